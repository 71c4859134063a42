"""The adapters of one generation, and the part of them that each caller may use."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, count
from operator import is_not
from typing import Generic, TypeVar

import numpy as np

from lora_store.errors import AdapterNotFound
from lora_store.lru_cache import LruCache
from lora_store.persistent_map import PersistentMap
from lora_store.records import AdapterRecord
from lora_store.snapshot import Key, Snapshot
from retriever_svc.calibration import Abstain, Candidates, Floats, judge
from retriever_svc.encoder import Encoder, Vectors
from retriever_svc.index import AdapterIndex, Allowed, IndexSettings, Match
from retriever_svc.inverted_lists import InvertedLists
from retriever_svc.listing import Listings, listed
from retriever_svc.map_layout import MAX_NAME_CHARS, MAX_POINTS, Layout
from retriever_svc.ordinary_prompts import centred, nearness, nearness_by_group, refers_back
from retriever_svc.planning import resolve
from retriever_svc.preferences import Preferences
from retriever_svc.projection import PoolMap
from retriever_svc.served_bases import EVERY_BASE, BaseCounts, ServedBases

_TRUSTED = "trusted"
Value = TypeVar("Value")
_MAX_VALUES = 256  # callers choose the keys, so their number must be bounded
_MAX_POINTS_KEPT = 32 * MAX_POINTS  # of all callers' maps
_BLOCK = 4096  # records compared at a time; other threads may run in between
_WIDER = 16  # times as many are searched again where equal weights hide others: each search reads all that tie


def _count_points(drawn: tuple[Layout, PoolMap]) -> int:
    """Return the size of a map in points, at least what makes room for `_MAX_VALUES` small ones."""
    return max(len(drawn[1].names), _MAX_POINTS_KEPT // _MAX_VALUES)


class PerCallerCache(Generic[Value]):
    """Values by caller. Two threads may compute the same value at once; both results are equal."""

    def __init__(self, getsizeof: Callable[[Value], int] = lambda _: 1, maxsize: int = _MAX_VALUES) -> None:
        self._values: LruCache[tuple[str, ...], Value] = LruCache(maxsize, getsizeof)
        self._lock = threading.Lock()

    def get(self, key: tuple[str, ...], compute: Callable[[], Value]) -> Value:
        """Return the cached value of `key`, or compute and cache it."""
        with self._lock:
            cached = self._values.get(key)
        if cached is not None:
            return cached
        value = compute()
        with self._lock:
            self._values.put(key, value)
        return value


@dataclass(frozen=True, slots=True)
class Pool:
    """One generation: its snapshot, encoder, and index of the adapters that this encoder embedded. Immutable.

    The snapshot has every adapter. Those of a base model that is not in `bases` are in no index, list or count.
    """

    snapshot: Snapshot
    encoder: Encoder
    index: AdapterIndex
    ordinary: Vectors | None = None  # (J, D) of ordinary prompts, by the same encoder
    bases: ServedBases = EVERY_BASE
    centre: Vectors | None = None  # (D,), of an encoder without projection (see `ordinary_prompts.centred`)
    _allowed: PerCallerCache[Allowed] = field(default_factory=PerCallerCache)
    _allowed_by_tags: PerCallerCache[Allowed] = field(default_factory=PerCallerCache)  # new tags evict no entry without
    _maps: PerCallerCache[tuple[Layout, PoolMap]] = field(
        default_factory=lambda: PerCallerCache(_count_points, _MAX_POINTS_KEPT)
    )
    _preferences: PerCallerCache[Preferences] = field(default_factory=PerCallerCache)
    _counts: PerCallerCache[int] = field(default_factory=PerCallerCache)
    _unserved: PerCallerCache[BaseCounts] = field(default_factory=PerCallerCache)
    _near_ordinary: dict[int, tuple[float, float]] = field(default_factory=dict)  # by the hash of the vector
    listings: Listings = field(init=False)
    references: Vectors | None = field(init=False)  # the ordinary prompts, from the centre

    def __post_init__(self) -> None:
        object.__setattr__(self, "listings", Listings(self.snapshot, self.bases))
        references = None if self.ordinary is None else centred(self.ordinary, self.centre)
        object.__setattr__(self, "references", references)

    @classmethod
    def of(
        cls,
        snapshot: Snapshot,
        encoder: Encoder,
        settings: IndexSettings,
        lists: InvertedLists | None = None,
        ordinary: Vectors | None = None,
        bases: ServedBases = EVERY_BASE,
        centre: Vectors | None = None,
    ) -> Pool:
        """Build a pool. `lists` must be for the positions in the order of `routable`."""
        index = AdapterIndex.of(routable(snapshot, encoder.identity, bases), encoder.dim, settings, lists)
        return cls(snapshot, encoder, index, ordinary, bases, centre)

    def after(self, snapshot: Snapshot) -> Pool:
        """Return the pool of a later generation with the same encoder. Call it from one thread on the newest pool."""
        index = self._index_after(self.index, snapshot)
        return Pool(snapshot, self.encoder, index, self.ordinary, self.bases, self.centre)

    def rebuilt(self, index: AdapterIndex, newest: Pool) -> Pool:
        """Return `newest` with a new index: `index` holds this pool's adapters, so apply the changes since."""
        index = self._index_after(index, newest.snapshot)
        return Pool(newest.snapshot, newest.encoder, index, newest.ordinary, newest.bases, newest.centre)

    def _index_after(self, index: AdapterIndex, snapshot: Snapshot) -> AdapterIndex:
        gone, new = diff_records(self.snapshot.records, snapshot.records)
        return index.after(gone, [record for record in new if _is_routable(record, self.encoder.identity, self.bases)])

    def may_find(self, record: AdapterRecord, tenant: str) -> bool:
        """Return whether `tenant` may be given this adapter without naming it."""
        return self.bases.serves(record) and self.index.may_find(record, tenant)

    def allowed(
        self, tenant: str, tags: Sequence[str] = (), *, trusted_only: bool = False, base_model: str = ""
    ) -> Allowed:
        """Return the adapters to which a request of `tenant` with these tags may be routed.

        With `base_model`, only those of this served base model.
        """
        wanted = tuple(sorted(set(tags)))
        key = (_TRUSTED if trusted_only else "", base_model, tenant, *wanted)
        names = self.bases.list_names(base_model) if base_model and self.bases.are_several else None
        return (self._allowed_by_tags if wanted else self._allowed).get(
            key, lambda: self.index.allowed(tenant, wanted, trusted_only=trusted_only, base_models=names)
        )

    def nearness(self, queries: Vectors) -> list[float] | None:
        """Return the nearness of queries (N, D) to ordinary prompts, None if there are none."""
        if self.references is None:
            return None
        found: list[float] = nearness(centred(queries, self.centre), self.references).tolist()
        return found

    def judged(
        self, found: Sequence[list[Match]], abstain: Abstain, queries: Vectors, near: Sequence[float] | None = None
    ) -> list[list[Match]]:
        """Return the same matches with their thresholds at an operating point and their confidences.

        `found` has one list for each of `queries` (N, D). `near`: their nearness to ordinary prompts, if it is known.
        """
        near = self.nearness(queries) if near is None else near
        if near is None:
            return list(found)
        rows = zip(found, centred(queries, self.centre), near, strict=True)
        return [self._judged(matches, abstain, query, close) for matches, query, close in rows]

    def _judged(self, matches: Sequence[Match], abstain: Abstain, query: Vectors, close: float) -> list[Match]:
        """Judge the matches of a prompt: its vector (D,) from the centre, and its nearness to ordinary prompts."""
        assert self.references is not None
        if not matches:
            return []
        embeddings = [match.record.embedding for match in matches if match.record.embedding is not None]
        vectors = centred(np.stack([embedding.vector for embedding in embeddings]), self.centre)
        scores = np.asarray([match.score for match in matches])
        own_scores = [embedding.own_scores for embedding in embeddings]
        if self.centre is None:
            compared = scores
        else:  # own scores are not from the centre, so they set no floor
            compared, own_scores = np.asarray(vectors @ query, np.float64), [0 * own for own in own_scores]
        near = self._adapters_nearness([embedding.vector for embedding in embeddings], vectors)
        judgement = judge(Candidates(compared, own_scores, *near), abstain, close)
        thresholds = judgement.thresholds
        if abstain != "never":
            thresholds = (thresholds + scores - compared).clip(-1, 1)
        judged = zip(matches, thresholds.tolist(), judgement.confidences.tolist(), strict=True)
        return [match._replace(threshold=threshold, confidence=confidence) for match, threshold, confidence in judged]

    def _adapters_nearness(self, given: Sequence[Vectors], vectors: Vectors) -> tuple[Floats, Floats]:
        """Return the nearness of adapters' vectors to ordinary prompts, others than bare words and bare words: (C,).

        `vectors` (C, D): those `given`, from the centre.

        It is kept: many prompts have the same candidates, and computing it takes longer than the rest of a judgement.
        An adapter has another vector where a tenant's evaluation or outcomes chose it for prompts of another one.
        """
        assert self.references is not None
        keys = [hash(vector.tobytes()) for vector in given]
        new = [row for row, key in enumerate(keys) if key not in self._near_ordinary]
        others, words = nearness_by_group(vectors[new], self.references)
        for row, near, near_words in zip(new, others.tolist(), words.tolist(), strict=True):
            self._near_ordinary[keys[row]] = near, near_words
        rows = np.asarray([self._near_ordinary[key] for key in keys], np.float64)
        return rows[:, 0], rows[:, 1]

    def refers_back(self, query: Vectors) -> bool:
        """Return whether a text (D,) is like the ordinary prompts that refer to an earlier turn."""
        return self.references is not None and refers_back(centred(query, self.centre), self.references)

    def preferences(self, tenant: str) -> Preferences:
        """Return what the rankings of `tenant` say about its search results."""
        return self._preferences.get(
            (tenant,),
            lambda: Preferences.of(
                self.snapshot, tenant, self.encoder.identity, self.may_find, self.centre, self.bases
            ),
        )

    def map(self, tenant: str) -> tuple[Layout, PoolMap]:
        """Return the layout and the map of the adapters of `tenant`. Adapters it cannot see do not affect it."""
        return self._maps.get((tenant,), lambda: self._drawn(tenant))

    def _drawn(self, tenant: str) -> tuple[Layout, PoolMap]:
        num, records, vectors = self.index.spread(tenant, MAX_POINTS)
        num_chars = sum(len(record.ref.name_for(tenant)) for record in records)
        if num_chars > MAX_NAME_CHARS:
            _, records, vectors = self.index.spread(tenant, len(records) * MAX_NAME_CHARS // num_chars)
        layout = Layout.of(vectors)
        groups, places = layout.place(vectors)
        return layout, PoolMap(
            generation=self.snapshot.generation_for(tenant),
            num_adapters=num,
            names=tuple(record.ref.name_for(tenant) for record in records),
            places=tuple((x, y) for x, y in places.tolist()),
            groups=tuple(groups.tolist()),
            clusters=layout.clusters(groups, records),
        )

    def embedded(self, tenant: str, name: str, *, owner_names: bool = False) -> list[AdapterRecord]:
        """Return the live adapter that `tenant` means by `name` if it is served and embedded, else an empty list."""
        try:
            record = resolve(self.snapshot, tenant, name, owner_names=owner_names)
        except AdapterNotFound:
            return []
        return [record] if _is_routable(record, self.encoder.identity, self.bases) else []

    def count(self, tenant: str) -> int:
        """Return how many listed adapters `tenant` may use, including those that `auto` cannot find."""
        records = self.snapshot.records.values()
        return self._counts.get((tenant,), lambda: sum(1 for _ in filter(self.bases.serves, listed(records, tenant))))

    def unserved(self, tenant: str | None = None) -> BaseCounts:
        """Return how many of the adapters that `tenant` sees, or of all, were made for each unserved base model."""
        records = self.snapshot.records.values()
        if tenant is None:
            return self._unserved.get((), lambda: self.bases.unserved(records))
        return self._unserved.get((tenant,), lambda: self.bases.unserved(listed(records, tenant)))

    def nearest(
        self,
        vectors: Vectors,
        top_k: int,
        tenant: str,
        tags: Sequence[str] = (),
        *,
        trusted_only: bool = False,
        base_model: str = "",
        windows: Sequence[list[Match]] = (),
    ) -> list[list[Match]]:
        """Return the best `top_k` adapters per query among those that `tenant` may see, or all of them if fewer.

        Of adapters with equal weights return only the best, since a plan cannot contain the same weights twice.
        `windows`: the best adapters of all base models per query, if the caller has searched them already. Search only
        where one has too few.
        """
        allowed, width = self.allowed(tenant, tags, trusted_only=trusted_only, base_model=base_model), top_k
        found = [self._distinct(window, top_k, base_model) for window in windows] or [[] for _ in vectors]
        lacking = [row for row, matches in enumerate(found) if len(matches) < top_k]
        while lacking:
            for row, matches in zip(lacking, self.index.search(vectors[lacking], width, allowed), strict=True):
                found[row] = self._distinct(matches, top_k, base_model)
            lacking = [row for row in lacking if len(found[row]) < top_k and width < allowed.num]
            width *= _WIDER
        return found

    def _distinct(self, matches: Sequence[Match], num: int, base_model: str) -> list[Match]:
        """Return the first `num` matches of this base model with different weights; of every one for ""."""
        first: dict[str, Match] = {}
        for match in matches:
            if not base_model or self.bases.find(match.record.base_model) == base_model:
                first.setdefault(match.record.weights_digest, match)
                if len(first) == num:
                    break
        return list(first.values())


def routable(snapshot: Snapshot, encoder: str, bases: ServedBases) -> list[AdapterRecord]:
    """Return the served adapters that this encoder embedded with finite numbers. The others are found by name only."""
    return [record for record in snapshot.records.values() if _is_routable(record, encoder, bases)]


def _is_routable(record: AdapterRecord, encoder: str, bases: ServedBases) -> bool:
    embedding = record.embedding
    if embedding is None or embedding.encoder != encoder or not bases.serves(record):
        return False
    return math.isfinite(embedding.vector @ embedding.vector)


def diff_records(
    old: Mapping[Key, AdapterRecord], new: Mapping[Key, AdapterRecord]
) -> tuple[list[Key], list[AdapterRecord]]:
    """Return (names whose record was removed or replaced, records that are new).

    A later generation keeps the objects and the order of the earlier one, so walk both side by side: this costs a tenth
    of looking up every name. A name that moved counts as removed and added. Compare maps that share memory only where
    they differ.
    """
    if isinstance(old, PersistentMap) and isinstance(new, PersistentMap):
        keys = new.changed_since(old)
        if keys is not None:
            changed = [key for key in keys if old.get(key) is not new.get(key)]
            return [key for key in changed if key in old], [new[key] for key in changed if key in new]
    before, after = list(old.values()), list(new.values())
    gone: list[Key] = []
    came: list[AdapterRecord] = []
    i = j = 0
    while True:
        num_same = _num_same(before, i, after, j)
        i, j = i + num_same, j + num_same
        if i == len(before) or j == len(after):
            return [*gone, *(record.ref.key for record in before[i:])], [*came, *after[j:]]
        is_replaced, is_new = before[i].ref.key == after[j].ref.key, after[j].ref.key not in old
        if is_replaced or is_new:
            came.append(after[j])
            j += 1
        if is_replaced or not is_new:
            gone.append(before[i].ref.key)
            i += 1


def _num_same(before: Sequence[AdapterRecord], i: int, after: Sequence[AdapterRecord], j: int) -> int:
    """Return the number of identical objects in a row, starting at `before[i]` and `after[j]`."""
    total = 0
    while True:
        ours, theirs = before[i + total : i + total + _BLOCK], after[j + total : j + total + _BLOCK]
        same = next(compress(count(), map(is_not, ours, theirs)), min(len(ours), len(theirs)))
        total += same
        if same < _BLOCK:
            return total
