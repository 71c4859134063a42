"""How a publish runs over the handles: stage, embed, probe, commit, then every Retriever replica catches up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.retriever import Embedded
from deployments.store import FolderUpload
from lora_store import AdapterRecord, AdapterRef, AdapterRefused, Staged
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
    probe_shift: float | None
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
        """Publish all that can be, in one commit; what cannot has its error in its place. What is live stays as it is.

        Raises: what the Retriever or the Store says of the batch as a whole.
        """
        module_shapes = await self._worker.module_shapes.remote()
        staging = [self._store.stage.remote(upload, module_shapes) for upload in uploads]
        staged = await asyncio.gather(*staging, return_exceptions=True)
        live = await self._store.live.remote([item.ref for item in staged if isinstance(item, Staged)])
        new = [item for item in staged if isinstance(item, Staged) and item.ref not in live]
        encoder, embedded = await self._retriever.embed.remote([item.samples for item in new])
        pairs = zip(new, embedded, strict=True)
        probed = await asyncio.gather(*[self._probe(*pair) for pair in pairs], return_exceptions=True)
        known = live | {item.ref: outcome for item, outcome in zip(new, probed, strict=True)}
        outcomes = [known[item.ref] if isinstance(item, Staged) else item for item in staged]
        generation = await self._commit([item for item in probed if isinstance(item, _Probed)], encoder, actor)
        generation = max([generation, *[record.generation for record in live.values()]])
        ready, behind = await self._catch_up(generation) if generation else (0, 0)
        return [_published(outcome, generation, ready, behind) for outcome in outcomes]

    async def _probe(self, staged: Staged, embedded: Embedded | None) -> _Probed:
        shift = await self._worker.probe.remote(staged.weights_digest)
        if shift == 0.0:
            raise AdapterRefused(staged.ref.name, ["it does not change what the base model says"])
        return _Probed(staged, embedded, shift)

    async def _commit(self, new: Sequence[_Probed], encoder: str, actor: str) -> int:
        """The generation at which all of `new` is live, 0 when there is nothing new."""
        if not new:
            return 0
        generation: int = await self._store.commit.remote(
            [item.staged for item in new],
            [None if item.embedded is None else item.embedded.vector for item in new],
            encoder,
            [item.shift for item in new],
            actor,
        )
        logger.info("published %d adapters at generation %d", len(new), generation)
        return generation

    async def _catch_up(self, generation: int) -> tuple[int, int]:
        """(replicas that serve `generation`, replicas that do not yet); (0, 1) where Ray 2.60 gives up on them all."""
        response = self._retriever.broadcast("catch_up", generation)
        try:
            results = await response.results_async(timeout_s=CATCH_UP_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError) as exc:
            logger.warning("generation %d is committed, but not every replica has it yet: %s", generation, exc)
            return 0, 1
        ready = sum(isinstance(result, int) for result in results)
        return ready, len(results) - ready


def _published(outcome: object, generation: int, ready: int, behind: int) -> Published | Exception:
    if isinstance(outcome, _Probed):
        found = outcome.embedded is not None
        neighbours = outcome.embedded.neighbours if outcome.embedded is not None else ()
        return Published(outcome.staged.ref, generation, ready, behind, found, outcome.shift, neighbours)
    if isinstance(outcome, AdapterRecord):
        found, shift = outcome.encoder is not None, outcome.probe_shift
        return Published(outcome.ref, outcome.generation, ready, behind, found, shift, ())
    assert isinstance(outcome, Exception)
    return outcome
