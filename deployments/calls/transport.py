"""Which way a handle's calls take. Serve 2.60 has two: Ray's tasks, and gRPC from replica to replica.

The default is decided by the environment of whatever process builds the application, so each handle says its own.
"""

from __future__ import annotations

import os

from ray.serve.handle import DeploymentHandle


def bypass_http_proxy() -> None:
    """No way between replicas that this process or one it starts opens goes through what `http_proxy` names.

    Python's gRPC would go there, Ray's own does not. `grpc_proxy` is heeded before it, empty too.
    """
    os.environ.setdefault("grpc_proxy", "")


def direct(handle: DeploymentHandle) -> DeploymentHandle:
    """By gRPC: for streams of tokens that send signs of life. benchmarks/README.md says what that saves."""
    return handle.options(_by_reference=False)


def over_object_store(handle: DeploymentHandle) -> DeploymentHandle:
    """By Ray's tasks: for answers that hold object references, whose objects gRPC would keep for ever."""
    return handle.options(_by_reference=True)
