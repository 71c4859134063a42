"""Open the console in a real Chromium and use it: prompts, views, and a dropped folder."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Locator, Page, Route, expect

from tests.browsing import Browsing, address_of
from tests.deployments.adapter_records import BASE
from tests.deployments.app_fakes import Served, serve_plainly
from tests.deployments.console_fakes import CountingWorker, MappedRetriever

CONFIG = json.dumps({"r": 8, "base_model_name_or_path": BASE})


@asynccontextmanager
async def look(
    browsing: Browsing, *, context: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[Page, Served]]:
    """Open the console over an Ingress with these fakes."""
    options.setdefault("retriever", MappedRetriever())
    served = serve_plainly(**{"worker": CountingWorker(), **options})
    async with address_of(served) as url, browsing.page(url, **(context or {})) as page:
        yield page, served


async def ask(page: Page, prompt: str = "A verse, please.") -> None:
    await page.get_by_label("Prompt", exact=True).fill(prompt)
    await page.get_by_role("button", name="Ask", exact=True).click()


async def ask_and_wait(page: Page, prompt: str = "A verse, please.") -> None:
    """Ask, and wait until the whole answer is shown."""
    await ask(page, prompt)
    await expect(last_turn(page, ".note")).to_contain_text("tokens")


def last_turn(page: Page, part: str = "") -> Locator:
    """Return the last turn of the conversation, or a part of it."""
    return page.locator(f"#turns > li:last-child {part}")


async def go(page: Page, view: str) -> None:
    """Follow the link to a view, and wait until the view is shown: the page shows it some time after the click."""
    await page.get_by_role("navigation").get_by_role("link", name=view, exact=True).click()
    await expect(page.get_by_role("heading", level=2, name=view, exact=True)).to_be_visible()


async def open_adapter(page: Page, name: str) -> None:
    """Open the page of an adapter from the table, and wait until all of it is shown."""
    await go(page, "Adapters")
    await page.locator("#pool-rows").get_by_role("link", name=name, exact=True).click()
    await expect(page.locator("#adapter-title")).to_have_text(name)
    await expect(page.locator("#adapter-body")).to_be_visible()
    await expect(page.locator("#adapter-code pre")).to_have_count(2)


async def press(button: Locator, path: str, status: int = 200) -> None:
    """Press a button, and wait for this answer to the request that it sends."""
    async with button.page.expect_response(lambda answer: answer.request.url.endswith(path)) as answered:
        await button.click()
    assert (await answered.value).status == status


async def publish(page: Page, count: int = 1) -> None:
    """Publish all ticked folders, this many."""
    await page.get_by_role("button", name=f"Publish {count} adapter").click()
    await expect(page.locator("#previews .good")).to_have_count(count)


async def show_options(page: Page) -> None:
    await page.get_by_text("System prompt and more options").click()


async def wait_frames(page: Page, count: int) -> None:
    """Let the page draw this many frames: by then it has handled what it received before."""
    await page.evaluate(
        "(n) => new Promise((done) => { const f = () => (n-- ? requestAnimationFrame(f) : done()); f(); })", count
    )


async def poll(page: Page) -> None:
    """Let the page read the server's metrics now instead of two seconds after it did, and handle the answer."""
    async with page.expect_response("**/v1/stats"):
        await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await wait_frames(page, 5)


async def report_generation(route: Route, generation: int) -> None:
    """Answer with the server's metrics, of a pool at this generation."""
    answer = await (await route.fetch()).json()
    await route.fulfill(json={**answer, "pool": {**answer["pool"], "generation": generation}})


def folder_of(parent: Path, name: str, samples: Sequence[str] = (), config: str = CONFIG) -> Path:
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(config)
    (folder / "adapter_model.safetensors").write_bytes(b"12345")
    (folder / ".hidden").write_text("of the file manager")
    if samples:
        lines = [json.dumps({"input": text}) for text in samples]
        (folder / "lora_samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
