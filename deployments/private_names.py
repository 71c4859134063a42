"""The names of other libraries that are not public, or not stable, and that this server uses; checked at every start.

A release of a library may rename or drop one without notice. Some would then fail at the first request, others would
silently do nothing: a method of Ray's router that is never called, a limit on connections that uvicorn never reads.
vLLM's names are in `gpu_worker/vllm/settings.py`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

Function = tuple[str, str, tuple[str, ...]]
"""A module, the dotted name of one of its functions, and that function's parameters."""
FUNCTIONS: tuple[Function, ...] = (
    ("ray._private.authentication.authentication_utils", "is_token_auth_enabled", ()),
    ("ray._raylet", "Config.initialize", ("config_list",)),
    ("ray.serve.request_router", "RequestRouter._add_pending_request_to_indices", ("self", "pending_request")),
    ("ray.serve.request_router", "RequestRouter._remove_pending_request_from_indices", ("self", "pending_request")),
    (
        "ray.serve.request_router",
        "RequestRouter._get_pending_request_matching_internal_request_id",
        ("self", "request_metadata"),
    ),
    ("ray.serve.request_router", "RequestRouter.update_replicas", ("self", "replicas")),
    (
        "ray.serve.request_router",
        "RequestRouter.on_request_routed",
        ("self", "pending_request", "replica_id", "result"),
    ),
    ("uvicorn.protocols.http.h11_impl", "H11Protocol.connection_made", ("self", "transport")),
    ("uvicorn.protocols.http.h11_impl", "H11Protocol.data_received", ("self", "data")),
    ("uvicorn.protocols.http.h11_impl", "H11Protocol.send_400_response", ("self", "msg")),
    ("uvicorn.protocols.http.h11_impl", "H11Protocol.on_response_complete", ("self",)),
    ("uvicorn.protocols.http.h11_impl", "H11Protocol.pause_writing", ("self",)),
    ("uvicorn.protocols.http.h11_impl", "H11Protocol.handle_websocket_upgrade", ("self", "event")),
    ("uvicorn.protocols.http.h11_impl", "H11Protocol.connection_lost", ("self", "exc")),
    ("transformers.modeling_utils", "AttentionInterface.get_interface", ("self", "attn_implementation", "default")),
    (
        "transformers.modeling_utils",
        "load_state_dict",
        ("checkpoint_file", "map_location", "weights_only", "disable_mmap"),
    ),
    ("torch.cpu", "_init_amx", ()),
    ("deltalake", "DeltaTable.update_incremental", ("self",)),
)
"""The functions that this server calls, replaces or is called by."""
Source = tuple[str, str, tuple[str, ...]]
"""A module, the dotted name of something in it ("" for all of it), and its source code, for a class of its file."""
SOURCES: tuple[Source, ...] = (
    (
        "ray",
        "init",
        ('"_node_ip_address"', '"_temp_dir"', '"_metrics_export_port"', "ray._private.utils.set_sigterm_handler("),
    ),
    ("ray._private.auto_init_hook", "", ("enable_auto_connect",)),
    ("ray._private.worker", "", ("ray._private.parameter.RayParams(",)),
    ("ray._private.parameter", "RayParams.__init__", ("no_monitor", "include_log_monitor")),
    ("ray._private.node", "Node", ("ray._private.services.start_api_server(", "if process_info is not None")),
    (
        "ray._private.services",
        "start_raylet",
        ('"--num_prestart_python_workers={}"', "--maximum_startup_concurrency=", "process_info = start_ray_process("),
    ),
    ("ray.serve._private.client", "", ("time.sleep(CLIENT_POLLING_INTERVAL_S)",)),
    ("ray._private.workers.default_worker", "", ("args.worker_preload_modules",)),
    ("ray.serve._private.common", "RequestMetadata", ("internal_request_id",)),
    (
        "ray.serve.request_router",
        "RequestRouter",
        ("self._pending_requests_by_id", "self._get_curr_time_s", "def replica_queue_len_cache"),
    ),
    ("ray.serve.handle", "DeploymentHandle.options", ("_by_reference",)),
    ("ray.serve", "ingress", ("__serve_build_asgi_app__",)),
    (
        "ray.serve._private.constants",
        "",
        (
            '"RAY_SERVE_CONTROL_LOOP_INTERVAL_S"',
            '"RAY_SERVE_ENABLE_HA_PROXY"',
            '"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"',
            '"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"',
            '"RAY_SERVE_METRICS_EXPORT_INTERVAL_MS"',
            '"RAY_SERVE_PROXY_USE_GRPC"',
            '"RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"',
            '"RAY_SERVE_TRACING_SAMPLING_RATIO"',
        ),
    ),
    ("ray.serve._private.http_util", "configure_http_middlewares", ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",)),
    ("ray.serve._private.http_util", "start_asgi_http_server", ("uvicorn.Config(",)),
    ("uvicorn.config", "", ("\nHTTP_PROTOCOLS",)),
    ("uvicorn.config", "Config.load", ("HTTP_PROTOCOLS.get(self.http,",)),
    (
        "uvicorn.protocols.http.h11_impl",
        "H11Protocol",
        ("self.conn =", "self.client = get_remote_addr(transport)", "self.loop =", "self.transport = transport"),
    ),
    ("starlette.requests", "Request", ('hasattr(self, "_body")', 'hasattr(self, "_json")')),
    ("transformers", "PreTrainedModel", ("_supports_attention_backend",)),
    ("transformers", "PreTrainedConfig", ("_attn_implementation", "_experts_implementation")),
    ("transformers.utils.hub", "cached_files", ("_raise_exceptions_for_missing_entries",)),
    ("transformers.integrations.moe", "", ('experts_class, "_apply_gate"',)),
    ("transformers.modeling_utils", "", ("\nALL_ATTENTION_FUNCTIONS",)),
    ("transformers.modeling_rope_utils", "", ("\nROPE_INIT_FUNCTIONS", '"longrope"')),
    ("torch.nn", "Module", ("_forward_hooks", "_forward_pre_hooks")),
    ("deltalake", "DeltaTable.create_write_transaction", ("commit_properties", "post_commithook_properties")),
    ("deltalake", "CommitProperties", ("max_commit_retries",)),
    ("deltalake.transaction", "", ("class AddAction", "modification_time", "data_change", "stats")),
)
"""The attributes, variables and options that this server reads or sets."""
ENGINE_LIBRARIES = ("torch", "transformers")
"""They take seconds to import. So each worker checks their names, and the command's process does without them."""


def check_libraries(
    functions: Iterable[Function] = FUNCTIONS, sources: Iterable[Source] = SOURCES, *, of_engine: bool | None = None
) -> None:
    """Raise ImportError unless the installed libraries have every private name that this server uses.

    `of_engine`: check only the names of `ENGINE_LIBRARIES`, or only the others. None: all.
    """

    def chosen(rows: Iterable[Function | Source]) -> list[Function | Source]:
        return [row for row in rows if of_engine in (None, row[0].partition(".")[0] in ENGINE_LIBRARIES)]

    problems = [*_find_changed(chosen(functions)), *_find_missing(chosen(sources))]
    if problems:
        raise ImportError(
            f"the installed packages do not fit this server: {'; '.join(problems)}. "
            "Install the versions that pyproject.toml names, as docs/how-to/install.md says"
        )


def _find_changed(functions: Iterable[Function]) -> Iterator[str]:
    for module, name, expected in functions:
        function = _find(module, name)
        if not callable(function):
            yield f"{_version(module)} has no {module}.{name}"
            continue
        found = tuple(inspect.signature(function).parameters)
        if found != expected:
            yield f"{name} of {_version(module)} takes {', '.join(found)} instead of {', '.join(expected)}"


def _find_missing(sources: Iterable[Source]) -> Iterator[str]:
    for module, name, texts in sources:
        place = f"{module}.{name}".rstrip(".")
        found = _find(module, name)
        if found is None:
            yield f"{_version(module)} has no {place}"
            continue
        # Python finds a class in its file by parsing all of it, which takes too long for a start.
        source = inspect.getsource(inspect.getmodule(found) or found if inspect.isclass(found) else found)
        missing = [text.strip('"\n') for text in texts if text not in source]
        if missing:
            yield f"{place} of {_version(module)} has no {', '.join(missing)}"


def _find(module: str, name: str) -> Any:
    """Return what the module has under this name, the module itself for "", or None."""
    try:
        found = importlib.import_module(module)
        return attrgetter(name)(found) if name else found
    except (ImportError, AttributeError):
        return None


def _version(module: str) -> str:
    library = module.partition(".")[0]
    return f"{library} {importlib.metadata.version(library)}"
