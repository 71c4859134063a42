"""Publish the adapters of the settings at the start of a server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deployments.api import error_table
from deployments.api.adapters import PublishItem
from deployments.api.responses import Published
from deployments.errors import NoAnswerInTime, NotReady
from deployments.publishing.adapter_folders import AdapterFolder, adapter_folders
from deployments.publishing.publisher import Publisher
from retriever_svc import ServedBases

logger = logging.getLogger(__name__)

_BATCH = 32
_ACTOR = "preload"
_MOST_TRIES = 3  # then the server is ready without the adapters that met errors which may pass
_PAUSE_S = 60.0  # between later tries


class Preload:
    """Publishes the folders whose names have no served version, in the background. Create it in an event loop."""

    def __init__(
        self,
        paths: Sequence[Path],
        publisher: Publisher,
        *,
        bases: ServedBases | None = None,
        approves: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the preload. `approves`: approve its adapters, because the operator chose them.

        `bases`: a live version of another base model is replaced; by default none is.
        """
        self._paths, self._publisher, self._approves = paths, publisher, approves
        self._bases = bases or ServedBases()
        self._left: list[AdapterFolder] | None = None  # not published, and not refused for good; None before the start
        self._refused: dict[str, str] = {}
        self._num_tries, self._next_try, self._is_ready = 0, 0.0, False
        self._clock = clock
        self._task = asyncio.get_event_loop().create_task(self._publish())

    def refused(self) -> dict[str, str]:
        """Return the folders that are not published, with the reasons. Try those again that met an error that may pass.

        Raises: NotReady while there are such folders, but not after three tries, nor for a base model without workers.
        """
        if self._task.done() and self._left != [] and self._clock() >= self._next_try:
            if (error := self._task.exception()) is not None:
                logger.error("publishing the preloaded adapters failed; it will be retried", exc_info=error)
            if self._is_ready:
                self._next_try = self._clock() + _PAUSE_S
            self._task = asyncio.get_running_loop().create_task(self._publish())
        if not self._is_ready:
            reason = next(iter(self._refused.values()), "its preloaded adapters are not published yet")
            raise NotReady(f"the server is still starting: {reason}")
        return dict(self._refused)

    async def wait(self) -> None:
        """Return once it has ended, with or without errors."""
        await asyncio.wait([self._task])

    def cancel(self) -> None:
        if not self._task.get_loop().is_closed():
            self._task.cancel()

    async def _publish(self) -> None:
        if self._left is None:
            self._left = [found for path in self._paths for found in adapter_folders(path)]
        folders, are_away = self._left, True
        for start in range(0, len(folders), _BATCH):
            batch = folders[start : start + _BATCH]
            passing = await self._publish_batch([PublishItem(found.path, found.name) for found in batch])
            settled = [found for found in batch if found.path not in passing]
            self._left = [found for found in self._left if found not in settled]
            are_away &= all(code == NotReady.code for code in passing.values())
        self._num_tries += 1
        self._is_ready |= are_away or self._num_tries == _MOST_TRIES

    async def _publish_batch(self, batch: Sequence[PublishItem]) -> dict[Path | None, str]:
        """Publish those that lack a served version. Return the codes of errors that may pass, by folder."""
        lacking = await self._lacking(batch)
        outcomes = await self._publish_when_possible(lacking) if lacking else []
        if self._approves:
            await self._approve(batch)
        earlier = {item.path: self._refused.pop(str(item.path), None) for item in batch}
        passing: dict[Path | None, str] = {}
        for upload, outcome in zip(lacking, outcomes, strict=True):
            if isinstance(outcome, Exception):
                status, body = error_table.describe(outcome)
                reason = self._refused[str(upload.path)] = body["error"]["message"]
                if reason != earlier[upload.path]:
                    logger.error("%s was not published: %s", upload.path, outcome)
                if status in error_table.RETRIED:
                    passing[upload.path] = body["error"]["code"]
        return passing

    async def _publish_when_possible(self, batch: Sequence[PublishItem]) -> list[Published | Exception]:
        """Publish, as soon as a worker has loaded its model, which may take many minutes."""
        while True:
            try:
                return await self._publisher.publish(batch, actor=_ACTOR)
            except NoAnswerInTime:
                logger.info("the preload waits for a worker")

    async def _lacking(self, batch: Sequence[PublishItem]) -> list[PublishItem]:
        """Return those without a served version. Versions that were updated or rolled back since are not changed."""
        live = await self._publisher.live(batch)
        served = {key for key, record in live.items() if self._bases.serves(record)}
        return [item for item in batch if (item.tenant, item.adapter_name) not in served]

    async def _approve(self, batch: Sequence[PublishItem]) -> None:
        """Approve the live versions that a preload published, including those from before approval was required."""
        live = await self._publisher.live(batch)
        waiting = [
            record.ref
            for record in live.values()
            if record.actor == _ACTOR and record.visibility == "public" and not record.approved
        ]
        if waiting:
            await self._publisher.approve(waiting, actor=_ACTOR)
