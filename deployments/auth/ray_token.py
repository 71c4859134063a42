"""Ray's token authentication: switch it on, and refuse to run without it.

Every Ray process and every Serve replica listens for gRPC on all interfaces and unpickles what it receives. In token
mode Ray rejects callers that do not send the cluster's token; without it, anyone who reaches a port can run code as
this server. Each process reads the mode from RAY_AUTH_MODE. It is checked where the application is built and again in
every replica, because a driver in token mode can connect to a cluster without authentication.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray._raylet
from ray._private.authentication.authentication_utils import is_token_auth_enabled

from deployments.auth.private_files import keep_files_private, make_private, sessions_folder
from deployments.errors import RayUnauthenticated

MODE_VARIABLE = "RAY_AUTH_MODE"
TOKEN_VARIABLE, FILE_VARIABLE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"  # read by Ray

logger = logging.getLogger(__name__)


def prepare_own_ray(*, allow_unauthenticated: bool) -> Path:
    """Guard the Ray that this process starts next: private files, and token mode, whatever RAY_AUTH_MODE says.

    Return the folder of its sessions. `allow_unauthenticated` leaves the mode as it is. Raises: FolderNotPrivate.
    """
    keep_files_private(Path.home())
    sessions = sessions_folder(os.environ, os.geteuid())
    make_private(sessions.parent, os.geteuid())
    if not allow_unauthenticated:
        use_token_mode()
    return sessions


def start_own_ray(**options: Any) -> Any:
    """Start Ray on this machine.

    Raises: TimeoutError if it does not start within Ray's own thirty seconds; OSError for a file that it cannot write.
    """
    try:
        return ray.init("local", **options)  # ignores RAY_ADDRESS
    except OSError as exc:
        place = f"Ray's token is kept in {Path.home() / '.ray'}"
        raise OSError(
            f"Ray did not start: {exc}. {place}: set HOME to a folder, or {TOKEN_VARIABLE} to a token"
        ) from exc
    except Exception as exc:
        if type(exc) is not Exception:  # Ray has no class for it
            raise
        raise TimeoutError(f"Ray did not start: {exc} Try again when the machine is less busy.") from exc


def describe_token(environment: Mapping[str, str]) -> str:
    """Return where Ray's token is: in a variable, or in a file."""
    if environment.get(TOKEN_VARIABLE):
        return f"in the variable {TOKEN_VARIABLE}"
    return f"in {environment.get(FILE_VARIABLE) or '~/.ray/auth_token'}"


def use_token_mode() -> None:
    """Switch token mode on for this process and for every process that it starts, whatever the environment says."""
    given = os.environ.get(MODE_VARIABLE)
    if given is not None and given.lower() != "token":
        logger.warning(
            "%s=%s is ignored: Ray starts in token mode. To start Ray without it, set "
            "allow_unauthenticated_ray: true in the settings",
            MODE_VARIABLE,
            given,
        )
    os.environ[MODE_VARIABLE] = "token"
    config = getattr(ray._raylet, "Config")  # noqa: B009  Ray's own stub of the module lacks it
    config.initialize("")  # Ray 2.60 reads the variable once, when it is imported


def require_token_mode(*, allow_unauthenticated: bool) -> None:
    """Check that this process uses Ray's token mode.

    A driver that is not connected yet and whose environment names no mode is switched to token mode first, as
    `ray.init` does for a new local cluster. `allow_unauthenticated` turns the refusal into a warning.

    Raises: RayUnauthenticated.
    """
    if not allow_unauthenticated and not ray.is_initialized() and MODE_VARIABLE not in os.environ:
        use_token_mode()
    if is_token_auth_enabled():
        return
    if not allow_unauthenticated:
        raise RayUnauthenticated(os.environ.get(MODE_VARIABLE))
    logger.warning("Ray runs without token authentication: anyone who reaches its ports can run code as this server")
