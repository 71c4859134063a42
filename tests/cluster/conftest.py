"""One application on several nodes for all tests of what happens when something dies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from gpu_worker.model.base_model import load_base_model
from lora_store import Sample, write_peft_folder
from tests.cluster.load import Ask, Load
from tests.cluster.machines import Machines, own_ray
from tests.e2e.conftest import talkative
from tests.e2e.live import eventually
from tests.tiny import linear_shapes, random_adapter, tiny_config

TOPICS = ("whales", "glaciers", "violins", "beetles", "volcanoes", "bread")
MAX_TOKENS = 160


@dataclass(frozen=True)
class Running:
    """The nodes, and what each request is answered while nothing dies."""

    machines: Machines
    model: Path
    expected: Mapping[tuple[str, str], str]

    def load(self, *, max_retries: int = 0) -> Load:
        return Load(self.machines.url, self.expected, max_retries)


def asks(count: int, *, num_streamed: int = 0) -> list[Ask]:
    """Base, adapters by their names and by the Retriever's choice, in turn; streamed ones spread evenly."""
    names = ["tiny", *TOPICS]
    kinds = [(name, f"The sea, the {name} and") for name in names]
    kinds += [("auto", f"Tell me about {topic}, please.") for topic in TOPICS]
    total = count + num_streamed
    streamed = {number * total // num_streamed for number in range(num_streamed)}
    return [Ask(*kinds[number % len(kinds)], MAX_TOKENS, number in streamed) for number in range(total)]


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tiny_folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    assert not ray.is_initialized(), "this process is the driver of another cluster"
    folder = tmp_path_factory.mktemp("cluster")
    model = talkative(tiny_folders["gemma3"], tmp_path_factory.mktemp("talkative"))
    shapes = linear_shapes(load_base_model(tiny_config(model)))
    for seed, topic in enumerate(TOPICS):
        samples = [Sample(f"{verb} {topic}, please.") for verb in ("Tell me about", "Explain", "Write of", "Describe")]
        adapter = random_adapter(shapes, seed)
        write_peft_folder(folder / "adapters" / topic, adapter.modules, base_model="tiny", samples=samples)
    num_workers = 3 if request.config.getoption("--scale") == "full" else 2
    settings = {
        "base_model": str(model),
        "store_uri": str(folder / "pool"),
        "preload": [str(folder / "adapters")],
        "worker_scaling.min_replicas": num_workers,
        "worker_scaling.max_replicas": num_workers,
    }
    machines = Machines(settings, folder)
    with own_ray():
        machines.start()
        try:
            # One Ingress may have found the pool complete before every Retriever has read it.
            eventually(lambda: {num for _, num in machines.on_all("Retriever", "load", "local")} == {len(TOPICS)})
            quiet = asyncio.run(Load(machines.url).run(asks(2 * len(TOPICS) + 1)))
            expected = {(o.ask.model, o.ask.prompt): o.text for o in quiet if o.is_answer}
            assert len(set(expected.values())) == len(quiet), quiet
            assert {len(text) for text in expected.values()} == {MAX_TOKENS}
            yield Running(machines, model, expected)
        finally:
            machines.stop()
