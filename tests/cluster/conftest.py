"""One application on several nodes, for all tests that kill replicas or nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import ray

from gpu_worker.model.base_model import load_base_model
from lora_store.location import DEFAULT_CACHE_DIR
from tests.cluster.load import KEY, Load
from tests.cluster.machines import Machines, own_ray
from tests.cluster.running import MAX_TOKENS, TENANTS, TOPICS, Running, asks
from tests.deployments.key_files import entry, write
from tests.e2e.live import eventually, write_adapter
from tests.served_engine import WORKER, save_served_model
from tests.tiny import linear_shapes, tiny_config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run these tests and those of `servers` first: the shared application keeps this process connected to Ray."""
    items.sort(key=lambda item: item.path.parent.name not in ("cluster", "servers"))


def filled_cache(folder: Path) -> Path:
    """Return a cache without weights, in which no kernel is compiled and no encoder converted again."""
    folder.mkdir()
    for path in DEFAULT_CACHE_DIR.glob("*"):
        if path.is_dir() and path.name not in ("weights", "usage", "passed_checks"):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tiny_folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    assert not ray.is_initialized(), "this process is the driver of another cluster"
    folder = tmp_path_factory.mktemp("cluster")
    model = save_served_model(tiny_folders, tmp_path_factory.mktemp("talkative"))
    shapes = linear_shapes(load_base_model(tiny_config(model)))
    for seed, topic in enumerate(TOPICS):
        write_adapter(folder / "adapters" / topic, shapes, seed, topic)
    num_workers = 3 if request.config.getoption("--scale") == "full" else 2
    settings = {
        "base_model": str(model),
        "store_uri": str(folder / "pool"),
        "preload": [str(folder / "adapters")],
        "cache_dir": str(filled_cache(folder / "cache")),
        "keys_file": str(write(folder / "keys.json", entry(KEY, "local"), *[entry(name, name) for name in TENANTS])),
        **{f"worker.{name}": value for name, value in WORKER.items()},
        "worker_scaling.num_replicas": num_workers,
    }
    machines = Machines(settings, folder, num_accelerators=num_workers)
    with own_ray():
        machines.start()
        try:
            # One Ingress may have found the pool complete before every Retriever has read it.
            eventually(
                lambda: {size.num_adapters for size in machines.on_all("Retriever", "load", "local")} == {len(TOPICS)}
            )
            quiet = asyncio.run(Load(machines.url).run(asks(2 * len(TOPICS) + 1)))
            expected = {(o.ask.model, o.ask.prompt): o.text for o in quiet if o.is_answer}
            assert len(set(expected.values())) == len(quiet), quiet
            assert {len(text) for text in expected.values()} == {MAX_TOKENS}
            yield Running(machines, model, folder / "pool", expected)
        finally:
            machines.stop()
