"""A valid PEFT folder, the shapes of its base model, and a store in a folder or on S3."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from lora_store import AdapterRecord, AdapterRef, Location, LoraStore, ModuleWeights, Sample, Staged, write_peft_folder
from lora_store.files import Files
from tests.lora_store.builders import (
    BASE,
    SHAPES,
    FakeClock,
    MakeFolder,
    MakeRecord,
    MakeWeights,
    OpenStore,
    PublishOne,
    Stored,
    embedding,
)


@pytest.fixture
def module_shapes() -> dict[str, tuple[int, int]]:
    return dict(SHAPES)


@pytest.fixture
def make_weights() -> MakeWeights:
    def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, ModuleWeights]:
        random = torch.Generator().manual_seed(seed)
        ranks = dict(zip(SHAPES, (4, 2, 4), strict=True))
        return {
            name: ModuleWeights(
                torch.randn(ranks[name], num_in, generator=random).to(dtype),
                torch.randn(num_out, ranks[name], generator=random).to(dtype),
                8 / ranks[name],
            )
            for name, (num_out, num_in) in SHAPES.items()
        }

    return make


@pytest.fixture
def make_folder(tmp_path: Path, make_weights: MakeWeights) -> MakeFolder:
    def make(name: str = "poet", seed: int = 0, inputs: tuple[str, ...] = ("Write a poem.", "Rhyme this.")) -> Path:
        folder = tmp_path / f"folders-{seed}" / name
        samples = [Sample(text) for text in inputs]
        write_peft_folder(folder, make_weights(seed), base_model=BASE, samples=samples)
        return folder

    return make


@pytest.fixture
def folder_uri(tmp_path: Path) -> str:
    """Return the URI of a store whose files a test may change."""
    return str(tmp_path / "store")


@pytest.fixture(params=["folder", "s3"])
def store_uri(request: pytest.FixtureRequest, folder_uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URI of a store in a folder, then of one on an S3 endpoint."""
    if request.param == "folder":
        return folder_uri
    return request.getfixturevalue("s3_endpoint").uri(f"stores/{uuid4().hex}")


@pytest.fixture
def location(store_uri: str) -> Location:
    return Location(store_uri)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def open_store(store_uri: str, clock: FakeClock) -> OpenStore:
    return lambda: LoraStore(store_uri, accepts_base=[BASE], now=clock.now, sleep=clock.sleep)


@pytest.fixture
def store(open_store: OpenStore) -> LoraStore:
    return open_store()


@pytest.fixture
def publish(store: LoraStore, make_folder: MakeFolder) -> PublishOne:
    """Publish one version and return it."""

    def run(name: str = "poet", seed: int = 0, encoder: str = "enc", precondition: Any = "any", **label: Any) -> Staged:
        staged = store.stage(make_folder(name, seed, inputs=(f"{name} {seed}",)), **label)
        store.commit([staged], [embedding(encoder=encoder)], [1.0], "me", precondition)
        return staged

    return run


@pytest.fixture
def stored(location: Location) -> Stored:
    """Return the bytes of every file below one part of the store, by its path there."""

    def list_files(part: str) -> dict[str, int]:
        return {file.name: file.num_bytes for file in Files(location.child(part)).entries()}

    return list_files


@pytest.fixture
def make_record() -> MakeRecord:
    plain = AdapterRecord(
        ref=AdapterRef("local", "poet", "d" * 64),
        weights_digest="a" * 64,
        samples_digest=None,
        visibility="public",
        tags=("fun", "short"),
        base_model=BASE,
        ranks=(2, 4),
        target_modules=("q_proj",),
        num_bytes=100,
        num_samples=0,
        template="chat",
        embedding=embedding(),
        probe_shift=0.125,
        source="poet",
        actor="tester",
        created_at=datetime(2026, 1, 2, 12, tzinfo=UTC),
        generation=0,
    )

    def make(name: str = "poet", tenant: str = "local", digest: str = "d" * 64, **changes: Any) -> AdapterRecord:
        return replace(plain, ref=AdapterRef(tenant, name, digest), **changes)

    return make
