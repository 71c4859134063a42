from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray import serve
from ray._private import auto_init_hook, parameter, services, utils
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    ServeStatus,
)

from deployments.cli import local_server
from deployments.cli.client import ServerFailed, check_free, free_port
from deployments.cli.local_server import (
    _CALL_S,
    _LAST_ANSWERS_S,
    APP_NAME,
    CHEAPER_SERVE,
    Server,
    _early_processes,
    _fewer_processes,
    _inherited,
    _shut_down_serve,
    causes_in,
    printing_to,
)
from gpu_worker.config import PACKAGED_MODEL
from tests.deployments.app_fakes import config_of
from tests.deployments.listening import listener
from tests.deployments.scripted import scripted


@pytest.fixture(autouse=True)
def private_files_of_another_home(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Keep this process's umask and the user's own `~/.ray` as they are."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@contextmanager
def ready_server(*statuses: int) -> Iterator[Server]:
    with scripted(*((status, {"status": status}) for status in statuses)) as http:
        yield Server(config_of(), port=int(http.url.rpartition(":")[2]))
        assert {path for _, path in http.asked} <= {"/ready"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_a_queue_and_end_no_process_once_the_server_runs(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        received = Server(config_of(), port=0).interrupts()
        signal.raise_signal(number)
        assert received.get(timeout=1) == number and received.empty()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def interrupt(server: Server, number: signal.Signals, becomes: type[BaseException]) -> None:
    with server:
        server.leave_on_signals()
        try:
            signal.raise_signal(number)
        except SystemExit as exc:
            raise becomes from exc


@pytest.mark.parametrize("becomes", [SystemExit, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_start_is_the_exit_status_whatever_its_exception_becomes(
    number: signal.Signals, becomes: type[BaseException]
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as caught:
        interrupt(Server(config_of(), port=1), number, becomes)
    assert caught.value.code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_while_ray_starts_waits_for_it_and_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own handler would exit at once with 15, and a process with a part of Ray aborts as it exits."""
    happened = list[str]()

    def start_ray(**_: object) -> None:
        utils.set_sigterm_handler(lambda *_: sys.exit(15))
        signal.raise_signal(signal.SIGTERM)
        happened.append("started")

    monkeypatch.setattr(local_server, "start_own_ray", start_ray)
    before = utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, Server(config_of(), port=1) as server:
        server.leave_on_signals()
        server._start_ray(tmp_path)
    assert caught.value.code == 128 + signal.SIGTERM and happened == ["started"]
    assert (utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)) == before


def test_after_rays_start_signals_are_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        local_server, "start_own_ray", lambda **_: signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
    )
    with pytest.raises(SystemExit) as caught, Server(config_of(), port=1) as server:
        server.leave_on_signals()
        server._start_ray(tmp_path)
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM


def test_a_signal_whose_exception_was_lost_ends_the_server_once_it_runs() -> None:
    with pytest.raises(SystemExit), Server(config_of(), port=1) as server:
        server.leave_on_signals()
        with suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        assert server.interrupts().get(timeout=1) == signal.SIGTERM


def test_a_stop_takes_less_than_the_ten_seconds_that_containers_have() -> None:
    """Serve stops deployments before those that they call: the Ingress, then Worker and Retriever, then the Store."""
    config, loop_s = config_of(), float(CHEAPER_SERVE["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"])
    stages = (config.ingress_scaling, config.worker_scaling, config.store_scaling)
    drains_s = [scaling.root["graceful_shutdown_wait_loop_s"] + loop_s for scaling in stages]
    assert _LAST_ANSWERS_S + _CALL_S + sum(drains_s) < 9, "a second is left for Ray's own end"
    assert config.retriever_scaling.root["graceful_shutdown_wait_loop_s"] <= drains_s[1]


def test_a_port_or_an_address_that_cannot_be_listened_at_is_named_before_ray_starts() -> None:
    port = free_port("127.0.0.1")
    assert 0 < port < 65536
    check_free("127.0.0.1", port)
    with listener() as port:
        with pytest.raises(ServerFailed, match=f"127.0.0.1:{port}: Address already in use"):
            check_free("127.0.0.1", port)
        with Server(config_of(), port=port) as server, pytest.raises(ServerFailed, match="in use"):
            server.start()
    with pytest.raises(ServerFailed, match=r"192\.0\.2\.1:0"):
        check_free("192.0.2.1", 0)
    host, _, chosen = Server(config_of(), port=0).url.removeprefix("http://").partition(":")
    assert host == "127.0.0.1"
    check_free(host, int(chosen))
    assert Server(config_of(), host="::1", port=8000).url == "http://[::1]:8000"


def test_a_pool_is_new_at_its_first_start_and_only_the_packaged_model_is_prepared(tmp_path: Path) -> None:
    config = config_of(cache_dir=tmp_path / "cache", store_uri=str(tmp_path / "pool"))
    for is_new in (True, False):
        reported: list[str] = []
        server = Server(config, port=1)
        server.prepare(reported.append)
        assert server.has_new_pool == is_new
        assert reported == ["opening the pool", "starting Ray and the deployments"]
    assert not (tmp_path / "cache").exists()
    assert (tmp_path / "pool").stat().st_mode & 0o077 == 0, "no other user may read the pool"


def test_a_pool_that_cannot_be_opened_is_named_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServerFailed, match=f"the pool {tmp_path / 'file' / 'pool'} cannot be opened: "):
        Server(config_of(store_uri=str(tmp_path / "file" / "pool")), port=1).prepare(lambda _: None)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anyone")
    away = f"s3://b/p?endpoint_override=127.0.0.1:{free_port('127.0.0.1')}&scheme=http&region=us-east-1"
    with pytest.raises(ServerFailed, match=r"the pool s3://b/p.* cannot be opened: "):
        Server(config_of(store_uri=away), port=1).prepare(lambda _: None)
    assert not ray.is_initialized()


def test_a_cache_that_cannot_be_written_to_is_named_before_ray_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    config = config_of(base_model=PACKAGED_MODEL, cache_dir=cache, store_uri=str(tmp_path / "pool"))
    with pytest.raises(ServerFailed, match=f"^cache_dir: {cache} cannot be written to: "):
        Server(config, port=1).prepare(lambda _: None)


def status_of(**messages: tuple[DeploymentStatus, str]) -> ServeStatus:
    deployments = {
        name: DeploymentStatusOverview(status=status, status_trigger="UNSPECIFIED", replica_states={}, message=message)  # type: ignore[arg-type]
        for name, (status, message) in messages.items()
    }
    app = ApplicationStatusOverview(
        status=ApplicationStatus.DEPLOY_FAILED,
        message="Failed to update the deployments",
        last_deployed_time_s=0.0,
        deployments=deployments,
    )
    return ServeStatus(applications={APP_NAME: app})


def test_a_failed_start_says_which_deployment_failed_and_why(tmp_path: Path) -> None:
    failed = status_of(
        Store=(DeploymentStatus.HEALTHY, ""),
        Worker=(DeploymentStatus.DEPLOY_FAILED, "The deployment failed. Error:\n  File x\nValueError: no such model\n"),
        Retriever=(DeploymentStatus.UPDATING, "still starting"),
    )
    said = f"the deployment Worker cannot start: ValueError: no such model\nthe logs are in {tmp_path}"
    assert causes_in(failed, tmp_path) == said
    assert causes_in(status_of(Store=(DeploymentStatus.UPDATING, "")), tmp_path) == ""
    assert causes_in(ServeStatus(), tmp_path) == ""


def test_an_application_that_cannot_be_deployed_ends_the_start_with_the_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = status_of(Worker=(DeploymentStatus.DEPLOY_FAILED, "ValueError: no such model"))
    for status, says in (
        (failed, "^the deployment Worker cannot start: ValueError: no"),
        (ServeStatus(), "^Serve fails"),
    ):

        def run(*args: object, **options: object) -> None:
            raise RuntimeError("Serve fails")

        monkeypatch.setattr(local_server, "serve", SimpleNamespace(run=run, status=lambda status=status: status))
        with pytest.raises(ServerFailed, match=says):
            Server(config_of(), port=1)._deploy(SimpleNamespace())  # type: ignore[arg-type]


def test_ray_starts_without_processes_that_nobody_needs_and_others_have_them_again() -> None:
    before = parameter.RayParams, services.start_api_server
    with pytest.raises(KeyError), _fewer_processes():
        params = parameter.RayParams(num_cpus=1)
        assert (params.num_cpus, params.no_monitor, params.include_log_monitor) == (1, True, False)
        assert params.dashboard_agent_listen_port == 0
        assert services.start_api_server(False, raise_on_failure=False, port=None) == (None, None)
        raise KeyError
    assert (parameter.RayParams, services.start_api_server) == before


def test_ray_starts_the_python_processes_of_the_first_actors_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(services, "start_ray_process", lambda command, kind, *, fate_share: started.append(command))
    before, unchanged = services.start_ray_process, ["raylet", "--static_resource_list=CPU,2.0", "--head"]
    with pytest.raises(KeyError), _early_processes(3):
        command = [*unchanged, "--num_prestart_python_workers=2", "--maximum_startup_concurrency=16.0"]
        services.start_ray_process(command, "raylet", fate_share=True)
        raise KeyError
    assert started == [[*unchanged, "--num_prestart_python_workers=3", "--maximum_startup_concurrency=16"]]
    assert services.start_ray_process is before


def test_the_start_waits_for_ready_and_reports_the_last_answer_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port('127.0.0.1')}")  # where nothing listens
    with ready_server(503, 200) as server:
        assert server.wait_ready(timeout_s=120) == {"status": 200}
    silent = Server(config_of(), port=free_port("127.0.0.1"))
    with pytest.raises(ServerFailed, match="not ready after 0 s"):
        silent.wait_ready(timeout_s=0.1)
    seconds = iter(range(10))
    monkeypatch.setattr(local_server, "time", SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: None))
    with ready_server(503) as server, pytest.raises(ServerFailed, match=r"not ready after 3 s.*503"):
        server.wait_ready(timeout_s=3)


@pytest.mark.parametrize(
    ("num_ingresses", "traces", "given", "passes_proxy"),
    [
        (1, False, None, False),
        (2, False, None, True),
        (1, True, None, True),
        (1, True, False, False),
        (1, False, True, True),
    ],
)
def test_requests_pass_the_proxy_only_where_it_is_needed(
    num_ingresses: int, traces: bool, given: bool | None, passes_proxy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several Ingress replicas cannot listen at one address, and traces begin in the proxy."""
    if traces:
        monkeypatch.setenv("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", "a:b")
    else:
        monkeypatch.delenv("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", raising=False)
    config = config_of(ingress_scaling={"autoscaling_config": {"max_replicas": num_ingresses}})
    server = Server(config, host="::1", port=8000, uses_proxy=given)
    assert server.url == "http://[::1]:8000" and server._uses_proxy == passes_proxy
    assert server._has_proxy == (num_ingresses > 1 or traces or passes_proxy)


def test_what_a_process_prints_while_it_stops_ray_goes_to_a_file_or_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A log that cannot be written to does not end the stop. The text reaches the file when the block ends."""
    buffered = [os.fdopen(number, "w", closefd=False) for number in (1, 2)]
    for name, stream in zip(("stdout", "stderr"), buffered, strict=True):
        monkeypatch.setattr(sys, name, stream)
    log = tmp_path / "stop.log"
    print("before", end=" ")
    with printing_to(log), printing_to(log):
        print("of a thread")
        print("of the log", file=sys.stderr)
        os.write(2, b"of the C++ core\n")
    print("after")
    os.write(2, b"again\n")
    for lost in ("/missing/stop.log", "/dev/full"):
        with printing_to(Path(lost)):
            print("a line that is lost")
        os.write(1, b"stopped\n")
    assert capfd.readouterr() == ("before after\nstopped\nstopped\n", "again\n")
    assert sorted(log.read_text().splitlines()) == ["of a thread", "of the C++ core", "of the log"]
    assert len(caplog.records) == 1 and "/missing/stop.log" in caplog.text


async def test_a_stop_does_not_wait_for_serve_once_rays_control_plane_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = list[str]()

    async def wait_for_the_controller() -> None:
        closing.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    async def answer_at_once() -> None:
        ended.append("answered")

    closing = asyncio.Event()
    async with await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0) as listening:
        address = "127.0.0.1", listening.sockets[0].getsockname()[1]
        monkeypatch.setattr(serve, "shutdown_async", answer_at_once)
        await _shut_down_serve(address)
        monkeypatch.setattr(serve, "shutdown_async", wait_for_the_controller)
        stopping = asyncio.ensure_future(_shut_down_serve(address))
        await closing.wait()
        assert not stopping.done()
    await stopping
    assert ended == ["answered", "cancelled"]


@pytest.mark.parametrize("is_broken", [False, True])
def test_ray_stops_for_good_even_if_serve_could_not_be_stopped(
    is_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread can start another Ray once the server stops."""
    happened = list[str]()

    async def stop_serve() -> None:
        if is_broken:
            raise ValueError("the controller's answer is broken")

    def stop_ray() -> None:
        happened.append("stopped")
        monkeypatch.setattr(ray, "is_initialized", lambda: False)

    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(serve, "shutdown_async", stop_serve)
    monkeypatch.setattr(ray, "shutdown", stop_ray)
    monkeypatch.setattr(ray, "init", lambda: happened.append("another"))
    with pytest.raises(ValueError, match="is broken") if is_broken else nullcontext(), Server(config_of(), port=8000):
        pass
    auto_init_hook.auto_init_ray()
    assert happened == ["stopped"]


def test_variables_for_rays_processes_respect_the_users_and_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "the user's")
    monkeypatch.delenv("LACKING", raising=False)
    with pytest.raises(KeyError), _inherited({"GIVEN": "ours", "LACKING": "ours"}):
        assert (os.environ["GIVEN"], os.environ["LACKING"]) == ("the user's", "ours")
        raise KeyError
    assert os.environ["GIVEN"] == "the user's"
    assert "LACKING" not in os.environ
