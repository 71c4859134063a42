"""The description of the API in a real Chromium."""

from __future__ import annotations

import re

import pytest
from playwright.async_api import Request, expect

from tests.browsing import Browsing
from tests.deployments.all_routes import APP
from tests.deployments.looking import look

pytestmark = pytest.mark.browser


async def test_every_operation_is_shown_with_its_fields_and_nothing_is_asked_elsewhere(browsing: Browsing) -> None:
    """A script or a style that violates the policy, or fails, makes the test fail when the page is closed."""
    asked: list[str] = []
    async with look(browsing) as (page, _):
        page.on("request", lambda request: asked.append(_site(request)))
        await page.get_by_role("link", name="API").click()
        await expect(page).to_have_url(re.compile(r"/docs$"))
        count = sum(len(operations) for operations in APP.openapi()["paths"].values())
        await expect(page.locator("#operations section")).to_have_count(count)
        await expect(page.locator("#docs-note")).to_be_hidden()
        chat = page.locator("#operations section", has_text="/v1/chat/completions")
        await chat.locator("summary").first.click()
        await expect(chat).to_contain_text("messages")
        await expect(chat).to_contain_text("items, at most 1024")
        await expect(chat).to_contain_text("text/event-stream")
        await chat.locator("summary", has_text=re.compile(r"^lora ")).first.click()
        await expect(chat).to_contain_text("min_score")
        await page.get_by_label("Filter").fill("pool gc")
        await expect(page.locator("#operations section:visible")).to_have_count(1)
        assert await page.locator("script[src^=http], link[href^=http], iframe, img").count() == 0
    assert len(asked) > 5 and len(set(asked)) == 1


def _site(request: Request) -> str:
    return request.url.partition("/")[2].partition("/")[2].partition("/")[0]


async def test_an_unreadable_document_is_reported(browsing: Browsing) -> None:
    async with look(browsing) as (page, _):
        await page.route(
            "**/openapi.json", lambda route: route.fulfill(status=503, json={"error": {"message": "away"}})
        )
        await page.goto(page.url + "docs")
        await expect(page.locator("#docs-note")).to_contain_text("Cannot read the API description: away")
