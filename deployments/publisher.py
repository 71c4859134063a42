"""How a publish runs over the handles: stage, embed, probe, commit, then every Retriever replica catches up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ray.serve.handle import DeploymentHandle

from deployments.retriever import Embedded
from deployments.store import FolderUpload
from lora_store import AdapterRef, AdapterRefused, Staged
from retriever_svc import Candidate

logger = logging.getLogger(__name__)

CATCH_UP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Published:
    """One adapter that is live. `ready` Retriever replicas route to it already, `behind` ones do not yet."""

    ref: AdapterRef
    generation: int
    ready: int
    behind: int
    found_by_auto: bool  # False: it came without samples, and only its name reaches it
    probe_shift: float
    neighbours: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class _Probed:
    staged: Staged
    embedded: Embedded | None
    shift: float


class Publisher:
    """The only path by which an adapter becomes live."""

    def __init__(self, store: DeploymentHandle, retriever: DeploymentHandle, worker: DeploymentHandle) -> None:
        self._store, self._retriever, self._worker = store, retriever, worker

    async def publish(self, uploads: Sequence[FolderUpload], actor: str) -> list[Published | Exception]:
        """Publish all that can be, in one commit; what cannot has its error in its place.

        Raises: what the Retriever or the Store says of the batch as a whole.
        """
        module_shapes = await self._worker.module_shapes.remote()
        staging = [self._store.stage.remote(upload, module_shapes) for upload in uploads]
        staged = await asyncio.gather(*staging, return_exceptions=True)
        good = [item for item in staged if isinstance(item, Staged)]
        encoder, embedded = await self._retriever.embed.remote([item.samples for item in good])
        pairs = zip(good, embedded, strict=True)
        probed = iter(await asyncio.gather(*[self._probe(*pair) for pair in pairs], return_exceptions=True))
        outcomes = [next(probed) if isinstance(item, Staged) else item for item in staged]
        return await self._commit(outcomes, encoder, actor)

    async def _probe(self, staged: Staged, embedded: Embedded | None) -> _Probed:
        shift = await self._worker.probe.remote(staged.weights_digest)
        if shift == 0.0:
            raise AdapterRefused(staged.ref.name, ["it does not change what the base model says"])
        return _Probed(staged, embedded, shift)

    async def _commit(self, outcomes: Sequence[object], encoder: str, actor: str) -> list[Published | Exception]:
        good = [outcome for outcome in outcomes if isinstance(outcome, _Probed)]
        generation = ready = behind = 0
        if good:
            generation = await self._store.commit.remote(
                [item.staged for item in good],
                [None if item.embedded is None else item.embedded.vector for item in good],
                encoder,
                [item.shift for item in good],
                actor,
            )
            ready, behind = await self._catch_up(generation)
            logger.info("published %d adapters at generation %d", len(good), generation)
        return [_published(outcome, generation, ready, behind) for outcome in outcomes]

    async def _catch_up(self, generation: int) -> tuple[int, int]:
        """(replicas that serve `generation`, replicas that do not yet)."""
        response = self._retriever.broadcast("catch_up", generation)
        results = await response.results_async(timeout_s=CATCH_UP_TIMEOUT_S, return_exceptions=True)
        ready = sum(isinstance(result, int) for result in results)
        return ready, len(results) - ready


def _published(outcome: object, generation: int, ready: int, behind: int) -> Published | Exception:
    if isinstance(outcome, _Probed):
        found = outcome.embedded is not None
        neighbours = outcome.embedded.neighbours if outcome.embedded is not None else ()
        return Published(outcome.staged.ref, generation, ready, behind, found, outcome.shift, neighbours)
    assert isinstance(outcome, Exception)
    return outcome
