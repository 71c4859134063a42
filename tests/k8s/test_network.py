"""Which addresses a rule of a network policy reaches."""

from __future__ import annotations

from collections.abc import Callable

from tests.k8s import network
from tests.k8s.manifests import Manifests
from tests.k8s.network import METADATA

DOCUMENT = {"metadata": {"name": "p"}, "spec": {"egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]}}


def test_an_open_rule_reaches_every_metadata_service_and_an_excepted_one_does_not() -> None:
    [rule] = network.egress_rules(DOCUMENT)
    assert [address for address in METADATA if rule.reaches(address)] == [a for a in METADATA if ":" not in a]
    assert rule.reaches("203.0.113.7") and not rule.reaches("2001:db8::1")


def test_a_rule_for_the_model_hub_opens_the_workers(rendered: Callable[[str], Manifests]) -> None:
    manifests = rendered("hub")
    assert list(network.problems(manifests)) == []
    [rule] = network.egress_rules(manifests.named("NetworkPolicy", "loraretriever-model-hub"))
    assert rule.reaches("203.0.113.7") and rule.has_port("TCP", 443) and not rule.has_port("TCP", 80)
