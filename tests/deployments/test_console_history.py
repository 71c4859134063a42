"""Conversations of the console: several turns, examples, the history, and requests as code."""

from __future__ import annotations

import ast
import asyncio
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import pytest
from playwright.async_api import expect

from gpu_worker.front.request.prompts import Message
from lora_store import Sample
from retriever_svc import PoolMap
from tests.browsing import Browsing
from tests.deployments.adapter_records import adapter
from tests.deployments.app_fakes import Served
from tests.deployments.console_fakes import CountingWorker, MappedRetriever
from tests.deployments.looking import ask, ask_and_wait, last_turn, look, show_options, wait_frames

pytestmark = pytest.mark.browser


def prompts_of(served: Served) -> list[object]:
    return [job.prompt for (job,) in served.worker.called("stream")]


async def test_a_conversation_sends_its_system_prompt_and_earlier_turns_but_no_failed_one(browsing: Browsing) -> None:
    async with look(browsing) as (page, served):
        await show_options(page)
        await page.get_by_label("System prompt", exact=True).fill("Rhyme.")
        await ask_and_wait(page)
        await page.get_by_label("Model", exact=True).fill("nosuch")
        await ask(page, "lost")
        await expect(last_turn(page, ".error")).to_be_visible()
        await page.get_by_label("Model", exact=True).fill("auto")
        await ask_and_wait(page, "Another one.")
        system, first = Message("system", "Rhyme."), Message("user", "A verse, please.")
        second = (system, first, Message("assistant", "Hello"), Message("user", "Another one."))
        assert prompts_of(served) == [(system, first), second]
        await page.locator("#turns > li").first.get_by_role("button", name="Again").click()
        await expect(page.locator("#turns > li .note")).to_have_count(1)
        assert prompts_of(served)[2] == (system, first)


async def test_an_example_is_a_sample_of_the_pool_and_is_asked_by_a_click(browsing: Browsing) -> None:
    async with look(browsing) as (page, _):
        examples = page.locator("#examples button")
        await expect(examples).to_have_text(["A sample of coder.coder", "A sample of poet.poet"])
        await examples.last.click()
        await expect(last_turn(page, ".note")).to_contain_text("tokens")
        await expect(last_turn(page, ".asked")).to_contain_text("A sample of poet.")
        await expect(page.locator("#welcome")).to_be_hidden()


@dataclass
class ClusteredRetriever(MappedRetriever):
    """Its adapters are near others of their kind, the part of the name after the last hyphen."""

    samples_by_kind: Mapping[str, str] = field(default_factory=dict)

    def pool_map(self, tenant: str) -> PoolMap:
        kinds = sorted({_kind(record.ref.name) for record in self.held})
        places = []
        for number, record in enumerate(self.held):
            angle = 2 * math.pi * kinds.index(_kind(record.ref.name)) / len(kinds)
            places.append((math.cos(angle) + number / 10_000, math.sin(angle)))
        return replace(super().pool_map(tenant), places=tuple(places))

    async def samples(self, tenant: str, name: str, min_generation: int = 0) -> list[Sample]:
        kind = _kind(name)
        return [Sample(self.samples_by_kind.get(kind, f"A sample of {kind}."))]


def _kind(name: str) -> str:
    return name.rpartition("-")[2]


async def test_the_examples_of_a_large_pool_differ_in_kind(browsing: Browsing) -> None:
    kinds = ["negate", "translate", "sum", "date", "rhyme", "unit"]
    held = [adapter(f"a{number:03}-label") for number in range(300)]
    held += [adapter(f"b{number}-{kind}") for number, kind in enumerate(kinds)]
    async with look(browsing, retriever=ClusteredRetriever(held)) as (page, _):
        names = page.locator("#examples button small")
        await expect(names).to_have_count(6)
        shown = [_kind(name) for name in await names.all_inner_texts()]
        assert len(set(shown)) == 6, shown
        await page.reload()
        await expect(names).to_have_count(6)
        assert [_kind(name) for name in await names.all_inner_texts()] == shown, "chosen in the same way every time"


async def test_samples_that_a_button_cannot_show_whole_come_last(browsing: Browsing) -> None:
    long = {"who": "word " * 30, "options": "Who is it?\nOPTIONS:\n- this one\n- that one\n- someone else"}
    held = [adapter(name) for name in ("a-who", "b-options", "c-negate", "d-date")]
    async with look(browsing, retriever=ClusteredRetriever(held, samples_by_kind=long)) as (page, _):
        names = page.locator("#examples button small")
        await expect(names).to_have_count(4)
        assert set((await names.all_inner_texts())[2:]) == {"a-who", "b-options"}


async def test_history_survives_a_reload_and_can_be_deleted(browsing: Browsing) -> None:
    async with look(browsing) as (page, served):
        await ask_and_wait(page, "first")
        await page.get_by_role("button", name="New conversation").click()
        await expect(page.locator("#turns > li")).to_have_count(0)
        await expect(page.locator("#plan li")).to_have_count(0)
        await ask_and_wait(page, "second")
        await page.reload()
        await expect(last_turn(page, ".asked")).to_contain_text("second")
        await expect(last_turn(page, ".text")).to_have_text("Hello")
        await expect(page.locator("#plan li .name")).to_have_text(["poet", "coder"])
        await expect(page.locator("#history-list .earlier")).to_have_text(["second", "first"])
        await page.get_by_role("button", name="first", exact=True).click()
        await expect(last_turn(page, ".asked")).to_contain_text("first")
        await ask_and_wait(page, "more")
        assert len(prompts_of(served)[-1]) == 3  # type: ignore[arg-type]  # the kept turn is part of the request
        await page.get_by_role("button", name="Delete the conversation: second").click()
        await expect(page.locator("#history-list .earlier")).to_have_text(["first"])
        async with page.expect_download() as download:
            await page.get_by_role("button", name="Export").click()
        exported = json.loads((await (await download.value).path()).read_text(encoding="utf-8"))
        assert [[turn["prompt"] for turn in chat["turns"]] for chat in exported] == [["first", "more"]]
        await page.get_by_role("button", name="Clear", exact=True).click()
        await page.locator("#confirm-yes").click()
        await expect(page.locator("#history")).to_be_hidden()
        await page.reload()
        await expect(page.locator("#welcome")).to_be_visible()


async def test_history_of_another_form_is_left_out(browsing: Browsing) -> None:
    async with look(browsing) as (page, _):
        for stored in ("{", "[1, null, {}]", '[{"id": "a", "system": "", "turns": [{"prompt": 1}]}]'):
            await page.evaluate("(text) => localStorage.setItem('loraretriever-history', text)", stored)
            await page.reload()
            await expect(page.locator("#history")).to_be_hidden()
            await ask_and_wait(page)
            await expect(page.locator("#history-list .earlier")).to_have_text(["A verse, please."])


async def test_requests_as_code_do_what_the_page_does(browsing: Browsing) -> None:
    """The snippets run as they are shown, quotes and line breaks included."""
    prompt = 'It\'s "quoted" $HOME `x`\nsecond \\ line é'
    async with look(browsing) as (page, served):
        await page.evaluate("sessionStorage.setItem('loraretriever-key', 'top secret')")
        await show_options(page)
        await page.get_by_label("Strategy").select_option("fusion")
        await page.get_by_label("Only with tags").fill("one")
        await page.get_by_label("Prompt", exact=True).fill(prompt)
        await page.get_by_role("button", name="Code", exact=True).click()
        for title, runner in (("curl", ["bash", "-c"]), ("Python", [sys.executable, "-c"])):
            code = await page.get_by_label(f"{title} code").inner_text()
            assert "top secret" not in code and "LORARETRIEVER_KEY" in code
            process = await asyncio.create_subprocess_exec(
                *runner, code, stdout=asyncio.subprocess.PIPE, env={**os.environ, "LORARETRIEVER_KEY": "k"}
            )
            shown, _ = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode == 0 and b"Hello" in shown
        requests = [request for ([request],) in served.retriever.called("route")]
        assert [(r.text, r.strategy, r.tags) for r in requests] == [(prompt, "fusion", ("one",))] * 2
        assert [job.sampling.max_tokens for (job,) in served.worker.called("stream")] == [128, 128]


async def test_code_is_copied(browsing: Browsing) -> None:
    async with look(browsing, context={"permissions": ["clipboard-read", "clipboard-write"]}) as (page, _):
        await ask_and_wait(page)
        await page.get_by_role("button", name="Code", exact=True).click()
        await page.clock.install()
        await page.clock.pause_at(datetime.now() + timedelta(hours=1))  # the button says it for two seconds
        await page.get_by_role("button", name="Copy curl").click()
        await expect(page.get_by_role("button", name="Copied")).to_be_visible()
        copied = await page.evaluate("navigator.clipboard.readText()")
        assert re.match(r"curl http://127\.0\.0\.1:\d+/v1/chat/completions ", copied)
        assert "A verse, please." in copied


async def test_a_conversation_that_is_deleted_during_its_answer_stays_deleted(browsing: Browsing) -> None:
    goes_on = asyncio.Event()
    stored = "localStorage.getItem('loraretriever-history') ?? ''"
    async with look(browsing, worker=CountingWorker(goes_on=goes_on)) as (page, _):
        for prompt in ("secret one", "secret two"):
            goes_on.set()
            await ask_and_wait(page, f"{prompt}, first")
            goes_on.clear()
            await ask(page, prompt)
            await expect(last_turn(page, ".text")).to_have_text("Hel")
            if prompt == "secret one":
                await page.get_by_role("button", name="Clear", exact=True).click()
                await page.locator("#confirm-yes").click()
            else:
                await page.get_by_role("button", name="Delete the conversation").click()
            await expect(page.locator("#turns > li")).to_have_count(0)
            await wait_frames(page, 10)
            assert "secret" not in await page.evaluate(stored)
            await expect(page.locator("#history")).to_be_hidden()
        await ask(page, "a prompt")
        await expect(last_turn(page, ".text")).to_have_text("Hel")
        await page.reload()
        await expect(last_turn(page, ".asked")).to_contain_text("a prompt")  # kept before its answer
        await page.get_by_role("button", name="New conversation").click()
        await expect(page.locator("#history-list .earlier")).to_have_text(["a prompt"])


async def test_two_tabs_with_one_conversation_keep_the_turns_of_both(browsing: Browsing) -> None:
    async with look(browsing) as (page, _):
        await ask_and_wait(page, "first")
        other = await page.context.new_page()
        await other.goto(page.url)
        await other.locator("#history-list .earlier").click()
        await ask_and_wait(page, "of this tab")
        for prompt in ("of the other", "one more"):
            await ask_and_wait(other, prompt)
        kept = "(text) => JSON.parse(localStorage.getItem(text)).map((chat) => chat.turns.map((turn) => turn.prompt))"
        assert await other.evaluate(kept, "loraretriever-history") == [
            ["first", "of the other", "one more"],
            ["first", "of this tab"],
        ]
        await other.close()


async def test_texts_stay_texts_in_python(browsing: Browsing) -> None:
    texts = ["true", "null", "constructor", "__proto__", "toString", 'a "quoted" one']
    request = {
        "model": "constructor",
        "messages": [{"role": "user", "content": text} for text in texts],
        "stream": False,
        "lora": {"explain": True, "plan": None},
    }
    made = """async (request) => {
      const { src } = document.querySelector("script[type=module]");
      return (await import(new URL("snippets.js", src))).asPython(request);
    }"""
    async with look(browsing) as (page, _):
        code = await page.evaluate(made, request)
    [call] = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and len(node.keywords) == 4]
    lora = request.pop("lora")
    said = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert said == {**request, "extra_body": {"lora": lora}}
