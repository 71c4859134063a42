"""Take the screenshots of the console that the documentation shows.

    python -m docs.screenshots http://127.0.0.1:8000

The server must have the starter pool, as `make serve` starts it; one adapter of it gets other tags, and a trial. Needs
Debian's package `chromium`.
"""

from __future__ import annotations

import asyncio
import base64
import math
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from playwright.async_api import Browser, Page, ViewportSize, async_playwright, expect
from playwright.async_api import Route as PageRoute

FOLDER = Path(__file__).parent / "console"
STARTER_POOL = Path(__file__).parents[1] / "examples" / "starter_pool"
QUALITY = 70
WIDE: ViewportSize = {"width": 1280, "height": 860}
NARROW: ViewportSize = {"width": 390, "height": 720}
LARGE: ViewportSize = {"width": 1280, "height": 1500}
KINDS = {  # A pool that does not exist has these tags, and names with these words.
    "support": ("ticket", "refund"),
    "legal": ("clause", "contract"),
    "sql": ("query", "schema"),
    "dates": ("date", "week"),
    "poems": ("rhyme", "verse"),
    "medical": ("dose", "triage"),
    "travel": ("hotel", "route"),
    "code": ("python", "review"),
}
SEARCHED = "give me my money back"
ALIKE = {  # adapters that it finds, by a sample
    "support-refund-21": "The shoes do not fit, I want my money back",
    "support-refund-05": "When will I get the money for the parcel that I sent back?",
    "support-ticket-12": "I paid twice for one order",
    "legal-contract-07": "May the buyer end the contract and be paid back?",
}
ANSWER_MS = 120_000
PROMPTS = ("Negate the statement: the chemist has used my car", "Turn the statement into a question: the boys like tea")
SYSTEM_PROMPT = "You edit sentences."
FLAGS = ("--no-sandbox", "--disable-gpu", "--hide-scrollbars")


@asynccontextmanager
async def opened(
    browser: Browser, url: str, *, size: ViewportSize = WIDE, theme: Literal["light", "dark"] = "light"
) -> AsyncIterator[Page]:
    """Open the console without a history."""
    async with await browser.new_context(viewport=size, color_scheme=theme) as context:
        page = await context.new_page()
        await page.goto(url)
        await expect(page.locator("#examples button").first).to_be_visible(timeout=ANSWER_MS)
        yield page


async def save(page: Page, folder: Path, name: str, part: str | None = None) -> None:
    """Write what the window shows, or one element, as WebP."""
    await page.mouse.move(0, 0)
    await page.evaluate("scrollTo(0, 0)")
    box = None if part is None else await page.locator(part).bounding_box()
    clip: dict[str, Any] = {"captureBeyondViewport": True, "clip": {**box, "scale": 1}} if box else {}
    session = await page.context.new_cdp_session(page)
    shown = await session.send("Page.captureScreenshot", {"format": "webp", "quality": QUALITY, **clip})
    (folder / f"{name}.webp").write_bytes(base64.b64decode(shown["data"]))


async def go(page: Page, view: str) -> None:
    await page.get_by_role("navigation").get_by_role("link", name=view, exact=True).click()


async def ask(page: Page, *prompts: str) -> None:
    """Ask the prompts in turn, and wait for the answers."""
    for number, prompt in enumerate(prompts, start=1):
        await page.get_by_label("Prompt", exact=True).fill(prompt)
        await page.get_by_role("button", name="Ask", exact=True).click()
        await expect(page.locator("#turns > li .note")).to_have_count(number, timeout=ANSWER_MS)
    await expect(page.locator("#map .prompt")).to_have_count(1, timeout=ANSWER_MS)


async def of_ask(page: Page, folder: Path) -> None:
    """Take the screenshots of the view Ask."""
    await save(page, folder, "examples", "#view-ask .chat")
    await ask(page, *PROMPTS)
    await save(page, folder, "ask")
    await save(page, folder, "why", "#view-ask .plan")
    await page.get_by_role("button", name="Code", exact=True).click()
    await save(page, folder, "code", "#code-dialog")
    await page.get_by_role("button", name="Close").click()


async def of_history(page: Page, folder: Path) -> None:
    """Take the screenshot of two conversations after a reload, the second with a system prompt."""
    await page.get_by_role("button", name="New conversation").click()
    await page.get_by_text("System prompt and more options").click()
    await page.get_by_label("System prompt", exact=True).fill(SYSTEM_PROMPT)
    await ask(page, PROMPTS[1])
    await page.reload()
    await expect(page.locator("#history-list .earlier")).to_have_count(2)
    await page.get_by_text("System prompt and more options").click()
    await save(page, folder, "history", "#view-ask .chat")
    await page.get_by_text("System prompt and more options").click()


def made_up_map(per_cluster: int = 50) -> dict[str, Any]:
    """Return the map of a pool of four hundred adapters that do not exist, as the server describes one."""
    clusters, points = [], []
    for number, (tag, words) in enumerate(KINDS.items()):
        x, y, radius = 1.1 * (number % 4), 1.1 * (number // 4), 0.5
        clusters.append({"name": tag, "x": x, "y": y, "radius": radius, "num_adapters": per_cluster})
        for place in range(per_cluster):
            far, turn = 0.9 * radius * math.sqrt((place + 0.5) / per_cluster), 2.4 * place
            name = f"{tag}-{words[place % 2]}-{place:02}"
            at = {"x": x + far * math.cos(turn), "y": y + far * math.sin(turn)}
            points.append({"name": name, **at, "cluster": number})
    count = {"object": "pool_map", "generation": 1, "num_adapters": len(points)}
    return {**count, "clusters": clusters, "points": points}


async def fulfil(answer: dict[str, Any], route: PageRoute) -> None:
    await route.fulfill(json=answer)


async def of_map(page: Page, folder: Path) -> None:
    """Take the screenshot of the map of a large pool, in which adapters are searched by what they do."""
    drawn = made_up_map()
    alike = [{"name": name, "samples": [{"input": text}]} for name, text in ALIKE.items()]
    answers: dict[str, Any] = {
        "**/v1/pool/map*": drawn,
        "**/v1/loras?search=*": {"data": [], "total": 0},
        "**/v1/route": {"data": [{"candidates": alike}]},
    }
    for address, answer in answers.items():
        await page.route(address, partial(fulfil, answer))
    await page.reload()
    await go(page, "Ask")
    await expect(page.locator("#map .label.cluster")).to_have_count(len(KINDS))
    await page.get_by_label("Find").fill(SEARCHED)
    await page.get_by_label("Find").press("Enter")
    await expect(page.locator("#map-spoken")).to_have_text(next(iter(ALIKE)))
    await page.locator("#map-whole").click()
    await save(page, folder, "map", "#map-panel")


async def of_changes(page: Page, folder: Path) -> None:
    """Edit an adapter, try the version before, and take the screenshots of that, of its page and of the usage."""
    await go(page, "Adapters")
    await page.get_by_role("link", name="past_tense", exact=True).click()
    await expect(page.locator("#adapter-similar li").first).to_be_visible(timeout=ANSWER_MS)
    await page.get_by_role("button", name="Edit", exact=True).click()
    await page.locator("#edit-tags").fill("grammar, verbs")
    await save(page, folder, "edit", "#edit-form")
    await page.get_by_role("button", name="Save").click()
    await expect(page.locator("#edit-form")).to_be_hidden(timeout=ANSWER_MS)
    await page.get_by_label("on this many % of the requests").fill("20")
    await page.locator("#adapter-versions tr").first.evaluate("(row) => row.setAttribute('data-before', '')")
    await page.get_by_role("button", name="Start trial").click()
    await expect(page.locator("#adapter-versions [data-before]")).to_have_count(0, timeout=ANSWER_MS)
    await save(page, folder, "trial", "#adapter-body > div:has(#trial-form)")
    await go(page, "Status")
    await page.locator("#usage-by").select_option("version")
    await expect(page.locator("#usage-rows svg").first).to_be_visible(timeout=ANSWER_MS)
    await save(page, folder, "usage", "#usage")


async def of_other_views(page: Page, folder: Path, adapters: Path) -> None:
    """Take the screenshots of the views Compare, Adapters and Publish. Nothing is published."""
    await page.get_by_text("System prompt and more options").click()
    await page.get_by_label("Longest answer, tokens").fill("24")
    await go(page, "Compare")
    await page.get_by_label("Prompt to compare").fill(PROMPTS[0])
    await page.get_by_role("button", name="Compare").click()
    await expect(page.locator("#compare-status")).to_contain_text("different", timeout=ANSWER_MS)
    await save(page, folder, "compare", "#view-compare")
    await go(page, "Adapters")
    await page.get_by_role("link", name="sentence_negation", exact=True).click()
    await expect(page.locator("#adapter-similar li").first).to_be_visible(timeout=ANSWER_MS)
    await save(page, folder, "adapter")
    await go(page, "Publish")
    await page.locator("#folder").set_input_files(adapters)
    await expect(page.locator("#previews > li")).to_have_count(3)
    await expect(page.locator("#previews > li", has_text="auto answers")).to_have_count(2, timeout=ANSWER_MS)
    await save(page, folder, "publish", "#view-publish")


def write_adapters(folder: Path) -> None:
    """Write the folders of the preview: a new version, a copy under another name, and one that cannot be published."""
    for name, copied in (
        ("past_tense", "past_tense"),
        ("negation-v2", "sentence_negation"),
        ("old-format", "date_format"),
    ):
        shutil.copytree(STARTER_POOL / copied, folder / name)
    (folder / "old-format" / "adapter_model.safetensors").rename(folder / "old-format" / "adapter_model.bin")
    (folder / "old-format" / "lora_samples.jsonl").unlink()


async def take(url: str, folder: Path) -> None:
    """Write every screenshot of the console at `url` into `folder`."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        with tempfile.TemporaryDirectory() as parent:
            adapters = Path(parent) / "adapters"
            write_adapters(adapters)
            async with opened(browser, url) as page:
                await of_ask(page, folder)
                await of_history(page, folder)
                await of_other_views(page, folder, adapters)
            async with opened(browser, url, size=LARGE) as page:
                await of_changes(page, folder)
                await of_map(page, folder)
        for name, size, theme in (("dark", WIDE, "dark"), ("narrow", NARROW, "light")):
            async with opened(browser, url, size=size, theme=theme) as page:
                await ask(page, PROMPTS[0])
                await page.evaluate("scrollTo(0, 0)")
                await save(page, folder, name)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(take(sys.argv[1], FOLDER))
