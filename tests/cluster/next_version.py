"""The application as a later version of the server may be: its workers' reports have one field more.

Serve reads `build_app`'s annotation to turn a YAML file's args into an AppConfig: it must be the class, not its name.
"""

from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import patch

from ray.serve import Application

from deployments import app
from deployments.config.app import AppConfig
from deployments.worker import WorkerDeployment
from gpu_worker.front.request.request import Delta, Job


class NextWorker(WorkerDeployment):
    """A Worker of that version."""

    async def stream(self, job: Job) -> AsyncIterator[Any]:
        async for item in super().stream(job):
            yield item if isinstance(item, Delta) else (*item, "a field of the next version")

    def is_of_the_next_version(self) -> bool:
        return True


def build_app(args: AppConfig) -> Application:
    """Return the application with these workers."""
    with patch.object(app, "WorkerDeployment", NextWorker):
        return app.build_app(args)
