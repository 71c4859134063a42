"""The application graph, as Serve reads it. Nothing is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.serve import Application

from deployments.app import application, build_app
from deployments.calls.proxy_limits import HA_PROXY_VARIABLE
from deployments.config.app import AppConfig
from deployments.config.settings_errors import SettingsInvalid
from deployments.errors import ProxyUnsafe
from tests.deployments.app_fakes import config_of
from tests.deployments.key_files import entry, write


def test_rays_haproxy_is_refused_without_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HA_PROXY_VARIABLE, "1")
    with pytest.raises(ProxyUnsafe, match="set keys_file"):
        build_app(config_of())
    keys = write(tmp_path / "keys.json", entry("k"))
    build_app(config_of(keys_file=keys))
    monkeypatch.setenv(HA_PROXY_VARIABLE, "0")
    build_app(config_of())


@pytest.mark.parametrize("name", ["api_key", "keys_file"])
def test_a_key_without_a_value_in_serves_own_file_does_not_start_a_server_without_keys(name: str) -> None:
    with pytest.raises(SettingsInvalid, match=f"{name} is empty or null; remove the line to run without a key"):
        build_app(AppConfig.model_validate({name: None}))
    build_app(AppConfig.model_validate({}))


def bound(app: Application) -> tuple[str, dict[str, Any]]:
    """Return the deployment's name and its arguments by name. Ray has no public way to read the graph."""
    deployment = app._bound_deployment
    given = [*deployment.init_args, *deployment.init_kwargs.values()]
    workers = [each for own in given if isinstance(own, dict) for each in own.values()]
    handles = [each for each in (*given, *workers) if isinstance(each, Application)]
    return deployment.name, dict(bound(each) for each in handles)


def test_the_ingress_calls_all_others_and_the_worker_calls_the_store() -> None:
    assert bound(build_app(config_of())) == ("Ingress", {"Retriever": {}, "Worker": {"Store": {}}, "Store": {}})


def test_workers_start_first_because_they_take_longest() -> None:
    given = build_app(config_of())._bound_deployment.init_kwargs
    assert list(given)[:2] == ["workers", "retriever"]


def test_each_of_several_base_models_has_workers_of_its_own() -> None:
    models = [{"base_model": "org/a"}, {"base_model": "org/b", "worker_scaling": {"num_replicas": 2}}]
    _, handles = bound(build_app(AppConfig(models=models)))
    assert handles == {"Retriever": {}, "Worker-a": {"Store": {}}, "Worker-b": {"Store": {}}, "Store": {}}


def test_only_a_local_server_has_an_address_of_its_own() -> None:
    for app, address in ((build_app(config_of()), None), (application(config_of(), ("::1", 8000)), ("::1", 8000))):
        assert app._bound_deployment.init_kwargs["address"] == address


def test_serve_reads_the_settings_class_from_the_builder() -> None:
    """A file of settings becomes an AppConfig by this annotation, which must not be text."""
    assert build_app.__annotations__["args"] is AppConfig
