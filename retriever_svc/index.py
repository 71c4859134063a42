"""Cosine search over the adapters of one generation, restricted to those a caller may see."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from lora_store.records import AdapterRecord
from lora_store.snapshot import Key
from retriever_svc.adapter_table import AdapterTable, Mask, Positions
from retriever_svc.calibration import Votes
from retriever_svc.encoder import Vectors
from retriever_svc.inner_products import best_rows
from retriever_svc.inverted_lists import InvertedLists, ListedPart

_FLOAT32_ERROR = 1e-5  # of a score that was summed in float32
_TIE_ROOM = 8
_CODE_ROOM = 24  # more of them, since codes order near ones only roughly
_SCATTERED_COST = 4  # a row read out of order costs as much as this many in order


class Match(NamedTuple):
    """One adapter found, with the cosine of its embedding to the query."""

    record: AdapterRecord
    score: float


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """When search goes over to lists, and how far it reads them: measured, see benchmarks/README.md."""

    exact_rows: int = 20_000  # up to so many are searched one by one
    side_rows: int = 5_000  # so many new ones may stand beside the lists before these are trained anew
    num_probes: int = 64  # lists read by a search
    requires_approval: bool = False  # a public adapter is found by other tenants only once it is approved


@dataclass(frozen=True, slots=True)
class Allowed:
    """The adapters that one caller's search may return: `positions` are read one by one, `listed` by the lists."""

    num: int
    positions: Positions
    listed: ListedPart | None


class AdapterIndex:
    """The adapters of one generation, never changed: the next one is made by `after`, and shares nearly all with it.

    Exact while few rows are to be read, whatever the pool's size; beyond, lists of codes narrow the pool and what came
    since they were trained is read exactly. Then scores are taken again in float64 row by row: equal embeddings score
    exactly equal, and no answer depends on what else is asked. Dims: P positions, N queries, D dimensions.
    """

    def __init__(
        self,
        table: AdapterTable,
        alive: Mask,
        lists: InvertedLists | None,
        settings: IndexSettings,
    ) -> None:
        """`alive` (P,): which of the table's first P rows this generation has."""
        self._table, self._alive = table, alive
        self._vectors: Vectors = table.vectors.view()[: len(alive)]
        self._lists, self._settings = lists, settings
        self.num_live = int(alive.sum())

    @classmethod
    def of(
        cls,
        records: Sequence[AdapterRecord],
        dim: int,
        settings: IndexSettings | None = None,
        lists: InvertedLists | None = None,
    ) -> Self:
        """`records` stand at their own places in the order given. Each has an embedding of `dim` dimensions."""
        settings = settings or IndexSettings()
        table = AdapterTable(dim, len(records), requires_approval=settings.requires_approval)
        table.append(records)
        return cls(table, np.ones(len(records), np.bool_), lists, settings)

    def after(self, gone: Iterable[Key], new: Sequence[AdapterRecord]) -> Self:
        """The index without the names `gone` (known or not) and with `new`, at the cost of those and of one bitmap.

        For one thread, and on the newest index of its line: both append to the same table.
        """
        table = self._table
        assert len(table) == len(self._alive), "an older generation cannot be followed again"
        found = [table.positions.pop(key) for key in gone if key in table.positions]
        table.append(new)
        alive = np.ones(len(table), np.bool_)
        alive[: len(self._alive)] = self._alive
        alive[found] = False
        return type(self)(table, alive, self._lists, self._settings)

    def compacted(self) -> Self:
        """The same adapters in a table of their own, without lists."""
        return self.of(self.records, self._table.dim, self._settings)

    def trained(self) -> Self:
        """The same index with lists over all it has. Takes long. For an index without dead positions."""
        assert self.num_dead == 0
        lists = InvertedLists.train(self._vectors)
        return type(self)(self._table, self._alive, lists, self._settings)

    @property
    def records(self) -> list[AdapterRecord]:
        """Every adapter, by position."""
        return [self._table.records[position] for position in np.flatnonzero(self._alive)]

    @property
    def lists(self) -> InvertedLists | None:
        return self._lists

    @property
    def num_dead(self) -> int:
        """Positions, and codes in lists, whose adapters are gone."""
        return len(self._alive) - self.num_live + (0 if self._lists is None else self._lists.num_gone)

    @property
    def num_unlisted(self) -> int:
        return self.num_live if self._lists is None else len(self._lists.unlisted(self._alive))

    @property
    def num_positions(self) -> int:
        return len(self._alive)

    @property
    def num_bytes(self) -> int:
        lists = 0 if self._lists is None else self._lists.num_bytes
        return self._table.num_bytes + self._alive.nbytes + lists

    @property
    def wants_lists(self) -> bool:
        return self.num_live > self._settings.exact_rows

    @property
    def wants_rebuild(self) -> bool:
        """Whether too much is dead, or too much stands beside the lists."""
        too_long = self.wants_lists and (self._lists is None or self.num_unlisted > self._settings.side_rows)
        return too_long or self.num_dead > self.num_live // 4

    def allowed(self, tenant: str | None = None, tags: Collection[str] = ()) -> Allowed:
        """What `tenant` may see and carries all of `tags`; no tenant sees everything."""
        mask = self._alive & self._table.tagged(tags, len(self._alive)) if tags else self._alive
        if tenant is not None:
            mask = mask & self._table.visible(tenant, len(mask))
        num = int(mask.sum())
        if self._lists is None or min(len(mask), _SCATTERED_COST * num) <= self._settings.exact_rows:
            return Allowed(num, np.flatnonzero(mask), None)
        return Allowed(num, self._lists.unlisted(mask), self._lists.part_of(mask))

    def votes(self, tenant: str) -> tuple[Votes, Votes]:
        """Return the votes on the score floor of `tenant`: (of its own and approved adapters, of each other tenant)."""
        return self._table.votes_for(tenant, self._alive)

    def offers(self, record: AdapterRecord, tenant: str) -> bool:
        """Whether a search for `tenant` may find it."""
        return record.ref.tenant == tenant or record.is_open(requires_approval=self._settings.requires_approval)

    def spread(self, tenant: str, max_rows: int) -> tuple[int, list[AdapterRecord], Vectors]:
        """(how many `tenant` may see, at most `max_rows` of those evenly spread by position, their vectors (N, D))."""
        positions = np.flatnonzero(self._alive & self._table.visible(tenant, len(self._alive)))
        num = len(positions)
        if num > max_rows:
            positions = positions[np.arange(max_rows) * num // max_rows]
        return num, [self._table.records[position] for position in positions], self._vectors[positions]

    def search(self, vectors: Vectors, top_k: int, allowed: Allowed) -> list[list[Match]]:
        """The best `min(top_k, allowed.num)` per query, best first, ties by tenant and name; none for a NaN.

        `vectors` (N, D) unit rows.
        """
        num_wanted = min(top_k, allowed.num)
        if num_wanted == 0:
            return [[] for _ in vectors]
        queries = np.ascontiguousarray(vectors, np.float32)
        return [self._best(query, num_wanted, allowed) if np.isfinite(query).all() else [] for query in queries]

    def _best(self, query: Vectors, num_wanted: int, allowed: Allowed) -> list[Match]:
        """Widens the shortlist until the last wanted is clearly better than all that was left out."""
        width = num_wanted
        while True:
            positions, left_out = self._shortlist(query, width, allowed)
            scores = np.sum(self._vectors[positions] * query.astype(np.float64), axis=-1).clip(-1, 1)
            order = np.argsort(-scores, kind="stable")
            if left_out < scores[order[num_wanted - 1]]:
                return self._named(positions[order], scores[order], num_wanted)
            width *= 2

    def _shortlist(self, query: Vectors, width: int, allowed: Allowed) -> tuple[Positions, float]:
        """Positions of `width` adapters or more, if there are, and what the best of all others read scores at most."""
        one_by_one, left_out = np.empty(0, np.int64), -np.inf
        if len(allowed.positions):
            num = min(width + _TIE_ROOM, len(allowed.positions))
            scores, one_by_one = best_rows(query, self._vectors, allowed.positions, num)
            left_out = -np.inf if num == len(allowed.positions) else float(scores[-1]) + _FLOAT32_ERROR
        if self._lists is None or allowed.listed is None:
            return one_by_one, left_out
        num = width + _CODE_ROOM
        scores, listed = self._lists.best(query, num, allowed.listed, self._settings.num_probes)
        if len(listed) == num:
            left_out = max(left_out, float(scores[-1]) + self._lists.code_error)
        return np.concatenate([one_by_one, listed]), left_out

    def _named(self, positions: Positions, scores: NDArray[np.float64], num_wanted: int) -> list[Match]:
        """The first `num_wanted` of what comes best first, equal scores put in the order of tenant and name."""
        num_tied = int(np.searchsorted(-scores, -scores[num_wanted - 1], side="right"))
        records = [self._table.records[position] for position in positions[:num_tied]]
        matches = [Match(record, float(score)) for record, score in zip(records, scores[:num_tied], strict=True)]
        matches.sort(key=lambda match: (-match.score, match.record.ref.tenant, match.record.ref.name))
        return matches[:num_wanted]
