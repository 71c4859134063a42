"""Which prompts are noted, and that noting is off, bounded and harmless unless it is wanted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deployments.api.base import LoraOptions
from deployments.api.completions import Question
from deployments.api.responses import Planned
from deployments.auth.authenticator import LOCAL_CALLER, Caller
from deployments.background import Background
from deployments.calls.catalogue_clients import serve_store
from deployments.generation.notes import MAX_ASKED, PAUSE_S, PromptNotes
from lora_store import Feedback, StoreUnavailable
from retriever_svc.encoder import MAX_CHARS
from tests.deployments.adapter_records import POOL, adapter, pool_of
from tests.deployments.asking import asked
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore
from tests.fakes import FakeHandle

CHAT = "/v1/chat/completions"


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]


async def noted(*bodies: dict[str, Any], learning: str = "observe", path: str = CHAT, **options: Any) -> list[Feedback]:
    """Return what the store was given after these requests."""
    store = options.setdefault("store", FakeStore(pool_of(*POOL)))
    async with asked(learning=learning, **options) as (client, _):
        for body in bodies:
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, answer.text
    return list(store.given.values())


async def test_nothing_is_noted_unless_the_operator_switched_it_on() -> None:
    bodies = [{"model": "poet", "messages": turns("Rhyme.")}, {"messages": turns("Rhyme.")}]
    assert await noted(*bodies, learning="off") == []
    assert len(await noted(*bodies)) == 2


async def test_a_request_that_names_an_adapter_proposes_its_prompt() -> None:
    system = [{"role": "system", "content": "You are a helpful assistant."}]
    [proposed] = await noted({"model": "poet", "messages": [*system, *turns("Rhyme on rain.")]})
    assert (proposed.text, proposed.adapter, proposed.key_id) == ("Rhyme on rain.", "poet", "local")
    [proposed] = await noted({"model": "poet", "prompt": "Rhyme on snow."}, path="/v1/completions")
    assert proposed.text == "Rhyme on snow."


@pytest.mark.parametrize(
    "body",
    [
        {"model": "tiny-base", "messages": turns("Rhyme.")},
        {"model": f"poet@{POOL[0].ref.digest}", "messages": turns("Rhyme.")},
        {"messages": turns("Rhyme."), "lora": {"adapters": [{"name": "poet"}]}},
        {"model": "poet", "messages": turns("Rhyme.", "Rain, pain.", "shorter please")},
        {"model": "poet", "messages": turns("Generate a concise title for this chat.")},
        {"model": "poet", "messages": turns(" " * MAX_CHARS + "Rhyme." + " " * MAX_CHARS)},
    ],
    ids=["the base model", "a version", "options", "a later turn", "housekeeping", "space as far as it is read"],
)
async def test_other_prompts_propose_nothing(body: dict[str, Any]) -> None:
    assert await noted(body) == []


async def test_the_owner_of_an_adapter_never_sees_prompts_of_other_tenants() -> None:
    foreign = adapter("poet", tenant="globex")
    body = {"model": "globex/poet", "messages": turns("Our secret.")}
    assert await noted(body, retriever=FakeRetriever([foreign])) == []


async def test_a_routed_request_is_kept_under_its_id_for_an_outcome() -> None:
    store = FakeStore(pool_of(*POOL))
    async with asked(store=store, learning="observe") as (client, _):
        answer = await client.post(CHAT, json={"messages": turns("Rhyme on rain.")})
        request_id = answer.headers["x-request-id"]
    found = await store.asked("local", request_id)
    assert found is not None and (found.text, found.adapter) == ("Rhyme on rain.", None)
    assert await store.asked("globex", request_id) is None


async def test_what_is_kept_for_an_outcome_is_the_text_that_decided() -> None:
    [by_query] = await noted({"messages": turns("Rhyme."), "lora": {"query": "Translate into French"}})
    assert by_query.text == "Translate into French"
    system = [{"role": "system", "content": "Translate into German."}]
    abstaining = FakeRetriever(POOL, abstains=True)
    [with_system] = await noted({"messages": [*system, *turns("Good evening.")]}, retriever=abstaining)
    assert with_system.text == "Translate into German.\nGood evening."
    assert await noted({"messages": turns("Rhyme."), "lora": {"query": " "}}) == []


async def test_a_store_that_is_away_fails_no_request() -> None:
    store = FakeStore(pool_of(*POOL), failing={"put_feedback": (StoreUnavailable("gone"), 9)})
    assert await noted({"model": "poet", "messages": turns("Rhyme.")}, store=store) == []


async def test_noting_is_sampled_for_each_tenant() -> None:
    now = [1000.0]
    store = FakeStore(pool_of(*POOL))
    background = Background()
    handle = FakeHandle(store)
    notes = PromptNotes(serve_store(handle), background, is_on=True, clock=lambda: now[0])  # type: ignore[arg-type]
    plan = await FakeRetriever().plan_named("local", [("poet", 1.0)], "selection")
    routed = Planned(plan, reason="fits", text="A text.")

    async def note(number: int, model: str, planned: Planned, caller: Caller = LOCAL_CALLER) -> None:
        notes.note(Question(f"text {number}", f"text {number}", model, LoraOptions()), planned, caller, f"{number}")
        await background.idle()

    for number in range(3 * MAX_ASKED):
        await note(number, "poet", Planned(plan))
        await note(number, "auto", routed)
    first = len(store.given)
    caller = replace(LOCAL_CALLER, tenant="quiet")
    await note(0, "auto", routed, caller)
    of_others = len(store.given) - first
    now[0] += PAUSE_S
    await note(99, "poet", Planned(plan))
    await note(99, "auto", routed)
    assert (first, of_others, len(store.given)) == (1 + MAX_ASKED, 1, 1 + MAX_ASKED + 1 + 2)
