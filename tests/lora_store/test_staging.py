"""A staged version before its commit: its digest covers everything that identifies it, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from lora_store.staging import version_digest
from lora_store.validation import Label

LABEL = Label("poet", "acme", ("fun",), "chat", "public")
WEIGHTS, SAMPLES = "a" * 64, "b" * 64


def digest(label: Label = LABEL, weights: str = WEIGHTS, samples: str | None = SAMPLES, base: str = "tiny") -> str:
    return version_digest(label, weights, samples, base)


def test_weights_samples_template_contract_tags_and_base_each_make_another_version() -> None:
    versions = [
        digest(),
        digest(weights="c" * 64),
        digest(samples="c" * 64),
        digest(samples=None),
        digest(replace(LABEL, template="alpaca")),
        digest(replace(LABEL, template=None)),
        digest(replace(LABEL, contract='{"stop":["a"]}')),
        digest(replace(LABEL, tags=())),
        digest(replace(LABEL, tags=("fun", "short"))),
        digest(base="other"),
        digest(weights=SAMPLES, samples=WEIGHTS),
    ]
    assert all(first != second for first, second in combinations(versions, 2))
    assert all(len(version) == 64 for version in versions)


@pytest.mark.parametrize("change", [{"name": "bard"}, {"tenant": "globex"}, {"visibility": "private"}], ids=str)
def test_the_name_the_tenant_and_the_visibility_are_not_part_of_the_version(change: dict[str, Any]) -> None:
    assert digest(replace(LABEL, **change)) == digest()
