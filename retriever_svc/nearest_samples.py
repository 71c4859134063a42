"""Find the samples that a prompt is nearest to, to explain a choice.

Only samples of the caller's own tenant are shown. Another tenant's samples may be private even where its adapter is
public, and a sample that is shown cannot be taken back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest

import numpy as np

from lora_store.adapter import AdapterRef
from lora_store.errors import StoreUnavailable
from lora_store.records import AdapterRecord
from retriever_svc.bulk import BulkEncoding
from retriever_svc.encoder import Vectors
from retriever_svc.pool import Pool
from retriever_svc.route import Candidate, NearSample, Route
from retriever_svc.sample_source import SampleSource, read_samples

logger = logging.getLogger(__name__)

MAX_ADAPTERS = 8  # whose samples one call reads
MAX_SAMPLES = 32  # read of one adapter
NUM_SHOWN = 2  # of one candidate
MAX_CHARS = 200  # shown of one sample


@dataclass(frozen=True, slots=True)
class NearestSamples:
    """The samples of one tenant's own candidates. Encode the chunks of `encoding` before `shown_in`.

    `texts`: by adapter, the inputs of its samples, in the order of `encoding`.
    """

    texts: dict[AdapterRef, list[str]]
    encoding: BulkEncoding

    @classmethod
    def of(cls, pool: Pool, tenant: str, routes: Sequence[Route], samples: SampleSource) -> NearestSamples:
        """Read the samples of at most `MAX_ADAPTERS` candidates, the best of each route first."""
        own = [[c.ref for c in _best_first(route.candidates) if c.ref.tenant == tenant] for route in routes]
        by_rank = dict.fromkeys(ref for ref in chain.from_iterable(zip_longest(*own)) if ref is not None)
        live = (pool.snapshot.records.get(ref.key) for ref in by_rank)
        records = [record for record in live if record is not None and record.ref in by_rank]
        texts = {record.ref: _read_inputs(samples, record) for record in records[:MAX_ADAPTERS]}
        every = [text for own_texts in texts.values() for text in own_texts]
        return cls(texts, BulkEncoding(pool.encoder, every, [tenant] * len(every)))

    def shown_in(self, routes: Sequence[Route], prompts: Sequence[Vectors]) -> list[Route]:
        """Return the routes with the samples that each of the prompts (D,) is nearest to."""
        rows = iter(self.encoding.vectors())
        vectors = {ref: list(islice(rows, len(texts))) for ref, texts in self.texts.items()}
        return [
            replace(route, candidates=tuple(self._explained(c, prompt, vectors) for c in route.candidates))
            for route, prompt in zip(routes, prompts, strict=True)
        ]

    def _explained(self, candidate: Candidate, prompt: Vectors, vectors: dict[AdapterRef, list[Vectors]]) -> Candidate:
        texts = self.texts.get(candidate.ref)
        if not texts:
            return candidate
        scores = np.stack(vectors[candidate.ref]) @ prompt
        nearest = np.argsort(-scores, kind="stable")[:NUM_SHOWN]
        return replace(candidate, samples=tuple(NearSample(_short(texts[i]), float(scores[i])) for i in nearest))


def _best_first(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates by how far they are above their thresholds, as the reason names them."""
    return sorted(candidates, key=lambda candidate: candidate.threshold - candidate.score)


def _read_inputs(samples: SampleSource, record: AdapterRecord) -> list[str]:
    """Return the inputs of the adapter's samples, none if they cannot be read: they only explain."""
    try:
        found = read_samples(samples, record) or ()
    except StoreUnavailable as exc:
        logger.warning("no samples are shown, since the store does not answer: %s", exc.cause)
        return []
    return list(dict.fromkeys(sample.input for sample in found[:MAX_SAMPLES]))


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS - 1]}…"
