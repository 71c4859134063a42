"""Run the application on this machine: start and stop a local Ray with Serve."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any, BinaryIO, Self

import httpx
import ray
from ray import serve
from ray._private import auto_init_hook, parameter, services, utils
from ray.exceptions import RayError
from ray.serve._private import client as serve_client
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeStatus

from deployments.auth.private_files import keep_files_private
from deployments.auth.ray_token import prepare_own_ray, start_own_ray
from deployments.calls.h11_proxy import CALLBACK, CALLBACK_VARIABLE
from deployments.calls.proxy_limits import TRACING_VARIABLE
from deployments.calls.serve_calls import bypass_http_proxy
from deployments.cli.client import ServerFailed, check_free, free_port
from deployments.config.app import AppConfig
from deployments.json_types import JsonObject
from gpu_worker.config import PACKAGED_MODEL
from gpu_worker.model.packaged_model import ensure_converted
from lora_store import LoraStore, LoraStoreError

APP_NAME = "loraretriever"
# The proxy calls the Ingress over gRPC: on one machine, connections break when a replica dies.
_PROXY_BY_GRPC = {"RAY_SERVE_PROXY_USE_GRPC": "1"}
# Serve's work on the engine's cores: docs/benchmarks/index.md states how much each of these saves.
CHEAPER_SERVE = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # of the controller; Serve's own is 0.1
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",  # Serve's own is 100; Ray exports every 10 s
}
# An Ingress that no longer responds keeps its address until its process ends. Serve would give it ten minutes.
ENDS_AT_ONCE = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}
# Imported by Ray's workers as they start, while this process still prepares the application.
_IMPORTED_BY_WORKERS = {"RAY_preload_python_modules": "deployments.serve_import"}
# Ray would end those that wait for longer than a second.
_KEPT_FOR_REPLICAS = {"RAY_idle_worker_killing_time_threshold_ms": "10000"}
_NICENESS_VARIABLE = "RAY_worker_niceness"
_LOOPBACK = "127.0.0.1"
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
_POLL_S = 0.25
_STARTED_TIMEOUT_S = 60.0
_LAST_ANSWERS_S, _CALL_S = 5.0, 1.0  # containers are killed ten seconds after they were asked to stop
logger = logging.getLogger(__name__)


class Server:
    """A local server. Leaving its context stops everything that it started."""

    def __init__(
        self,
        config: AppConfig,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        num_cpus: int | None = None,
        metrics_port: int | None = None,
        is_verbose: bool = True,
        uses_proxy: bool | None = None,
    ) -> None:
        """Prepare a server.

        `num_cpus`: logical CPUs for replicas; None = as many as the settings may need.
        `metrics_port`: port of the Prometheus metrics; None = any free port.
        `is_verbose`: Ray reports what it starts, otherwise errors only.
        `uses_proxy`: requests pass Serve's proxy; None = if it is needed for several Ingress replicas or for traces.
        """
        if ":" not in host and (config.allowed_hosts or not config.has_keys):  # where the Host header is checked
            config = config.model_copy(update={"allowed_hosts": (*config.allowed_hosts, host.lower())})
        self.settings, self._host = config, host
        self._num_cpus = num_cpus or max(config.num_logical_cpus, os.cpu_count() or 1)
        self._port, self._metrics_port = port or free_port(host), metrics_port
        needs_proxy = config.ingress_scaling.max_replicas > 1 or TRACING_VARIABLE in os.environ
        self._uses_proxy = needs_proxy if uses_proxy is None else uses_proxy
        self._has_proxy = needs_proxy or self._uses_proxy
        self._proxy = host, self._port
        self._control_plane = "", 0
        self.ray_address = ""  # where other drivers of its Ray cluster connect, after the start
        self.logs = Path()  # the folder of Serve's log files, after the start
        self._app: DeploymentHandle | None = None
        self.has_new_pool = False  # whether `prepare` created the pool
        self._interrupted_by = 0  # the signal that ended the start
        self._leaves_at_once = True  # on a signal
        self._handlers: dict[int, Any] = {}  # that `leave_on_signals` replaced
        self.ray_log_level = logging.INFO if is_verbose else logging.ERROR

    @property
    def url(self) -> str:
        return _make_url(self._host, self._port)

    @property
    def proxy_url(self) -> str:
        """Return the address of Serve's proxy, after the start. It serves all applications of this Ray.

        It runs only if it is needed for several Ingress replicas or for traces, or if `uses_proxy`.
        """
        return _make_url(*self._proxy)

    @property
    def _stop_log(self) -> Path:
        """Return the file for what Ray prints during the stop."""
        return self.logs.with_name("stop.log") if self.logs.name else Path(os.devnull)

    def prepare(self, report: Callable[[str], None]) -> None:
        """Open the pool, and convert the packaged base model: errors would otherwise end a replica minutes later.

        Raises: ServerFailed, with the setting and the cause, if the pool or the cache cannot be opened.
        """
        report("opening the pool")
        keep_files_private(Path.home())
        config = self.settings
        try:
            store = LoraStore(config.store_uri, accepts_base=config.served_models.accepted_names)
            store.check_writes(os.environ)
            store.snapshot()
            self.has_new_pool = store.is_new
        except (LoraStoreError, OSError) as exc:
            raise ServerFailed(f"store_uri: the pool {config.store_uri} cannot be opened: {exc}") from exc
        for model in config.by_model.values():
            if model.base_model == PACKAGED_MODEL:
                report("checking the base model (the first start converts it, which takes about a minute)")
                try:
                    ensure_converted(model.worker_config())
                except OSError as exc:
                    raise ServerFailed(f"cache_dir: {config.cache_dir} cannot be written to: {exc}") from exc
        report("starting Ray and the deployments")

    def start(self, report: Callable[[str], None] = lambda _: None) -> str:
        """Start Ray and the application. Return its URL; `wait_ready` waits until it answers.

        `report` receives each phase that begins.

        Ray uses token authentication, whatever RAY_AUTH_MODE says, unless `allow_unauthenticated_ray` is set. Other
        drivers of this user find the token in `~/.ray/auth_token`. The process and its children create files that only
        their owner can read. Raises: ServerFailed, with the causes, if a deployment cannot start.
        """
        check_free(self._host, self._port)
        sessions = prepare_own_ray(allow_unauthenticated=self.settings.allow_unauthenticated_ray)
        os.environ.update({CALLBACK_VARIABLE: CALLBACK, **_PROXY_BY_GRPC})  # inherited by Ray's processes
        os.environ.setdefault(_NICENESS_VARIABLE, "0")
        bypass_http_proxy()
        inherited = CHEAPER_SERVE | _IMPORTED_BY_WORKERS | _KEPT_FOR_REPLICAS
        inherited |= {} if self._uses_proxy else ENDS_AT_ONCE
        # At least those of Serve's controller, the Store and the first Worker, at most those of all deployments.
        num_early = max(3, min(os.cpu_count() or 1, 4 + len(self.settings.by_model)))
        with _inherited(inherited), _fewer_processes(), _early_processes(num_early):
            context = self._start_ray(sessions)
        self.logs = Path(context.address_info["session_dir"]) / "logs" / "serve"
        self.ray_address = context.address_info["gcs_address"]
        host, _, port = self.ray_address.rpartition(":")
        self._control_plane = host, int(port)
        logging.getLogger("ray.serve").setLevel(self.ray_log_level)
        if not self._uses_proxy:
            self._proxy = _LOOPBACK, free_port(_LOOPBACK)
        location = ProxyLocation.EveryNode if self._has_proxy else ProxyLocation.Disabled
        options = HTTPOptions(host=self._proxy[0], port=self._proxy[1])
        with ThreadPoolExecutor(1) as beside:
            starting = beside.submit(serve.start, proxy_location=location, http_options=options)
            from deployments.app import application  # imported while Serve's controller starts

            starting.result()
        report("loading the base model")
        app = application(self.settings, None if self._uses_proxy else (self._host, self._port))
        self._deploy(app)
        return self.url

    def _start_ray(self, sessions: Path) -> Any:
        """Start Ray. A signal waits until Ray has started: the process would abort if it exited with a part of it."""
        self._leaves_at_once = False
        signal.signal(signal.SIGTERM, self._leave)
        with _own_sigterm_handler():
            context = start_own_ray(
                num_cpus=self._num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=self.ray_log_level,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(sessions),
                _metrics_export_port=self._metrics_port,
            )
        signal.signal(signal.SIGTERM, self._leave)  # in place of the handler of Ray's core
        self._leaves_at_once = True
        if self._interrupted_by:
            sys.exit(128 + self._interrupted_by)
        return context

    def _deploy(self, app: serve.Application) -> None:
        serve_client.CLIENT_POLLING_INTERVAL_S = _POLL_S  # Serve's own is a second, also while it stops
        try:
            self._app = serve.run(app, name=APP_NAME, route_prefix="/", logging_config={"enable_access_log": False})
        except RuntimeError as exc:
            raise ServerFailed(causes_in(serve.status(), self.logs) or str(exc)) from exc

    def wait_ready(self, *, timeout_s: float) -> JsonObject:
        """Wait for a 200 from `/ready` and return its body. Raises: ServerFailed after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        last = "no answer"
        while time.monotonic() < deadline:
            try:
                response = httpx.get(f"{self.url}/ready", timeout=30, trust_env=False)  # not through `http_proxy`
            except httpx.TransportError as exc:
                last = str(exc)
            else:
                if response.status_code == 200:
                    answer: JsonObject = response.json()
                    return answer
                last = response.text
            time.sleep(_POLL_S)
        raise ServerFailed(f"not ready after {timeout_s:.0f} s; last answer: {last}")

    def started(self) -> JsonObject:
        """Return the state of the start in full, with the paths of refused folders."""
        assert self._app is not None, "the server has not been started"
        answer: JsonObject = self._app.started.remote().result(timeout_s=_STARTED_TIMEOUT_S)
        return answer

    def leave_on_signals(self) -> None:
        """Let SIGINT and SIGTERM end the start with 128 and their number as the exit status, until the context ends.

        They leave all contexts, which stops what has been started.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._leave)

    def _leave(self, number: int, _: FrameType | None) -> None:
        self._interrupted_by = number
        if self._leaves_at_once:
            sys.exit(128 + number)

    def interrupts(self) -> SimpleQueue[int]:
        """Return a queue that receives SIGINT and SIGTERM from now on. They no longer end the process."""
        received = SimpleQueue[int]()  # unlike an Event, a handler may use it at any time
        if self._interrupted_by:  # in a place that lets no exception pass, such as a destructor
            received.put(self._interrupted_by)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: received.put(number))
        return received

    def finish_requests(self) -> bool:
        """Accept no more connections, and give requests in progress some seconds. Return whether all were answered.

        Behind Serve's proxy it does nothing: there Serve decides what happens to them.
        """
        if self._uses_proxy or self._app is None:
            return True
        try:
            with printing_to(self._stop_log):
                answering = self._app.finish_requests.remote(_LAST_ANSWERS_S)
                is_answered: bool = answering.result(timeout_s=_LAST_ANSWERS_S + _CALL_S)
        except (RayServeException, RayError, TimeoutError) as exc:
            logger.warning("requests in progress could not be finished: %r", exc)
            return False
        return is_answered

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaves_at_once, interrupted_by = False, self._interrupted_by
        try:
            self._stop()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        if interrupted_by:  # whatever the exception of the handler became: Ray makes others of it
            raise SystemExit(128 + interrupted_by) from exc

    def _stop(self) -> None:
        if ray.is_initialized():
            # Threads of Serve's handles call Ray until the process ends. A call after its end would start another Ray.
            auto_init_hook.enable_auto_connect = False
            with printing_to(self._stop_log):
                try:
                    if self._app is not None:
                        self._app.shutdown()  # what it reports to the controller would start another Ray after the end
                    asyncio.run(_shut_down_serve(self._control_plane))
                finally:
                    ray.shutdown()


async def _shut_down_serve(control_plane: tuple[str, int]) -> None:
    """Stop Serve's replicas and controller, unless Ray's control plane, which they need, has ended or ends meanwhile.

    A signal to the whole process group, as of `timeout` or systemd, ends both at once. Without its control plane Serve
    would wait for half a minute.
    """
    stopping = asyncio.ensure_future(serve.shutdown_async())
    while not stopping.done() and await _listens(*control_plane):
        await asyncio.wait([stopping], timeout=_POLL_S)
    stopping.cancel()
    with suppress(asyncio.CancelledError, RayError, RayServeException):
        await stopping


async def _listens(host: str, port: int) -> bool:
    """Return whether a process accepts connections at the address."""
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    return True


@contextmanager
def printing_to(file: Path) -> Iterator[None]:
    """Append to a file what this process prints. While Ray stops, its threads and its C++ core print about themselves.

    Their lines say that calls of Serve's controller end with it, or that a process of Ray has ended before this one.
    A file that cannot be written to, as on a full disk, loses the lines and does not end the stop.
    """
    with _open_or_discard(file) as log:
        _flush()
        terminals = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in terminals:
                os.dup2(log.fileno(), number)
            yield
        finally:
            _flush()
            for number, terminal in terminals.items():
                os.dup2(terminal, number)
                os.close(terminal)


def _open_or_discard(file: Path) -> BinaryIO:
    """Open the file to append to it, or a file that keeps nothing if that fails."""
    try:
        return file.open("ab")
    except OSError as exc:
        logger.warning("what Ray prints during the stop is lost: %s", exc)
        return open(os.devnull, "ab")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the disk is full, or nobody reads the pipe
            stream.flush()


def causes_in(status: ServeStatus, logs: Path) -> str:
    """Return why the application's deployments failed, a line for each, and the folder of their logs."""
    app = status.applications.get(APP_NAME)
    deployments = {} if app is None else app.deployments
    causes = [
        f"the deployment {name} cannot start: {deployment.message.strip().splitlines()[-1].strip()}"
        for name, deployment in deployments.items()
        if deployment.status in _FAILED and deployment.message.strip()
    ]
    return "\n".join([*causes, f"the logs are in {logs}"]) if causes else ""


@contextmanager
def _fewer_processes() -> Iterator[None]:
    """Let Ray start without its dashboard, its autoscaler of machines and its log monitor.

    Nothing reads what they do on one machine: `include_dashboard=False` leaves a process that reports usage to Ray's
    makers, nobody adds machines, and `log_to_driver=False` leaves a reader of logs without a listener. The dashboard's
    agent, which exports metrics, gets any free port: for its fixed one it would wait seconds where another Ray has it.
    """
    before = parameter.RayParams, services.start_api_server
    parameter.RayParams = partial(
        parameter.RayParams, no_monitor=True, include_log_monitor=False, dashboard_agent_listen_port=0
    )
    services.start_api_server = lambda *_, **__: (None, None)  # as after a start that failed, which is no error
    try:
        yield
    finally:
        parameter.RayParams, services.start_api_server = before


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Let Ray start without its handler of SIGTERM in Python, which exits with 15."""
    before = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


@contextmanager
def _early_processes(number: int) -> Iterator[None]:
    """Let Ray start at least this many Python processes at once, as it starts itself.

    The first actors get them: Serve's controller, then replicas in the order of `app.py`.
    """
    before, changed = services.start_ray_process, ("--num_prestart_python_workers", "--maximum_startup_concurrency")

    def raised(part: str) -> str:
        name, _, own = part.partition("=")
        return f"{name}={max(number, int(float(own)))}" if name in changed else part

    def start(command: list[str], *args: Any, **options: Any) -> Any:
        return before(list(map(raised, command)), *args, **options)

    services.start_ray_process = start
    try:
        yield
    finally:
        services.start_ray_process = before


@contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables that the user has not set, for processes that start in the context, and remove them afterwards."""
    lacking = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(lacking)
    try:
        yield
    finally:
        for name in lacking:
            del os.environ[name]


def _make_url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
