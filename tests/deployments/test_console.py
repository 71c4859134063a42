"""The console in a real Chromium, over an Ingress with fakes."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import pytest
from playwright.async_api import Route, expect

from gpu_worker.errors import EngineFull, EngineStopped
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.request.request import Delta
from lora_store import ROUTED_STRATEGIES
from retriever_svc.route import NearSample
from tests.browsing import Browsing
from tests.deployments.adapter_records import adapter
from tests.deployments.console_fakes import CountingWorker, MappedRetriever
from tests.deployments.fake_worker import DELTAS
from tests.deployments.looking import ask, ask_and_wait, go, last_turn, look, poll, show_options, wait_frames

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="document.title=\'taken\'"><script>document.title="taken"</script>'


async def test_an_answer_streams_next_to_its_adapters(browsing: Browsing) -> None:
    goes_on = asyncio.Event()
    async with look(browsing, worker=CountingWorker(goes_on=goes_on)) as (page, served):
        await expect(page.locator("#map-list li")).to_have_count(2)
        await ask(page)
        await expect(last_turn(page, ".text")).to_have_text("Hel")
        await expect(page.locator("#plan li .name")).to_have_text(["poet", "coder"])
        await expect(page.locator("#plan li").first).to_contain_text("weight 0.50")
        await expect(page.locator("#considered-list li").first).to_contain_text("cosine 1.000")
        await expect(page.locator("#ask-status")).to_have_text("answering…")
        goes_on.set()
        await expect(last_turn(page, ".text")).to_have_text("Hello")
        await expect(last_turn(page, ".by .tag")).to_have_text(["poet × 0.50", "coder × 0.50"])
        await expect(last_turn(page, ".note")).to_contain_text("3 tokens · prompt 5")
        await expect(last_turn(page, ".note")).to_contain_text(re.compile("first token after .* tokens/s"))
        await expect(page.locator("#ask-status")).to_have_text("the answer is complete")
        await expect(page.locator("#map .spot.chosen")).to_have_count(2)
        await expect(page.locator("#map .prompt")).to_have_count(1)
        await expect(page.get_by_role("button", name="Stop")).to_be_disabled()
        located = served.retriever.called("place")  # again if the page has loaded the map again meanwhile
        assert located and all(one == ("local", "A verse, please.", ["poet", "coder"], 7) for one in located)


async def test_the_controls_determine_the_request(browsing: Browsing) -> None:
    async with look(browsing) as (page, served):
        await show_options(page)
        await page.get_by_label("Strategy").select_option("fusion")
        await page.get_by_label("Most adapters (k)").fill("5")
        await page.get_by_label("Abstain").select_option("strict")
        await page.get_by_label("Only with tags").fill("one, two")
        await page.get_by_label("Longest answer, tokens").fill("17")
        await page.get_by_label("Temperature").fill("0.5")
        await page.get_by_label("Top p").fill("0.9")
        await page.get_by_label("Seed").fill("7")
        prompt = page.get_by_label("Prompt", exact=True)
        await prompt.fill("line")
        await prompt.press("Shift+Enter")
        await prompt.press("x")
        await prompt.press("Enter")
        await expect(last_turn(page, ".text")).to_have_text("Hello")
        [([request],)] = served.retriever.called("route")
        assert (request.text, request.strategy, request.top_k) == ("line\nx", "fusion", 5)
        assert (request.abstain, request.tags) == ("strict", ("one", "two"))
        sampling = served.job.sampling
        assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (17, 0.5, 0.9, 7)
        model = page.get_by_label("Model", exact=True)
        await model.fill("coder")
        for option in ("Strategy", "Most adapters (k)", "Abstain", "Only with tags"):
            await expect(page.get_by_label(option)).to_be_disabled()
        await ask(page)
        await expect(page.locator("#plan li .name")).to_have_text(["coder"])
        assert len(served.retriever.called("route")) == 1
        await model.fill("tiny-base")
        await ask(page)
        await expect(page.locator("#plan-note")).to_have_text("The base model answers, as requested.")
        answer = await page.request.put(f"{page.url}v1/names/careful", data={"lora": {"k": 1}})
        assert answer.ok, await answer.text()
        await model.fill("careful")  # a policy, whose requests choose adapters
        await expect(page.get_by_label("Strategy")).to_be_enabled()
        await ask_and_wait(page)
        ([request],) = served.retriever.called("route")[-1]
        assert (request.strategy, request.top_k) == ("fusion", 5)


async def test_a_second_prompt_and_stop_end_the_answer_on_the_page_and_in_the_worker(browsing: Browsing) -> None:
    goes_on = asyncio.Event()
    async with look(browsing, worker=CountingWorker(goes_on=goes_on)) as (page, served):
        await ask(page, "first")
        await expect(last_turn(page, ".text")).to_have_text("Hel")
        await ask(page, "second")
        await expect(page.locator("#turns .note").first).to_have_text(re.compile("stopped$"))
        goes_on.set()
        await expect(last_turn(page, ".note")).to_contain_text("3 tokens")
        goes_on.clear()
        await ask(page, "third")
        await expect(last_turn(page, ".text")).to_have_text("Hel")
        await page.get_by_role("button", name="Stop").click()
        await expect(last_turn(page, ".note")).to_contain_text("stopped")
        await expect(page.locator("#turns .text")).to_have_text(["Hel", "Hello", "Hel"])
        first, _, third = [r for r in served.worker.responses if hasattr(r.answer, "__aiter__")]
        async with asyncio.timeout(60):
            while not (first.num_cancels and third.num_cancels):
                await asyncio.sleep(0)


async def test_an_error_is_shown_after_the_text_so_far(browsing: Browsing) -> None:
    worker = CountingWorker()
    async with look(browsing, worker=worker) as (page, _):
        for earlier, text, error in (
            ((), "", EngineFull("too many requests wait")),
            (DELTAS[:1], "Hel", EngineStopped("the engine has stopped")),
        ):
            worker.events = [*earlier, error]
            await ask(page)
            await expect(last_turn(page, ".error")).to_have_text(str(error))
            await expect(last_turn(page, ".text")).to_have_text(text)
            await expect(page.locator("#plan-note")).not_to_contain_text("Choosing")
            await expect(page.get_by_label("Prompt", exact=True)).to_have_value("A verse, please.")  # to be sent again


async def test_a_refused_prompt_leaves_no_plan_of_an_earlier_one(browsing: Browsing) -> None:
    async with look(browsing) as (page, _):
        await ask(page)
        await expect(page.locator("#map .spot.chosen")).to_have_count(2)
        await expect(page.locator("#map .prompt")).to_have_count(1)
        await page.get_by_label("Model", exact=True).fill("nosuch")
        await ask(page)
        await expect(last_turn(page, ".error")).to_contain_text("nosuch")
        await expect(page.locator("#plan-note")).to_have_text("The request failed, so no adapter was chosen.")
        for part in ("#plan li", "#considered:visible", "#map .spot.chosen", "#map .prompt"):
            await expect(page.locator(part)).to_have_count(0)
        await page.locator("#turns > li").first.get_by_role("button", name="Why").click()
        await expect(page.locator("#plan li")).to_have_count(2)
        await expect(page.locator("#map .spot.chosen")).to_have_count(2)


async def test_an_abstention_says_that_the_base_model_answers(browsing: Browsing) -> None:
    async with look(browsing, retriever=MappedRetriever(abstains=True)) as (page, _):
        await ask(page)
        await expect(page.locator("#plan-note")).to_contain_text("No adapter fits, so the base model answers")
        await expect(page.locator("#plan-note")).to_contain_text("poet is the nearest, with a score of 1.000")
        await expect(page.locator("#considered-list .name")).to_have_text(["poet", "coder"])
        await expect(page.locator("#changes-list")).to_contain_text("Abstain never")
        await expect(page.locator("#plan li")).to_have_count(0)


async def test_the_explanation_is_about_the_adapter_that_answers(browsing: Browsing) -> None:
    """The nearest candidate misses its threshold, and the one that answers does so with a version under trial."""
    scores = {"far": 0.5, "nearest": 0.9, "poet": 0.8}
    thresholds = {"far": 0.6, "nearest": 0.95, "poet": 0.7}
    candidates = [
        {"name": name, "digest": name * 8, "score": score, "threshold": thresholds[name], "confidence": 0.5}
        for name, score in scores.items()
    ]
    used = {"name": "poet", "digest": "trial", "weight": 1.0}
    plan = {"strategy": "selection", "why": "", "abstained": False, "reason": "fits"}
    show = """async (plan) => {
      const { src } = document.querySelector("script[type=module]");
      (await import(new URL("plan.js", src))).showPlan(plan);
    }"""
    async with look(browsing) as (page, _):
        await page.evaluate(show, {**plan, "adapters": [used], "candidates": candidates})
        verdicts = [re.compile(f"^{verdict} ·") for verdict in ("not used", "not used", "used")]
        await expect(page.locator("#considered-list .verdict")).to_have_text(verdicts)
        await expect(page.locator("#changes-list li")).to_have_text(
            [
                "A lora.min_score of 0.801 or more turns poet away.",
                "nearest is 0.100 nearer: Answer with nearest",
            ]
        )
        await page.evaluate(show, {**plan, "adapters": [{**used, "name": "another"}], "candidates": candidates})
        await expect(page.locator("#considered")).to_be_visible()
        await expect(page.locator("#changes")).to_be_hidden()


async def test_nothing_the_server_sends_becomes_markup(browsing: Browsing) -> None:
    """Publishers choose names and tags, and the model writes the answer, so neither can be trusted."""
    hostile = replace(adapter(HOSTILE), tags=(HOSTILE,))
    worker = CountingWorker([Delta(HOSTILE, 1, 1, "stop")])
    retriever = MappedRetriever([hostile], near=(NearSample(HOSTILE, 0.5),))
    async with look(browsing, worker=worker, retriever=retriever) as (page, _):
        await ask(page)
        await expect(last_turn(page, ".text")).to_have_text(HOSTILE)
        await expect(page.locator("#plan li .name")).to_have_text([HOSTILE])
        await expect(page.locator("#considered-list .near li")).to_have_text([f"0.500 {HOSTILE}"])
        await expect(page.locator("#pool-rows .tag")).to_have_text([HOSTILE])
        await expect(page.locator("#map .label.chosen")).to_have_text([HOSTILE])
        await go(page, "Adapters")
        await page.locator("#pool-rows a").click()
        await expect(page.locator("#adapter-title")).to_have_text(HOSTILE)
        assert await page.title() == f"{HOSTILE} · LoraRetriever"
        assert await page.locator("img, body script").count() == 0


async def test_a_large_pool_is_searched_and_paged(browsing: Browsing) -> None:
    retriever = MappedRetriever([adapter(f"task-{number:02}") for number in range(40)])
    async with look(browsing, retriever=retriever) as (page, _):
        await go(page, "Adapters")
        await expect(page.locator("#pool-count")).to_have_text("1–15 of 40")
        await page.get_by_role("button", name="Next page").click()
        await expect(page.locator("#pool-count")).to_have_text("16–30 of 40")
        await page.get_by_role("button", name="Next page").click()
        await expect(page.locator("#pool-count")).to_have_text("31–40 of 40")
        await expect(page.get_by_role("button", name="Next page")).to_be_disabled()
        await page.get_by_role("button", name="Previous page").click()
        await expect(page.locator("#pool-count")).to_have_text("16–30 of 40")
        await expect(page.locator("#pool-rows .name").first).to_have_text("task-15")
        await page.get_by_label("Search").fill("task-3")
        await expect(page.locator("#pool-count")).to_have_text("1–10 of 10")
        await expect(page.locator("#pool-rows .name").first).to_have_text("task-30")
        await expect(page.get_by_role("button", name="Next page")).to_be_disabled()
        await page.get_by_label("Search").fill("nothing like it")
        await expect(page.locator("#pool-count")).to_have_text(
            "no adapters found; under Ask, Find on the map also searches samples"
        )


async def test_pages_follow_the_rows_that_are_shown_while_others_are_read(browsing: Browsing) -> None:
    retriever = MappedRetriever([adapter(f"task-{number:02}") for number in range(60)])
    goes_on, fails = asyncio.Event(), asyncio.Event()

    async def hold(route: Route) -> None:
        await goes_on.wait()
        if fails.is_set():
            await route.fulfill(status=503, json={"error": {"message": "starting"}})
        else:
            await route.continue_()

    async with look(browsing, retriever=retriever) as (page, _):
        count, rows = page.locator("#pool-count"), page.locator("#pool-rows .name")
        back, on = (page.get_by_role("button", name=f"{which} page") for which in ("Previous", "Next"))
        await go(page, "Adapters")
        await expect(count).to_have_text("1–15 of 60")
        await page.route("**/v1/loras?*", hold)
        await on.dblclick()
        goes_on.set()
        await expect(count).to_have_text("16–30 of 60")
        await expect(rows.first).to_have_text("task-15")
        fails.set()
        await on.click()
        await expect(page.locator("#pool-error")).to_have_text("starting")
        fails.clear()
        await on.click()
        await expect(count).to_have_text("31–45 of 60")
        await expect(rows.first).to_have_text("task-30")
        goes_on.clear()
        async with page.expect_request("**/v1/loras?*search=task-3*"):
            await page.get_by_label("Search").fill("task-3")
        await expect(back).to_be_disabled()
        await expect(on).to_be_disabled()
        goes_on.set()
        await expect(count).to_have_text("1–10 of 10")
        await page.unroute_all(behavior="wait")


class GeneratingWorker(CountingWorker):
    """Has 100 tokens more each time that it is asked for its state."""

    async def load(self) -> EngineStatus:
        status = await super().load()
        counters = replace(status.counters, num_new_tokens=100 * self.num_asked)
        return replace(status, counters=counters)


async def test_the_metrics_are_live(browsing: Browsing) -> None:
    worker = GeneratingWorker()
    async with look(browsing, worker=worker) as (page, _):
        await go(page, "Status")
        await expect(page.locator("#metric-running")).to_have_text("3 of 32")
        await expect(page.locator("#metric-waiting")).to_have_text("2")
        await expect(page.locator("#metric-bank")).to_have_text("16 of 256")
        await expect(page.locator("#metric-hits")).to_have_text("device 60 % memory 30 % store 10 %")
        await expect(page.locator("#metric-generation")).to_have_text("7")
        await expect(page.locator("#connection")).to_have_text("live")
        worker.holdings = replace(worker.holdings, num_running=4)  # type: ignore[type-var]
        await expect(page.locator("#metric-running")).to_have_text("4 of 32")
        await expect(page.locator("#metric-rate")).to_have_text(re.compile("[1-9]"))


async def test_the_map_is_read_by_keyboard(browsing: Browsing) -> None:
    async with look(browsing) as (page, _):
        await expect(page.locator("#map-list li")).to_have_count(2)
        await expect(page.locator("#examples button")).to_have_count(2)  # nothing else changes the layout
        before = await page.locator("#map").bounding_box()
        await wait_frames(page, 5)
        after = await page.locator("#map").bounding_box()
        assert before and after
        assert [before["width"], before["height"]] == [after["width"], after["height"]], "drawing it changed its size"
        await page.locator("#map").focus()
        await page.keyboard.press("ArrowRight")
        await expect(page.locator("#map-spoken")).to_have_text("coder")
        await page.keyboard.press("ArrowRight")
        await expect(page.locator("#map-spoken")).to_have_text("poet")
        await page.keyboard.press("Enter")
        await expect(page.locator("#adapter-title")).to_have_text("poet")


async def test_a_field_that_prevents_sending_is_shown(browsing: Browsing) -> None:
    async with look(browsing) as (page, served):
        await show_options(page)
        longest = page.get_by_label("Longest answer, tokens")
        await page.get_by_label("Temperature").fill("0.25")
        await longest.fill("")
        await show_options(page)  # which hides them
        await expect(longest).to_be_hidden()
        await page.get_by_label("Prompt", exact=True).fill("A verse, please.")
        await page.get_by_label("Prompt", exact=True).press("Enter")
        await expect(longest).to_be_visible()
        await expect(longest).to_be_focused()
        assert served.worker.called("stream") == []
        await longest.fill("17")
        await page.get_by_label("Prompt", exact=True).press("Enter")
        await expect(last_turn(page, ".note")).to_contain_text("tokens")
        assert (served.job.sampling.max_tokens, served.job.sampling.temperature) == (17, 0.25)


async def test_strategies_are_offered_once_the_server_lists_them(browsing: Browsing) -> None:
    async with look(browsing) as (page, _):
        is_ready = asyncio.Event()

        async def answer(route: Route) -> None:
            if is_ready.is_set():
                await route.continue_()
            else:
                await route.fulfill(status=503, json={"error": {"message": "starting"}})

        await page.route("**/v1/models/auto", answer)
        async with page.expect_response("**/v1/models/auto"):
            await page.reload()
        await expect(page.locator("#connection")).to_have_text("live")
        await expect(page.locator("#strategy option")).to_have_count(1)
        is_ready.set()
        await poll(page)
        await expect(page.locator("#strategy option")).to_have_count(1 + len(ROUTED_STRATEGIES))
        await page.unroute_all(behavior="wait")
