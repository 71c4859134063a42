from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest

from deployments.api.completions import ChatCompletionRequest, CompletionRequest
from deployments.api.error_table import describe
from deployments.api.responses import Planned
from deployments.batch.planning import BatchRouting
from deployments.calls.catalogue_clients import serve_retriever
from deployments.config.app import AppConfig, RetrievalSettings
from deployments.errors import ModelNotFound, RequestInvalid
from deployments.generation.planner import Planner
from lora_store import BASE_PLAN
from lora_store.errors import PlanInvalid
from retriever_svc import NoAdapterMatched, Retriever, Route, RouteRequest
from retriever_svc.encoder import MAX_CHARS
from retriever_svc.views import split_views
from tests.deployments.adapter_records import BASE, POOL, adapter
from tests.deployments.app_fakes import config_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.fakes import FakeHandle
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, live_pool, record_of


def plan(handle: FakeHandle, model: str = "auto", lora: dict[str, Any] | None = None, **retrieval: Any) -> Planned:
    body = {"messages": [{"role": "user", "content": "Rhyme"}], "model": model, "lora": lora or {}}
    planner = Planner(config_of().served_models, RetrievalSettings(**retrieval), serve_retriever(handle))
    [question] = ChatCompletionRequest.model_validate(body).questions()
    return asyncio.run(planner.plan_all([question], "local"))[0]


def planner_over(handle: FakeHandle) -> Planner:
    return Planner(config_of().served_models, RetrievalSettings(), serve_retriever(handle))


def handle_of(*extra: str) -> FakeHandle:
    return FakeHandle(FakeRetriever((*POOL, *[adapter(name) for name in extra])))


def names(planned: Planned) -> list[str]:
    return [row.ref.name for row in planned.plan.adapters]


@pytest.mark.parametrize("model", ["auto", f"{BASE}:auto"])
def test_auto_asks_the_retriever_even_if_an_adapter_has_that_name(model: str) -> None:
    handle = handle_of("auto")
    planned = plan(handle, model)
    assert [call.name for call in handle.calls] == ["route"]
    assert names(planned) == ["poet", "coder", "auto"]
    assert [candidate.ref.name for candidate in planned.candidates] == ["poet", "coder", "auto"]


def test_the_bases_name_means_the_base_model_without_retrieval() -> None:
    handle = handle_of(BASE)
    assert plan(handle, BASE) == Planned(BASE_PLAN)
    assert handle.calls == []


@pytest.mark.parametrize("model", ["poet", f"{BASE}:poet", "local/poet", f"{BASE}:local/poet"])
def test_an_adapters_name_is_one_adapter_of_weight_one(model: str) -> None:
    planned = plan(handle_of(), model)
    assert planned.plan.strategy == "selection"
    assert [(row.ref.name, row.weight, row.score) for row in planned.plan.adapters] == [("poet", 1.0, None)]
    assert planned.candidates == ()


@pytest.mark.parametrize(("lora", "strategy"), [({}, "selection"), ({"strategy": "mixture"}, "mixture")])
def test_a_request_looks_the_adapter_that_it_names_up_once(lora: dict[str, Any], strategy: str) -> None:
    handle = handle_of()
    body = {"prompt": ["Rhyme", "Sing"], "model": "poet", "lora": lora | {"min_generation": 9}}

    async def plan_request() -> list[Planned]:
        planner = planner_over(handle)
        _, _, questions, bound = await planner.apply_policy(CompletionRequest.model_validate(body), "local")
        assert bound is None
        return await planner.plan_all(questions, "local")

    planned = asyncio.run(plan_request())
    assert planned == [plan(handle_of(), "poet", body["lora"])] * 2
    assert [(call.name, *call.args) for call in handle.calls] == [("find_model", "local", "poet", strategy, 9)]


@pytest.mark.parametrize("model", ["unknown", f"{BASE}:unknown", f"{BASE}:", "other:poet", "auto:poet", ":poet", "a/b"])
def test_an_unknown_model_is_reported_under_the_clients_name(model: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        plan(handle_of(), model)
    status, body = describe(caught.value)
    assert status == 404
    assert body["error"] == {
        "message": f"no model or adapter {model!r}; use 'auto', or a name of `loraretriever list` or GET /v1/models",
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }


def route_request(handle: FakeHandle) -> RouteRequest:
    [([request],)] = handle.called("route")
    assert isinstance(request, RouteRequest)
    return request


def test_options_come_from_the_config_unless_the_request_sets_them() -> None:
    settings = {"strategy": "fusion", "k": 5, "weights": "softmax", "fallback": "error"}
    plan(handle := handle_of(), **settings, min_score=0.9)
    expected = RouteRequest("Rhyme", "local", "fusion", 5, "softmax", 0.9, "error", abstain="balanced")
    assert route_request(handle) == expected
    said = {"strategy": "selection", "k": 2, "weights": "uniform", "fallback": "base", "min_score": 0.0}
    said |= {"filter": {"tags": ["a", "b"]}, "min_generation": 9}
    plan(handle := handle_of(), lora=said, **settings)
    expected = RouteRequest("Rhyme", "local", "selection", 2, "uniform", 0.0, "base", ("a", "b"), 9)
    assert route_request(handle) == expected


def test_the_question_behind_a_text_that_is_too_long_to_read_is_read() -> None:
    question = "Negate the statement: bees fly."
    content = "\n\n".join([*[f"Paragraph {number} speaks of other things." for number in range(1000)], question])
    body = {"messages": [{"role": "user", "content": content}], "model": "auto"}
    [asked] = ChatCompletionRequest.model_validate(body).questions()
    asyncio.run(planner_over(handle := handle_of()).plan_all([asked], "local"))
    assert len(content) > 2 * MAX_CHARS and len(route_request(handle).text) == MAX_CHARS
    assert split_views(route_request(handle).text)[1] == question


@pytest.mark.parametrize(
    ("given", "setting", "expected"),
    [({}, {}, 0.9), ({}, {"kept_weight": 0.6}, 0.6), ({"kept_weight": 0.5}, {"kept_weight": 0.6}, 0.5)],
)
def test_a_strategys_option_is_the_requests_then_the_settings_then_its_own(
    given: dict[str, float], setting: dict[str, float], expected: float
) -> None:
    plan(handle := handle_of(), lora={"strategy_options": given}, strategy="top_p_mixture", strategy_options=setting)
    request = route_request(handle)
    assert (request.strategy, request.options) == ("top_p_mixture", {"kept_weight": expected})


def test_an_option_that_the_strategy_lacks_is_refused_before_retrieval() -> None:
    handle = handle_of()
    with pytest.raises(RequestInvalid) as caught:
        plan(handle, lora={"strategy": "fusion", "strategy_options": {"width": 0.5}})
    assert caught.value.param == "lora.strategy_options"
    assert str(caught.value) == "lora.strategy_options: strategy 'fusion' has no option 'width'; it has none"
    assert handle.calls == []


def test_an_operating_point_of_the_request_replaces_both_settings() -> None:
    plan(handle := handle_of(), lora={"abstain": "never"}, abstain="lenient", min_score=0.3)
    request = route_request(handle)
    assert (request.abstain, request.min_score) == ("never", None)


@pytest.mark.parametrize(
    ("model", "lora", "choices"),
    [("poet", {}, [("poet", 1.0)]), ("auto", {"adapters": [{"name": "poet", "weight": 0.5}]}, [("poet", 0.5)])],
)
def test_a_named_plan_passes_on_min_generation(
    model: str, lora: dict[str, Any], choices: list[tuple[str, float]]
) -> None:
    handle = handle_of()
    plan(handle, model, lora | {"min_generation": 9})
    assert handle.called("plan_named") == [("local", choices, "selection", 9)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("k", 3),
        ("weights", "uniform"),
        ("strategy_options", {"width": 0.5}),
        ("abstain", "never"),
        ("min_score", 0.5),
        ("fallback", "base"),
        ("filter", {"tags": ["a"]}),
    ],
)
@pytest.mark.parametrize("model", ["auto", "poet", BASE, f"{BASE}:poet"])
def test_retrieval_options_are_refused_if_adapters_are_named(model: str, field: str, value: Any) -> None:
    named = {"adapters": [{"name": "poet"}]} if model == "auto" else {}
    handle = handle_of()
    with pytest.raises(RequestInvalid, match=f"lora.{field}") as caught:
        plan(handle, model, named | {field: value})
    assert caught.value.param == f"lora.{field}"
    assert handle.calls == []


@pytest.mark.parametrize(
    ("model", "lora", "param"),
    [
        (BASE, {"strategy": "mixture"}, "lora.strategy"),
        *((model, {"adapters": [{"name": "poet"}]}, "lora.adapters") for model in (BASE, "poet", f"{BASE}:poet")),
    ],
)
def test_the_base_is_not_composed_and_named_adapters_require_model_auto(
    model: str, lora: dict[str, Any], param: str
) -> None:
    handle = handle_of()
    with pytest.raises(RequestInvalid, match="auto" if param == "lora.adapters" else "at least one adapter") as caught:
        plan(handle, model, lora)
    assert (caught.value.param, handle.calls) == (param, [])


@pytest.mark.parametrize(("count", "strategy"), [(1, "selection"), (2, "fusion")])
def test_named_adapters_are_planned_with_their_weights_by_the_configs_strategy(count: int, strategy: str) -> None:
    handle = handle_of()
    adapters = [{"name": "coder", "weight": -0.5}, {"name": "poet"}][:count]
    planned = plan(handle, lora={"adapters": adapters}, strategy="fusion")
    assert planned.plan.strategy == strategy
    assert [(row.ref.name, row.weight) for row in planned.plan.adapters] == [("coder", -0.5), ("poet", 1.0)][:count]
    assert handle.called("route") == []
    assert (
        plan(handle, lora={"adapters": adapters, "strategy": "mixture"}, strategy="fusion").plan.strategy == "mixture"
    )


def test_an_impossible_plan_keeps_its_own_error() -> None:
    with pytest.raises(PlanInvalid):
        plan(handle_of(), lora={"adapters": [{"name": "poet"}, {"name": "poet"}]})
    twins = FakeHandle(FakeRetriever(failure=NoAdapterMatched(0.1, 0.5)))
    with pytest.raises(NoAdapterMatched):
        plan(twins)


def plan_turns(handle: FakeHandle, *turns: str, lora: dict[str, Any] | None = None) -> Planned:
    messages = [{"role": "user", "content": turn} for turn in turns]
    [question] = ChatCompletionRequest.model_validate({"messages": messages, "lora": lora or {}}).questions()
    return asyncio.run(planner_over(handle).plan_all([question], "local"))[0]


def routed(handle: FakeHandle) -> list[RouteRequest]:
    return [request for ([request],) in handle.called("route")]


def plan_angles(*degrees: int, k: int = 3) -> tuple[str, list[str]]:
    """Return the adapter of a conversation whose turns have these angles, and the texts that it reads.

    The pool has one adapter at 0 degrees and one at 60.
    """

    def unit(angle: int) -> tuple[float, float]:
        return math.cos(math.radians(angle)), math.sin(math.radians(angle))

    turns = [f"Please read the text of turn {number}" for number in range(len(degrees))]
    encoder = FakeEncoder({turn: unit(angle) for turn, angle in zip(turns, degrees, strict=True)})
    pool = Source(record_of("at 0", unit(0)), record_of("at 60", unit(60)))
    planner = Planner(
        config_of().served_models, RetrievalSettings(k=k), BatchRouting(Retriever(live_pool(encoder, pool)))
    )
    messages = [{"role": "user", "content": turn} for turn in turns]
    [question] = ChatCompletionRequest.model_validate({"messages": messages}).questions()
    [planned] = asyncio.run(planner.plan_all([question], "local"))
    return names(planned)[0], [text[-1] for batch in encoder.batches for text in batch]


@pytest.mark.parametrize(
    ("degrees", "answers", "read"),
    [
        ([0, 33], "at 0", "01"),
        ([0, 33, 33], "at 0", "102"),
        ([0, 33, 33, 33], "at 0", "2103"),
        ([0, 33, 33, 33, 33], "at 0", "32104"),
        ([0, 33, 33, 33, 33, 33], "at 60", "43215"),  # the first turn is no longer read
        ([0, 60, 33, 33], "at 60", "213"),
        ([0, 33, 60, 27], "at 60", "23"),
        ([0, 33, 33, 60], "at 60", "2103"),
        ([60, 33, 33], "at 60", "102"),
        ([33, 33, 27], "at 60", "102"),
        ([180, 33, 27], "at 60", "102"),
    ],
)
@pytest.mark.parametrize("k", [1, 3])
def test_an_adapter_stays_over_turns_that_others_answer_nearly_as_well(
    degrees: list[int], answers: str, read: str, k: int
) -> None:
    assert plan_angles(*degrees, k=k) == (answers, list(read))


SEA, SKY, WARMER, SHORTER = (
    "Write a poem about the sea",
    "How far is the sky?",
    "a bit warmer please",
    "und etwas kürzer",
)


def test_a_conversation_prefers_the_adapter_of_its_previous_turn() -> None:
    plan_turns(handle := handle_of(), SEA, SKY)
    found = [(request.text, request.preferred, request.counted) for request in routed(handle)]
    assert found == [(SEA, None, "never"), (SKY, POOL[0].ref, "if_chosen")]


def test_further_texts_are_tried_only_after_the_first_found_no_adapter() -> None:
    plan_turns(found := handle_of(), SEA, "blue sky")
    assert [request.text for request in routed(found)] == [SEA, "blue sky"]
    none = FakeHandle(FakeRetriever(POOL, abstains=True))
    assert plan_turns(none, SEA, "blue sky", lora={"fallback": "error"}).abstained
    assert [(request.text, request.fallback, request.preferred, request.counted) for request in routed(none)] == [
        (SEA, "base", None, "never"),
        ("blue sky", "base", None, "if_chosen"),
        (f"{SEA}\nblue sky", "error", None, "always"),
    ]


@dataclass
class BackReferring(FakeRetriever):
    """Finds adapters for the texts of `fitting` alone, and holds that those of `back` refer to an earlier turn."""

    fitting: tuple[str, ...] = ()
    back: tuple[str, ...] = ()

    async def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        routes = []
        for request in requests:
            self.abstains = request.text not in self.fitting
            [route] = await super().route([request])
            routes.append(replace(route, refers_back=request.text in self.back))
        return routes


@pytest.mark.parametrize(
    ("turns", "back", "texts", "abstains"),
    [
        ([SEA, WARMER], (WARMER,), [SEA, WARMER, SEA], False),
        ([SEA, SHORTER, WARMER], (WARMER, SHORTER), [SHORTER, f"{SEA}\n{SHORTER}", SEA, WARMER, SEA], False),
        ([SEA, SKY], (), [SEA, SKY, SKY], True),
        ([SEA, SKY, WARMER], (WARMER,), [SKY, WARMER], True),
    ],
    ids=["the turn that it means", "a chain of turns", "no reference", "a complete turn in between"],
)
def test_a_turn_that_refers_back_keeps_the_adapter_of_the_turn_that_it_means(
    turns: list[str], back: tuple[str, ...], texts: list[str], abstains: bool
) -> None:
    handle = FakeHandle(BackReferring(fitting=(SEA,), back=back))
    planned = plan_turns(handle, *turns)
    assert ([request.text for request in routed(handle)], planned.abstained) == (texts, abstains)
    assert names(planned) == ([] if abstains else ["poet", "coder"])


def test_a_short_turn_in_between_is_read_with_the_turns_before_it() -> None:
    joined = f"{SEA}\nblue sky"
    handle = FakeHandle(BackReferring(fitting=(joined,), back=(WARMER,)))
    assert names(plan_turns(handle, SEA, "blue sky", WARMER)) == ["poet", "coder"]
    assert [request.text for request in routed(handle)] == ["blue sky", joined, WARMER, joined]


@pytest.mark.parametrize(
    ("retriever", "counted"),
    [
        (FakeRetriever(), ["never", "if_chosen"]),
        (BackReferring(fitting=(SEA,), back=(WARMER,)), ["never", "if_chosen", "always"]),
        (BackReferring(fitting=(SEA,)), ["never", "if_chosen", "always"]),
    ],
)
def test_a_conversation_is_counted_once_whatever_answers_it(retriever: FakeRetriever, counted: list[str]) -> None:
    plan_turns(handle := FakeHandle(retriever), SEA, WARMER)
    assert [request.counted for request in routed(handle)] == counted


def test_housekeeping_is_answered_by_the_base_and_asks_nobody() -> None:
    handle = handle_of()
    planned = plan_turns(handle, "Write a poem", "Generate a concise title for this conversation")
    assert planned == Planned(BASE_PLAN, abstained=True, reason="housekeeping")
    assert handle.calls == []


def test_a_query_of_the_request_replaces_the_conversation() -> None:
    handle = handle_of()
    plan_turns(handle, "Write a poem", "Generate a title for this conversation", lora={"query": "Rhyme"})
    assert [request.text for request in routed(handle)] == ["Rhyme"]


@pytest.mark.parametrize(
    ("turns", "lora", "expected"),
    [
        (["Write a poem about the sea", "blue sky"], {}, ["Write a poem about the sea", "blue sky", "joined"]),
        (
            ["Sing", "Write a poem", "Please paint the sea in blue"],
            {},
            ["Write a poem", "Sing\nWrite a poem", "Sing", "Please paint the sea in blue"],
        ),
        (["Write a poem", "Generate a title for this conversation"], {}, []),
        (["one", "two"], {"query": "Rhyme"}, ["Rhyme"]),
        (["one", "two"], {"adapters": [{"name": "poet"}]}, []),
    ],
)
def test_every_text_that_may_be_encoded_is_counted(turns: list[str], lora: dict[str, Any], expected: list[str]) -> None:
    messages = [{"role": "user", "content": turn} for turn in turns]
    [question] = ChatCompletionRequest.model_validate({"messages": messages, "lora": lora}).questions()
    texts = planner_over(handle_of()).texts_to_route(question)
    assert list(texts) == ["\n".join(turns) if text == "joined" else text for text in expected]


@pytest.mark.parametrize(
    ("names", "model", "base_model", "said"),
    [
        ("ab", "a:auto", "b", "model: lora.plan is of base model 'b', but `model`"),
        ("ab", "auto", "c", "this plan has 'a', got 'c'"),
        ("a", "auto", "c", "this plan has 'a', got 'c'"),
        ("ab", "b:auto", None, None),
        ("ab", "auto", "b", None),
        ("a", "auto", "a", None),
    ],
)
async def test_a_plan_without_adapters_is_replayed_on_its_base(
    names: str, model: str, base_model: str | None, said: str | None
) -> None:
    models = AppConfig(models=[{"base_model": f"x/{name}"} for name in names]).served_models
    planner = Planner(models, RetrievalSettings(), serve_retriever(handle_of()))
    lora = {"plan": {"strategy": "base", "adapters": [], "base_model": base_model}}
    body = {"messages": [{"role": "user", "content": "Rhyme"}], "model": model, "lora": lora}
    [question] = ChatCompletionRequest.model_validate(body).questions()
    with nullcontext() if said is None else pytest.raises(RequestInvalid, match=re.escape(said)):
        [planned] = await planner.plan_all([question], "local")
        assert planned.plan.base_model == ("b" if names == "ab" else "")
