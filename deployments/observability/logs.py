"""What the project logs goes into Serve's own log files: as text, or as JSON where Serve's `logging_config` says so."""

from __future__ import annotations

import logging

from ray import serve
from ray.serve.context import ReplicaContext
from ray.serve.exceptions import RayServeException

_PACKAGES = ("deployments", "gpu_worker", "lora_store", "retriever_svc")


class _ToServe(logging.Handler):
    """Serve's logger adds the replica's name and, in JSON, the id of the request that its handles carry along."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger("ray.serve").handle(record)


def join_serve_logs() -> None:
    """Called as a replica starts. Outside of one, logging stays as it is."""
    if not _is_replica():
        return
    for package in _PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.getLogger("ray.serve").level)
        logger.handlers = [_ToServe()]
        logger.propagate = False


def _is_replica() -> bool:
    try:
        return isinstance(serve.get_replica_context(), ReplicaContext)
    except RayServeException:
        return False
