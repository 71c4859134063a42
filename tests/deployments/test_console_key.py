"""The API key in the console, in a real Chromium, over an Ingress with fakes and real keys."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from playwright.async_api import Page, Request, Response, Route, expect

from tests.browsing import Browsing, drop_folder
from tests.deployments.adapter_records import adapter, pool_of
from tests.deployments.console_fakes import CountingWorker, MappedRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.key_files import entry, write
from tests.deployments.looking import (
    ask,
    ask_and_wait,
    folder_of,
    go,
    last_turn,
    look,
    open_adapter,
    poll,
    publish,
    report_generation,
    wait_frames,
)

pytestmark = pytest.mark.browser

KEY = "of good news"
NEEDS_A_KEY = "This server needs a key. Ask its operator."


async def use(page: Page, key: str) -> None:
    """Type a key into the open dialog, and use it."""
    await page.get_by_label("API key", exact=True).fill(key)
    await page.get_by_role("button", name="Use", exact=True).click()


async def test_a_key_is_asked_for_once_and_sent_with_every_request(browsing: Browsing, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "verse")
    answered: list[Request] = []

    def note(response: Response) -> None:
        if response.ok and "/v1/" in response.url:
            answered.append(response.request)

    async with look(browsing, api_key=KEY) as (page, _):
        await expect(page.locator("#key-note")).to_have_text(NEEDS_A_KEY)
        page.on("response", note)
        await use(page, KEY)
        await expect(page.locator("#connection")).to_have_text("live")
        await expect(page.locator("#map-list li")).to_have_count(2)
        await ask(page)
        await expect(last_turn(page, ".text")).to_have_text("Hello")
        await expect(page.locator("#map .prompt")).to_have_count(1)
        await drop_folder(page, folder)
        await publish(page)
        sent = {f"{one.method} {one.url.partition('/v1/')[2].partition('?')[0]}" for one in answered}
        expected = {"GET stats", "GET loras", "GET pool/map", "POST pool/map", "POST chat/completions", "POST loras"}
        assert expected <= sent
        assert {await one.header_value("authorization") for one in answered} == {f"Bearer {KEY}"}
        stored = await page.evaluate("JSON.stringify(localStorage) + document.cookie")
        assert "A verse, please." in stored and "good news" not in stored
        await page.locator("#key-button").click()
        await page.get_by_role("button", name="Forget").click()
        await expect(page.locator("#confirm-title")).to_have_text("The key is forgotten. Clear the history too?")
        await page.locator("#confirm-yes").click()
        await expect(page.locator("#key-note")).to_have_text(NEEDS_A_KEY)
        assert "A verse, please." not in await page.evaluate("JSON.stringify(localStorage)")


async def test_the_dialog_says_once_that_the_server_needs_a_key(browsing: Browsing) -> None:
    async with look(browsing, api_key=KEY) as (page, _):
        await expect(page.locator("#key-note")).to_have_text(NEEDS_A_KEY)
        await expect(page.locator("#connection")).to_have_text("key needed")
        await page.get_by_role("button", name="Cancel").click()
        for part in ("#map-note", "#examples-note", "#pool-error"):
            await expect(page.locator(part)).to_have_text("")
        await go(page, "Adapters")
        await expect(page.locator("#pool-error")).to_be_hidden()
        await expect(page.locator("#key-button")).to_be_visible()


async def test_only_a_key_that_the_server_accepts_gets_a_tick(browsing: Browsing) -> None:
    async with look(browsing, api_key=KEY) as (page, _):
        note, button = page.locator("#key-note"), page.locator("#key-button")
        await expect(note).to_have_text(NEEDS_A_KEY)
        await use(page, "a wrong one")
        await expect(note).to_have_text("This server does not accept your key. Ask its operator.")
        await expect(button).to_have_text("API key")
        await expect(button).to_have_attribute("aria-label", "API key: not accepted")
        await use(page, KEY)
        await expect(button).to_have_text("API key ✓")
        await expect(button).to_have_attribute("aria-label", "API key: accepted")
        await button.click()
        await expect(note).to_have_text("The server accepts your key.")
        for typed in ("", "  "):  # which is no key
            await use(page, typed)
            await page.keyboard.press("Escape")
            await expect(page.locator("#key-dialog")).to_be_hidden()
            assert await page.evaluate("sessionStorage.getItem('loraretriever-key')") == KEY
            await button.click()
        await use(page, "a wrong one")
        await expect(button).to_have_text("API key")


async def test_a_server_without_keys_has_no_button_for_one(browsing: Browsing) -> None:
    async with look(browsing) as (page, _):
        await expect(page.locator("#connection")).to_have_text("live")
        await expect(page.locator("#map-list li")).to_have_count(2)
        await expect(page.locator("#key-button")).to_be_hidden()


async def test_another_key_sees_nothing_of_the_one_before(browsing: Browsing, tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("first"), entry("second", "globex", roles=["infer", "publish"]))
    versions = {"acme": "", "globex": "theirs"}
    own = {who: adapter("poet", version=one, tenant=who, visibility="private") for who, one in versions.items()}
    retriever, store = MappedRetriever(list(own.values())), FakeStore(pool_of(*own.values()))
    async with look(browsing, keys_file=keys, retriever=retriever, store=store, cache_dir=tmp_path) as (page, _):
        await page.goto(page.url + "#adapter/poet")
        await page.reload()
        await expect(page.locator("#key-note")).to_have_text(NEEDS_A_KEY)
        await use(page, "first")
        facts, strategy = page.locator("#adapter-facts"), page.get_by_label("Strategy")
        await expect(facts).to_contain_text(own["acme"].ref.digest[:12])
        await go(page, "Ask")
        await strategy.select_option("fusion")
        await ask_and_wait(page)
        await go(page, "Status")
        await expect(page.locator("#metric-waiting")).to_have_text("2")
        await expect(page.locator("#usage-rows tr")).to_have_count(1)
        await go(page, "Adapters")
        async with page.expect_response("**/v1/loras?*min_generation=9"):
            await page.route("**/v1/stats", lambda route: report_generation(route, 9))
            await poll(page)
        await page.unroute_all(behavior="wait")
        await page.go_back()
        await page.go_back()
        await page.go_back()
        await page.locator("#key-button").click()
        async with page.expect_request("**/v1/loras?*") as listing, page.expect_request("**/v1/pool/map?*") as drawing:
            await use(page, "second")
        requests = await listing.value, await drawing.value
        for request in requests:  # the other tenant's generation may be an earlier one
            assert request.url.endswith("min_generation=0")
        await expect(facts).to_contain_text(own["globex"].ref.digest[:12])
        await expect(strategy.locator("option")).not_to_have_count(1)
        assert await strategy.input_value() == "fusion"
        for part in ("#metric-waiting", "#metric-bank"):
            await expect(page.locator(part)).to_have_text("–")
        await expect(page.locator("#usage-rows tr")).to_have_count(0)
        await go(page, "Adapters")
        await expect(page.locator("#pool-rows a")).to_have_count(1)
        await go(page, "Ask")
        await page.locator("#new-chat").click()
        await expect(page.locator("#examples button")).not_to_have_count(0)
        await page.locator("#key-button").click()
        await page.get_by_role("button", name="Forget").click()
        await page.locator("#confirm-yes").click()
        await expect(page.locator("#key-note")).to_have_text(NEEDS_A_KEY)
        for part in ("#pool-rows a", "#map-list a", "#map .spot", "#examples button", "#models option"):
            await expect(page.locator(part)).to_have_count(0)


async def test_late_examples_of_the_key_before_are_not_shown(browsing: Browsing, tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("first"), entry("second", "globex"))
    own = [adapter(name, tenant=who, visibility="private") for who, name in (("acme", "ours"), ("globex", "theirs"))]
    waits, goes_on = asyncio.Event(), asyncio.Event()

    async def hold(route: Route) -> None:
        if await route.request.header_value("authorization") == "Bearer first":
            waits.set()
            await goes_on.wait()
        await route.continue_()

    async with look(browsing, keys_file=keys, retriever=MappedRetriever(own)) as (page, _):
        for path in ("**/v1/loras/*?samples=8", "**/v1/models?*"):
            await page.route(path, hold)
        await use(page, "first")
        await waits.wait()
        await page.locator("#key-button").click()
        await use(page, "second")
        names, models = page.locator("#examples small"), page.locator("#models option[value=ours]")
        await expect(names).to_have_text(["theirs"])
        goes_on.set()
        await page.unroute_all(behavior="wait")
        await wait_frames(page, 20)
        await expect(names).to_have_text(["theirs"])
        await expect(models).to_have_count(0)
        await expect(page.locator("#examples-note")).to_be_hidden()


async def test_another_key_stops_a_comparison_and_empties_it(browsing: Browsing, tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("first"), entry("second", "globex"))
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {number}" for number in range(9)))
    goes_on = asyncio.Event()
    async with look(browsing, keys_file=keys, worker=CountingWorker(goes_on=goes_on)) as (page, _):
        asked: list[Request] = []
        page.on("request", lambda request: asked.append(request) if request.url.endswith("completions") else None)
        answers, status = page.locator("#compared > li, #tabled tr"), page.locator("#compare-status")
        await use(page, "first")
        await go(page, "Compare")
        await page.get_by_label("Adapters, versions or policies").fill("poet")
        await page.get_by_label("Prompts from a file").set_input_files(file)
        await expect(answers).to_have_count(10)
        await page.locator("#key-button").click()
        await use(page, "second")
        await expect(page.locator("#key-button")).to_have_text("API key ✓")
        goes_on.set()
        await wait_frames(page, 20)
        assert asked and {await one.header_value("authorization") for one in asked} == {"Bearer first"}
        await expect(answers).to_have_count(0)
        await expect(status).to_have_text("")
        await expect(page.locator("#compare-stop")).to_be_disabled()
        await go(page, "Ask")
        await ask_and_wait(page)
        await go(page, "Compare")
        goes_on.clear()
        await page.get_by_label("Prompt to compare").fill("A verse, please.")
        await page.get_by_role("button", name="Compare").click()
        await expect(answers).not_to_have_count(0)
        num_asked = len(asked)
        await page.locator("#key-button").click()
        await page.get_by_role("button", name="Forget").click()
        await expect(page.locator("#confirm-title")).to_contain_text("The key is forgotten.")
        await expect(answers).to_have_count(0)
        goes_on.set()
        await page.locator("#confirm-no").click()
        await expect(page.locator("#key-note")).to_have_text(NEEDS_A_KEY)
        await expect(status).to_have_text("")
        assert len(asked) == num_asked


async def test_another_key_stops_a_publish_and_the_rest_waits(browsing: Browsing, tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("first"), entry("second", "globex"))
    for name in ("one", "three", "two"):
        folder_of(tmp_path / "all", name, ["A verse."])
    waits, goes_on = asyncio.Event(), asyncio.Event()

    async def hold(route: Route) -> None:
        if route.request.method == "POST":
            waits.set()
            await goes_on.wait()
        await route.continue_()

    async with look(browsing, keys_file=keys) as (page, served):
        button, cards = page.locator("#publish-button"), page.locator("#previews > li")
        await use(page, "first")
        await page.route("**/v1/loras", hold)
        await drop_folder(page, tmp_path / "all")
        await expect(page.locator("#previews .notes li")).to_have_count(6)
        await button.click()
        await waits.wait()
        await page.locator("#key-button").click()
        async with page.expect_request("**/v1/loras/two") as checked:
            await use(page, "second")
        assert await (await checked.value).header_value("authorization") == "Bearer second"
        await expect(button).to_be_disabled()
        goes_on.set()
        await expect(button).to_have_text("Publish 2 adapters")
        await expect(button).to_be_enabled()
        await expect(cards.locator(".state")).to_have_text(["published with the key before", "", ""])
        await expect(page.locator("#previews .notes li")).to_have_count(6)
        await publish(page, 2)
        staged = [upload for (upload, _) in served.store.called("stage")]
        assert [upload.tenant for upload in staged] == ["acme", "globex", "globex"]
        assert sorted(upload.name for upload in staged) == ["one", "three", "two"]
        await page.locator("#key-button").click()
        await use(page, "first")
        await expect(cards).to_have_count(0)
        await expect(page.locator("#publish-form")).to_be_hidden()


async def test_a_late_generation_of_the_key_before_is_not_waited_for(browsing: Browsing, tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("first", "local"), entry("second", "globex"))
    waits, goes_on = asyncio.Event(), asyncio.Event()

    async def answer_late(route: Route) -> None:
        waits.set()
        await goes_on.wait()
        await route.fulfill(json={"generation": 900})

    async with look(browsing, keys_file=keys) as (page, _):
        await use(page, "first")
        await page.route("**/v1/loras/poet/rollback", answer_late)
        await open_adapter(page, "poet")
        await page.get_by_role("button", name="Make live").click()
        await page.locator("#confirm-yes").click()
        await waits.wait()
        await page.locator("#key-button").click()
        await use(page, "second")
        await expect(page.locator("#key-button")).to_have_text("API key ✓")
        async with page.expect_response("**/rollback"):
            goes_on.set()
        await wait_frames(page, 5)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await go(page, "Adapters")
        await poll(page)
        assert asked and [url for url in asked if "min_generation=900" in url] == []


async def test_a_browser_that_keeps_no_data_of_sites_has_the_whole_console(browsing: Browsing) -> None:
    throws = "get() { throw new DOMException('blocked', 'SecurityError'); }"
    async with look(browsing, api_key=KEY) as (page, _):
        for storage in ("sessionStorage", "localStorage"):
            await page.add_init_script(f"Object.defineProperty(window, '{storage}', {{ {throws} }})")
        await page.reload()
        await use(page, KEY)
        await expect(page.locator("#key-button")).to_have_text("API key ✓")
        await go(page, "Adapters")
        await expect(page.locator("#pool-rows tr")).to_have_count(2)
        await go(page, "Ask")
        await ask(page)
        await expect(last_turn(page, ".text")).to_have_text("Hello")
        await expect(page.locator("#ask-status")).to_have_text("this browser has no room to keep the conversation")
