"""A version of an adapter that is stored and not committed yet."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from lora_store.adapter import AdapterRef, Sample
from lora_store.records import AdapterRecord, Visibility
from lora_store.validation import CheckedFolder, Label
from lora_store.weights_blob import hash_blob

Kept = Literal["visibility", "tags", "template", "contract", "samples", "several_samples", "same_samples"]
"""A field that a publish takes over from the live version of the name if it is not given.

"several_samples": the samples, if the live version has several. A description, which is given, replaces only one.
"same_samples": the samples, if those that are given are the live version's without the accepted ones.
"""


@dataclass(frozen=True, slots=True)
class Staged:
    """A validated version whose blobs are stored and leased. It is invisible until `commit`.

    `record` lacks the fields that `commit` fills in. `keeps`: what it took over from the live version of its name when
    it was staged. The commit takes the visibility from the version that is live then, and fails if the rest changed.
    `replaces`: the digest of the version that it was made from, which must still be live; None: any.
    """

    record: AdapterRecord
    samples: tuple[Sample, ...]
    lease: str
    keeps: frozenset[Kept] = frozenset()
    warnings: tuple[str, ...] = ()
    replaces: str | None = None

    @property
    def ref(self) -> AdapterRef:
        return self.record.ref

    @property
    def weights_digest(self) -> str:
        return self.record.weights_digest


@dataclass(frozen=True, slots=True)
class Edit:
    """Changes that make a new version of the same weights. None: as in the live version; "server": no template.

    `contract`: JSON; "": none.
    """

    tags: tuple[str, ...] | None = None
    template: str | None = None
    visibility: Visibility | None = None
    samples: tuple[Sample, ...] | None = None
    contract: str | None = None


def version_digest(label: Label, weights_digest: str, samples_digest: str | None, base_model: str) -> str:
    """Return the sha256 over everything that identifies a version. Visibility is left out, as it may change later."""
    parts = [weights_digest, samples_digest, label.template, list(label.tags), base_model]
    parts += [label.contract] if label.contract else []  # without one, the digest is that of earlier releases
    return hash_blob(json.dumps(parts).encode())


def make_label(record: AdapterRecord) -> Label:
    """Return the publisher's metadata of a version."""
    return Label(
        record.ref.name,
        record.ref.tenant,
        record.tags,
        record.template,
        record.visibility,
        contract=record.contract,
    )


def changed_version(record: AdapterRecord, **changes: Any) -> AdapterRecord:
    """Return another version of the record: the same weights with these changes, and nothing that a commit fills in."""
    new = uncommitted(replace(record, **changes))
    return replace(new, ref=_find_ref(new))


def uncommitted(record: AdapterRecord) -> AdapterRecord:
    """Return the record without what a commit fills in."""
    new = replace(record, embedding=None, probe_shift=None, actor="", generation=0, approved=False)
    return replace(new, trial=None, is_offered=False, live_since=None)


def _find_ref(record: AdapterRecord) -> AdapterRef:
    """Return the ref of the version that has the record's content."""
    digest = version_digest(make_label(record), record.weights_digest, record.samples_digest, record.base_model)
    return replace(record.ref, digest=digest)


def take_over(record: AdapterRecord, live: AdapterRecord, keeps: Collection[Kept]) -> AdapterRecord:
    """Return the version with the tags, template, contract and samples of the live one, as far as `keeps` says so."""
    changes: dict[str, Any] = {}
    if "tags" in keeps:
        changes["tags"] = live.tags
    if "template" in keeps:
        changes["template"] = live.template
    if "contract" in keeps:
        changes["contract"] = live.contract
    if "samples" in keeps or "same_samples" in keeps or ("several_samples" in keeps and live.num_samples > 1):
        changes |= {"samples_digest": live.samples_digest, "num_samples": live.num_samples}
    new = replace(record, **changes)
    if new == record:
        return record
    ref = _find_ref(new)
    trial = None if new.trial is None else replace(new.trial, digest=ref.digest)
    return replace(new, ref=ref, trial=trial)


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
        ranks=tuple(sorted({module.rank for module in checked.stored.values()})),
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in checked.stored})),
        num_bytes=num_bytes,
        num_samples=len(checked.samples),
        template=label.template,
        contract=label.contract,
        embedding=None,
        probe_shift=None,
        source=source,
        actor="",
        created_at=datetime.fromtimestamp(0, UTC),
        generation=0,
        expires_at=expires_at,
    )
