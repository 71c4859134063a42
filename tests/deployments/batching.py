"""A store with random adapters of a tiny model, and parquet files of prompts for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deployments.batch.run import BatchRun, BatchSettings, begin
from deployments.config.app import AppConfig, RetrievalSettings
from gpu_worker.config import NativeSettings, VllmSettings
from lora_store import LoraStore, Sample, write_peft_folder
from retriever_svc import embed_groups
from tests.shared_encoders import shared_encoder
from tests.tiny import random_adapter

BASE = "tiny"
VERBS = ("Tell me about", "Explain", "Write of", "Describe")
TOPICS = ("the sea", "old trains", "good bread", "a long war", "wild bees", "cold winters")
TOPICS_OF = {"first": ("the sea", "old trains"), "second": ("good bread", "wild bees")}  # with two base models
TOP_P = {"strategy": "top_p_mixture", "strategy_options": {"kept_weight": 0.5}}
DEFAULTS = {"max_tokens": 6, "temperature": 0}


@dataclass(frozen=True)
class Place:
    """A store with adapters, and where inputs and outputs go."""

    folder: Path
    config: AppConfig

    def begin(self, rows: list[dict[str, Any]], *, part_rows: int = 8, **changes: Any) -> BatchRun:
        source = write_rows(self.folder / "in.parquet", rows)
        settings = BatchSettings(self.config, str(source), str(self.folder / "out"), part_rows, defaults=DEFAULTS)
        return begin(replace(settings, **changes))

    def written(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(self.folder / "out").to_pylist()
        return rows


def tiny_app(model: Path, store: str, **worker: Any) -> AppConfig:
    """Return settings in float32, so that rows of one batch can be compared with rows of another."""
    settings = {"dtype": "float32", "num_threads": 1, "bank_rank_rows": 32, "max_model_len": 512, "max_batch_size": 16}
    settings_of = VllmSettings if worker.get("engine") == "vllm" else NativeSettings
    return AppConfig(
        base_model=str(model),
        base_model_name=BASE,
        store_uri=store,
        retrieval=RetrievalSettings(encoder_threads=1, min_score=-1.0),  # no row abstains
        worker=settings_of(**settings | worker),
    )


def publish(
    config: AppConfig, shapes: Mapping[str, tuple[int, int]], folders: Path, topics: Sequence[str], base: str = BASE
) -> int:
    """Publish a random adapter for each topic, with sentences about it as samples. Return the generation."""
    store = LoraStore(config.store_uri, accepts_base=config.served_models.accepted_names)
    staged = []
    for topic in topics:
        path = folders / topic.replace(" ", "-")
        samples = [Sample(f"{verb} {topic}, please.") for verb in VERBS]
        modules = random_adapter(shapes, seed=TOPICS.index(topic)).modules
        write_peft_folder(path, modules, base_model=base, samples=samples)
        staged.append(store.stage(path, module_shapes=shapes))
    embeddings = embed_groups(shared_encoder(num_threads=1), [item.samples for item in staged])
    return store.commit(staged, embeddings, [1.0] * len(staged), "tester")


def prompts(count: int) -> list[dict[str, Any]]:
    """Return rows of every kind that a server would answer."""
    kinds: list[dict[str, Any]] = [
        {},
        {"lora": '{"strategy": "fusion", "k": 2}'},
        {"model": BASE},
        {"temperature": 1.0, "seed": 7, "lora": json.dumps(TOP_P)},
        {"lora": '{"adapters": [{"name": "the-sea", "weight": 0.5}, {"name": "wild-bees"}]}'},
        {"model": "old-trains", "max_tokens": 5},
    ]
    fields = {"model": None, "max_tokens": None, "temperature": None, "seed": None, "lora": None}
    return [
        {"prompt": f"{VERBS[n % 4]} {TOPICS[n % 5]}, part {n}"} | fields | kinds[n % len(kinds)] for n in range(count)
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], *, group_rows: int = 100) -> Path:
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path, row_group_size=group_rows)
    return path
