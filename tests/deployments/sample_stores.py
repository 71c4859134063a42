"""A store whose adapters have texts for training an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_store import LoraStore
from tests.deployments.adapter_records import BASE, write_random_folder


def store_of(folder: Path, texts: Mapping[str, Sequence[str]]) -> str:
    """Store the topics as adapters: the first belongs to another tenant, and one more has no samples."""
    store = LoraStore(str(folder / "pool"), accepts_base=[BASE])
    for number, (name, own) in enumerate([*texts.items(), ("silent", [])]):
        write_random_folder(folder / name, number, own)
        of_another = {"tenant": "other", "visibility": "private"} if number == 0 else {}
        staged = store.stage(folder / name, **of_another)  # type: ignore[arg-type]
        store.commit([staged], [None], [None], "test")
    return str(folder / "pool")
