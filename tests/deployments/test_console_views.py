"""The views of the console next to the conversation: compare, status, and their layout in several sizes."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from playwright.async_api import Route, expect

from gpu_worker.front.request.request import Delta, Job
from lora_store import ROUTED_STRATEGIES
from lora_store.usage import SUMS, UsageQuery
from tests.browsing import Browsing
from tests.deployments.adapter_records import adapter
from tests.deployments.app_fakes import Served
from tests.deployments.console_fakes import CountingWorker, MappedRetriever
from tests.deployments.key_files import bearer, entry, write
from tests.deployments.looking import ask, ask_and_wait, go, last_turn, look

pytestmark = pytest.mark.browser

VIEWS = ("Ask", "Compare", "Adapters", "Publish", "Status")


def jobs_of(served: Served) -> list[Job]:
    return [job for (job,) in served.worker.called("stream")]


async def test_strategies_and_the_base_model_are_compared_side_by_side_and_one_may_fail(browsing: Browsing) -> None:
    async with look(browsing, context={"viewport": {"width": 1440, "height": 900}}) as (page, served):
        ways = ["auto", *ROUTED_STRATEGIES, "base model"]
        await go(page, "Compare")
        await expect(page.locator("#ways label")).to_have_text(ways)
        await page.get_by_label("Prompt to compare").fill("A verse, please.")
        await page.get_by_role("button", name="Compare").click()
        columns = page.locator("#compared > li")
        await expect(columns).to_have_count(len(ways))
        await expect(page.locator("#compare-status")).to_have_text(f"{len(ways)} ways, 1 different answer")
        await expect(columns.locator(".text")).to_have_text(["Hello"] * len(ways))
        await expect(columns.nth(1)).to_contain_text("poet × 0.50")
        await expect(columns.last.locator(".by")).to_have_text("base model")
        await expect(columns.last.locator(".note")).to_contain_text("3 tokens")
        routed = [request.strategy for ([request],) in served.retriever.called("route")]
        assert sorted(routed) == sorted(["mixture", *ROUTED_STRATEGIES])
        assert sorted(len(job.plan.adapters) for job in jobs_of(served)) == [0] + [2] * len(routed)
        tops = await columns.evaluate_all("(nodes) => nodes.map((node) => node.getBoundingClientRect().top)")
        assert len(tops) == len(ways) and len(set(tops[:6])) == 1, "six are side by side"

        async def fail_the_base_model(route: Route) -> None:
            if "tiny-base" in (route.request.post_data or ""):
                await route.fulfill(status=429, json={"error": {"message": "too many requests wait"}})
            else:
                await route.continue_()

        for way in ROUTED_STRATEGIES:
            await page.get_by_label(way, exact=True).uncheck()
        await page.route("**/v1/chat/completions", fail_the_base_model)
        await page.get_by_label("Prompt to compare").press("Enter")
        await expect(columns).to_have_count(2)
        await expect(page.locator("#compared .error")).to_have_text("too many requests wait")
        await expect(page.locator("#compare-status")).to_have_text("2 ways, 1 different answer, 1 failed")
        await expect(columns.locator(".text").first).to_have_text("Hello")


async def test_named_adapters_versions_and_policies_are_compared_alone(browsing: Browsing) -> None:
    async with look(browsing) as (page, served):
        await page.goto(page.url.partition("#")[0] + "#adapter/poet")
        await page.get_by_role("button", name="Compare version").first.click()
        await expect(page.get_by_label("Prompt to compare")).to_have_value("A sample of poet.")
        models = page.get_by_label("Adapters, versions or policies")
        live, kept = (await models.input_value()).split(", ")
        assert (live, kept.partition("@")[0]) == ("poet", "poet")
        await models.fill("poet, coder, poet")
        await page.get_by_role("button", name="Compare").click()
        await expect(page.locator("#compared h3")).to_have_text(["poet by name", "coder by name"])
        await expect(page.locator("#compare-status")).to_have_text("2 ways, 1 different answer")
        assert sorted(model for _, model, *_ in served.retriever.called("find_model")) == ["coder", "poet"]
        answer = await page.request.put(f"{page.url.partition('#')[0]}v1/names/careful", data={"model": "poet"})
        assert answer.ok, await answer.text()
        await models.fill("careful, coder")
        await page.get_by_label("Prompt to compare").press("Enter")
        await expect(page.locator("#compared h3")).to_have_text(["careful by name", "coder by name"])
        await expect(page.locator("#compared .by")).to_contain_text(["poet", "coder"])


async def test_the_prompts_of_a_file_are_answered_in_a_table_with_the_share_of_right_answers(
    browsing: Browsing, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = ['{"input": "One", "output": "Hello"}', "", '{"input": "Two", "output": "Bye"}', "Three"]
    file.write_text("\n".join(lines))
    async with look(browsing) as (page, served):
        await go(page, "Compare")
        for way in ("auto", *ROUTED_STRATEGIES):
            await page.get_by_label(way, exact=True).uncheck()
        await page.get_by_label("Adapters, versions or policies").fill("poet")
        await page.get_by_label("Prompts from a file").set_input_files(file)
        await expect(page.locator("#compare-status")).to_have_text(
            "3 of 3 prompts, 2 ways; most right: base model, poet (1 of 2)"
        )
        await expect(page.locator("#tabled tbody tr").first).to_have_text("OneHello✓ Hello✓ Hello")
        await expect(page.locator("#tabled tbody tr").nth(2)).to_have_text("ThreeHelloHello")
        await expect(page.locator("#tabled tfoot")).to_have_text("Right1 of 21 of 2")
        assert len(jobs_of(served)) == 6
        file.write_text('{"input": 5}')
        await page.get_by_label("Prompts from a file").set_input_files(file)
        await expect(page.locator("#compare-status")).to_contain_text('line 1 of the file needs "input"')
        assert len(jobs_of(served)) == 6
        await page.route("**/v1/chat/completions", lambda route: None)  # never answered
        file.write_text("One\nTwo")
        await page.get_by_label("Prompts from a file").set_input_files(file)
        await expect(page.locator("#tabled tbody tr")).to_have_count(2)
        await page.locator("#compare-stop").click()
        await expect(page.locator("#compare-status")).to_have_text("0 of 2 prompts, 2 ways")
        await page.evaluate("() => { File.prototype.text = () => Promise.reject(new Error()); }")  # it is deleted
        await page.get_by_label("Prompts from a file").set_input_files(file)
        await expect(page.locator("#compare-status")).to_have_text("the browser cannot read the file")


async def test_nothing_overflows_the_screen(browsing: Browsing) -> None:
    long = replace(adapter("x" * 64), tags=("y" * 64, "z" * 64))
    fakes = {
        "worker": CountingWorker([Delta("v" * 500, 5, 1, "stop")]),
        "retriever": MappedRetriever([adapter("poet"), long]),
    }
    async with look(browsing, **fakes) as (page, _):

        async def check(view: str) -> None:
            for width in (320, 1440):
                await page.set_viewport_size({"width": width, "height": 800})
                inside, outside = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
                assert inside <= outside, (view, width)

        await ask(page, "w" * 200)
        await expect(page.locator("#plan li")).to_have_count(2)
        await expect(last_turn(page, ".note")).to_contain_text("tokens")
        for view in VIEWS:
            await go(page, view)
            await check(view)
        await go(page, "Adapters")
        await page.locator("#pool-rows a").last.click()
        code = page.locator("#adapter-code pre")
        await expect(code).to_have_count(2)
        await check("an adapter")
        await expect(code.last).to_be_visible()
        cut = "(nodes) => nodes.map((node) => node.scrollWidth - node.clientWidth)"
        assert await code.evaluate_all(cut) == [0, 0]  # at the larger width


async def test_names_are_whole_and_metrics_are_in_even_rows(browsing: Browsing) -> None:
    retriever = MappedRetriever([adapter("question_formation"), adapter("pronoun_replacement")])
    async with look(browsing, retriever=retriever) as (page, _):

        async def measure(selector: str, what: str) -> AsyncIterator[list[float]]:
            for width in (1024, 1280):
                await page.set_viewport_size({"width": width, "height": 800})
                yield await page.locator(selector).evaluate_all(f"(nodes) => nodes.map((node) => node.{what})")

        await ask(page)
        await expect(page.locator("#plan li .name").first).to_have_text("question_formation")
        async for lines in measure("#plan .name, #considered-list .name", "getClientRects().length"):
            assert lines == [1] * 4
        await go(page, "Adapters")
        await expect(page.locator("#pool-rows .name")).to_have_count(2)
        async for heights in measure("#pool-rows .name", "getBoundingClientRect().height"):
            assert heights == [28, 28]
        await go(page, "Status")
        await expect(page.locator("#metric-hits .part")).to_have_count(3)
        async for tops in measure("#metrics > div", "getBoundingClientRect().top"):
            assert len({tops.count(top) for top in tops}) == 1, "every row has as many tiles as the others"


async def test_on_a_phone_the_prompt_is_in_view_and_the_links_take_two_lines(browsing: Browsing) -> None:
    held = [adapter(f"a-task-of-the-number-{number}") for number in range(8)]
    context = {"viewport": {"width": 390, "height": 844}}
    async with look(browsing, context=context, retriever=MappedRetriever(held)) as (page, _):
        await expect(page.locator("#examples button")).to_have_count(6)
        await expect(page.locator("#examples button:visible")).to_have_count(2)
        bottom = "(node) => node.getBoundingClientRect().bottom"
        prompt_ends = await page.locator("#prompt").evaluate(bottom)
        assert prompt_ends < 844
        top = "(node) => node.getBoundingClientRect().top"
        assert prompt_ends < await page.locator("#examples button").first.evaluate(top)
        tops = "(nodes) => nodes.map((node) => node.getBoundingClientRect().top)"
        links = await page.locator("nav a").evaluate_all(tops)
        assert len(links) == 6 and len(set(links)) <= 2


async def test_every_control_has_a_size_to_hit(browsing: Browsing) -> None:
    small = """(nodes) => nodes.filter((node) => node.checkVisibility() && !node.closest('.spoken, .skip'))
        .filter((node) => Math.min(node.offsetHeight, node.offsetWidth) < 24 && node.type !== 'checkbox')
        .map((node) => node.outerHTML)"""
    async with look(browsing) as (page, _):
        await ask_and_wait(page)
        for view in VIEWS:
            await go(page, view)
            controls = page.locator("button, input, select, textarea")
            assert await controls.count() > 20
            assert await controls.evaluate_all(small) == []


async def test_views_are_reached_by_keyboard_and_the_address_names_them(browsing: Browsing) -> None:
    async with look(browsing) as (page, _):
        await page.evaluate("sessionStorage.setItem('loraretriever-key', 'any')")  # so that it has the button
        await page.reload()
        await expect(page.locator("#examples button")).to_have_count(2)
        await page.evaluate("document.activeElement.blur()")
        reached = set()
        for _ in range(40):
            await page.keyboard.press("Tab")
            reached.add(await page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert {"Skip to the content", "Compare", "key-button", "prompt", "model", "ask-button", "map"} <= reached
        for view in VIEWS[1:]:
            await page.get_by_role("link", name=view, exact=True).first.press("Enter")
            heading = page.get_by_role("heading", name=view, exact=True)
            await expect(heading).to_be_focused()
            assert await page.title() == f"{view} · LoraRetriever"
            await expect(page.locator("nav [aria-current]")).to_have_text(view)
        await page.reload()
        await expect(page.get_by_role("heading", name="Status", exact=True)).to_be_visible()
        await page.go_back()
        await expect(page.get_by_role("heading", name="Publish", exact=True)).to_be_visible()


async def test_an_admin_sees_who_used_what_and_another_key_its_own_tenant(browsing: Browsing, tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("user", roles=["infer"]), entry("admin", "ops"))
    async with look(browsing, keys_file=keys, cache_dir=tmp_path) as (page, served):

        async def use(key: str) -> None:
            await page.evaluate(f"sessionStorage.setItem('loraretriever-key', '{key}')")
            await page.reload()

        rows = page.locator("#usage-rows tr")
        await page.get_by_label("API key", exact=True).fill("admin")
        await page.get_by_role("button", name="Use", exact=True).click()
        for key, count in (("admin", 1), ("user", 2)):
            await use(key)
            for _ in range(count):
                await ask_and_wait(page)
        url = page.url.partition("#")[0]
        routed = await page.request.post(f"{url}v1/route", data={"prompt": ["A verse."]}, headers=bearer("user"))
        assert routed.ok, await routed.text()
        await go(page, "Status")
        await expect(rows.get_by_role("rowheader")).to_have_text(["acme"])
        bars = rows.get_by_role("img", name=re.compile(r"^Requests by day, most on \d{4}-\d\d-\d\d: \d+$"))
        await expect(bars.locator("rect")).to_have_count(30)
        await page.get_by_label("In the last").select_option("7 days")
        await expect(bars.locator("rect")).to_have_count(7)
        await go(page, "Adapters")
        await page.get_by_role("link", name="local/poet").click()
        await expect(page.locator("#adapter-uses")).to_contain_text("2 requests, 0 errors")
        used = page.locator("#adapter-versions tr", has_text="live").locator("[data-uses]")
        await expect(used).to_have_text(re.compile(r"^2 requests, .* new tokens; mean [\d.]+ s, 95 % within [\d.]+ s$"))
        await use("admin")
        await expect(page.locator("#adapter-uses")).to_contain_text("3 requests, 0 errors")
        await go(page, "Status")
        await expect(rows.get_by_role("rowheader")).to_have_text(["acme", "ops"])
        row = rows.filter(has_text="acme")
        query = UsageQuery(date(2000, 1, 1), date(2100, 1, 1), ("tenant",), "acme")
        [known] = await served.services.store.usage(query)
        assert known["completion_tokens"] > 0
        assert (await row.inner_text()).split("\t")[: len(SUMS) + 1] == ["acme", *[str(known[name]) for name in SUMS]]
        await page.locator("#usage-by").select_option("adapter")
        await expect(page.locator("#usage-rows")).to_contain_text("local/")
        await expect(rows.get_by_role("rowheader", name="(none)", exact=True)).to_have_count(1)
        await page.locator("#usage-by").select_option("version")
        version = rows.filter(has_text="local/poet@")
        await expect(version.get_by_role("rowheader")).to_have_text(re.compile("^local/poet@[0-9a-f]{12}$"))
        await expect(version.locator("td").nth(len(SUMS))).to_have_text(re.compile(r"^[\d.]+ s$"))
