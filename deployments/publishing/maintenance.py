"""Long jobs on the pool. Each yields progress objects with `done` and `total`, then one with the `result`."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from ray.exceptions import RayActorError

from deployments.api.doctor_report import doctor_object
from deployments.api.responses import replicas_object
from deployments.calls.catalogue_clients import RetrieverClient, StoreClient
from deployments.json_types import JsonObject
from deployments.publishing.learning import Learning, counted
from deployments.publishing.publisher import Publisher
from lora_store import AdapterRef, EncoderIncomplete
from retriever_svc import AskedPrompt, EncoderUnusable

logger = logging.getLogger(__name__)

_LOAD_ENCODER_TIMEOUT_S = 600.0  # a model may have to be downloaded first
_MAX_ROUNDS = 5


async def verify(store: StoreClient, tenant: str) -> AsyncGenerator[JsonObject]:
    """Hash again every blob that the tenant can see. Report a bad one at once, and again in the result."""
    await store.ping()
    problems: list[JsonObject] = []
    done = 0
    async with aclosing(store.verify(tenant)) as checks:
        async for verified in checks:
            done, check = verified.done, verified.check
            line: JsonObject = {"done": done, "total": verified.total}
            if check.problem is not None:
                problems.append({"digest": check.digest, "adapter": str(check.ref), "problem": check.problem})
                line |= {"problem": problems[-1]}
            yield line
    yield {"result": {"num_blobs": done, "problems": problems}}


async def doctor(
    store: StoreClient, retriever: RetrieverClient, tenant: str, prompts: Sequence[AskedPrompt] = ()
) -> AsyncGenerator[JsonObject]:
    """Search by every adapter's own samples, and by `prompts`. Report how well adapters are found, and outcomes."""
    async with aclosing(retriever.doctor(tenant, prompts)) as steps:
        async for step in steps:
            yield {"done": step.num_done, "total": step.num_total}
            if step.report is not None:
                outcomes = counted(tenant, await store.feedback(tenant, "outcome"))
                yield {"result": {**doctor_object(step.report, tenant), "outcomes": outcomes}}


async def reindex(
    publisher: Publisher,
    store: StoreClient,
    retriever: RetrieverClient,
    learning: Learning,
    model: str,
    actor: str,
    projection: str = "auto",
) -> AsyncGenerator[JsonObject]:
    """Embed the pool with the encoder `model`, then activate that encoder on every replica at one generation.

    `projection`: auto, none, or refit, which fits one to the pool's samples first. Adapters published meanwhile are
    embedded in a further round. Applied outcomes are applied again, with the vectors of the new encoder.
    Raises: EncoderUnusable, ProjectionUnusable, EncoderIncomplete.
    """
    await store.ping()
    if projection == "refit":
        projection = await retriever.refit(model)
    for round_number in range(1, _MAX_ROUNDS + 1):
        unreadable: list[AdapterRef] = []
        async with aclosing(retriever.reindex(model, projection)) as steps:
            async for step in steps:
                unreadable += step.unreadable
                if step.embeddings:
                    await store.add_embeddings(step.embeddings)
                yield {"done": step.num_done, "total": step.num_total}
        projection = identity = await _prepare_everywhere(retriever, model, projection)  # loaded once for all rounds
        try:
            generation = await store.activate_encoder(model, identity, actor)
        except EncoderIncomplete as exc:
            logger.info("%d adapters were published while the pool was embedded", len(exc.missing))
            if round_number == _MAX_ROUNDS or set(exc.missing) <= set(
                unreadable
            ):  # another round would not embed these
                raise
            continue
        await learning.apply_again(actor)
        replicas = replicas_object(await publisher.catch_up(generation))
        yield {"result": {"encoder": model, "identity": identity, "generation": generation, "replicas": replicas}}
        return


async def _prepare_everywhere(retriever: RetrieverClient, model: str, projection: str) -> str:
    """Load the encoder on every replica, and return its identity. Raises: the error of a replica that cannot."""
    answers = await retriever.broadcast_prepare_encoder(model, _LOAD_ENCODER_TIMEOUT_S, projection)
    identities = set()
    for answer in answers:
        if isinstance(answer, RayActorError):
            continue  # its successor loads the encoder at its start
        if isinstance(answer, BaseException):
            raise answer
        identities.add(answer)
    if len(identities) != 1:
        raise EncoderUnusable(model, f"its {len(answers)} Retriever replicas load {len(identities)} different ones")
    return identities.pop()
