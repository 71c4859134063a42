"""Send the project's logs to Serve's log files, as text or as JSON according to Serve's `logging_config`."""

from __future__ import annotations

import logging

from ray import serve
from ray.serve.context import ReplicaContext
from ray.serve.exceptions import RayServeException

_PACKAGES = ("deployments", "gpu_worker", "lora_store", "retriever_svc")
_HTTP_SERVER = "uvicorn.error"  # of an Ingress that listens itself; its warnings are about what clients send


class _ServeLogHandler(logging.Handler):
    """Passes records to Serve's logger, which adds the replica's name, and in JSON the request id of Serve's proxy."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger("ray.serve").handle(record)


def join_serve_logs() -> None:
    """Redirect the project's loggers to Serve. Do nothing outside a replica."""
    if not own_replica_id():
        return
    levels = dict.fromkeys(_PACKAGES, logging.getLogger("ray.serve").level) | {_HTTP_SERVER: logging.ERROR}
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [_ServeLogHandler()]
        logger.propagate = False


def own_replica_id() -> str:
    """Return the unique id of the replica that this process is; "" outside a replica."""
    try:
        context = serve.get_replica_context()
    except RayServeException:
        return ""
    return context.replica_id.unique_id if isinstance(context, ReplicaContext) else ""
