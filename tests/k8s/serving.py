"""Check serveConfigV2 against the code, and its settings against their pods."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import ray
from pydantic import ValidationError
from ray._private import ray_constants
from ray.serve.schema import ServeDeploySchema

from deployments.calls.h11_proxy import CALLBACK, CALLBACK_VARIABLE
from deployments.cli.local_server import APP_NAME, CHEAPER_SERVE, ENDS_AT_ONCE
from deployments.config.app import AppConfig
from deployments.scaling.settings import ServeOptions
from lora_store.location import Location
from tests.k8s import placement
from tests.k8s.general import secrets_made_by_hand
from tests.k8s.image import BAKED_MODEL
from tests.k8s.manifests import Document, Manifests, Pod, quantity

LONG = ("/v1/pool", "/v1/loras", "/v1/load_lora_adapter")  # routes of jobs and of publishing
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


def problems(manifests: Manifests) -> Iterator[str]:
    if manifests.cluster["rayVersion"] != ray.__version__:
        yield f"rayVersion is {manifests.cluster['rayVersion']}, the pinned Ray {ray.__version__}"
    try:
        serve = ServeDeploySchema.model_validate(manifests.serve)
        config = manifests.config
    except ValidationError as exc:
        yield str(exc)
        return
    yield from _unknown_keys(manifests.serve, serve.model_dump(exclude_unset=True), "serveConfigV2")
    [application] = serve.applications
    if application.name != APP_NAME:
        yield f"the application is {application.name!r}, handles ask for {APP_NAME!r}"
    yield from _import_problems(application.import_path)
    for pod in (manifests.head, *manifests.workers):
        if {"name": CALLBACK_VARIABLE, "value": CALLBACK} not in pod.container.get("env", []):
            yield f"{pod.name}: its HTTP proxy bounds no headers: {CALLBACK_VARIABLE} is not {CALLBACK}"
        for name, value in (CHEAPER_SERVE | ENDS_AT_ONCE).items():
            if pod.variables.get(name) != value:
                yield f"{pod.name}: {name} is not {value}, as `loraretriever serve` sets it"
    for pod in manifests.workers:
        if serve.http_options.port != pod.ports.get("serve") or serve.http_options.host != "0.0.0.0":
            yield f"{pod.name}: its port `serve` is not where Serve listens"
        yield from (f"{pod.name}: {problem}" for problem in _path_problems(config, pod))
    for group, pod in zip(manifests.cluster["workerGroupSpecs"], manifests.workers, strict=True):
        yield from (f"{pod.name}: {problem}" for problem in _keys_problems(config, group, pod))
        yield from (f"{pod.name}: {problem}" for problem in _store_problems(config, group, pod))
    yield from _scaling_problems(config)
    yield from _drain_problems(manifests, config)
    yield from _outside_problems(manifests, config)


def _unknown_keys(given: Any, read: Any, where: str) -> Iterator[str]:
    """Return the keys that Serve would silently drop."""
    if isinstance(given, dict):
        for key, value in given.items():
            if key not in read:
                yield f"Serve does not know {where}.{key}"
            else:
                yield from _unknown_keys(value, read[key], f"{where}.{key}")
    elif isinstance(given, list):
        for one, other in zip(given, read, strict=True):
            yield from _unknown_keys(one, other, f"{where}[]")


def _import_problems(import_path: str) -> Iterator[str]:
    module, _, name = import_path.partition(":")
    try:
        builder = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as exc:
        yield f"import_path: {exc}"
        return
    args = inspect.signature(builder).parameters.get("args")
    if args is None or args.annotation is not AppConfig:
        yield f"{import_path} does not take args as an AppConfig"


def _keys_problems(config: AppConfig, group: Document, pod: Pod) -> Iterator[str]:
    """Check that only an Ingress reads the keys."""
    if config.keys_file is None:
        yield "without keys_file everybody who reaches the server is its user"
        return
    _, volume = pod.volume_at(str(config.keys_file))
    secret = volume.get("secret", {}).get("secretName", "")
    if not placement.may_hold(group, pod, config.ingress_scaling):
        if secret:
            yield f"it mounts the secret {secret} and holds no Ingress"
    elif config.keys_file.name not in secrets_made_by_hand().get(secret, set()):
        yield f"keys_file {config.keys_file} is on no volume of a secret that has it"


def _path_problems(config: AppConfig, pod: Pod) -> Iterator[str]:
    _, cache = pod.volume_at(str(config.cache_dir))
    if "emptyDir" not in cache:
        yield f"cache_dir {config.cache_dir} is not on a volume of the pod's own"
    elif config.weights_cache is not None and quantity(cache["emptyDir"]["sizeLimit"]) <= config.disk_cache_bytes:
        yield f"disk_cache_bytes ({config.disk_cache_bytes}) is not below the volume's sizeLimit"
    for own in config.by_model.values():
        if _may_hold_a_worker(own, pod) and not _has_model(own, pod):
            yield f"base_model {own.base_model} is neither in the image nor on a volume"


def _store_problems(config: AppConfig, group: Document, pod: Pod) -> Iterator[str]:
    """Check that only the Store and the Retriever can reach the store."""
    has_credentials = "serviceAccountName" in pod.spec or bool(pod.container.get("envFrom"))
    if not any(placement.may_hold(group, pod, s) for s in (config.store_scaling, config.retriever_scaling)):
        if has_credentials:
            yield "it has credentials of the store and holds neither Store nor Retriever"
        return
    location = Location(config.store_uri)
    if not location.is_local:
        if "serviceAccountName" not in pod.spec or not pod.container.get("envFrom"):
            yield f"nothing gives it credentials for {config.store_uri}"
        return
    mount, volume = pod.volume_at(location.delta_uri)
    if "persistentVolumeClaim" not in volume or mount.get("readOnly"):
        yield f"store_uri {config.store_uri} is on no claim that can be written"


def _may_hold_a_worker(config: AppConfig, pod: Pod) -> bool:
    return config.worker_scaling.num_gpus <= pod.requests("nvidia.com/gpu")


def _has_model(config: AppConfig, pod: Pod) -> bool:
    _, volume = pod.volume_at(config.base_model)
    return PurePosixPath(config.base_model) == BAKED_MODEL or "persistentVolumeClaim" in volume


def _scaling_problems(config: AppConfig) -> Iterator[str]:
    """Check that bounds on queues do not shrink, and that every deployment has a second replica."""
    names = ("ingress_scaling", "retriever_scaling", "store_scaling")
    scalings: list[tuple[str, ServeOptions]] = [(name, getattr(config, name)) for name in names]
    scalings += [("worker_scaling", own.worker_scaling) for own in config.by_model.values()]
    for name, scaling in scalings:
        default: ServeOptions = AppConfig.model_fields[name].default
        if scaling.root["max_ongoing_requests"] < (least := default.root["max_ongoing_requests"]):
            yield f"{name}: max_ongoing_requests is below the default's {least}"
        if scaling.root["max_queued_requests"] != (number := default.root["max_queued_requests"]):
            yield f"{name}: max_queued_requests is not the default's {number}"
        if scaling.min_replicas < 2:
            yield f"{name}: one replica alone is missing while it is replaced"
    for own in config.by_model.values():
        if own.worker_scaling.root["max_ongoing_requests"] < own.worker.max_batch_size + own.worker.max_waiting:
            yield "worker_scaling: max_ongoing_requests is below max_batch_size + max_waiting"


def _drain_problems(manifests: Manifests, config: AppConfig) -> Iterator[str]:
    waits = {
        "rayClusterDeletionDelaySeconds": manifests.ray_service["spec"]["rayClusterDeletionDelaySeconds"],
        "idleTimeoutSeconds": manifests.cluster["autoscalerOptions"]["idleTimeoutSeconds"],
    }
    for name, wait_s in waits.items():
        if wait_s <= config.max_request_s:
            yield f"{name} ({wait_s}) cuts requests of max_request_s ({config.max_request_s:.0f})"
    assert hasattr(ray_constants, DRAIN), "Ray has another variable for the time of a drain"
    for pod in manifests.workers:
        drain_s, grace_s = float(pod.variables.get(DRAIN, 30)), pod.spec.get("terminationGracePeriodSeconds", 30)
        if drain_s <= config.max_request_s:
            yield f"{pod.name}: {DRAIN} ({drain_s:.0f}) cuts requests of max_request_s ({config.max_request_s:.0f})"
        if grace_s <= drain_s:
            yield f"{pod.name}: terminationGracePeriodSeconds ({grace_s}) is not above {DRAIN} ({drain_s:.0f})"
    if float(manifests.head.variables.get(DRAIN, 30)) != 0:
        yield f"head: {DRAIN} is not 0: its pod ends late, and nothing on it is waited for"


def _outside_problems(manifests: Manifests, config: AppConfig) -> Iterator[str]:
    """Check that an Ingress and a route of the Gateway API reach Serve, and cut no stream and no upload."""
    name, port = f"{manifests.ray_service['metadata']['name']}-serve-svc", 8000  # KubeRay's Service
    for ingress in manifests.of_kind("Ingress"):
        notes = {key.partition("/")[2]: value for key, value in ingress["metadata"]["annotations"].items()}
        waits_s = [float(notes.get(f"proxy-{kind}-timeout", 60)) for kind in ("read", "send")]
        if min(waits_s) <= config.max_request_s:
            yield f"Ingress: a proxy timeout of {min(waits_s):.0f} s is not above max_request_s"
        if notes.get("proxy-buffering") != "off" or notes.get("proxy-request-buffering") != "off":
            yield "Ingress: nginx keeps tokens or uploads back"
        if quantity(notes.get("proxy-body-size", "1m").upper() + "i") <= config.max_upload_bytes:
            yield "Ingress: an upload of max_upload_bytes is refused"
        backends = [path["backend"] for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]]
        if backends != [{"service": {"name": name, "port": {"name": "serve"}}}]:
            yield f"Ingress: it leads to {backends}, not to {name}"
        if not ingress["spec"].get("tls"):
            yield "Ingress: keys are sent without TLS"
    for route in manifests.of_kind("HTTPRoute"):
        endless = [rule for rule in route["spec"]["rules"] if set(rule.get("timeouts", {}).values()) == {"0s"}]
        matches = [{"path": {"type": "PathPrefix", "value": path}} for path in LONG]
        if [match for rule in endless for match in rule["matches"]] != matches:
            yield "HTTPRoute: it cuts a long job or upload"
        for rule in route["spec"]["rules"]:
            waits = rule.get("timeouts", {})
            waits_s = [float(waits.get(kind, "15s")[:-1]) or math.inf for kind in ("request", "backendRequest")]
            if min(waits_s) <= config.max_request_s:
                yield f"HTTPRoute: a timeout of {waits} is not above max_request_s"
            if [(backend["name"], backend["port"]) for backend in rule["backendRefs"]] != [(name, port)]:
                yield f"HTTPRoute: it does not lead to {name}"
