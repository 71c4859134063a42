"""A store whose adapters have texts for training an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lora_store import LoraStore, ModuleWeights, Sample, write_peft_folder
from tests.deployments.adapter_records import BASE


def store_of(folder: Path, texts: Mapping[str, Sequence[str]]) -> str:
    """Store the topics as adapters: the first belongs to another tenant, and one more has no samples."""
    store = LoraStore(str(folder / "pool"), accepts_base=[BASE])
    for number, (name, own) in enumerate([*texts.items(), ("silent", [])]):
        weights = {"model.layers.0.mlp.up_proj": ModuleWeights(torch.full((2, 6), 1.0 + number), torch.ones(8, 2), 2.0)}
        write_peft_folder(folder / name, weights, base_model=BASE, samples=[Sample(text) for text in own])
        of_another = {"tenant": "other", "visibility": "private"} if number == 0 else {}
        staged = store.stage(folder / name, **of_another)  # type: ignore[arg-type]
        store.commit([staged], [None], [None], "test")
    return str(folder / "pool")
