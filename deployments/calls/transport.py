"""Choose the transport of a handle's calls. Serve 2.60 has two: Ray's tasks, and gRPC from replica to replica.

The environment of the process that builds the application decides the default, so each call names its own transport.
"""

from __future__ import annotations

import os

from ray.serve.handle import DeploymentHandle


def bypass_http_proxy() -> None:
    """Keep gRPC connections of this process and its children away from the proxy that `http_proxy` names.

    Python's gRPC would use that proxy, Ray's own does not. gRPC reads `grpc_proxy` first, even if it is empty.
    """
    os.environ.setdefault("grpc_proxy", "")


def over_grpc(handle: DeploymentHandle) -> DeploymentHandle:
    """Use gRPC: for streams of tokens with heartbeats. benchmarks/README.md states what that saves."""
    return handle.options(_by_reference=False)


def over_object_store(handle: DeploymentHandle) -> DeploymentHandle:
    """Use Ray's tasks: for large arguments, and for answers with object references, which gRPC would never free."""
    return handle.options(_by_reference=True)
