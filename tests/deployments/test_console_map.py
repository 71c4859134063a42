"""The map of a large pool in a real browser: named clusters, search, zoom, and the list of what is in view."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from playwright.async_api import Page, Route, expect

from retriever_svc import NoAdapterMatched
from tests.browsing import Browsing
from tests.deployments.adapter_records import adapter
from tests.deployments.console_fakes import LaidOutRetriever, MappedRetriever
from tests.deployments.looking import ask, go, look, poll, report_generation

pytestmark = pytest.mark.browser
WIDE: dict[str, Any] = {"viewport": {"width": 1400, "height": 1000}}
OVERLAPS = """(nodes) => {
  const boxes = nodes.map((node) => [node.textContent, node.getBBox()]);
  const apart = (a, b, axis, size) => a[axis] + 3 >= b[axis] + b[size] || b[axis] + 3 >= a[axis] + a[size];
  const meet = (a, b) => !apart(a, b, "x", "width") && !apart(a, b, "y", "height");
  const after = (i, box) => boxes.slice(i + 1).filter(([, other]) => meet(box, other));
  return boxes.flatMap(([name, box], i) => after(i, box).map(([other]) => [name, other]));
}"""
LISTEN = """() => {
  globalThis.turned = new Promise((done) => addEventListener("wheel", (e) => done(e.defaultPrevented), { once: true }));
}"""
COUNT_DOTS = "(node) => node.getAttribute('d').split('M').length - 1"


async def moved(page: Page) -> str | None:
    return await page.locator("#map-moved").get_attribute("transform")


async def check_labels(page: Page, kind: str, least: int) -> None:
    """Check that there are labels of this kind, and that no two labels overlap."""
    labels = page.locator("#map .label")
    assert await page.locator(f"#map .label.{kind}").count() >= least
    assert await labels.evaluate_all(OVERLAPS) == []


@pytest.mark.parametrize(("count", "num_kinds"), [(300, 12), (10_000, 24)])
async def test_an_adapter_is_found_on_the_map_of_a_large_pool(browsing: Browsing, count: int, num_kinds: int) -> None:
    retriever = LaidOutRetriever(count, num_kinds)
    name = retriever.names[7]
    async with look(browsing, context=WIDE, retriever=retriever) as (page, _):
        summary, listed = page.locator("#map-count"), page.locator("#map-list li")
        await expect(summary).to_have_text(f"In view: {count:,} of {count:,}")
        await expect(page.locator("#map-note")).to_have_text(f"{count:,} adapters in {num_kinds} clusters.")
        assert await page.locator("#map-dots").evaluate(COUNT_DOTS) == count
        await check_labels(page, "cluster", least=num_kinds // 2)
        await summary.click()
        assert sorted(await listed.get_by_role("button").all_inner_texts()) == retriever.kinds

        await page.get_by_label("Find").fill(name)
        await expect(summary).to_have_text("Found: 1 by name or tag, 2 by samples")
        await expect(page.locator("#map-spoken")).to_have_text("Found: 1 by name or tag, 2 by samples")
        assert await page.locator("#map-found").evaluate(COUNT_DOTS) == 3
        await page.get_by_label("Find").press("Enter")
        await expect(page.locator("#map")).to_have_class("many searched zoomed" if count > 300 else "searched zoomed")
        await expect(page.locator("#map .label.current")).to_have_text(name)
        await expect(listed.get_by_role("link")).to_have_text([name, *retriever.names[:2]])
        await page.get_by_label("Find").fill(retriever.kinds[2])  # the name of a cluster
        await expect(summary).to_contain_text(f"Found: {len(retriever.names[2::num_kinds]):,} by name or tag, ")
        await page.get_by_label("Find").fill("")
        await expect(summary).to_contain_text("In view: ")

        await page.get_by_role("button", name="Whole map").click()
        await expect(summary).to_have_text(f"In view: {count:,} of {count:,}")
        await listed.get_by_role("button", name=retriever.kinds[3]).click()
        await expect(page.locator("#map")).to_have_class("many zoomed" if count > 300 else "zoomed")
        await expect(page.locator("#map-spoken")).to_contain_text(f"{retriever.kinds[3]}: ")
        await check_labels(page, "cluster", least=1)
        for _ in range(8):
            await page.get_by_role("button", name="Zoom in").click()
        await check_labels(page, "other", least=0)
        if count > 300:
            await page.get_by_role("button", name="Whole map").click()
            label = await page.locator("#map .label.cluster").first.bounding_box()
            assert label
            await page.mouse.click(label["x"] + label["width"] / 2, label["y"] + label["height"] / 2)
            await expect(page.locator("#map")).to_have_class("many zoomed")  # a click among many goes nearer
        await page.locator("#map").focus()
        await page.keyboard.press("0")
        await expect(page.locator("#map-spoken")).to_have_text(f"{count:,} adapters in view")
        await page.keyboard.press("Home")
        await expect(page.locator("#map-spoken")).to_have_text(min(retriever.names))
        await page.keyboard.press("Enter")
        await expect(page.locator("#adapter-title")).to_have_text(min(retriever.names))


async def test_an_adapter_is_found_by_what_it_does_with_the_keyboard(browsing: Browsing) -> None:
    retriever = LaidOutRetriever(300, 12)
    first, second = retriever.names[:2]
    async with look(browsing, context=WIDE, retriever=retriever) as (page, _):
        spoken = page.locator("#map-spoken")
        await expect(page.locator("#map-count")).to_have_text("In view: 300 of 300")
        await page.get_by_label("Find").focus()
        await page.keyboard.type("a verse on the weather")  # which is in no name or tag
        await expect(spoken).to_have_text("Found: 0 by name or tag, 2 by samples")
        await expect(page.locator("#map-list li")).to_have_text([f"{name} Rhyme on rain." for name in (first, second)])
        assert await page.locator("#map-found").evaluate(COUNT_DOTS) == 2
        for width in (1400, 390):
            await page.set_viewport_size({"width": width, "height": 1000})
            assert await page.evaluate("document.documentElement.scrollWidth") == width
        await page.keyboard.press("Enter")
        await expect(page.locator("#map")).to_be_focused()
        await expect(spoken).to_have_text(first)
        await page.keyboard.press("ArrowRight")
        await expect(spoken).to_have_text(second)
        await expect(page.locator("#map .label.current")).to_have_text(second)
        await page.keyboard.press("Enter")
        await expect(page.locator("#adapter-title")).to_have_text(second)

        retriever.failure = NoAdapterMatched(0.0, 1.0)  # as for a key that may not ask
        await page.go_back()
        await page.get_by_label("Find").fill(first)
        await expect(page.locator("#map-count")).to_have_text("Found: 1 by name or tag, 0 by samples")
        await expect(page.locator("#map-note")).to_contain_text("no adapter")
        retriever.failure = None
        await page.get_by_label("Find").fill(second)
        await expect(page.locator("#map-note")).to_have_text("300 adapters in 12 clusters.")


async def test_enter_waits_for_a_search_that_has_not_come_back(browsing: Browsing) -> None:
    retriever, answers = LaidOutRetriever(300, 12), asyncio.Event()

    async def answer_later(route: Route) -> None:
        await answers.wait()
        await route.continue_()

    async with look(browsing, context=WIDE, retriever=retriever) as (page, _):
        await page.route("**/v1/route", answer_later)
        await page.clock.install()
        await page.get_by_label("Find").fill("a verse on the weather")
        await page.get_by_label("Find").press("Enter")
        await page.clock.run_for(1000)  # what the field does some time after the last key
        answers.set()
        await expect(page.locator("#map-spoken")).to_have_text(retriever.names[0])


async def test_a_change_is_shown_once_the_server_answers_whatever_failed_before(browsing: Browsing) -> None:
    retriever, generations, failed = MappedRetriever(), [7], set[str]()

    async def fail_first(route: Route) -> None:
        url = route.request.url
        if url.endswith("min_generation=8") and url not in failed:
            failed.add(url)
            await route.fulfill(status=503, json={"error": {"message": "busy"}})
        else:
            await route.continue_()

    async with look(browsing, retriever=retriever) as (page, _):
        await page.route("**/v1/stats", lambda route: report_generation(route, generations[-1]))
        for path in ("**/v1/pool/map?*", "**/v1/loras?*"):
            await page.route(path, fail_first)
        await ask(page)
        await expect(page.locator("#map .prompt")).to_have_count(1)
        await page.route(
            "**/v1/pool/map", lambda route: route.fulfill(status=503, json={"error": {"message": "no place"}})
        )
        retriever.held = [*retriever.held, adapter("novelist")]
        generations.append(8)
        for _ in range(2):
            await poll(page)
        await expect(page.locator("#map-list li")).to_have_count(3)
        await go(page, "Adapters")
        await poll(page)
        await expect(page.locator("#pool-rows tr")).to_have_count(3)
        assert len(failed) == 2
        await expect(page.locator("#map-note")).to_have_text("no place")  # that of the prompt, and only that
        await expect(page.locator("#map .prompt")).to_have_count(0)
        await expect(page.locator("#pool-error")).to_be_hidden()
        await page.unroute_all(behavior="wait")


@pytest.mark.parametrize(
    ("view", "path", "rows"), [("Ask", "pool/map", "#map-list li"), ("Adapters", "loras", "#pool-rows tr")]
)
async def test_a_pool_that_changes_faster_than_it_loads_is_shown(
    browsing: Browsing, view: str, path: str, rows: str
) -> None:
    retriever, generations, goes_on = MappedRetriever(), itertools.count(8), asyncio.Event()
    waiting: list[Route] = []

    async def hold(route: Route) -> None:
        waiting.append(route)
        await goes_on.wait()
        await route.continue_()

    async with look(browsing, retriever=retriever) as (page, _):
        await go(page, view)
        await expect(page.locator(rows)).to_have_count(2)
        retriever.held = [*retriever.held, adapter("novelist")]
        await page.route(f"**/v1/{path}?*", hold)
        await page.route("**/v1/stats", lambda route: report_generation(route, next(generations)))
        for _ in range(3):
            await poll(page)
        assert len(waiting) == 1
        goes_on.set()
        await expect(page.locator(rows)).to_have_count(3)
        await page.unroute_all(behavior="wait")


async def test_the_map_is_zoomed_and_moved_by_mouse_touch_and_keys(browsing: Browsing) -> None:
    async with look(browsing, context=WIDE | {"has_touch": True}, retriever=LaidOutRetriever(300, 12)) as (page, _):
        await expect(page.locator("#map-count")).to_have_text("In view: 300 of 300")
        map_, whole = page.locator("#map"), await moved(page)
        box = await map_.bounding_box()
        assert box
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        seen = [whole]

        async def check_moved() -> None:
            await expect(page.locator("#map-moved")).not_to_have_attribute("transform", seen[-1] or "")
            seen.append(await moved(page))

        for has_focus in (False, True):  # without it the wheel scrolls the page
            if has_focus:
                await map_.focus()
            await page.mouse.move(x, y)
            await page.evaluate(LISTEN)
            await page.mouse.wheel(0, -300)
            assert await page.evaluate("() => globalThis.turned") == has_focus
        await check_moved()
        await page.mouse.down()
        await page.mouse.move(x + 60, y + 30, steps=3)
        await page.mouse.up()
        await check_moved()
        await expect(page.locator("#view-ask")).to_be_visible()  # a drag opens no adapter
        for key in ("+", "Shift+ArrowRight", "Shift+ArrowDown", "-"):
            await page.keyboard.press(key)
            await check_moved()
        await page.keyboard.press("Control+0")  # that of the browser, which zooms the page
        assert await moved(page) == seen[-1]
        await page.keyboard.press("0")
        await expect(page.locator("#map-moved")).to_have_attribute("transform", whole or "")
        seen.append(whole)
        await pinch(page, x, y)
        await check_moved()


async def pinch(page: Page, x: float, y: float) -> None:
    """Put two fingers on the page and move them apart."""
    session = await page.context.new_cdp_session(page)

    async def touch(kind: str, *apart: float) -> None:
        points: list[dict[str, Any]] = [{"x": x + far, "y": y, "id": place} for place, far in enumerate(apart)]
        await session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    await touch("touchStart", -20, 20)
    for far in (30, 40, 60):
        await touch("touchMove", -far, far)
    await touch("touchEnd")
    await session.detach()
