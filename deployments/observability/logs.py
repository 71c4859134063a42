"""Send the project's logs to Serve's log files, as text or as JSON according to Serve's `logging_config`."""

from __future__ import annotations

import logging

from ray import serve
from ray.serve.context import ReplicaContext
from ray.serve.exceptions import RayServeException

_PACKAGES = ("deployments", "gpu_worker", "lora_store", "retriever_svc")


class _ServeLogHandler(logging.Handler):
    """Passes records to Serve's logger, which adds the replica's name and, in JSON, the request id."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger("ray.serve").handle(record)


def join_serve_logs() -> None:
    """Redirect the project's loggers to Serve. Do nothing outside a replica."""
    if not _is_replica():
        return
    for package in _PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.getLogger("ray.serve").level)
        logger.handlers = [_ServeLogHandler()]
        logger.propagate = False


def _is_replica() -> bool:
    try:
        return isinstance(serve.get_replica_context(), ReplicaContext)
    except RayServeException:
        return False
