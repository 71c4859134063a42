"""A staged version before its commit: its digest covers everything that identifies it, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from lora_store import AdapterRef, Sample, write_peft_folder
from lora_store.records import Visibility
from lora_store.staging import Staged, staged_record, version_digest
from lora_store.validation import CheckedFolder, Label, check_folder
from tests.lora_store.builders import MakeWeights

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


@pytest.fixture
def checked(make_weights: MakeWeights, tmp_path: Path) -> CheckedFolder:
    modules = make_weights()  # two of rank 4 and one of rank 2
    write_peft_folder(tmp_path, modules, base_model="tiny", samples=[Sample("Rhyme."), Sample("Sing.")])
    return check_folder(tmp_path, LABEL, accepts_base={"tiny"}, module_shapes=None)


@pytest.mark.parametrize("visibility", ["public", "private"])
def test_the_record_describes_the_folder_without_the_fields_of_the_commit(
    visibility: Visibility, checked: CheckedFolder
) -> None:
    label = replace(LABEL, visibility=visibility)
    record = staged_record(
        label, checked, weights_digest=WEIGHTS, samples_digest=SAMPLES, num_bytes=99, source="folder"
    )
    assert record.ref == AdapterRef("acme", "poet", digest())
    assert (record.ranks, record.target_modules) == ((2, 4), ("q_proj", "up_proj"))
    assert (record.num_samples, record.num_bytes, record.base_model, record.source) == (2, 99, "tiny", "folder")
    assert (record.visibility, record.tags, record.template) == (visibility, ("fun",), "chat")
    assert (record.embedding, record.probe_shift, record.actor, record.generation) == (None, None, "", 0)
    assert record.created_at == datetime.fromtimestamp(0, UTC)
    staged = Staged(record, checked.samples, "lease")
    assert (staged.ref, staged.weights_digest, staged.keeps) == (record.ref, WEIGHTS, frozenset())
