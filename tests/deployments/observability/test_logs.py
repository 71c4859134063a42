from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from deployments.observability import logs
from deployments.observability.logs import join_serve_logs

PACKAGES = ("deployments", "gpu_worker", "lora_store", "retriever_svc")


class Recorder(logging.Handler):
    """Stores the records that it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in (*PACKAGES, "ray.serve", "uvicorn.error")]
    before = [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.level, logger.handlers, logger.propagate = level, handlers, propagate


def test_outside_a_replica_the_loggers_do_not_change() -> None:
    before = [(logger.handlers, logger.propagate) for logger in map(logging.getLogger, PACKAGES)]
    join_serve_logs()
    assert [(logger.handlers, logger.propagate) for logger in map(logging.getLogger, PACKAGES)] == before


def test_in_a_replica_records_of_every_package_go_to_serve_once_at_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "own_replica_id", lambda: "r1")  # only Serve creates one
    serve, recorder = logging.getLogger("ray.serve"), Recorder()
    serve.handlers, serve.propagate = [recorder], False
    serve.setLevel(logging.WARNING)
    join_serve_logs()
    join_serve_logs()  # a replica with the code of two deployments
    for package in PACKAGES:
        logging.getLogger(f"{package}.room.module").warning("%s is late", package)
        logging.getLogger(f"{package}.room.module").info("too much detail")
    logging.getLogger("uvicorn.error").warning("what a client sent")
    logging.getLogger("uvicorn.error").error("a failure")
    expected = [*(f"{package} is late" for package in PACKAGES), "a failure"]
    assert [record.getMessage() for record in recorder.records] == expected
    assert recorder.records[0].name == "deployments.room.module"
