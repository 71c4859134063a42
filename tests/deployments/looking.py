"""Open the console in a real Chromium and use it: prompts, and a dropped folder."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from playwright.async_api import Page

from tests.browsing import Browsing, address_of
from tests.deployments.app_fakes import Served, serve_plainly
from tests.deployments.console_fakes import CountingWorker, MappedRetriever

Look = Callable[[Page, Served], Awaitable[None]]


def look(browsing: Browsing, question: Look, *, context: dict[str, Any] | None = None, **options: Any) -> None:
    """Open the console over an Ingress with these fakes, and let `question` inspect it."""

    async def run() -> None:
        options.setdefault("retriever", MappedRetriever())
        served = serve_plainly(**{"worker": CountingWorker(), **options})
        async with address_of(served) as url, browsing.page(url, **(context or {})) as page:
            await question(page, served)

    browsing.run(run())


async def ask(page: Page, prompt: str = "A verse, please.") -> None:
    await page.get_by_label("Prompt").fill(prompt)
    await page.get_by_role("button", name="Ask", exact=True).click()


def folder_of(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"12345")
    (folder / ".hidden").write_text("of the file manager")
    return folder
