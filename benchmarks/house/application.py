"""The four deployments in one process over a tiny model, without Ray, so that the walks can be traced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from deployments.config.app import AppConfig
from deployments.ingress import Ingress
from deployments.retriever import RetrieverDeployment
from deployments.store import StoreDeployment
from deployments.worker import WorkerDeployment
from gpu_worker.model.base_model import BaseModel, load_base_model
from lora_store import Sample, write_peft_folder
from tests.deployments.app_fakes import Served, http_of
from tests.deployments.batching import publish, tiny_app
from tests.fakes import FakeHandle
from tests.tiny import FAMILIES, byte_tokenizer, linear_shapes, random_adapter, tiny_config

TOPIC = "the sea"


@dataclass(frozen=True, slots=True, eq=False)
class _Reference:
    """Replaces an object reference of Ray."""

    value: Any

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        return self.value


def save_tiny_model(folder: Path) -> BaseModel:
    """Save a random model that always chooses a token with text. Return it loaded."""
    torch.manual_seed(0)
    model = FAMILIES["gemma3"]()
    with torch.no_grad():
        model.get_input_embeddings().weight[256:] = 0  # type: ignore[operator]
    model.save_pretrained(folder)  # type: ignore[operator]
    byte_tokenizer().save_pretrained(folder)
    return load_base_model(tiny_config(folder))


def published_app(folder: Path) -> AppConfig:
    """Return the settings of an application whose pool holds one adapter, and write another one to publish."""
    base = save_tiny_model(folder / "model")
    config = tiny_app(folder / "model", str(folder / "pool")).model_copy(
        update={"allowed_hosts": ("test",), "allow_unauthenticated_ray": True}
    )
    shapes = linear_shapes(base)
    publish(config, shapes, folder / "adapters", [TOPIC])
    samples = [Sample("Sing of the hills."), Sample("Praise the hills.")]
    write_peft_folder(folder / "new", random_adapter(shapes, seed=9).modules, base_model="tiny", samples=samples)
    return config


@asynccontextmanager
async def served_app(config: AppConfig) -> AsyncIterator[tuple[Ingress, httpx.AsyncClient]]:
    """Yield (the Ingress, a client of its routes) over real deployments."""
    store = FakeHandle(StoreDeployment(config, put=_Reference))
    replica = RetrieverDeployment(config)
    worker = WorkerDeployment.__new__(WorkerDeployment)
    await WorkerDeployment.__init__(worker, config.worker_config(), 0.0, store, allow_unauthenticated_ray=True)
    handles = FakeHandle(replica), FakeHandle(worker), store
    ingress = Ingress(config, *handles)
    await ingress.services.preload.wait()
    try:
        async with http_of(Served(ingress, *handles)) as client:
            yield ingress, client
            await ingress.services.background.idle()
    finally:
        worker._engine.stop()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
