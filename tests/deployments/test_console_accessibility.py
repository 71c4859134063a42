"""axe-core: the console has no violation of WCAG 2.2 AA in any view, in both themes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.async_api import Page, expect

from tests.browsing import Browsing, drop_folder
from tests.clients.processes import node_file
from tests.deployments.console_fakes import LaidOutRetriever
from tests.deployments.looking import ask, ask_and_wait, folder_of, go, last_turn, look, publish, show_options

pytestmark = pytest.mark.browser
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
RUN = """async (tags) => {
  const found = await axe.run({ runOnly: { type: "tag", values: tags }, rules: { "target-size": { enabled: true } } });
  const reason = ({ html, failureSummary }) => `${html}: ${failureSummary}`;
  const shown = (rows) => rows.map(({ id, nodes }) => [id, ...nodes.map(reason)]);
  return { violations: shown(found.violations), passes: found.passes.length };
}"""


async def check(page: Page, view: str) -> None:
    """Run the rules on the page as it is shown now."""
    found: dict[str, Any] = await page.evaluate(RUN, TAGS)
    assert found["violations"] == [], view
    assert found["passes"] > 10, view


@pytest.mark.parametrize(("theme", "width"), [("light", 320), ("dark", 1280)])
async def test_no_view_violates_wcag(
    browsing: Browsing, tmp_path: Path, theme: Literal["light", "dark"], width: int
) -> None:
    axe = node_file("axe-core/axe.min.js").read_text(encoding="utf-8")
    good, bad = folder_of(tmp_path / "all", "verse", ["Write a verse."]), folder_of(tmp_path / "all", "pickled")
    (bad / "adapter_model.safetensors").rename(bad / "adapter_model.bin")
    context = {"color_scheme": theme, "viewport": {"width": width, "height": 800}, "bypass_csp": True}
    async with look(browsing, context=context, api_key="of good news") as (page, _):
        await page.evaluate(axe)
        await page.get_by_label("API key", exact=True).fill("of good news")
        await check(page, "a key is needed")
        await page.get_by_role("button", name="Use", exact=True).click()
        await expect(page.locator("#examples button")).to_have_count(2)
        await check(page, "examples")
        await ask_and_wait(page)
        await show_options(page)
        await check(page, "an answer")
        await page.get_by_label("Model", exact=True).fill("nosuch")
        await ask(page)
        await expect(last_turn(page, ".error")).to_be_visible()
        await check(page, "an error")
        await page.get_by_role("button", name="Code", exact=True).click()
        await check(page, "code")
        await page.get_by_role("button", name="Close").click()
        await page.locator("#key-button").click()
        await check(page, "key")
        await page.get_by_role("button", name="Cancel").click()
        await page.get_by_label("Model", exact=True).fill("auto")
        await go(page, "Compare")
        await page.get_by_label("Prompt to compare").fill("A verse, please.")
        await page.get_by_role("button", name="Compare").click()
        await expect(page.locator("#compare-status")).to_contain_text("6 ways")
        await check(page, "compare")
        await go(page, "Adapters")
        await check(page, "adapters")
        await page.locator("#pool-rows a").first.click()
        await expect(page.locator("#adapter-code pre")).to_have_count(2)
        await check(page, "adapter")
        await page.get_by_role("button", name="Edit", exact=True).click()
        await expect(page.locator("#edit-form")).to_be_visible()
        await check(page, "edit")
        await page.locator("#edit-cancel").click()
        await page.get_by_role("button", name="Withdraw…").click()
        await check(page, "withdraw")
        await page.get_by_role("button", name="Cancel").click()
        await drop_folder(page, good.parent)
        await expect(page.locator("#previews > li")).to_have_count(2)
        await check(page, "preview")
        await publish(page)
        await check(page, "published")
        await go(page, "Status")
        await expect(page.locator("#usage-rows svg").first).to_be_visible()
        await check(page, "status")
        await page.get_by_role("navigation").get_by_role("link", name="API").click()
        await expect(page.locator("#operations section").first).to_be_visible(
            timeout=60_000
        )  # the server builds it once
        await page.evaluate(axe)
        await page.locator("#operations summary").first.click()
        await check(page, "API")


@pytest.mark.parametrize("width", [1280, 390])
async def test_a_large_map_violates_no_wcag_rule(browsing: Browsing, width: int) -> None:
    axe = node_file("axe-core/axe.min.js").read_text(encoding="utf-8")
    context: dict[str, Any] = {"viewport": {"width": width, "height": 800}, "bypass_csp": True}
    async with look(browsing, context=context, retriever=LaidOutRetriever(300, 12)) as (page, _):
        await page.evaluate(axe)
        await expect(page.locator("#map-count")).to_have_text("In view: 300 of 300")
        await page.locator("#map-count").click()
        await check(page, "clusters")
        await page.get_by_label("Find").fill("kindaa")
        await page.get_by_label("Find").press("Enter")
        await expect(page.locator("#map-list small").first).to_be_visible()
        await check(page, "a search")
