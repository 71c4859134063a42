"""Cosine search over the adapters of one generation, restricted to those that a caller may see."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import AdapterRef
from lora_store.records import AdapterRecord
from lora_store.snapshot import Key
from retriever_svc.adapter_table import AdapterTable, Mask, Positions
from retriever_svc.calibration import NO_THRESHOLD
from retriever_svc.encoder import Vectors
from retriever_svc.inner_products import best_rows
from retriever_svc.inverted_lists import InvertedLists, ListedPart

_FLOAT32_ERROR = 1e-5  # error bound of a score summed in float32
_TIE_ROOM = 8  # extra candidates for ties
_CODE_ROOM = 24  # more candidates for codes, which rank similar scores only roughly
_MOST_DEAD = 1 / 4  # dead positions, or what they hold, as a share of the live ones
_FEWEST_DEAD = 1 / 16  # fewer dead positions are kept, whatever they hold, because a rebuild reads every adapter
_SCATTERED_COST = 4  # reading a row out of order costs as much as this many in order


class Match(NamedTuple):
    """An adapter found by a search, with the cosine of its embedding to the query.

    `threshold` and `confidence` are as `judge` returns them, once the match is judged. `outcome`: what the tenant's
    outcomes for nearly the same prompts say in sum; below 0 the adapter does not fit.
    """

    record: AdapterRecord
    score: float
    threshold: float = NO_THRESHOLD
    confidence: float = 1.0
    outcome: float = 0.0

    @property
    def ref(self) -> AdapterRef:
        """The adapter's identity."""
        return self.record.ref

    @property
    def fits(self) -> bool:
        """Whether the score reaches the adapter's threshold, and no outcome speaks against it."""
        return self.score >= self.threshold and self.outcome >= 0


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """When a search uses inverted lists, and how many it reads. Measured: see docs/benchmarks/index.md."""

    exact_rows: int = 20_000  # up to this many rows are searched exactly
    side_rows: int = 5_000  # rows that may be missing from the lists before they are trained again
    num_probes: int = 64  # lists read per search
    requires_approval: bool = False  # other tenants find a public adapter only if it is approved


@dataclass(frozen=True, slots=True)
class Allowed:
    """The adapters that one caller's search may return: `positions` are read exactly, `listed` through the lists."""

    num: int
    positions: Positions
    listed: ListedPart | None


class AdapterIndex:
    """The adapters of one generation. Immutable: `after` makes the index of the next one, which shares its memory.

    A search over few rows is exact, whatever the pool's size. A search over many uses inverted lists of codes for a
    shortlist, and reads rows exactly that are newer than the lists. Final scores are computed in float64 row by row, so
    equal embeddings have exactly equal scores and results do not depend on other queries of the batch.
    Dims: P positions, N queries, D dimensions.
    """

    def __init__(
        self,
        table: AdapterTable,
        alive: Mask,
        lists: InvertedLists | None,
        settings: IndexSettings,
    ) -> None:
        """Create an index. `alive` (P,) marks which of the table's first P rows belong to this generation."""
        self._table, self._alive = table, alive
        self._vectors: Vectors = table.vectors.view()[: len(alive)]
        self._lists, self._settings = lists, settings
        self.num_live = int(alive.sum())

    @property
    def requires_approval(self) -> bool:
        """Whether other tenants find a public adapter only if it is approved."""
        return self._settings.requires_approval

    @classmethod
    def of(
        cls,
        records: Sequence[AdapterRecord],
        dim: int,
        settings: IndexSettings | None = None,
        lists: InvertedLists | None = None,
    ) -> Self:
        """Create an index of records, in the order given. Each needs an embedding of `dim` dimensions."""
        settings = settings or IndexSettings()
        table = AdapterTable(dim, len(records), requires_approval=settings.requires_approval)
        table.append(records)
        return cls(table, np.ones(len(records), np.bool_), lists, settings)

    def after(self, gone: Iterable[Key], new: Sequence[AdapterRecord]) -> Self:
        """Return an index without the names `gone` (known or not) and with `new`.

        The cost is proportional to these, plus one bitmap. Call it from one thread and only on the newest index, since
        both indexes share the table.
        """
        table = self._table
        assert len(table) == len(self._alive), "only the newest index can be extended"
        found = [table.positions.pop(key) for key in gone if key in table.positions]
        table.append(new)
        alive = np.ones(len(table), np.bool_)
        alive[: len(self._alive)] = self._alive
        alive[found] = False
        return type(self)(table, alive, self._lists, self._settings)

    def compacted(self) -> Self:
        """Return an index of the same adapters with a new table and no lists."""
        return self.of(self.records, self._table.dim, self._settings)

    def trained(self) -> Self:
        """Return the same index with lists over all its rows, which takes long. It must have no dead positions."""
        assert self.num_dead == 0
        lists = InvertedLists.train(self._vectors)
        return type(self)(self._table, self._alive, lists, self._settings)

    @property
    def records(self) -> list[AdapterRecord]:
        """The adapters, ordered by position."""
        return [self._table.records[position] for position in np.flatnonzero(self._alive)]

    @property
    def lists(self) -> InvertedLists | None:
        return self._lists

    @property
    def num_dead(self) -> int:
        """The number of positions, and of codes in lists, whose adapters are gone."""
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
        """Whether too many positions are dead or hold too much memory, or too many rows are missing from the lists."""
        too_long = self.wants_lists and (self._lists is None or self.num_unlisted > self._settings.side_rows)
        return too_long or self.num_dead > _MOST_DEAD * self.num_live or self._holds_too_much

    @property
    def _holds_too_much(self) -> bool:
        """Whether dead positions hold too much for the live ones, as those of one adapter with many new tags do."""
        if len(self._alive) - self.num_live <= _FEWEST_DEAD * self.num_live:
            return False
        sizes = self._table.sizes.view()[: len(self._alive)]
        num_live_bytes = int(sizes[self._alive].sum())
        return int(sizes.sum()) - num_live_bytes > _MOST_DEAD * num_live_bytes

    def allowed(
        self,
        tenant: str | None = None,
        tags: Collection[str] = (),
        *,
        trusted_only: bool = False,
        base_models: Collection[str] | None = None,
    ) -> Allowed:
        """Return the adapters that `tenant` may see and that have all of `tags`. No tenant means every tenant's.

        With `trusted_only`, leave out other tenants' adapters that no admin approved. With `base_models`, leave out
        those that name other ones.
        """
        mask = self._alive & self._table.tagged(tags, len(self._alive)) if tags else self._alive
        if base_models is not None:
            mask = mask & self._table.of_bases(base_models, len(mask))
        if tenant is not None:
            seen = self._table.trusted if trusted_only else self._table.visible
            mask = mask & seen(tenant, len(mask))
        num = int(mask.sum())
        if self._lists is None or min(len(mask), _SCATTERED_COST * num) <= self._settings.exact_rows:
            return Allowed(num, np.flatnonzero(mask), None)
        return Allowed(num, self._lists.unlisted(mask), self._lists.part_of(mask))

    def may_find(self, record: AdapterRecord, tenant: str) -> bool:
        """Return whether a search for `tenant` may find this adapter. An unlisted one is found by its name alone."""
        is_open = record.is_open(requires_approval=self._settings.requires_approval)
        return not record.is_unlisted and (record.ref.tenant == tenant or is_open)

    def spread(self, tenant: str, max_rows: int) -> tuple[int, list[AdapterRecord], Vectors]:
        """Return (how many adapters `tenant` may see, an evenly spaced selection of at most `max_rows`, its vectors).

        The vectors are (N, D).
        """
        return self._evenly(self._alive & self._table.visible(tenant, len(self._alive)), max_rows)

    def _evenly(self, mask: Mask, max_rows: int) -> tuple[int, list[AdapterRecord], Vectors]:
        positions = np.flatnonzero(mask)
        num = len(positions)
        if num > max_rows:
            positions = positions[np.arange(max_rows) * num // max_rows]
        return num, [self._table.records[position] for position in positions], self._vectors[positions]

    def search(self, vectors: Vectors, top_k: int, allowed: Allowed, spare: int = 0) -> list[list[Match]]:
        """Return the best `min(top_k, allowed.num)` adapters per query, best first; ties are sorted by tenant and name.

        Of the next best ones return those that the same scan found, at most `spare`. `vectors`: (N, D) unit rows. A
        query with NaN has no matches.
        """
        num_wanted = min(top_k, allowed.num)
        if num_wanted == 0:
            return [[] for _ in vectors]
        queries = np.ascontiguousarray(vectors, np.float32)
        return [self._best(query, num_wanted, allowed, spare) if np.isfinite(query).all() else [] for query in queries]

    def _best(self, query: Vectors, num_wanted: int, allowed: Allowed, spare: int) -> list[Match]:
        """Return the best matches. Widen the shortlist until the last wanted score exceeds all that were left out."""
        width = num_wanted + spare
        while True:
            positions, left_out = self._shortlist(query, width, allowed)
            scores = np.sum(self._vectors[positions] * query.astype(np.float64), axis=-1).clip(-1, 1)
            order = np.argsort(-scores, kind="stable")
            if not scores[order[num_wanted - 1]] <= left_out:  # so that a score of NaN ends the search, too
                num_certain = int(np.count_nonzero(scores > left_out))
                return self._named(positions[order], scores[order], min(num_wanted + spare, num_certain))
            width *= 2

    def _shortlist(self, query: Vectors, width: int, allowed: Allowed) -> tuple[Positions, float]:
        """Return at least `width` positions, if there are so many, and an upper bound for the scores of all others."""
        exact, left_out = np.empty(0, np.int64), -np.inf
        if len(allowed.positions):
            num = min(width + _TIE_ROOM, len(allowed.positions))
            scores, exact = best_rows(query, self._vectors, allowed.positions, num)
            left_out = -np.inf if num == len(allowed.positions) else float(scores[-1]) + _FLOAT32_ERROR
        if self._lists is None or allowed.listed is None:
            return exact, left_out
        num = width + _CODE_ROOM
        scores, listed = self._lists.best(query, num, allowed.listed, self._settings.num_probes)
        if len(listed) == num:
            left_out = max(left_out, float(scores[-1]) + self._lists.code_error + _FLOAT32_ERROR)
        return np.concatenate([exact, listed]), left_out

    def _named(self, positions: Positions, scores: NDArray[np.float64], num_wanted: int) -> list[Match]:
        """Return the first `num_wanted` matches of positions sorted by score; sort ties by tenant and name."""
        num_tied = int(np.searchsorted(-scores, -scores[num_wanted - 1], side="right"))
        records = [self._table.records[position] for position in positions[:num_tied]]
        matches = [Match(record, float(score)) for record, score in zip(records, scores[:num_tied], strict=True)]
        if (scores[1:num_tied] == scores[: num_tied - 1]).any():
            matches.sort(key=lambda match: (-match.score, match.record.ref.tenant, match.record.ref.name))
        return matches[:num_wanted]
