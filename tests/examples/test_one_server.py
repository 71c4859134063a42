"""The unit of one server lets requests in progress finish, and its logs stay where the server says that they are."""

from __future__ import annotations

from pathlib import Path

from deployments.auth.private_files import sessions_folder
from tests.docs.pages import ROOT

LONGEST_SOCKET = "session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"  # with the largest process id
MAX_SOCKET_PATH = 107
MAX_USER = 65_533


def unit() -> dict[str, str]:
    """Return the settings of the unit's sections by their names."""
    lines = (ROOT / "examples" / "one_server" / "loraretriever.service").read_text().splitlines()
    pairs = [line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")]
    assert len(pairs) > 12 and len(dict(pairs)) == len(pairs), "a setting stands there twice"
    return dict(pairs)


def test_a_stop_signals_the_server_and_not_the_processes_of_its_requests() -> None:
    assert unit()["KillMode"] == "mixed"


def test_ray_writes_its_logs_to_a_folder_that_outlives_a_stop() -> None:
    settings = unit()
    environment = dict(pair.split("=") for pair in settings["Environment"].split())
    assert environment["RAY_TMPDIR"] == f"/var/log/{settings['LogsDirectory']}"
    assert environment["HOME"] == f"/var/lib/{settings['StateDirectory']}"


def test_paths_of_rays_sockets_are_short_enough_for_every_user_id() -> None:
    environment = dict(pair.split("=") for pair in unit()["Environment"].split())
    path: Path = sessions_folder(environment, MAX_USER) / LONGEST_SOCKET
    assert len(str(path)) <= MAX_SOCKET_PATH
