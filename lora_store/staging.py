"""One version of an adapter on its way into the catalogue."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime

from lora_store.adapter import AdapterRef, Sample
from lora_store.records import AdapterRecord
from lora_store.validation import Admitted, Label
from lora_store.weights_blob import digest_of


@dataclass(frozen=True, slots=True)
class Staged:
    """A checked version whose blobs are stored and held, and which nobody sees yet.

    `record` lacks what `commit` is given.
    """

    record: AdapterRecord
    samples: tuple[Sample, ...]
    hold: str
    keeps_visibility: bool = False  # a live version of its name says what the visibility is, not `record`

    @property
    def ref(self) -> AdapterRef:
        return self.record.ref

    @property
    def weights_digest(self) -> str:
        return self.record.weights_digest


def version_digest(label: Label, weights_digest: str, samples_digest: str | None, base_model: str) -> str:
    """sha256 over all that makes two versions the same one. Visibility is not part: it may change under a version."""
    parts = [weights_digest, samples_digest, label.template, list(label.tags), base_model]
    return digest_of(json.dumps(parts).encode())


def staged_record(
    label: Label,
    admitted: Admitted,
    *,
    weights_digest: str,
    samples_digest: str | None,
    num_bytes: int,
    source: str,
) -> AdapterRecord:
    """The record of what passed admission, without what is known at its commit."""
    digest = version_digest(label, weights_digest, samples_digest, admitted.base_model)
    return AdapterRecord(
        ref=AdapterRef(label.tenant, label.name, digest),
        weights_digest=weights_digest,
        samples_digest=samples_digest,
        visibility=label.visibility,
        tags=label.tags,
        base_model=admitted.base_model,
        ranks=tuple(sorted({module.rank for module in admitted.modules.values()})),
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in admitted.modules})),
        num_bytes=num_bytes,
        num_samples=len(admitted.samples),
        template=label.template,
        embedding=None,
        probe_shift=None,
        source=source,
        actor="",
        created_at=datetime.fromtimestamp(0, UTC),
        generation=0,
    )
