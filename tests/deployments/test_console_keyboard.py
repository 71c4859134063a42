"""The console's tasks with the keyboard alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from lora_store import Edit
from tests.browsing import Browsing
from tests.deployments.adapter_records import adapter, pool_of
from tests.deployments.console_fakes import MappedRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.looking import folder_of, go, last_turn, look, poll, report_generation

pytestmark = pytest.mark.browser
MAX_TABS = 120
FOCUSED = "(wanted) => document.activeElement.matches(wanted)"
AWAIT_CLICK = """(wanted) => {
  const found = document.querySelector(wanted);
  window.clicked = new Promise((seen) => found.addEventListener('click', (event) => seen(event.isTrusted)));
}"""


async def reach(page: Page, selector: str) -> None:
    """Press Tab until an element that matches has the focus."""
    for _ in range(MAX_TABS):
        await page.keyboard.press("Tab")
        if await page.evaluate(FOCUSED, selector):
            return
    pytest.fail(f"{selector} is not reached by Tab")


async def press(page: Page, selector: str) -> None:
    await reach(page, selector)
    await page.keyboard.press("Enter")


async def enter(page: Page, view: str) -> None:
    """Go to a view by its link, whose heading then has the focus."""
    await press(page, f'nav a[href="#{view}"]')
    await expect(page.locator(f"#view-{view}")).to_be_visible()


async def open_row(page: Page, number: int, name: str) -> None:
    """Open an adapter of the table, whose rows are one stop of Tab."""
    await enter(page, "adapters")
    await expect(page.locator("#pool-rows a")).to_have_count(2)
    await reach(page, "#pool-rows a")
    await page.keyboard.press("Home")
    for _ in range(number):
        await page.keyboard.press("ArrowDown")
    await page.keyboard.press("Enter")
    await expect(page.locator("#adapter-title")).to_have_text(name)
    await expect(page.locator("#adapter-body")).to_be_visible()


async def replace_text(page: Page, text: str) -> None:
    await page.keyboard.press("Control+A")
    await page.keyboard.type(text)


async def test_every_task_is_done_with_the_keyboard_alone(browsing: Browsing, tmp_path: Path) -> None:
    own, theirs = adapter("poet", version="fun"), adapter("sums", tenant="globex")
    folder = folder_of(tmp_path, "verse", ["Write a verse."])
    retriever = MappedRetriever([own, theirs])
    async with look(browsing, retriever=retriever, store=FakeStore(pool_of(own, theirs))) as (page, served):
        await expect(page.locator("#prompt")).to_be_focused()
        await page.keyboard.type("A verse, please.")
        await page.keyboard.press("Enter")
        await expect(last_turn(page, ".note")).to_contain_text("tokens")

        await enter(page, "compare")
        await reach(page, "#compare-prompt")
        await page.keyboard.type("A verse, please.")
        for _ in range(2):  # the first two ways are not asked
            await reach(page, "#ways input")
            await page.keyboard.press("Space")
        num_ways = await page.locator("#ways input").count() - 2
        await reach(page, "#compare-models")
        await page.keyboard.type("poet")
        await page.keyboard.press("Enter")
        await expect(page.locator("#compare-status")).to_have_text(f"{num_ways + 1} ways, 1 different answer")

        await enter(page, "publish")
        await reach(page, "#folder")
        page.on("filechooser", lambda _: None)  # so that the browser opens no window of its own
        await page.evaluate(AWAIT_CLICK, "#folder")
        await page.keyboard.press("Enter")
        assert await page.evaluate("() => clicked")
        await page.set_input_files("#folder", folder)
        await expect(page.locator("#previews > li")).to_have_count(1)
        await press(page, "#publish-button")
        await expect(page.locator("#previews .good .state")).to_contain_text("live at generation")

        await open_row(page, 1, "poet")
        await press(page, "#adapter-edit")
        await expect(page.locator("#edit-tags")).to_be_focused()
        await replace_text(page, "red")
        await press(page, "#edit-form .primary")
        await expect(page.locator("#adapter-edit")).to_be_focused()
        assert [changes for _, changes in served.store.called("edit")] == [Edit(tags=("red",))]

        await open_row(page, 0, "globex/sums")
        await press(page, "#adapter-approve")
        await expect(page.locator("#confirm-dialog")).to_be_visible()
        await press(page, "#confirm-yes")
        await expect(page.locator("#confirm-dialog")).to_be_hidden()

        await open_row(page, 1, "poet")
        await press(page, "#adapter-withdraw")
        await expect(page.locator("#confirm-typed")).to_be_focused()
        await page.keyboard.type("poet")
        await press(page, "#confirm-yes")
        await expect(page.locator("#view-adapters")).to_be_visible()
        assert [refs for refs, _ in served.store.called("approve")] == [[theirs.ref]]
        assert [names for _, names, *_ in served.store.called("withdraw")] == [["poet"]]


@pytest.mark.parametrize(
    ("view", "controls", "loaded"),
    [
        ("Adapters", "#pool-rows a", "**/v1/loras?*min_generation=9"),
        ("Ask", "#map-list a", "**/v1/pool/map?min_generation=9"),
        ("Ask", "#examples button", "**/v1/loras/*?samples=8"),
    ],
)
async def test_the_focus_stays_where_it_is_when_the_pool_changes(
    browsing: Browsing, view: str, controls: str, loaded: str
) -> None:
    retriever = MappedRetriever([adapter("coder"), adapter("poet")])
    async with look(browsing, retriever=retriever) as (page, _):
        await go(page, view)
        control = page.locator(controls)
        await expect(control).to_have_count(2)
        await page.locator("#map-count").evaluate("count => { count.parentElement.open = true; }")
        await control.last.focus()
        held = await control.last.inner_text()
        retriever.held = [adapter("bard"), *retriever.held]
        async with page.expect_response(loaded):
            await page.route("**/v1/stats", lambda route: report_generation(route, 9))
            await poll(page)
        await expect(control).to_have_count(3)
        await expect(page.locator(f"{controls}:focus")).to_have_text(held, use_inner_text=True)
        await page.unroute_all(behavior="wait")


async def test_the_focus_stays_near_a_button_that_disappears(browsing: Browsing) -> None:
    live, older = adapter("poet"), adapter("poet", version="older", generation=0)
    async with look(browsing, store=FakeStore(pool_of(live, older))) as (page, served):
        for prompt in ("first", "second", "third"):
            await page.locator("#new-chat").click()
            await page.keyboard.type(prompt)
            await page.keyboard.press("Enter")
            await expect(last_turn(page, ".note")).to_contain_text("tokens")
        await last_turn(page).get_by_role("button", name="Again").press("Enter")
        await expect(page.locator("#prompt")).to_be_focused()
        await expect(last_turn(page, ".note")).to_contain_text("tokens")
        await page.get_by_role("button", name="Delete the conversation: second").press("Enter")
        await expect(page.get_by_role("button", name="Delete the conversation: first")).to_be_focused()
        for _ in range(2):
            await page.keyboard.press("Enter")
        await expect(page.locator("#history")).to_be_hidden()
        await expect(page.locator("#prompt")).to_be_focused()
        await open_row(page, 1, "poet")
        await page.get_by_role("button", name="Make live").press("Enter")
        await press(page, "#confirm-yes")
        await expect(page.locator("#adapter-title")).to_be_focused()
        assert len(served.store.called("restage")) == 1
        await page.locator("#adapter-withdraw").press("Enter")
        await page.keyboard.type("poe")
        await page.keyboard.press("Enter")  # does nothing yet
        await page.keyboard.type("t")
        await page.keyboard.press("Enter")
        await expect(page.locator("#view-adapters")).to_be_visible()
        assert [names for _, names, *_ in served.store.called("withdraw")] == [["poet"]]
