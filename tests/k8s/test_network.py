"""Policies that allow too much or too little are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.k8s import network
from tests.k8s.manifests import Manifests
from tests.k8s.mistakes import Mistake, name_of, policy
from tests.k8s.network import METADATA

DOCUMENT = {"metadata": {"name": "p"}, "spec": {"egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]}}


def operator_peer(manifests: Manifests) -> dict:
    [peer] = policy(manifests, "operator")["ingress"][0]["from"]
    return peer


def drop(manifests: Manifests, name: str) -> None:
    manifests.remove("NetworkPolicy", f"loraretriever-{name}")


def leave_out(manifests: Manifests, name: str, block: int, address: str) -> None:
    policy(manifests, name)["egress"][0]["to"][block]["ipBlock"]["except"].remove(address)


MISTAKES = [
    Mistake(
        "operator of any namespace", lambda m: operator_peer(m).update(namespaceSelector={}), "pods of any namespace"
    ),
    Mistake(
        "names from any namespace",
        lambda m: policy(m, "dns")["egress"][0]["to"][0].update(namespaceSelector={}),
        "pods of any namespace",
    ),
    Mistake(
        "incoming alone is limited",
        lambda m: [policy(m, name).update(policyTypes=["Ingress"]) for name in ("redis", "to-redis")],
        "loraretriever-redis: no policy limits its egress",
    ),
    Mistake("any address", lambda m: policy(m, "nodes").update(egress=[{}]), "lets out to any address"),
    Mistake(
        "metadata of most clouds",
        lambda m: leave_out(m, "kubernetes-api", 0, "169.254.0.0/16"),
        "the metadata service 169.254.169.254",
    ),
    Mistake(
        "metadata by IPv6",
        lambda m: leave_out(m, "kubernetes-api", 1, "fd00:ec2::254/128"),
        "the metadata service fd00:ec2::254",
    ),
    Mistake(
        "Azure's wire server",
        lambda m: leave_out(m, "object-store", 0, "168.63.129.16/32"),
        "the metadata service 168.63.129.16",
        overlay="gpu-s3",
    ),
    Mistake("no names", lambda m: drop(m, "dns"), "gpu: it cannot ask for names"),
    Mistake("nodes apart", lambda m: policy(m, "nodes").update(egress=[]), "gpu: it does not reach head"),
    Mistake("autoscaler shut off", lambda m: drop(m, "kubernetes-api"), "the autoscaler does not reach"),
    Mistake(
        "workers at the Kubernetes API",
        lambda m: policy(m, "kubernetes-api")["podSelector"]["matchLabels"].pop("ray.io/node-type"),
        "gpu: it reaches the Kubernetes API",
    ),
    Mistake("no way to Redis", lambda m: drop(m, "to-redis"), "head: it does not reach Redis"),
    Mistake(
        "no way to the bucket", lambda m: drop(m, "object-store"), "cpu: it does not reach s3://", overlay="gpu-s3"
    ),
    Mistake(
        "workers at the bucket",
        lambda m: policy(m, "object-store")["podSelector"]["matchLabels"].pop("ray.io/group"),
        "gpu: it reaches addresses outside",
        overlay="gpu-s3",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=name_of)
def test_a_mistake_is_found(mistake: Mistake, rendered: Callable[[str], Manifests]) -> None:
    mistake.is_found_by(network.problems, rendered)


def test_an_open_rule_reaches_every_metadata_service_and_an_excepted_one_does_not() -> None:
    [rule] = network.egress_rules(DOCUMENT)
    assert [address for address in METADATA if rule.reaches(address)] == [a for a in METADATA if ":" not in a]
    assert rule.reaches("203.0.113.7") and not rule.reaches("2001:db8::1")


def test_a_rule_for_the_model_hub_opens_the_workers(rendered: Callable[[str], Manifests]) -> None:
    manifests = rendered("hub")
    assert list(network.problems(manifests)) == []
    [rule] = network.egress_rules(manifests.named("NetworkPolicy", "loraretriever-model-hub"))
    assert rule.reaches("203.0.113.7") and rule.has_port("TCP", 443) and not rule.has_port("TCP", 80)
