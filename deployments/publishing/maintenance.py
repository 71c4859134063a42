"""Long work on the pool, told as it goes: objects with `done` and `total`, then one with the `result`."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from deployments.api.responses import JsonObject, doctor_object
from deployments.publishing.publisher import Publisher
from lora_store import AdapterRef, EncoderIncomplete
from lora_store.garbage_collection import Verified
from retriever_svc import DoctorStep, EncoderUnusable, ReindexStep

logger = logging.getLogger(__name__)

_LOAD_ENCODER_TIMEOUT_S = 600.0  # a model may come from the hub first
_MAX_ROUNDS = 5


async def verify(publisher: Publisher, store: DeploymentHandle, tenant: str) -> AsyncGenerator[JsonObject]:
    """Hash again every blob of what the tenant sees. Report a bad one at once, and again in the result."""
    await publisher.reach_store()
    problems: list[JsonObject] = []
    done = 0
    async with aclosing(_streamed(store, "verify", tenant)) as checks:
        async for verified in checks:
            assert isinstance(verified, Verified)
            done, check = verified.done, verified.check
            line: JsonObject = {"done": done, "total": verified.total}
            if check.problem is not None:
                problems.append({"digest": check.digest, "adapter": str(check.ref), "problem": check.problem})
                line |= {"problem": problems[-1]}
            yield line
    yield {"result": {"num_blobs": done, "problems": problems}}


async def doctor(retriever: DeploymentHandle, tenant: str) -> AsyncGenerator[JsonObject]:
    """Ask by every adapter's own samples, and report how they are found."""
    async with aclosing(_streamed(retriever, "doctor", tenant)) as steps:
        async for step in steps:
            assert isinstance(step, DoctorStep)
            yield {"done": step.num_done, "total": step.num_total}
            if step.report is not None:
                yield {"result": doctor_object(step.report, tenant)}


async def reindex(
    publisher: Publisher, store: DeploymentHandle, retriever: DeploymentHandle, model: str, actor: str
) -> AsyncGenerator[JsonObject]:
    """Embed the pool by the encoder of `model`, then search by it on every replica from one generation on.

    What is published meanwhile is embedded in a further round. Raises: EncoderUnusable, EncoderIncomplete.
    """
    await publisher.reach_store()
    for round_number in range(1, _MAX_ROUNDS + 1):
        unreadable: list[AdapterRef] = []
        async with aclosing(_streamed(retriever, "reindex", model)) as steps:
            async for step in steps:
                assert isinstance(step, ReindexStep)
                unreadable += step.unreadable
                if step.embeddings:
                    await store.add_embeddings.remote(step.embeddings)
                yield {"done": step.num_done, "total": step.num_total}
        identity = await _prepare_everywhere(retriever, model)
        try:
            generation: int = await store.activate_encoder.remote(model, identity, actor)
        except EncoderIncomplete as exc:
            logger.info("%d adapters came while the pool was embedded", len(exc.missing))
            if round_number == _MAX_ROUNDS or set(exc.missing) <= set(unreadable):  # no further round embeds these
                raise
            continue
        ready, behind = await publisher.catch_up(generation)
        replicas = {"ready": ready, "behind": behind}
        yield {"result": {"encoder": model, "identity": identity, "generation": generation, "replicas": replicas}}
        return


async def _prepare_everywhere(retriever: DeploymentHandle, model: str) -> str:
    """The identity of the model's encoder, loaded on every replica. Raises: what one says that cannot load it."""
    response = retriever.broadcast("prepare_encoder", model)
    answers = await response.results_async(timeout_s=_LOAD_ENCODER_TIMEOUT_S, return_exceptions=True)
    identities = set()
    for answer in answers:
        if isinstance(answer, RayActorError):
            continue  # its successor loads the encoder as it starts
        if isinstance(answer, Exception):
            raise answer
        identities.add(answer)
    if len(identities) != 1:
        raise EncoderUnusable(model, f"its {len(answers)} Retriever replicas load {len(identities)} different ones")
    return str(identities.pop())


async def _streamed(handle: DeploymentHandle, method: str, *args: Any) -> AsyncGenerator[Any]:
    """What one replica yields; leaving early ends the work there."""
    response = getattr(handle.options(stream=True), method).remote(*args)
    try:
        async for item in response:
            yield item
    finally:
        response.cancel()
