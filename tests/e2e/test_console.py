"""The console of the running application, with a real model, encoder and browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from tests.browsing import Browsing, drop_folder
from tests.deployments.looking import go, last_turn, show_options
from tests.e2e.live import Live
from tests.e2e.starter_pool import POOL

pytestmark = pytest.mark.browser

NEGATE = "Negate the statement: the chemist has used my car"
PIRATES = "How would a pirate captain greet the crew of another ship?"
SLOW_MS = 60_000  # other tests may keep both cores busy


def folder_of(parent: Path, name: str, topic: list[str]) -> Path:
    """Write a starter adapter under another name, with other samples."""
    folder = parent / name
    shutil.copytree(POOL / "sentence_negation", folder)
    lines = [json.dumps({"input": text}) for text in topic]
    (folder / "lora_samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


async def ask(page: Page, prompt: str) -> None:
    """Ask in a conversation of its own, for an answer of 16 tokens."""
    await page.get_by_role("button", name="New conversation").click()
    await page.get_by_label("Prompt", exact=True).fill(prompt)
    await page.get_by_role("button", name="Ask", exact=True).click()
    await expect(last_turn(page, ".note")).to_contain_text("tokens", timeout=SLOW_MS)


async def limit(page: Page) -> None:
    await show_options(page)
    await page.get_by_label("Longest answer, tokens").fill("16")


def test_a_user_asks_publishes_and_withdraws(url: str, browsing: Browsing, tmp_path: Path) -> None:
    topic = ["What does a pirate captain say?", "Talk like a pirate to the crew.", "A pirate greets another ship."]
    folder = folder_of(tmp_path, "pirate_talk", topic)

    async def visit() -> None:
        async with browsing.page(f"{url}/") as page:
            await limit(page)
            await expect(page.locator("#map-list li")).to_have_count(12, timeout=SLOW_MS)
            examples = page.locator("#examples button small")
            await expect(examples).to_have_count(6, timeout=SLOW_MS)
            assert "bbq_gender_ambig" not in await examples.all_inner_texts(), "its samples are long"
            await ask(page, NEGATE)
            await expect(page.locator("#plan li .name").first).to_have_text("sentence_negation")
            await expect(last_turn(page, ".text")).to_contain_text("not")
            await expect(page.locator("#map .prompt")).to_have_count(1)
            chosen = await page.locator("#plan li .name").count()
            await expect(page.locator("#map .spot.chosen")).to_have_count(chosen)
            await go(page, "Status")
            await expect(page.locator("#metric-hits")).to_have_text(
                re.compile(r"device \d+ % memory \d+ % store \d+ %")
            )

            await drop_folder(page, folder)
            await page.get_by_role("button", name="Publish 1 adapter").click(timeout=SLOW_MS)
            await expect(page.locator("#previews .good .state")).to_contain_text("live at generation", timeout=SLOW_MS)
            await go(page, "Ask")
            await expect(page.locator("#map-list li")).to_have_count(13)
            await ask(page, PIRATES)
            await expect(page.locator("#plan li .name").first).to_have_text("pirate_talk")

            await go(page, "Adapters")
            await page.locator("#pool-rows").get_by_role("link", name="pirate_talk").click()
            await page.get_by_role("button", name="Withdraw…").click()
            await page.get_by_label("Type the name to confirm").fill("pirate_talk")
            await page.locator("#confirm-yes").click()
            await expect(page.locator("#pool-rows .name", has_text="pirate_talk")).to_have_count(0, timeout=SLOW_MS)
            await go(page, "Ask")
            await expect(page.locator("#map-list li")).to_have_count(12)
            await ask(page, PIRATES)
            await expect(page.locator("#plan li .name", has_text="pirate_talk")).to_have_count(0)

    browsing.run(visit())


def test_the_console_works_below_a_prefix_and_with_several_replicas(live: Live, browsing: Browsing) -> None:
    async def visit() -> None:
        async with browsing.page(f"{live.url}/") as page:
            await expect(page.locator("#connection")).to_have_text("live", timeout=SLOW_MS)
            await go(page, "Status")
            await expect(page.locator("#metric-running")).to_have_text("0 of 32")  # two workers of 16 rows
            await go(page, "Ask")
            await limit(page)
            await page.get_by_label("Model", exact=True).fill("tiny")
            await ask(page, "The sea is")

    browsing.run(visit())
