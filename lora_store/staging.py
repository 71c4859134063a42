"""A version of an adapter that is stored and not committed yet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime

from lora_store.adapter import AdapterRef, Sample
from lora_store.records import AdapterRecord
from lora_store.validation import CheckedFolder, Label
from lora_store.weights_blob import digest_of


@dataclass(frozen=True, slots=True)
class Staged:
    """A validated version whose blobs are stored and leased. It is invisible until `commit`.

    `record` lacks the fields that `commit` fills in. With `keeps_visibility`, a live version of the same name decides
    the visibility, and `record.visibility` applies to a new name only.
    """

    record: AdapterRecord
    samples: tuple[Sample, ...]
    lease: str
    keeps_visibility: bool = False

    @property
    def ref(self) -> AdapterRef:
        return self.record.ref

    @property
    def weights_digest(self) -> str:
        return self.record.weights_digest


def version_digest(label: Label, weights_digest: str, samples_digest: str | None, base_model: str) -> str:
    """Return the sha256 over everything that identifies a version. Visibility is left out, as it may change later."""
    parts = [weights_digest, samples_digest, label.template, list(label.tags), base_model]
    return digest_of(json.dumps(parts).encode())


def staged_record(
    label: Label,
    checked: CheckedFolder,
    *,
    weights_digest: str,
    samples_digest: str | None,
    num_bytes: int,
    source: str,
    expires_at: datetime | None = None,
) -> AdapterRecord:
    """Return the record of a validated folder, without the fields that are known at its commit."""
    digest = version_digest(label, weights_digest, samples_digest, checked.base_model)
    return AdapterRecord(
        ref=AdapterRef(label.tenant, label.name, digest),
        weights_digest=weights_digest,
        samples_digest=samples_digest,
        visibility=label.visibility,
        tags=label.tags,
        base_model=checked.base_model,
        ranks=tuple(sorted({module.rank for module in checked.modules.values()})),
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in checked.modules})),
        num_bytes=num_bytes,
        num_samples=len(checked.samples),
        template=label.template,
        embedding=None,
        probe_shift=None,
        source=source,
        actor="",
        created_at=datetime.fromtimestamp(0, UTC),
        generation=0,
        expires_at=expires_at,
    )
