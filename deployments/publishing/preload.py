"""Publish the adapters of the settings at the start of a server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from deployments.api import error_table
from deployments.api.adapters import PublishItem
from deployments.api.responses import Published
from deployments.errors import NoAnswerInTime, NotReady
from deployments.publishing.adapter_folders import adapter_folders
from deployments.publishing.publisher import Publisher
from retriever_svc import ServedBases

logger = logging.getLogger(__name__)

_BATCH = 32
_ACTOR = "preload"


class Preload:
    """Publishes the folders whose names have no served version, in the background. Create it in an event loop."""

    def __init__(
        self, paths: Sequence[Path], publisher: Publisher, *, bases: ServedBases | None = None, approves: bool = False
    ) -> None:
        """Start the preload. `approves`: approve its adapters, because the operator chose them.

        `bases`: a live version of another base model is replaced; by default none is.
        """
        self._paths, self._publisher, self._approves = paths, publisher, approves
        self._bases = bases or ServedBases()
        self._task = asyncio.get_event_loop().create_task(self._publish())

    def refused(self) -> dict[str, str]:
        """Return the refused folders with the reasons, once the preload has ended.

        Raises: NotReady before that, and after a failure of the whole preload, which is then started again.
        """
        if not self._task.done():
            raise NotReady("the server is still starting")
        if (error := self._task.exception()) is not None:
            logger.error("publishing the preloaded adapters failed; it will be retried", exc_info=error)
            self._task = asyncio.get_running_loop().create_task(self._publish())
            raise NotReady("publishing the preloaded adapters failed; it will be retried")
        return self._task.result()

    async def wait(self) -> None:
        """Return once it has ended, with or without errors."""
        await asyncio.wait([self._task])

    def cancel(self) -> None:
        if not self._task.get_loop().is_closed():
            self._task.cancel()

    async def _publish(self) -> dict[str, str]:
        refused = {}
        folders = [found for path in self._paths for found in adapter_folders(path)]
        for start in range(0, len(folders), _BATCH):
            batch = [PublishItem(found.path, found.name) for found in folders[start : start + _BATCH]]
            lacking = await self._lacking(batch)
            outcomes = await self._publish_batch(lacking) if lacking else []
            if self._approves:
                await self._approve(batch)
            for upload, outcome in zip(lacking, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    logger.error("%s was not published: %s", upload.path, outcome)
                    _, body = error_table.describe(outcome)
                    refused[str(upload.path)] = body["error"]["message"]
        return refused

    async def _publish_batch(self, batch: Sequence[PublishItem]) -> list[Published | Exception]:
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
