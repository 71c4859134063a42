"""The application is built in Ray's token mode only. Each case runs in its own process, as Ray reads the mode once."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import ray

from deployments.auth.ray_token import start_own_ray
from deployments.errors import RayUnauthenticated
from deployments.ingress import Ingress
from deployments.retriever import RetrieverDeployment
from deployments.store import StoreDeployment
from deployments.worker import WorkerDeployment

BUILD = """
import logging, os, sys
logging.basicConfig()
from deployments.app import build_app
from deployments.auth.ray_token import use_token_mode
from deployments.config.app import AppConfig
from deployments.errors import RayUnauthenticated
from ray._private.authentication.authentication_utils import is_token_auth_enabled

for choice in sys.argv[2:]:
    if choice == "switch on":
        use_token_mode()
        print("switched on", is_token_auth_enabled(), os.environ["RAY_AUTH_MODE"])
        break
    try:
        build_app(AppConfig(store_uri=sys.argv[1], allow_unauthenticated_ray=choice == "allow"))
        print("built", is_token_auth_enabled())
    except RayUnauthenticated as refusal:
        print("refused:", refusal)
"""


def python(mode: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    environment |= {} if mode is None else {"RAY_AUTH_MODE": mode}
    command = [sys.executable, "-c", BUILD, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_without_rays_token_mode_the_application_is_built_only_if_a_setting_allows_it(tmp_path: Path) -> None:
    """The server overrides such an environment. One process for all, because its imports take most of the time."""
    run = python("disabled", str(tmp_path), "refuse", "allow", "switch on")
    assert run.returncode == 0, run.stderr
    refused, built, switched = run.stdout.splitlines()
    assert refused.startswith("refused: ")
    for part in ("RAY_AUTH_MODE is 'disabled'", "Set RAY_AUTH_MODE=token", "allow_unauthenticated_ray: true"):
        assert part in refused
    assert (built, switched) == ("built False", "switched on True token")
    assert "RAY_AUTH_MODE=disabled is ignored" in run.stderr
    assert run.stderr.count("WARNING:deployments.auth.ray_token:Ray runs without token authentication") == 1


def test_without_a_mode_in_the_environment_the_builder_switches_it_on(tmp_path: Path) -> None:
    """`serve run` builds before it connects."""
    run = python(None, str(tmp_path), "refuse")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["built", "True"]


@pytest.mark.parametrize("deployment", [Ingress, RetrieverDeployment, StoreDeployment, WorkerDeployment])
async def test_every_replica_checks_its_process_as_it_starts(deployment: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver in token mode may connect to a cluster without it."""
    check = Mock(side_effect=RayUnauthenticated("off"))
    monkeypatch.setattr(sys.modules[deployment.__module__], "require_token_mode", check)
    parameters = inspect.signature(deployment).parameters.values()
    needed = [Mock(allow_unauthenticated_ray=False) for each in parameters if each.default is inspect.Parameter.empty]
    with pytest.raises(RayUnauthenticated):
        started = deployment.__init__(object.__new__(deployment), *needed)  # a coroutine, where Serve awaits it
        if started is not None:
            await started
    check.assert_called_once_with(allow_unauthenticated=False)


@pytest.mark.parametrize(("mode", "given"), [(None, "RAY_AUTH_MODE is not set"), ("off", "RAY_AUTH_MODE is 'off'")])
def test_the_refusal_states_the_given_value_and_the_remedy(mode: str | None, given: str) -> None:
    message = str(RayUnauthenticated(mode))
    assert given in message
    assert "ray get-auth-token --generate" in message


def test_a_ray_that_does_not_start_in_time_is_named_and_other_errors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, shown in ((Exception("The node timed out."), TimeoutError), (ValueError("num_cpus"), ValueError)):
        monkeypatch.setattr(ray, "init", Mock(side_effect=error))
        with pytest.raises(shown, match=r"^Ray did not start: The node timed out\. Try again|^num_cpus$"):
            start_own_ray(num_cpus=1)


def test_a_token_that_cannot_be_written_comes_with_its_folder_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", Mock(side_effect=PermissionError(13, "Permission denied", "x")))
    with pytest.raises(OSError, match="Permission denied") as caught:
        start_own_ray(num_cpus=1)
    assert all(word in str(caught.value) for word in (f"{tmp_path}/.ray", "set HOME", "RAY_AUTH_TOKEN"))
