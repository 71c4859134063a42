"""Checks of the network policies: allowed traffic in and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from lora_store.location import Location
from tests.k8s import placement
from tests.k8s.manifests import Document, Manifests, Pod

# Metadata services of clouds: AWS, Google and most others; their IPv6; Alibaba; Azure's wire server; Oracle.
METADATA = (
    "169.254.169.254",
    "169.254.170.2",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::a9fe:a9fe",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
)
_DNS: Document = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
    "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
}
_PUBLIC = "203.0.113.7"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule for outgoing traffic, and its policy. No ports means all ports."""

    policy: str
    peers: tuple[Document, ...]
    ports: frozenset[tuple[str, int]]

    def has_port(self, protocol: str, port: int) -> bool:
        return not self.ports or (protocol, port) in self.ports

    def reaches(self, address: str) -> bool:
        return any(_contains(peer["ipBlock"], address) for peer in self.peers if "ipBlock" in peer)

    def reaches_pod(self, labels: Mapping[str, str]) -> bool:
        selectors = [peer["podSelector"] for peer in self.peers if peer.keys() == {"podSelector"}]
        return any(selector.get("matchLabels", {}).items() <= labels.items() for selector in selectors)


def _contains(block: Document, address: str) -> bool:
    place = ip_address(address)
    networks = [ip_network(block["cidr"]), *[ip_network(left_out) for left_out in block.get("except", [])]]
    inside, *excepted = [place.version == network.version and place in network for network in networks]
    return inside and not any(excepted)


def problems(manifests: Manifests) -> Iterator[str]:
    for document in manifests.of_kind("NetworkPolicy"):
        yield from (f"policy {document['metadata']['name']}: {problem}" for problem in _policy_problems(document))
    for pod in manifests.pods:
        policies = [d for d in manifests.of_kind("NetworkPolicy") if _selects(d, pod)]
        for direction in ("Ingress", "Egress"):
            if not any(direction in policy["spec"]["policyTypes"] for policy in policies):
                yield f"{pod.name}: no policy limits its {direction.lower()}"
        rules = [rule for policy in policies for rule in egress_rules(policy)]
        if pod.is_ray:
            yield from (f"{pod.name}: {problem}" for problem in _ray_problems(manifests, pod, rules))
    yield from _way_out_problems(manifests)


def egress_rules(document: Document) -> Iterator[Rule]:
    for rule in document["spec"].get("egress", []):
        ports = frozenset((port["protocol"], port["port"]) for port in rule.get("ports", []))
        yield Rule(document["metadata"]["name"], tuple(rule.get("to", [])), ports)


def _selects(document: Document, pod: Pod) -> bool:
    return pod.is_selected_by(document["spec"]["podSelector"].get("matchLabels", {}))


def _policy_problems(document: Document) -> Iterator[str]:
    rules = [rule["from"] for rule in document["spec"].get("ingress", [])]
    for peer in [peer for peers in [*rules, *[rule.peers for rule in egress_rules(document)]] for peer in peers]:
        if peer.get("namespaceSelector") == {}:
            yield "it takes pods of any namespace, whose labels anybody with a namespace may set"
    for rule in egress_rules(document):
        if not rule.peers:
            yield "it lets out to any address"
        yield from (f"it lets out to the metadata service {address}" for address in METADATA if rule.reaches(address))


def _ray_problems(manifests: Manifests, pod: Pod, rules: list[Rule]) -> Iterator[str]:
    if not any(_DNS in rule.peers and rule.has_port("UDP", 53) and rule.has_port("TCP", 53) for rule in rules):
        yield "it cannot ask for names"
    for other in (manifests.head, *manifests.workers):
        if not any(rule.reaches_pod(other.labels) and not rule.ports for rule in rules):
            yield f"it does not reach {other.name}"
    api_is_open = any(rule.reaches(_PUBLIC) and rule.has_port("TCP", 6443) for rule in rules)
    if api_is_open != (pod.name == "head"):
        yield "it reaches the Kubernetes API" if api_is_open else "the autoscaler does not reach the Kubernetes API"


def _way_out_problems(manifests: Manifests) -> Iterator[str]:
    """Check the ways to Redis, and to the bucket from the pods that may run a Store or a Retriever."""
    config, policies = manifests.config, manifests.of_kind("NetworkPolicy")
    redis = [pod for pod in manifests.pods if "redis" in pod.container["image"]]
    to_redis = [rule for policy in policies if _selects(policy, manifests.head) for rule in egress_rules(policy)]
    for pod in redis:
        if not any(rule.reaches_pod(pod.labels) and rule.has_port("TCP", 6379) for rule in to_redis):
            yield "head: it does not reach Redis"
    for group, pod in zip(manifests.cluster["workerGroupSpecs"], manifests.workers, strict=True):
        rules = [rule for policy in policies if _selects(policy, pod) for rule in egress_rules(policy)]
        gets_out = any(rule.reaches(_PUBLIC) and rule.has_port("TCP", 443) for rule in rules)
        needs_bucket = not Location(config.store_uri).is_local and placement.may_hold(group, pod, config.store_scaling)
        if needs_bucket and not gets_out:
            yield f"{pod.name}: it does not reach {config.store_uri}"
        if gets_out and not needs_bucket and "loraretriever-model-hub" not in manifests.names("NetworkPolicy"):
            yield f"{pod.name}: it reaches addresses outside of the cluster and needs none"
