"""Check that every name, label and port used in a manifest exists."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

from tests.k8s.manifests import Document, Manifests, Pod

README = (Path(__file__).parent.parent.parent / "k8s" / "README.md").read_text()
_PROXY_HEALTH = "/-/healthz"
_KNOWN_LABELS = (
    ("app.kubernetes.io/component", "kuberay-operator"),
    ("kubernetes.io/metadata.name", "kuberay-system"),
    ("kubernetes.io/metadata.name", "kube-system"),
    ("k8s-app", "kube-dns"),
)
_SECRET = re.compile(r"kubectl create secret generic (\S+)(.*)")
_SECRET_KEY = re.compile(r"--from-(?:file|literal)=([^=\s]+)")


def secrets_made_by_hand() -> Mapping[str, set[str]]:
    """Return (name, keys) of the secrets that README asks to create, because no manifest contains them."""
    found: dict[str, set[str]] = {}
    for name, options in _SECRET.findall(README):
        found.setdefault(name, set()).update(_SECRET_KEY.findall(options))
    return found


def problems(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        yield from (f"pod {pod.name}: {problem}" for problem in _pod_problems(manifests, pod))
    used = {_claim(volume) for pod in manifests.pods for volume in pod.spec.get("volumes", [])}
    yield from (
        f"claim {name} is mounted by no pod" for name in sorted(manifests.names("PersistentVolumeClaim") - used)
    )
    yield from _redis_problems(manifests)
    yield from _service_problems(manifests)
    yield from _selection_problems(manifests)


def _pod_problems(manifests: Manifests, pod: Pod) -> Iterator[str]:
    mounted = {mount["name"] for mount in pod.container.get("volumeMounts", [])}
    if pod.is_ray and pod.name == "head":
        mounted |= {mount["name"] for mount in manifests.cluster["autoscalerOptions"].get("volumeMounts", [])}
    volumes = {volume["name"] for volume in pod.spec.get("volumes", [])} | pod.claim_templates
    yield from (f"there is no volume {name}" for name in sorted(mounted - volumes))
    yield from (f"volume {name} is not mounted" for name in sorted(volumes - mounted))
    for volume in pod.spec.get("volumes", []):
        yield from _volume_problems(manifests, volume)
    for variable in pod.container.get("env", []):
        yield from _key_problems(variable.get("valueFrom", {}).get("secretKeyRef"))
    for source in pod.container.get("envFrom", []):
        yield from _secret_problems(source["secretRef"]["name"])
    account = pod.spec.get("serviceAccountName")
    if account is not None and account not in manifests.names("ServiceAccount"):
        yield f"there is no service account {account}"
    yield from _probe_problems(pod)
    for constraint in pod.spec.get("topologySpreadConstraints", []):
        if not pod.is_selected_by(constraint["labelSelector"]["matchLabels"]):
            yield "it is spread by labels it does not have"


def _volume_problems(manifests: Manifests, volume: Document) -> Iterator[str]:
    claim = _claim(volume)
    if claim is not None and claim not in manifests.names("PersistentVolumeClaim"):
        yield f"there is no claim {claim}"
    if "secret" in volume:
        yield from _secret_problems(volume["secret"]["secretName"])
    if "configMap" in volume and volume["configMap"]["name"] not in manifests.names("ConfigMap"):
        yield f"there is no config map {volume['configMap']['name']}"


def _claim(volume: Document) -> str | None:
    return volume.get("persistentVolumeClaim", {}).get("claimName")


def _secret_problems(name: str) -> Iterator[str]:
    if name not in secrets_made_by_hand():
        yield f"README does not say how to make the secret {name}"


def _key_problems(reference: Mapping[str, str] | None) -> Iterator[str]:
    if reference is None:
        return
    yield from _secret_problems(reference["name"])
    if reference["key"] not in secrets_made_by_hand().get(reference["name"], set()):
        yield f"README makes the secret {reference['name']} without the key {reference['key']}"


def _probe_problems(pod: Pod) -> Iterator[str]:
    for kind in ("livenessProbe", "readinessProbe"):
        probe = pod.container.get(kind)
        if probe is None:
            if pod.ports:
                yield f"it has no {kind}"
            continue
        asked = probe.get("httpGet")
        if asked is None:
            continue
        if asked["port"] not in pod.ports:
            yield f"{kind} asks a port {asked['port']} that is none of its own"
        served = [_PROXY_HEALTH] if asked["port"] == "serve" else PUBLIC_EXACT_PATHS  # without a token
        if asked["path"] not in served:
            yield f"{kind} asks for {asked['path']}, which has no answer on {asked['port']} without a token"


def _redis_problems(manifests: Manifests) -> Iterator[str]:
    options = manifests.cluster.get("gcsFaultToleranceOptions")
    if options is None:
        return
    host, _, port = options["redisAddress"].partition(":")
    services = {service["metadata"]["name"]: service for service in manifests.of_kind("Service")}
    if host not in services:
        yield f"redisAddress: there is no service {host}"
    elif int(port) not in [exposed["port"] for exposed in services[host]["spec"]["ports"]]:
        yield f"redisAddress: service {host} has no port {port}"
    yield from _key_problems(options["redisPassword"]["valueFrom"]["secretKeyRef"])


def _service_problems(manifests: Manifests) -> Iterator[str]:
    for service in manifests.of_kind("Service"):
        name, spec = service["metadata"]["name"], service["spec"]
        pods = [pod for pod in manifests.pods if pod.is_selected_by(spec["selector"])]
        if not pods:
            yield f"service {name} selects no pod"
        for port in spec["ports"]:
            yield from (
                f"service {name}: no port {port['targetPort']} in {pod.name}"
                for pod in pods
                if port["targetPort"] not in pod.ports
            )
    for workload in manifests.of_kind("StatefulSet"):
        name, spec = workload["metadata"]["name"], workload["spec"]
        if not spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items():
            yield f"stateful set {name} does not select its own pods"
        if spec["serviceName"] not in manifests.names("Service"):
            yield f"stateful set {name}: there is no service {spec['serviceName']}"


def _selection_problems(manifests: Manifests) -> Iterator[str]:
    for document in manifests.of_kind("NetworkPolicy", "PodDisruptionBudget", "PodMonitor"):
        spec, where = document["spec"], f"{document['kind']} {document['metadata']['name']}"
        selector = spec["podSelector"] if document["kind"] == "NetworkPolicy" else spec["selector"]
        pods = [pod for pod in manifests.pods if pod.is_selected_by(selector["matchLabels"])]
        if not pods:
            yield f"{where} selects no pod"
        for pod in pods:
            yield from (f"{where}: {problem}" for problem in _port_problems(document, pod))
        incoming, outgoing = spec.get("ingress", []), spec.get("egress", [])
        for peer in [*[p for rule in incoming for p in rule["from"]], *[p for rule in outgoing for p in rule["to"]]]:
            yield from (f"{where}: {problem}" for problem in _peer_problems(manifests, peer))


def _port_problems(document: Document, pod: Pod) -> Iterator[str]:
    rules = document["spec"].get("ingress", [])
    for port in [port["port"] for rule in rules for port in rule.get("ports", [])]:
        if port not in pod.ports.values():
            yield f"nothing listens on {port} in {pod.name}"
    for endpoint in document["spec"].get("podMetricsEndpoints", []):
        if endpoint["port"] not in pod.ports:
            yield f"{pod.name} has no port {endpoint['port']}"


def _peer_problems(manifests: Manifests, peer: Document) -> Iterator[str]:
    """Check labels of foreign pods: README asks to set them, or Kubernetes or KubeRay sets them."""
    for selector in [selector for kind, selector in peer.items() if kind != "ipBlock"]:
        labels = selector.get("matchLabels", {})
        if labels and not any(pod.is_selected_by(labels) for pod in manifests.pods):
            for key, value in labels.items():
                if f"{key}={value}" not in README and (key, value) not in _KNOWN_LABELS:
                    yield f"no pod has the label {key}={value}, and README does not ask to set it"
