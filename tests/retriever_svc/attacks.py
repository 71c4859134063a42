"""Adapters that try to draw the prompts of others, with the packaged encoder, and what a third tenant gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_store.adapter import Sample
from lora_store.records import AdapterRecord
from retriever_svc import Encoder, LivePool, ProjectionFiles, Retriever, Route, RouteRequest
from retriever_svc.embedding import embed_groups
from retriever_svc.ordinary_prompts import bare_words, ordinary_prompts
from tests.retriever_svc.pool_fakes import Source, record_of

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
OWNER = "tests"  # whose part of the encoder's cache is used: most tests publish the same samples


def inputs_of(path: Path) -> list[str]:
    """Return the inputs of a file of samples or prompts."""
    return [json.loads(line)["input"] for line in path.read_text(encoding="utf-8").splitlines()]


def everyday_prompts() -> list[str]:
    """Return everyday prompts that are not among the packaged ordinary ones."""
    return inputs_of(ROOT / "benchmarks" / "routing" / "held_out_prompts.jsonl")


def starter_samples() -> dict[str, list[str]]:
    """Return the samples of each task of the starter pool."""
    folders = sorted(path.parent for path in (EXAMPLES / "starter_pool").glob("*/lora_samples.jsonl"))
    return {folder.name: inputs_of(folder / "lora_samples.jsonl") for folder in folders}


def held_out(task: str) -> list[str]:
    """Return held-out prompts of a task of the starter pool."""
    return inputs_of(EXAMPLES / "starter_heldout" / f"{task}.jsonl")


def published(encoder: Encoder, groups: Mapping[str, Sequence[str]], tenant: str) -> list[AdapterRecord]:
    """Return approved public adapters with these samples."""
    files = ProjectionFiles()
    projected = encoder.projected(files.shipped(encoder.identity))
    samples = [[Sample(text) for text in texts] for texts in groups.values()]
    embeddings = embed_groups(projected, samples, [OWNER] * len(samples))
    records = [record_of(name, None, tenant=tenant, approved=True, num_samples=1) for name in groups]
    return [replace(record, embedding=embedding) for record, embedding in zip(records, embeddings, strict=True)]


def pool_of(encoder: Encoder, records: Sequence[AdapterRecord]) -> LivePool:
    """Return a pool of these adapters."""
    return LivePool(lambda _: encoder, Source(*records), projections=ProjectionFiles())


def routes(encoder: Encoder, records: Sequence[AdapterRecord], prompts: Sequence[str]) -> list[Route]:
    """Return what a third tenant gets."""
    answers = Retriever(pool_of(encoder, records)).route([RouteRequest(prompt, tenant="initech") for prompt in prompts])
    found = [answer for answer in answers if isinstance(answer, Route)]
    assert len(found) == len(prompts)
    return found


def narrow_groups(
    encoder: Encoder, num_adapters: int, num_samples: int, *, of_words: bool = False
) -> dict[str, Sequence[str]]:
    """Return adapters of neighbouring ordinary prompts, spread over all bare words or over all others."""
    every = ordinary_prompts()
    texts = [text for text, is_word in zip(every, bare_words(len(every)), strict=True) if is_word == of_words]
    rows = encoder.encode(texts, [OWNER] * len(texts))
    rng = np.random.default_rng(0)
    seeds = rng.choice(len(texts), num_adapters, replace=False)
    nearest = np.argsort(-(rows[seeds] @ rows.T), axis=1)[:, :num_samples]
    return {f"narrow-{n}": [texts[place] for place in own] for n, own in enumerate(nearest)}
