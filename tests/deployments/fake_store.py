"""A store in memory."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from ray.exceptions import RayActorError

from deployments.api.adapters import PublishItem
from deployments.calls.catalogue_clients import Buffer
from deployments.errors import ShapesUnknown, SourceMissing
from deployments.json_types import JsonObject
from lora_store import (
    AdapterNotFound,
    AdapterRecord,
    AdapterRef,
    AdapterRefused,
    Collected,
    Edit,
    Embedding,
    EncoderIncomplete,
    Feedback,
    Kept,
    Key,
    NamedPolicy,
    Precondition,
    Ranking,
    Sample,
    Staged,
    TenantQuota,
    Trial,
    VersionConflict,
    Visibility,
    Withdrawn,
    policy_digest,
)
from lora_store.adapter import Shapes
from lora_store.errors import PublicNameTaken
from lora_store.feedback import Kind
from lora_store.garbage_collection import BlobCheck, Verified
from lora_store.location import Location
from lora_store.rules import approve_name_events, name_events
from lora_store.snapshot import KEPT_VERSIONS
from lora_store.staging import changed_version, take_over
from lora_store.usage import UsageFiles, UsageQuery
from tests.deployments.adapter_records import POOL, adapter, digest_of, key_of
from tests.deployments.fake_names import FakeNames


@dataclass
class FakeStore:
    """The pool in memory, at generation 7.

    The first tag of an upload makes it another version. `refused`, `missing`, `without_samples`, `taken`: names of
    uploads that are refused, whose source does not exist, that have no samples, and that another tenant owns.
    `failing`: exceptions by method name, each raised as often as its number says.
    `dying`: methods after which the replica dies, so that their answers are lost, each as often as its number says.
    """

    live: dict[Key, tuple[AdapterRecord, ...]] = field(default_factory=dict)
    failing: dict[str, tuple[Exception, int]] = field(default_factory=dict)
    dying: dict[str, int] = field(default_factory=dict)
    generation: int = 7
    held: list[Staged] = field(default_factory=list)  # staged but neither committed nor discarded
    swept: list[str] = field(default_factory=list)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)  # of uploaded files, by id and number
    encoder: str | None = None  # identity of the encoder that a reindex activated
    incomplete: list[EncoderIncomplete] = field(default_factory=list)  # errors of activations, in turn
    refused: Collection[str] = ()
    missing: Collection[str] = ()
    without_samples: Collection[str] = ()
    without_shapes: Collection[str] = ()  # served base models whose workers have not told the shapes yet
    taken: Collection[str] = ()
    ranked: list[tuple[str, Sequence[Ranking]]] = field(default_factory=list)
    usage_files: UsageFiles | None = None
    given: dict[tuple[str, Kind, str], Feedback] = field(default_factory=dict)  # by tenant, kind and id
    model_names: FakeNames = field(default_factory=FakeNames)
    _leases: Iterator[int] = field(default_factory=itertools.count)
    _commits: dict[str, int] = field(default_factory=dict)  # generations by commit id

    async def stage(self, upload: PublishItem, shapes_by_model: Mapping[str, Shapes]) -> Staged:
        self._fail("stage")
        name = upload.adapter_name
        base_model = upload.base_model or ""
        if base_model in self.without_shapes and base_model not in shapes_by_model:
            raise ShapesUnknown(base_model)
        if name in self.refused:
            raise AdapterRefused(name, ["it is bad"])
        if name in self.missing:
            raise SourceMissing(name)
        kept = self.live.get((upload.tenant, name), (None,))[0]
        tags = (() if kept is None else kept.tags) if upload.tags is None else upload.tags
        has_samples = upload.has_samples and name not in self.without_samples
        record = adapter(name, version=tags[0] if tags else "", samples=has_samples, tenant=upload.tenant)
        record = replace(record, visibility=upload.visibility or upload.default_visibility)
        expires_at = None if upload.ttl_s is None else datetime.now(UTC) + timedelta(seconds=upload.ttl_s)
        if upload.share is not None:
            trial = Trial(record.ref.digest, upload.share, upload.is_shadow)
            record = replace(record, trial=trial, is_offered=True)
        template = (None if kept is None else kept.template) if upload.template is None else upload.template
        template = None if template == "server" else template
        staged = self._hold(replace(record, embedding=None, template=template, expires_at=expires_at))
        given: dict[Kept, object] = {"visibility": upload.visibility, "tags": upload.tags, "template": upload.template}
        return replace(staged, keeps=frozenset(field for field, value in given.items() if value is None))

    async def put_part(self, upload: str, number: int, data: Buffer) -> None:
        self._fail("put_part")
        self.parts.setdefault(upload, {})[number] = data.tobytes()

    async def delete_parts(self, uploads: Collection[str]) -> None:
        self._fail("delete_parts")
        for upload in uploads:
            del self.parts[upload]

    async def put_usage(self, segment: str, lines: bytes) -> None:
        self._fail("put_usage")
        self._usage().put(segment, lines, datetime.now(UTC), timedelta(9999))

    async def usage(self, query: UsageQuery) -> list[JsonObject]:
        self._fail("usage")
        return self._usage().sums(query)

    def _usage(self) -> UsageFiles:
        if self.usage_files is None:
            self.usage_files = UsageFiles(Location(tempfile.mkdtemp()))
        return self.usage_files

    async def restage(self, record: AdapterRecord) -> Staged:
        self._fail("restage")
        return self._hold(record)

    async def resample(self, live: AdapterRecord, samples: Sequence[Sample] | None) -> Staged:
        self._fail("resample")
        samples = [Sample("one"), Sample("two")] if samples is None else samples
        return self._hold_samples(live, samples)

    async def edit(self, live: AdapterRecord, edit: Edit) -> Staged:
        self._fail("edit")
        if edit.tags is not None and "auto" in edit.tags:
            raise AdapterRefused(live.ref.name, ["tag 'auto' must be another"])
        samples = [Sample("one"), Sample("two")] if edit.samples is None else edit.samples
        changes = {
            "tags": live.tags if edit.tags is None else edit.tags,
            "template": None if edit.template == "server" else edit.template or live.template,
            "visibility": edit.visibility or live.visibility,
            "contract": live.contract if edit.contract is None else edit.contract or None,
        }
        staged = self._hold_samples(live, samples, **changes)
        return replace(staged, keeps=frozenset() if edit.visibility else frozenset({"visibility"}))

    def _hold_samples(self, live: AdapterRecord, samples: Sequence[Sample], **changes: object) -> Staged:
        digest = digest_of("\n".join(sample.input for sample in samples))
        record = changed_version(live, samples_digest=digest, num_samples=len(samples), **changes)
        staged = replace(self._hold(record), samples=tuple(samples), replaces=live.ref.digest)
        self.held[-1] = staged
        return staged

    async def put_feedback(self, tenant: str, kind: Kind, feedback: Feedback) -> None:
        self._fail("put_feedback")
        self.given[tenant, kind, feedback.id] = feedback

    async def asked(self, tenant: str, request_id: str) -> Feedback | None:
        wanted = Feedback.of_request(request_id, "", None, "")
        return self.given.get((tenant, "asked", wanted.id))

    async def feedback(self, tenant: str, kind: Kind, adapter: str | None = None) -> list[Feedback]:
        found = [given for (owner, sort, _), given in self.given.items() if (owner, sort) == (tenant, kind)]
        return [given for given in found[::-1] if given.text and adapter in (None, given.adapter)]

    async def tenants_with_outcomes(self) -> list[str]:
        return list(dict.fromkeys(tenant for tenant, rankings in self.ranked if any(r.is_outcome for r in rankings)))

    async def delete_proposals(self, tenant: str, adapter: str, ids: Collection[str]) -> None:
        for id in ids:
            del self.given[tenant, "proposed", id]

    async def take_over(self, staged: Sequence[Staged]) -> list[Staged]:
        self._fail("take_over")
        return [
            replace(item, record=take_over(item.record, self.live[key_of(item.record)][0], item.keeps))
            if self._is_overtaken(item)
            else item
            for item in staged
        ]

    def _is_overtaken(self, item: Staged) -> bool:
        kept = self.live.get(key_of(item.record))
        return kept is not None and "tags" in item.keeps and kept[0].tags != item.record.tags

    async def commit(
        self,
        staged: Sequence[Staged],
        embeddings: Sequence[Embedding | None],
        probe_shifts: Sequence[float | None],
        actor: str,
        precondition: Precondition = "any",
        quota: TenantQuota | None = None,
        commit_id: str | None = None,
    ) -> int:
        self._fail("commit")
        if commit_id in self._commits:
            return self._commits[commit_id]
        if precondition == "kept" and any(item.ref not in self._kept(item.ref) for item in staged):
            raise AdapterNotFound(staged[0].ref.name)
        if precondition == "any" and any(map(self._is_overtaken, staged)):
            raise VersionConflict(1)
        self._refuse_names(staged)
        self.generation += 1
        for item, embedding, shift in zip(staged, embeddings, probe_shifts, strict=True):
            if precondition == "live" and self._kept(item.ref)[:1] != [item.ref]:
                continue
            record = replace(item.record, generation=self.generation, embedding=embedding, actor=actor)
            record = replace(record, probe_shift=shift)
            if record.is_offered:
                live, *older = self.live[key_of(record)]
                self.live[key_of(record)] = (replace(live, trial=record.trial), replace(record, trial=None), *older)
                continue
            older = [old for old in self.live.get(key_of(record), ()) if old.ref != record.ref]
            self.live[key_of(record)] = (record, *older)[:KEPT_VERSIONS]
        leases = {item.lease for item in staged}
        self.held = [item for item in self.held if item.lease not in leases]
        return self._committed("commit", commit_id)

    async def check_commit(self, staged: Sequence[Staged], quota: TenantQuota | None = None) -> None:
        self._fail("check_commit")
        self._refuse_names(staged)

    def _refuse_names(self, staged: Sequence[Staged]) -> None:
        for item in staged:
            if item.ref.name in self.taken:
                raise PublicNameTaken(item.ref.name, ["the public name belongs to another tenant"])
            if item.record.is_offered and not self.live.get(key_of(item.record)):
                raise AdapterRefused(item.ref.name, ["no live version exists to share requests with"])

    async def discard(self, staged: Sequence[Staged]) -> None:
        self._fail("discard")
        leases = {item.lease for item in staged}
        assert leases <= {item.lease for item in self.held}
        self.held = [item for item in self.held if item.lease not in leases]

    async def withdraw(self, tenant: str, names: Sequence[str], actor: str, commit_id: str | None = None) -> Withdrawn:
        self._fail("withdraw")
        if commit_id in self._commits:
            return Withdrawn(self._commits[commit_id], ())
        for name in names:
            if (tenant, name) not in self.live:
                raise AdapterNotFound(name)
        self.generation += 1
        records = tuple(old for name in names for old in self.live.pop((tenant, name)))
        return Withdrawn(self._committed("withdraw", commit_id), records)

    async def expire(self, commit_id: str | None = None) -> Withdrawn:
        self._fail("expire")
        now = datetime.now(UTC)
        gone = [key for key, kept in self.live.items() if kept[0].is_expired(now)]
        if not gone:
            return Withdrawn(0, ())
        self.generation += 1
        records = tuple(old for key in gone for old in self.live.pop(key))
        return Withdrawn(self._committed("expire", commit_id), records)

    async def set_visibility(self, tenant: str, name: str, visibility: Visibility, actor: str) -> int:
        self._fail("set_visibility")
        kept = self.live.get((tenant, name))
        if kept is None:
            raise AdapterNotFound(name)
        self.generation += 1
        self.live[tenant, name] = (replace(kept[0], visibility=visibility), *kept[1:])
        return self.generation

    async def set_name(self, key: Key, policy: str, actor: str) -> int:
        self._fail("set_name")
        named = NamedPolicy(AdapterRef(*key, policy_digest(policy)), policy, actor, datetime(2026, 1, 3, tzinfo=UTC))
        return self.model_names.commit(lambda snapshot: name_events(snapshot, named))

    async def approve_name(self, ref: AdapterRef) -> int:
        return self.model_names.commit(lambda snapshot: approve_name_events(snapshot, ref))

    async def set_trial(self, tenant: str, name: str, trial: Trial | None, actor: str) -> int:
        self._fail("set_trial")
        live, *older = self.live[tenant, name]
        if trial is not None and trial.digest not in [record.ref.digest for record in older]:
            raise AdapterNotFound(name)
        self.generation += 1
        self.live[tenant, name] = (replace(live, trial=trial), *older)
        return self.generation

    async def approve(self, refs: Sequence[AdapterRef], actor: str) -> int:
        self._fail("approve")
        self.generation += 1
        for ref in refs:
            [first, *older] = self.live[ref.tenant, ref.name]
            self.live[ref.tenant, ref.name] = (replace(first, approved=True), *older)
        return self.generation

    async def add_embeddings(self, embeddings: Mapping[AdapterRef, Embedding]) -> int:
        self._fail("add_embeddings")
        self.generation += 1
        return self.generation

    async def rank(
        self,
        tenant: str,
        rankings: Sequence[Ranking],
        actor: str,
        are_outcomes: bool = False,
        keeps: Sequence[AdapterRef] = (),
    ) -> int:
        self._fail("rank")
        self.ranked.append((tenant, rankings))
        self.generation += 1
        return self.generation

    async def activate_encoder(self, model: str, identity: str, actor: str) -> int:
        if self.incomplete:
            raise self.incomplete.pop(0)
        self.encoder = identity
        self.generation += 1
        return self.generation

    async def ping(self) -> None:
        self._fail("ping")

    async def active_encoder(self) -> str | None:
        self._fail("active_encoder")
        return self.encoder

    async def versions(self, keys: Collection[Key]) -> dict[Key, tuple[AdapterRecord, ...]]:
        self._fail("versions")
        return {key: self.live[key] for key in keys if key in self.live}

    async def unreferenced(self, digests: Collection[str]) -> list[str]:
        self._fail("unreferenced")
        needed = {digest for kept in self.live.values() for record in kept for digest in record.blobs}
        return sorted(set(digests) - needed)

    async def sweep(self, digests: Collection[str]) -> list[str]:
        self._fail("sweep")
        self.swept += digests
        return list(digests)

    async def fetch(self, digest: str, is_suspect: bool = False) -> list[Awaitable[Buffer]]:
        raise NotImplementedError

    async def release(self, digests: Collection[str]) -> bool:
        return True

    async def gc(self, retention_s: float) -> Collected:
        self._fail("gc")
        return Collected(3, 12, 1)

    async def pool_state(self, tenant: str | None) -> bytes:
        self._fail("pool_state")
        return b"" if tenant is None else tenant.encode()

    async def pool_part(self, tenant: str | None, name: str, number: int) -> bytes:
        self._fail("pool_part")
        parts = self.parts.get(name, {})
        if number not in parts:
            raise AdapterNotFound(name)
        return parts[number]

    async def verify(self, tenant: str) -> AsyncGenerator[Verified]:
        self._fail("verify")
        checks = [BlobCheck(digest_of("a"), POOL[0].ref, None), BlobCheck(digest_of("b"), POOL[1].ref, "is missing")]
        for number, check in enumerate(checks, start=1):
            yield Verified(number, len(checks), check)

    def _kept(self, ref: AdapterRef) -> list[AdapterRef]:
        return [record.ref for record in self.live.get((ref.tenant, ref.name), ())]

    def _hold(self, record: AdapterRecord) -> Staged:
        samples = (Sample("one"), Sample("two")) if record.samples_digest else ()
        staged = Staged(record, samples, f"lease-{next(self._leases)}")
        self.held.append(staged)
        return staged

    def _committed(self, method: str, commit_id: str | None) -> int:
        """Record the call by its id and return the generation. Raises: RayActorError if its replica dies."""
        if commit_id is not None:
            self._commits[commit_id] = self.generation
        if self.dying.get(method, 0) > 0:
            self.dying[method] -= 1
            raise RayActorError()
        return self.generation

    def _fail(self, method: str) -> None:
        if method in self.failing:
            error, times = self.failing.pop(method)
            if times > 1:
                self.failing[method] = error, times - 1
            raise error
