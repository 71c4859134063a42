"""The adapter store. `stage` validates a folder and writes its blobs; `commit` makes many versions visible at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import LOCAL_TENANT, AdapterRef, Sample, Shapes, is_valid_name
from lora_store.ballast import Ballast
from lora_store.blobs import BlobStore
from lora_store.bounded_files import Limits
from lora_store.catalogue import CATALOGUE, Catalogue
from lora_store.conditional_writes import check_conditional_writes
from lora_store.contract_files import GIVEN, ReadContract
from lora_store.data_files import DATA_SUFFIX
from lora_store.errors import (
    AdapterNotFound,
    AdapterRefused,
    BlobCorrupted,
    FileRefused,
    StoreDamaged,
    StoreUnavailable,
)
from lora_store.events import Event, Withdraw
from lora_store.feedback import FeedbackFiles
from lora_store.files import Files
from lora_store.garbage_collection import PROJECTIONS, BlobCheck, Collected, GarbageCollector
from lora_store.leases import Leases
from lora_store.location import Location
from lora_store.names import NamedPolicy, policy_digest
from lora_store.pool_files import PART_BYTES, PoolState, blob_file, check_finished, is_projection
from lora_store.quota import TenantQuota, check_quota
from lora_store.rankings import Ranking
from lora_store.records import AdapterRecord, Embedding, Visibility
from lora_store.rules import (
    Precondition,
    activate_events,
    approve_events,
    approve_name_events,
    embed_events,
    expire_events,
    name_events,
    publish_events,
    rank_events,
    trial_events,
    visibility_events,
    withdraw_events,
)
from lora_store.sample_files import checked_sample, parse_samples, write_samples
from lora_store.snapshot import EVERYBODY, ActiveEncoder, Key, Snapshot
from lora_store.staging import Edit, Kept, Staged, changed_version, staged_record, take_over, uncommitted
from lora_store.table_log import LOG
from lora_store.trials import Trial
from lora_store.uploads import Uploads
from lora_store.usage import UsageFiles
from lora_store.validation import (
    NO_CHAT_TEMPLATE,
    SERVER_TEMPLATE,
    CheckedFolder,
    Label,
    check_folder,
    lacks_chat_template,
)
from lora_store.weights_blob import WeightsBlob, hash_blob

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The result of a withdrawal: the generation without the names, and every version that was withdrawn."""

    generation: int
    records: tuple[AdapterRecord, ...]


class LoraStore:
    """The adapters under one URI: blobs by digest, and the catalogue of live adapters. Versions never change.

    Every method may raise StoreUnavailable; then nothing is lost, and the caller may retry later. Withdrawals and
    collections work on a full disk. Every method may raise StoreDamaged, and StoreIsNewer.

    A change that is made already commits nothing. It returns the newest generation that the tenant can see, and an
    approval or an encoder the newest one that every tenant can see.
    """

    def __init__(
        self,
        uri: str,
        *,
        accepts_base: Collection[str],
        read_contract: ReadContract | None = None,
        limits: Limits | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """`read_contract`: how an adapter's contract is read; None ignores it."""
        self._accepts_base, self._limits = frozenset(accepts_base), limits
        self._read_contract = read_contract
        self._now = now
        self._location = location = Location.of_store(uri)
        self._files = Files(location)
        self._blobs = BlobStore(location.child("blobs"))
        self._leases = Leases(location, now, sleep)
        check_finished(location)
        self._catalogue = Catalogue(location.child(CATALOGUE), sleep, before_creating=self._require_new)
        self.uploads = Uploads(location.child("uploads"))
        self.feedback = FeedbackFiles(location.child("feedback"))
        self.usage = UsageFiles(location.child("usage"))
        projections = Files(location.child(PROJECTIONS))
        self._ballast = Ballast(location)
        self._own_blobs: tuple[Snapshot | None, str, Collection[str]] = (None, "", ())  # for the tenant that exports
        self._collector = GarbageCollector(self._blobs, self._leases, self._catalogue, projections, self.uploads, now)

    @property
    def is_new(self) -> bool:
        """Whether this object created the pool."""
        return self._catalogue.is_new

    def check_writes(self, environment: Mapping[str, str]) -> None:
        """Check that two writers cannot overwrite each other. Raises: ConditionalWritesMissing."""
        check_conditional_writes(self._location, environment)

    def stage(
        self,
        folder: Path,
        *,
        tenant: str = LOCAL_TENANT,
        name: str | None = None,
        tags: Collection[str] | None = None,
        template: str | None = None,
        contract: str | None = None,
        visibility: Visibility = "public",
        keeps_visibility: bool = False,
        has_samples: bool = True,
        source: str | None = None,
        ttl_s: float | None = None,
        share: float | None = None,
        is_shadow: bool = False,
        base_model: str | None = None,
        module_shapes: Shapes | None = None,
        templates: Mapping[str, str] | None = None,
        read_contract: ReadContract | None = None,
        is_private: bool = False,
        quota: TenantQuota | None = None,
    ) -> Staged:
        """Validate the folder, write its blobs, and lease them until `commit` or `discard`.

        `name` and `source` default to the folder's name, `base_model` to the one that it names. `module_shapes`: (out,
        in) of each linear layer that an adapter may change. `templates`: the names of the known chat templates, by
        digest; None accepts any and ignores it. `ttl_s`: the adapter is unlisted, expires then, and has no
        samples. `share`: of the live version's requests, as a trial. `is_private`: no other process can change the
        folder meanwhile.

        A new version of a live name keeps what is not given. `tags`: None keeps. `template`: None keeps; "server" names
        none; for a new name None takes the folder's. `contract`: JSON; None takes the folder's, and without one keeps;
        "" for none. `read_contract`: how it is read for this base model. `keeps_visibility`: `visibility` is for new
        names only. A folder without samples keeps the live ones, and so does one with those that are not accepted
        prompts. A description replaces a single live sample only.
        `has_samples`: False publishes it without any. `quota`: of the tenant, which this adapter alone must fit; the
        commit checks all adapters of a publish together.
        Raises: AdapterRefused with every reason, QuotaExceeded; nothing is written then.
        """
        self._ballast.fill()
        name = folder.name if name is None else name
        live = self.snapshot().records.get((tenant, name)) if is_valid_name(name) else None
        label = _make_label(name, tenant, tags, template, visibility, live)
        label = replace(label, base_model=base_model, contract=contract)
        checked = check_folder(
            folder,
            label,
            accepts_base=self._accepts_base,
            module_shapes=module_shapes,
            templates=templates,
            read_contract=read_contract or self._read_contract,
            limits=self._limits,
            is_private=is_private,
        )
        keeps_contract = contract is None and checked.contract is None
        if keeps_contract and live is not None:
            checked = replace(checked, contract=live.contract)
        has_samples = has_samples and ttl_s is None
        if not has_samples:
            checked = replace(checked, samples=())
        expires_at = None if ttl_s is None else self._now() + timedelta(seconds=ttl_s)
        has_few = has_samples and (checked.is_described or not checked.samples)
        are_same = live is not None and not has_few and self._are_own_samples(checked.samples, live)
        has_live_more = live is not None and live.num_samples > len(checked.samples)
        kept_samples = live if has_live_more and (has_few or are_same) else None
        staged = self._stage_checked(
            label, checked, folder.name if source is None else source, expires_at, kept_samples, quota
        )
        if share is not None:
            trial = Trial(staged.ref.digest, share, is_shadow)
            staged = replace(staged, record=replace(staged.record, trial=trial, is_offered=True))
        are_kept: dict[Kept, bool] = {
            "visibility": keeps_visibility,
            "tags": tags is None,
            "template": template is None,
            "contract": keeps_contract,
            "samples": has_few and (has_live_more or not checked.samples),
            "same_samples": are_same,
            "several_samples": has_samples and checked.is_described,
        }
        keeps = frozenset(field for field, is_kept in are_kept.items() if is_kept)
        return replace(staged, keeps=keeps, warnings=checked.warnings)

    def _are_own_samples(self, samples: tuple[Sample, ...], live: AdapterRecord) -> bool:
        """Return whether these are the live version's samples without those that were accepted."""
        if samples and live.samples_digest is not None:
            with suppress(AdapterNotFound, BlobCorrupted):  # a publish replaces them
                return samples == _without_accepted(self.samples(live.samples_digest))
        return False

    def _stage_checked(
        self,
        label: Label,
        checked: CheckedFolder,
        source: str,
        expires_at: datetime | None,
        kept_samples: AdapterRecord | None,
        quota: TenantQuota | None,
    ) -> Staged:
        """`kept_samples`: the live version whose samples it takes over."""
        label = replace(label, template=checked.template, contract=checked.contract or None)
        weights = WeightsBlob(checked.stored)
        weights_digest = weights.digest()
        samples = write_samples(checked.samples) if checked.samples and kept_samples is None else None
        record = staged_record(
            label,
            checked,
            weights_digest=weights_digest,
            samples_digest=None if samples is None else hash_blob(samples),
            num_bytes=weights.num_bytes(),
            source=source,
            expires_at=expires_at,
        )
        if kept_samples is not None:
            record = take_over(record, kept_samples, ["samples"])
        if quota is not None:
            check_quota(self.snapshot(), [record], quota)
        return self._stage_leased(record, partial(self._write, record, weights, samples, checked.samples))

    def restage(self, record: AdapterRecord) -> Staged:
        """Stage a version that the catalogue keeps: lease its blobs, check that they exist, and read its samples.

        The commit keeps the name's current visibility, whatever the visibility of this version was.
        Raises: AdapterNotFound if its blobs were deleted; BlobCorrupted.
        """
        staged = self._stage_leased(uncommitted(record), lambda: self._find(record))
        return replace(staged, keeps=frozenset({"visibility"}))

    def resample(self, live: AdapterRecord, samples: Sequence[Sample] | None) -> Staged:
        """Stage the weights of the live version with other samples, or None for its own without accepted ones.

        The commit fails if another version is live by then.
        Raises: AdapterNotFound if its blobs were deleted; AdapterRefused if it has no samples.
        """
        if live.samples_digest is None:
            raise AdapterRefused(live.ref.name, ["it has no samples: publish it with samples first"])
        if samples is None:
            samples = _without_accepted(self.samples(live.samples_digest))
        return self._stage_changed(live, changed_version(live, **_describe_samples(samples)), tuple(samples))

    def edit(
        self,
        live: AdapterRecord,
        edit: Edit,
        read_contract: ReadContract | None = None,
        templates: Mapping[str, str] | None = None,
    ) -> Staged:
        """Stage the weights of the live version with these changes. `read_contract`, `templates`: of its base model.

        The commit fails if another version is live by then. An accepted prompt stays marked as one.
        Raises: AdapterRefused with every reason; AdapterNotFound if its blobs were deleted.
        """
        name, tenant = live.ref.name, live.ref.tenant
        label = _make_label(name, tenant, edit.tags, edit.template, edit.visibility or live.visibility, live)
        reasons = list(label.problems())
        if lacks_chat_template(edit.template, templates):
            reasons.append(NO_CHAT_TEMPLATE)
        samples = None if edit.samples is None else self._checked_samples(live, edit.samples, reasons)
        read = read_contract or self._read_contract
        if edit.contract and read is not None:
            try:
                read(GIVEN, edit.contract.encode())
            except FileRefused as exc:
                reasons += [f"{exc.file}: {problem}" for problem in exc.problems]
        if reasons:
            raise AdapterRefused(name, reasons)
        template = None if label.template == SERVER_TEMPLATE else label.template
        changes: dict[str, Any] = {"tags": label.tags, "template": template, "visibility": label.visibility}
        if edit.contract is not None:
            changes["contract"] = edit.contract or None
        if samples is not None:
            changes |= _describe_samples(samples)
        staged = self._stage_changed(live, changed_version(live, **changes), samples)
        return staged if edit.visibility is None else replace(staged, keeps=frozenset())

    def _checked_samples(self, live: AdapterRecord, given: Sequence[Sample], reasons: list[str]) -> tuple[Sample, ...]:
        """Return the samples as they are stored. Add what is wrong with them to `reasons`."""
        limits = self._limits or Limits()
        if live.is_unlisted and given:
            reasons.append("samples: an adapter with ttl_s has none; publish it without ttl_s first")
        if len(given) > limits.max_samples:
            reasons.append(f"samples: at most {limits.max_samples}, got {len(given)}; send fewer")
        accepted = {sample for sample in self._find(live) if sample.is_accepted}
        samples = []
        for number, sample in enumerate(given, start=1):
            try:
                checked = checked_sample(sample.input, sample.output, limits.max_sample_bytes)
            except ValueError as exc:
                reasons.append(f"samples: number {number} {exc}")
            else:
                marked = replace(checked, is_accepted=True)
                samples.append(marked if marked in accepted else checked)
        return tuple(samples)

    def _stage_changed(self, live: AdapterRecord, record: AdapterRecord, samples: tuple[Sample, ...] | None) -> Staged:
        """Stage another version of the live one's weights, with these samples, or None for its own."""

        def write() -> tuple[Sample, ...]:
            if samples is None:
                return self._find(record)
            if live.weights_digest not in self._blobs:
                raise AdapterNotFound(str(live.ref))
            if samples:
                self._blobs.put(write_samples(samples))
            return samples

        staged = self._stage_leased(record, write)
        return replace(staged, keeps=frozenset({"visibility"}), replaces=live.ref.digest)

    def take_over(self, staged: Sequence[Staged]) -> list[Staged]:
        """Return them with what they keep of the versions that are live now, after a commit that failed for that.

        A version that takes over other samples has another lease. Raises: AdapterNotFound, BlobCorrupted.
        """
        snapshot, taken = self.snapshot(), list[Staged]()
        try:
            for item in staged:
                taken.append(self._take_over(item, snapshot.records.get(item.ref.key)))
        except BaseException:
            self._try_to_release(sorted({item.lease for item in taken} - {item.lease for item in staged}))
            raise
        return taken

    def _take_over(self, staged: Staged, live: AdapterRecord | None) -> Staged:
        keeps = staged.keeps
        given: tuple[Sample, ...] = ()
        if live is not None and "same_samples" in keeps and live.samples_digest != staged.record.samples_digest:
            own = _without_accepted(staged.samples)
            if not self._are_own_samples(own, live):
                given = own
                keeps -= {"same_samples"}
                live = replace(live, **_describe_samples(given))
        record = staged.record if live is None else take_over(staged.record, live, staged.keeps)
        if record.samples_digest == staged.record.samples_digest:
            return replace(staged, record=record, keeps=keeps)
        if "several_samples" in keeps:
            keeps |= {"samples"}
        again = self._stage_leased(record, lambda: self._find(record, given))
        return replace(staged, record=record, samples=again.samples, lease=again.lease, keeps=keeps)

    def commit(
        self,
        staged: Sequence[Staged],
        embeddings: Sequence[Embedding | None],
        probe_shifts: Sequence[float | None],
        actor: str,
        precondition: Precondition = "any",
        quota: TenantQuota | None = None,
        commit_id: str | None = None,
    ) -> int:
        """Make all of `staged` live and return the generation. `embeddings` and `probe_shifts` have one entry per item.

        Skip versions that are live with the same digest, visibility and encoder. On success release the leases; after
        an error those of `staged` remain, for another attempt or `discard`.
        `precondition`: what the versions must be in the newest state; "live" needs no lease and keeps the visibility.
        `quota`: the limit for their tenant, checked against the newest state.
        `commit_id`: a repeated call with the same id commits nothing and returns the generation of the first call.
        Raises: PublicNameTaken; QuotaExceeded; VersionConflict, also if another publish changed what a version keeps:
        then use `take_over`; AdapterNotFound if a version was staged so long ago that its lease expired and its
        blobs were deleted, or if it is not kept although `precondition` requires it; StoreUnavailable also if a blob
        was deleted meanwhile.
        """
        created_at = self._now()
        records = [
            replace(item.record, embedding=embedding, probe_shift=shift, actor=actor, created_at=created_at)
            for item, embedding, shift in zip(staged, embeddings, probe_shifts, strict=True)
        ]
        leased = () if precondition == "live" else staged
        renewed: list[str] = []
        arguments = _make_arguments(staged)
        try:
            for item in leased:
                if not self._leases.is_safe(item.lease):
                    renewed.append(self.restage(item.record).lease)
            generation = self._catalogue.commit(
                lambda snapshot: publish_events(snapshot, records, precondition, quota=quota, **arguments),
                commit_id,
                tenant=staged[0].ref.tenant if staged else EVERYBODY,
            )
        except StoreUnavailable:  # it may be committed
            raise
        except BaseException:
            self._try_to_release(renewed)
            raise
        self._require_blobs([item.record for item in leased])
        self._try_to_release([*(item.lease for item in staged), *renewed])
        return generation

    def check_commit(self, staged: Sequence[Staged], quota: TenantQuota | None = None) -> None:
        """Raise what `commit` of these would raise in the newest state, but for blobs."""
        records = [item.record for item in staged]
        publish_events(self.snapshot(), records, quota=quota, **_make_arguments(staged))

    def discard(self, staged: Sequence[Staged]) -> None:
        """Give up these staged versions: release their leases and delete the blobs that nothing else uses."""
        self._leases.release([item.lease for item in staged])
        self.sweep([digest for item in staged for digest in item.record.blobs])

    def withdraw(self, tenant: str, names: Sequence[str], actor: str, commit_id: str | None = None) -> Withdrawn:
        """Withdraw all of `names` with all their versions, or none. Their blobs remain until a sweep.

        `commit_id`: a repeated call with the same id withdraws nothing and returns the generation of the first call.
        Raises: AdapterNotFound for a name that is not live; VersionConflict.
        """
        keys, at = [(tenant, name) for name in names], self._now()
        withdrawn = self._withdraw(lambda snapshot: withdraw_events(snapshot, keys, actor, at), commit_id)
        self._delete_proposals(keys)
        return withdrawn

    def expire(self, commit_id: str | None = None) -> Withdrawn:
        """Withdraw the unlisted adapters whose time to live is over, as `withdraw` does. Generation 0: there are none.

        A repeated call with the same id returns no records.
        """
        at = self._now()
        if not expire_events(self.snapshot(), at):
            return Withdrawn(0, ())
        withdrawn = self._withdraw(lambda snapshot: expire_events(snapshot, at), commit_id)
        self._delete_proposals({record.ref.key for record in withdrawn.records})
        return withdrawn

    def _withdraw(self, find: Callable[[Snapshot], list[Withdraw]], commit_id: str | None) -> Withdrawn:
        """Commit the withdrawals that `find` returns for a snapshot. Return the versions that are gone."""
        gone: list[AdapterRecord] = []

        def events(snapshot: Snapshot) -> list[Withdraw]:
            wanted = find(snapshot)
            gone[:] = [record for event in wanted for record in snapshot.versions(event.ref.key)]
            return wanted

        generation = self._commit_on_full_disk(events, commit_id)
        return Withdrawn(generation, tuple(gone))

    def _delete_proposals(self, keys: Iterable[Key]) -> None:
        """Delete the prompts proposed for adapters that were withdrawn. A failure does not undo the withdrawal."""
        for tenant, name in keys:
            try:
                self.feedback.delete(tenant, name)
            except StoreUnavailable as exc:
                logger.warning("the prompts proposed for %s stay until they are too old: %s", name, exc)

    def set_visibility(self, tenant: str, name: str, visibility: Visibility, actor: str) -> int:
        """Set the visibility and return the generation. Raises: AdapterNotFound, PublicNameTaken, VersionConflict."""
        at = self._now()
        return self._catalogue.commit(
            lambda snapshot: visibility_events(snapshot, (tenant, name), visibility, actor, at), tenant=tenant
        )

    def set_trial(self, tenant: str, name: str, trial: Trial | None, actor: str) -> int:
        """Let a kept version answer a share of the name's requests, or none, and return the generation.

        Raises: AdapterNotFound, AdapterRefused, VersionConflict.
        """
        at = self._now()
        return self._catalogue.commit(
            lambda snapshot: trial_events(snapshot, (tenant, name), trial, actor, at), tenant=tenant
        )

    def approve(self, refs: Sequence[AdapterRef], actor: str) -> int:
        """Let `auto` choose these public versions for every tenant, and return the generation.

        Raises: AdapterNotFound for a version that is not live or not public; VersionConflict.
        """
        at = self._now()
        return self._catalogue.commit(lambda snapshot: approve_events(snapshot, refs, actor, at), tenant=EVERYBODY)

    def set_name(self, key: Key, policy: str, actor: str) -> int:
        """Make this policy, in JSON, the newest of a model name, and return the generation; "" removes the name.

        Raises: NameTaken, QuotaExceeded, VersionConflict; AdapterNotFound for a name to remove that does not exist.
        """
        named = NamedPolicy(AdapterRef(*key, policy_digest(policy)), policy, actor, self._now())
        return self._catalogue.commit(lambda snapshot: name_events(snapshot, named), tenant=key[0])

    def approve_name(self, ref: AdapterRef) -> int:
        """Let every tenant use this version of a name, and return the generation.

        Raises: AdapterNotFound for a version that is not kept; NameTaken, VersionConflict.
        """
        return self._catalogue.commit(lambda snapshot: approve_name_events(snapshot, ref), tenant=EVERYBODY)

    def add_embeddings(self, embeddings: Mapping[AdapterRef, Embedding]) -> int:
        """Add embeddings by an encoder that is to be activated, and return the generation. Skip versions not live."""
        return self._catalogue.commit(lambda snapshot: embed_events(snapshot, embeddings))

    def activate_encoder(self, model: str, identity: str, actor: str) -> int:
        """Search by this encoder's embeddings from now on, and return the generation.

        Raises: EncoderIncomplete if a live adapter with samples has no embedding by this encoder.
        """
        encoder, at = ActiveEncoder(model, identity), self._now()
        return self._catalogue.commit(lambda snapshot: activate_events(snapshot, encoder, actor, at), tenant=EVERYBODY)

    def rank(
        self,
        tenant: str,
        rankings: Sequence[Ranking],
        actor: str,
        are_outcomes: bool = False,
        keeps: Sequence[AdapterRef] = (),
    ) -> int:
        """Replace the rankings that `auto` of this tenant uses, and return the generation. See `rank_events`."""
        at = self._now()
        return self._catalogue.commit(
            lambda snapshot: rank_events(snapshot, tenant, rankings, actor, at, are_outcomes=are_outcomes, keeps=keeps),
            tenant=tenant,
        )

    def load(self, weights_digest: str) -> bytes:
        """Return the weights' canonical bytes, for `decode_weights`. Raises: AdapterNotFound, BlobCorrupted."""
        return self._blobs.get(weights_digest)

    def read_parts(self, weights_digest: str) -> Iterator[NDArray[np.uint8]]:
        """Yield the same bytes part by part. The reader hashes them. Raises: AdapterNotFound."""
        return self._blobs.read_parts(weights_digest)

    def check(self, weights_digest: str) -> None:
        """Hash the stored bytes. Raises: AdapterNotFound, BlobCorrupted."""
        self._blobs.check(weights_digest)

    def samples(self, samples_digest: str) -> tuple[Sample, ...]:
        """Return the samples. Raises: AdapterNotFound, BlobCorrupted."""
        return parse_samples(self._blobs.get(samples_digest))

    def pool_state(self, tenant: str | None) -> PoolState:
        """Return the newest state of the pool with its files, or of one tenant's adapters. Raises: StoreIsNewer."""
        self._catalogue.check_known("copy the pool")
        state = PoolState.of_store(self.snapshot(), self._files)
        return state if tenant is None else state.of_tenant(tenant)

    def pool_part(self, tenant: str | None, name: str, number: int) -> bytes:
        """Return part `number`, of `PART_BYTES` except the last, of a file of that state. Raises: AdapterNotFound."""
        digest = name.rpartition("/")[2]
        is_known = is_projection(name) or (name == blob_file(digest) and self._has_blob(tenant, digest))
        part = self._files.read_part(name, number * PART_BYTES, PART_BYTES) if is_known else None
        if part is None:
            raise AdapterNotFound(name[:100])
        return part

    def _has_blob(self, tenant: str | None, digest: str) -> bool:
        snapshot = self.snapshot()
        if tenant is None:
            return digest in snapshot.referenced()
        of, owner, blobs = self._own_blobs
        if of is not snapshot or owner != tenant:  # an export asks for each of its files
            blobs = PoolState(snapshot).of_tenant(tenant).blobs().keys()
            self._own_blobs = (snapshot, tenant, blobs)
        return digest in blobs

    def snapshot(self) -> Snapshot:
        """Return the newest state of the pool."""
        return self._catalogue.snapshot()

    def snapshot_at(self, generation: int) -> Snapshot:
        """Return the state at `generation`. Blobs of adapters withdrawn since may be gone. Raises: GenerationGone."""
        return self._catalogue.snapshot_at(generation)

    def sweep(self, digests: Collection[str]) -> list[str]:
        """Delete those blobs that no kept version uses and no publish has leased. Return the digests deleted."""
        return self._ballast.spend(lambda: self._collector.sweep(digests))

    def gc(self, retention_s: float) -> Collected:
        """Delete unused blobs, projections and files older than `retention_s`, as crashes and rivals leave them."""
        try:
            self.feedback.delete_old(self._now())
            return self._ballast.spend(lambda: self._collector.gc(retention_s))
        finally:
            self._ballast.fill()

    def to_verify(self, tenant: str | None = None) -> dict[str, AdapterRef]:
        """Return the blobs that kept versions use, each with one such version; only those `tenant` sees, if given."""
        return self._collector.to_verify(tenant)

    def verify(self, wanted: Mapping[str, AdapterRef] | None = None) -> Iterator[BlobCheck]:
        """Read and hash these blobs, or all that kept versions use. Yield one result per blob."""
        return self._collector.verify(self.to_verify() if wanted is None else wanted)

    def _commit_on_full_disk(self, events: Callable[[Snapshot], Sequence[Event]], commit_id: str | None) -> int:
        """Commit, once, even if the disk is full."""
        commit_id = commit_id or uuid4().hex
        return self._ballast.spend(lambda: self._catalogue.commit(events, commit_id))

    def _require_new(self) -> None:
        """Check that a catalogue may be created: the location holds no blobs and nothing of a catalogue.

        Raises: StoreDamaged.
        """
        num_blobs = len(self._blobs.files())
        files = Files(self._location.child(CATALOGUE)).entries()
        data_files = [file for file in files if file.name.endswith(DATA_SUFFIX)]
        if num_blobs or data_files:
            raise StoreDamaged(
                f"{self._location.uri}/{CATALOGUE}/{LOG}",
                f"is missing, but {num_blobs} blobs and {len(data_files)} data files of its catalogue are there",
                "mount its volume or restore a copy; with its data files, `loraretriever pool repair --store"
                f" {self._location.uri}` restores it; to begin a new pool, name another store_uri or first move `blobs`"
                " and `catalogue` elsewhere",
            )

    def _stage_leased(self, record: AdapterRecord, prepare: Callable[[], tuple[Sample, ...]]) -> Staged:
        """Lease the record's blobs, then call `prepare`. Release the lease if that fails."""
        lease = self._leases.acquire(record.blobs)
        try:
            return Staged(record, prepare(), lease)
        except BaseException:
            self._try_to_release([lease])
            raise

    def _require_blobs(self, records: Collection[AdapterRecord]) -> None:
        """Check that what was just committed is still stored. Raises: StoreUnavailable; then publish again.

        A lease fails where the clocks of the store's machines differ too much: a sweep takes it for an expired one.
        """
        missing = self._blobs.missing([digest for record in records for digest in record.blobs])
        if missing:
            raise StoreUnavailable(
                f"{len(missing)} blobs were deleted while they were published, such as {missing[0]}: set the clocks of"
                " the machines that use this store, and publish again"
            )

    def _write(
        self, record: AdapterRecord, weights: WeightsBlob, samples_file: bytes | None, samples: tuple[Sample, ...]
    ) -> tuple[Sample, ...]:
        """Write the blobs and return the samples. Without a `samples_file` they are in the store, or none."""
        self._blobs.put_pieces(record.weights_digest, weights.pieces)
        if samples_file is not None:
            self._blobs.put(samples_file)
            return samples
        return () if record.samples_digest is None else self.samples(record.samples_digest)

    def _find(self, record: AdapterRecord, samples: Sequence[Sample] = ()) -> tuple[Sample, ...]:
        """Return the record's samples, written first if given. Raises: AdapterNotFound if a blob was deleted."""
        if samples:
            self._blobs.put(write_samples(samples))
        if not all(digest in self._blobs for digest in record.blobs):
            raise AdapterNotFound(str(record.ref))
        return self.samples(record.samples_digest) if record.samples_digest is not None else ()

    def _try_to_release(self, leases: Collection[str]) -> None:
        """Release the leases. Those that cannot be deleted now expire by themselves."""
        try:
            self._leases.release(leases)
        except StoreUnavailable as exc:
            logger.warning("cannot release %d leases; they expire by themselves: %s", len(leases), exc.cause)


def _make_arguments(staged: Sequence[Staged]) -> dict[str, Any]:
    """Return arguments of `publish_events`: what each version keeps, and which version it replaces."""
    return {
        "keeps": {item.ref: item.keeps for item in staged},
        "replaces": {item.ref: item.replaces for item in staged if item.replaces is not None},
    }


def _make_label(
    name: str,
    tenant: str,
    tags: Collection[str] | None,
    template: str | None,
    visibility: Visibility,
    live: AdapterRecord | None,
) -> Label:
    """Return the label of a new version: what is None is that of the live version."""
    if live is not None:
        tags = live.tags if tags is None else tags
        template = (live.template or SERVER_TEMPLATE) if template is None else template
    return Label(name, tenant, tuple(sorted(set(tags or ()))), template, visibility)


def _without_accepted(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    return tuple(sample for sample in samples if not sample.is_accepted)


def _describe_samples(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the digest and the number of the samples, as fields of a record."""
    return {"samples_digest": hash_blob(write_samples(samples)) if samples else None, "num_samples": len(samples)}
