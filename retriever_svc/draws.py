"""Measure which prompts a public adapter would answer for other tenants if an admin approved it.

Samples say nothing about weights: an adapter with the samples of another one is found by the same prompts, whatever it
answers. So an approval is preceded by a measurement, as a tenant sees the pool that owns none of its adapters:

- the share of ordinary prompts that the version leads, each compared with the others (see `ordinary_prompts`). Bare
  words and the rest are measured apart, and so are openings and closings of letters: each is a view of a long prompt,
  and decides for all of it (see `views`). None of the three may exceed the bound;
- the share of the samples of the nearest adapters of other owners that the version leads. The score of an adapter for
  its own sample is that to its other samples, as for a new prompt;
- the same share of these samples without the wording that they share;
- how near the version is to these adapters. A copy in other words hardly leads the samples, but is near its original.

All are also counted for all of the owner's adapters together: many that each draw little are bounded as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import AdapterRef
from lora_store.records import AdapterRecord
from lora_store.snapshot import EVERYBODY
from retriever_svc.bulk import BulkEncoding
from retriever_svc.calibration import Abstain, leave_one_out_scores
from retriever_svc.embedding import CORE_WEIGHT
from retriever_svc.encoder import Vectors
from retriever_svc.index import Match
from retriever_svc.ordinary_prompts import centred, nearness_to_others, split_bare_words
from retriever_svc.pool import Pool
from retriever_svc.sample_source import SampleSource, read_samples
from retriever_svc.shared_wording import without_shared_wording
from retriever_svc.vector_cache import SAMPLES_OWNER

MAX_ADAPTERS = 16  # of other owners, the nearest ones
MAX_SAMPLES = 16  # of each of them
# An approval that grants more than these has to be confirmed. Most honest adapters of one trade stay below them, and
# copies do not: `python -m benchmarks.routing.draws`.
MOST_ORDINARY = 0.1  # six honest adapters of the starter pool draw 3 % together
MOST_OF_LETTERS = 0.05
MOST_OF_SAMPLES = 0.05
MOST_OF_CONTENTS = 0.5
MOST_ALIKE = 0.7  # cosine. On the `tune` pools 83 % of copies in other words reach it, and 0.3 % of other pairs
_NUM_COMPARED = 4  # adapters of the pool that compete for a prompt
LETTER_PARTS = (
    "Dear Sir or Madam,",
    "Hello everybody,",
    "Hi Anna, I hope you are well.",
    "To whom it may concern,",
    "Good morning, I have a question.",
    "Dear team,",
    "Dear Mr Miller, thank you for your message.",
    "Hello, I hope this message finds you well.",
    "Sehr geehrte Damen und Herren,",
    "Bonjour Madame, bonjour Monsieur,",
    "Estimados señores:",
    "Gentile signora,",
    "Szanowni Państwo,",
    "Здравствуйте!",
    "Many thanks in advance",
    "Thank you very much for your help!",
    "Thanks in advance for your answer.",
    "Thank you in advance and have a nice day",
    "Best regards, Thomas",
    "Kind regards and many thanks",
    "With best wishes, Maria",
    "Yours sincerely, J. Miller",
    "Thanks and best regards",
    "I look forward to hearing from you.",
    "Vielen Dank im Voraus und freundliche Grüße",
    "Merci d'avance, cordialement",
    "Muchas gracias de antemano, saludos",
    "Grazie mille, cordiali saluti",
    "Z góry dziękuję i pozdrawiam",
    "С уважением, Ольга",
    "よろしくお願いいたします。",
    "Obrigado desde já, atenciosamente",
)


@dataclass(frozen=True, slots=True)
class Drawn:
    """How many of `num` texts are led by the version, and by any adapter of its owner."""

    num: int
    by_version: int
    by_owner: int

    def exceeds(self, share: float) -> bool:
        """Return whether the version draws some of the texts, and its owner more than this share of them."""
        return self.by_version > 0 and self.by_owner > share * self.num


@dataclass(frozen=True, slots=True)
class DrawnAdapter:
    """The prompts of another owner's adapter that a version would draw.

    `contents`: of its samples without the wording that they share. `similarity`: the cosine of both adapters.
    """

    ref: AdapterRef
    samples: Drawn
    contents: Drawn
    similarity: float = 0.0

    @property
    def must_be_confirmed(self) -> bool:
        """Whether that is more than an approval may grant unasked."""
        too_many = self.samples.exceeds(MOST_OF_SAMPLES) or self.contents.exceeds(MOST_OF_CONTENTS)
        return too_many or self.similarity >= MOST_ALIKE


@dataclass(frozen=True, slots=True)
class Draws:
    """The prompts that a version would draw: ordinary ones, and those of others' adapters, most drawn first.

    `ordinary`: of bare words, parts of letters, or the rest: what must be confirmed, or else what is drawn most.
    `most_ordinary`: the share of these that may be drawn unasked.
    """

    ordinary: Drawn
    adapters: tuple[DrawnAdapter, ...] = ()
    most_ordinary: float = MOST_ORDINARY

    @property
    def must_be_confirmed(self) -> bool:
        """Whether the version draws more than an approval may grant unasked."""
        return self.ordinary.exceeds(self.most_ordinary) or any(adapter.must_be_confirmed for adapter in self.adapters)


@dataclass(frozen=True, slots=True)
class DrawMeasurement:
    """A measurement of one version. Encode the chunks of `encoding` before `result`.

    `victims`: adapters of other owners, each with the number of its samples in `encoding`. Their contents follow
    them, and the parts of letters come last.
    """

    pool: Pool
    record: AdapterRecord
    victims: tuple[tuple[AdapterRecord, int], ...]
    encoding: BulkEncoding

    @classmethod
    def of(cls, pool: Pool, record: AdapterRecord, samples: SampleSource) -> DrawMeasurement:
        """Read the samples of the nearest adapters of other owners. A version without an embedding draws nothing."""
        texts: list[str] = []
        victims: list[tuple[AdapterRecord, int]] = []
        for victim in _nearest_others(pool, record):
            own = [sample.input for sample in (read_samples(samples, victim) or ())[:MAX_SAMPLES]]
            victims.append((victim, len(own)))
            texts += [*own, *without_shared_wording(own)]
        texts += LETTER_PARTS if pool.ordinary is not None else ()
        return cls(pool, record, tuple(victims), BulkEncoding(pool.encoder, texts, [SAMPLES_OWNER] * len(texts)))

    def result(self, abstain: Abstain, min_score: float | None = None) -> Draws:
        """Return what the version draws at this operating point, or with one threshold for all."""
        rows, drawn, start = self.encoding.vectors(), [], 0
        for victim, num in self.victims:
            samples, contents = rows[start : start + num], rows[start + num : start + 2 * num]
            means_of = (1 - CORE_WEIGHT) * samples + CORE_WEIGHT * contents
            of_samples, of_contents = (
                self._drawn(queries, abstain, min_score, (victim, leave_one_out_scores(queries, means_of)))
                for queries in (samples, contents)
            )
            drawn.append(DrawnAdapter(victim.ref, of_samples, of_contents, self._similarity(victim)))
            start += 2 * num
        drawn.sort(key=lambda item: (-item.samples.by_owner, -item.contents.by_owner, str(item.ref)))
        ordinary, most = self._drawn_ordinary(rows[start:], abstain, min_score)
        is_shown = [item.samples.by_owner or item.contents.by_owner or item.must_be_confirmed for item in drawn]
        return Draws(ordinary, tuple(compress(drawn, is_shown)), most)

    def _similarity(self, other: AdapterRecord) -> float:
        own, others = self.record.embedding, other.embedding
        if own is None or others is None:
            return 0.0
        first, second = centred(np.stack([own.vector, others.vector]), self.pool.centre)
        return float(first @ second)

    def _drawn_ordinary(self, letters: Vectors, abstain: Abstain, min_score: float | None) -> tuple[Drawn, float]:
        """Return how many ordinary prompts are led, of the group that `Draws.ordinary` describes, and its bound."""
        ordinary, references = self.pool.ordinary, self.pool.references
        if ordinary is None or references is None or self.record.encoder != self.pool.encoder.identity:
            return Drawn(0, 0, 0), MOST_ORDINARY
        near, groups = nearness_to_others(references), split_bare_words(len(ordinary))
        everyday = [self._drawn(ordinary[mask], abstain, min_score, near=near[mask].tolist()) for mask in groups]
        drawn = [(found, MOST_ORDINARY) for found in everyday]
        drawn.append((self._drawn(letters, abstain, min_score), MOST_OF_LETTERS))

        def severity(group: tuple[Drawn, float]) -> tuple[bool, float, float]:
            found, most = group
            return found.exceeds(most), found.by_version / found.num, found.by_owner / found.num

        return max(drawn, key=severity)

    def _drawn(
        self,
        queries: Vectors,
        abstain: Abstain,
        min_score: float | None,
        victim: tuple[AdapterRecord, NDArray[np.float32]] | None = None,
        near: Sequence[float] | None = None,
    ) -> Drawn:
        """Return how many of the queries (N, D) are led by the version and its owner.

        `victim`: the adapter whose samples they are, with its scores for them (N,), or (0,) if it has one sample only.
        Without it the queries are ordinary prompts, with their nearness to the others (N,).
        """
        found = self.pool.index.search(queries, _NUM_COMPARED, self.pool.allowed(EVERYBODY))
        if victim is not None and len(victim[1]):
            found = [_with_score(matches, victim[0], score) for matches, score in zip(found, victim[1], strict=True)]
        competing = [self._with_version(matches, query) for matches, query in zip(found, queries, strict=True)]
        leaders = [_leader(matches, min_score) for matches in self.pool.judged(competing, abstain, queries, near)]
        by_version = sum(leader == self.record.ref for leader in leaders)
        by_owner = sum(leader is not None and leader.tenant == self.record.ref.tenant for leader in leaders)
        return Drawn(len(queries), by_version, by_owner)

    def _with_version(self, matches: Sequence[Match], query: Vectors) -> list[Match]:
        """Return the matches with the version, sorted by score; of equal scores the owner's come first."""
        assert self.record.embedding is not None
        found = _with_score(matches, self.record, float(self.record.embedding.vector @ query))
        owner = self.record.ref.tenant
        return sorted(found, key=lambda match: (-match.score, match.record.ref.tenant != owner))


def _with_score(matches: Sequence[Match], record: AdapterRecord, score: float) -> list[Match]:
    """Return the matches with that of the record at this score."""
    return [*(match for match in matches if match.record.ref != record.ref), Match(record, float(score))]


def _nearest_others(pool: Pool, record: AdapterRecord) -> list[AdapterRecord]:
    """Return the adapters of other owners that every tenant may find and that are nearest to this version."""
    if record.embedding is None or record.encoder != pool.encoder.identity:
        return []
    allowed, width = pool.allowed(EVERYBODY), MAX_ADAPTERS
    while True:
        [matches] = pool.index.search(record.embedding.vector[np.newaxis], width, allowed)
        others = [match.record for match in matches if match.record.ref.tenant != record.ref.tenant]
        if len(others) >= MAX_ADAPTERS or width >= allowed.num:
            return others[:MAX_ADAPTERS]
        width *= 2


def _leader(matches: Sequence[Match], min_score: float | None) -> AdapterRef | None:
    fits = (match for match in matches if (match.fits if min_score is None else match.score >= min_score))
    return next((match.record.ref for match in fits), None)
