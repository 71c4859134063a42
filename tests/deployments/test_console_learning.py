"""The console's parts that learn, in a real Chromium: proposed samples of an adapter, and buttons below an answer."""

from __future__ import annotations

import pytest
from playwright.async_api import expect

from lora_store import Feedback
from tests.browsing import Browsing
from tests.deployments.adapter_records import POOL, pool_of
from tests.deployments.fake_store import FakeStore
from tests.deployments.looking import ask, last_turn, look, open_adapter

pytestmark = pytest.mark.browser


async def test_proposed_samples_are_accepted_and_rejected_one_by_one_or_together(browsing: Browsing) -> None:
    store = FakeStore(pool_of(*POOL))
    for text in ("Rhyme on rain.", "Sing of snow.", "Write on wind."):
        proposed = Feedback.proposed(text, "poet", "team")
        store.given["local", "proposed", proposed.id] = proposed
    async with look(browsing, store=store) as (page, _):
        await open_adapter(page, "poet")
        rows = page.locator("#adapter-proposed > li")
        await expect(rows).to_have_count(3)
        await expect(rows.last).to_contain_text("Rhyme on rain.")
        await expect(rows.last).to_contain_text("team")
        await page.get_by_role("button", name="Reject: Sing of snow.").click()
        await expect(rows).to_have_count(2)
        await expect(rows.first.get_by_role("button", name="Accept")).to_be_focused()
        assert len(store.live["local", "poet"]) == 1
        await page.get_by_role("button", name="Accept: Rhyme on rain.").click()
        await expect(rows).to_have_count(1)
        assert len(store.live["local", "poet"]) == 2
        await page.get_by_role("button", name="Accept all").click()
        await expect(page.locator("#adapter-proposed-part")).to_be_hidden()
        await expect(page.locator("#adapter-title")).to_be_focused()
        assert len(store.live["local", "poet"]) == 3
        await open_adapter(page, "coder")
        await expect(page.locator("#adapter-proposed-part")).to_be_hidden()


async def test_an_answer_of_auto_is_judged_by_a_button(browsing: Browsing) -> None:
    store = FakeStore(pool_of(*POOL))
    async with look(browsing, store=store, learning="observe") as (page, _):
        await ask(page)
        bad = last_turn(page).get_by_role("button", name="Bad", exact=True)
        await bad.click()
        await expect(bad).to_have_attribute("aria-pressed", "true")
        [said] = [given for (_, kind, _), given in store.given.items() if kind == "outcome"]
        assert (said.text, said.adapter, said.score) == ("A verse, please.", "local/poet", -1)
        await last_turn(page).get_by_role("button", name="Good", exact=True).click()
        await expect(bad).to_have_attribute("aria-pressed", "false")
        await ask(page, "Another one, please.")
        await expect(page.locator("#turns > li")).to_have_count(2)
        await expect(last_turn(page).get_by_role("button", name="Again", exact=True)).to_be_visible()
        await expect(page.get_by_role("button", name="Bad", exact=True)).to_have_count(1)  # no later turn is kept


@pytest.mark.parametrize(("learning", "model"), [("off", "auto"), ("observe", "poet")])
async def test_there_are_no_buttons_where_nothing_is_learnt(browsing: Browsing, learning: str, model: str) -> None:
    async with look(browsing, learning=learning) as (page, _):
        await page.get_by_label("Model", exact=True).fill(model)
        await ask(page)
        await expect(last_turn(page).get_by_role("button", name="Again", exact=True)).to_be_visible()
        await expect(last_turn(page).get_by_role("button", name="Bad", exact=True)).to_be_hidden()
