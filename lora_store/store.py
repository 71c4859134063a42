"""The store: stage checks a folder and writes its blobs, commit makes many versions visible in one step."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from lora_store.adapter import LOCAL_TENANT, AdapterRef, Sample
from lora_store.admission import Admitted, Label, Shapes, check_folder
from lora_store.blobs import BlobStore
from lora_store.bounded_files import Limits
from lora_store.catalogue import Catalogue
from lora_store.errors import AdapterRefused
from lora_store.events import Event, Publish
from lora_store.records import AdapterRecord, Embedding, Visibility
from lora_store.sample_files import parse_samples, write_samples
from lora_store.snapshot import Key, Snapshot
from lora_store.weights_blob import digest_of, encode_weights


@dataclass(frozen=True, slots=True)
class Staged:
    """A checked version whose blobs are stored and which nobody sees yet. `record` lacks what `commit` is given."""

    record: AdapterRecord
    samples: tuple[Sample, ...]

    @property
    def ref(self) -> AdapterRef:
        return self.record.ref

    @property
    def weights_digest(self) -> str:
        return self.record.weights_digest


class LoraStore:
    """Adapters under one URI: blobs by digest, and the catalogue of what is live. Versions never change."""

    def __init__(
        self,
        uri: str,
        *,
        accepts_base: Collection[str],
        limits: Limits | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._accepts_base, self._limits = frozenset(accepts_base), limits
        self._now = now
        self._blobs = BlobStore(f"{uri.rstrip('/')}/blobs")
        self._catalogue = Catalogue(uri)

    def stage(
        self,
        folder: Path,
        *,
        tenant: str = LOCAL_TENANT,
        name: str | None = None,
        tags: Collection[str] = (),
        template: str | None = None,
        visibility: Visibility = "public",
        source: str | None = None,
        module_shapes: Shapes | None = None,
    ) -> Staged:
        """The folder's version, checked and its blobs written. Name and source default to the folder's name.

        `module_shapes`: (out, in) of each linear layer an adapter may change; None = not checked.
        Raises: AdapterRefused with every reason; then nothing was written.
        """
        label = Label(folder.name if name is None else name, tenant, tuple(sorted(set(tags))), template, visibility)
        admitted = check_folder(
            folder,
            label,
            accepts_base=self._accepts_base,
            module_shapes=module_shapes,
            limits=self._limits,
        )
        weights_digest, data = encode_weights(admitted.modules)
        self._blobs.put(data)
        samples_digest = self._blobs.put(write_samples(admitted.samples)) if admitted.samples else None
        record = _record_of(label, admitted, weights_digest, samples_digest)
        return Staged(
            replace(record, num_bytes=len(data), source=folder.name if source is None else source), admitted.samples
        )

    def commit(
        self,
        staged: Sequence[Staged],
        embeddings: Sequence[Embedding | None],
        probe_shifts: Sequence[float | None],
        actor: str,
    ) -> int:
        """The generation at which all of `staged` is live; `embeddings` and `probe_shifts` run along with it.

        What is live already, the same in digest, visibility and encoder, is not written again.
        Raises: AdapterRefused when a public name belongs to another tenant, VersionConflict.
        """
        created_at = self._now()
        records = [
            replace(
                item.record,
                embedding=embedding,
                probe_shift=shift,
                actor=actor,
                created_at=created_at,
            )
            for item, embedding, shift in zip(staged, embeddings, probe_shifts, strict=True)
        ]
        return self._catalogue.commit(lambda snapshot: _publish_events(snapshot, records))

    def load(self, weights_digest: str) -> bytes:
        """The weights' canonical bytes, for `decode_weights`. Raises: AdapterNotFound, BlobCorrupted."""
        return self._blobs.get(weights_digest)

    def samples(self, samples_digest: str) -> tuple[Sample, ...]:
        """Raises: AdapterNotFound, BlobCorrupted."""
        return parse_samples(self._blobs.get(samples_digest))

    def snapshot(self) -> Snapshot:
        return self._catalogue.snapshot()


def version_digest(label: Label, weights_digest: str, samples_digest: str | None, base_model: str) -> str:
    """sha256 over all that makes two versions the same one. Visibility is not part: it may change under a version."""
    parts = [weights_digest, samples_digest, label.template, list(label.tags), base_model]
    return digest_of(json.dumps(parts).encode())


def _record_of(label: Label, admitted: Admitted, weights_digest: str, samples_digest: str | None) -> AdapterRecord:
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
        num_bytes=0,
        num_samples=len(admitted.samples),
        template=label.template,
        embedding=None,
        probe_shift=None,
        source="",
        actor="",
        created_at=datetime.fromtimestamp(0, UTC),
        generation=0,
    )


def _publish_events(snapshot: Snapshot, records: Sequence[AdapterRecord]) -> list[Event]:
    """Publish events for what is not live yet, each record checked against those before it too.

    Raises: AdapterRefused when a public name belongs to another tenant.
    """
    live: dict[Key, AdapterRecord] = dict(snapshot.records)
    owners = {name: record.ref.tenant for name, record in snapshot.public.items()}
    events = []
    for record in records:
        tenant, name = record.ref.tenant, record.ref.name
        if record.visibility == "public" and owners.setdefault(name, tenant) != tenant:
            raise AdapterRefused(name, [f"the public name {name!r} belongs to another tenant"])
        if (tenant, name) not in live or _essence(live[tenant, name]) != _essence(record):
            live[tenant, name] = record
            events.append(Publish(record))
    return events


def _essence(record: AdapterRecord) -> tuple[str, str, str | None]:
    return record.ref.digest, record.visibility, record.encoder
