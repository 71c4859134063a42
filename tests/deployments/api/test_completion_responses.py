from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import pytest
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from deployments.api.completion_responses import Answer, plan_object, why
from deployments.api.logprobs import prompt_logprobs
from deployments.api.responses import Planned
from gpu_worker.front.request.request import Completion, Delta, PromptToken, TokenLogprob
from gpu_worker.front.request.tools import ToolCallPiece
from lora_store import BASE_PLAN, Plan, PlannedAdapter, Trial
from lora_store.trials import TrialVersion
from retriever_svc import Candidate
from tests.deployments.adapter_records import BASE as BASE_NAME
from tests.deployments.adapter_records import adapter
from tests.deployments.asking import post
from tests.deployments.fake_worker import NOTHING_CACHED, FakeWorker
from tests.deployments.shown_plans import CANDIDATES, CODER, EXPLAINED, LORA, PLAN, POET

USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8} | NOTHING_CACHED
IDENTITY = {"created": 1000, "model": "auto"}
HALF = TokenLogprob(b"\xc3", -0.5, ((b"\xc3", -0.5), (b"\xe2", -1.5)), 0)
REST = TokenLogprob(b"\xa9", -0.25, ((b" a", -0.125),), 0)
BASE = Planned(Plan("base", generation=9))


def answer(kind: Literal["chat", "text"] = "chat", **fields: Any) -> Answer:
    plans = fields.pop("plans", [Planned(PLAN, CANDIDATES)])
    return Answer(kind, "auto", plans, request_id="r1", created=1000, **fields)


def choice(finish_reason: str | None, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"index": index, "finish_reason": finish_reason, "logprobs": None, **fields}


@pytest.mark.parametrize("explain", [False, True])
def test_a_whole_answer_has_the_openai_shape(explain: bool) -> None:
    """Candidates and the generation are included on request."""
    shared = IDENTITY | {"usage": USAGE, "lora": EXPLAINED if explain else LORA}
    assert answer(explain=explain).opening()["lora"] == shared["lora"]
    whole = answer(explain=explain).whole([Completion("Hello", 5, 3, "length")])
    choices = [choice("length", message={"role": "assistant", "content": "Hello"})]
    assert whole == shared | {"id": "chatcmpl-r1", "object": "chat.completion", "choices": choices}
    ChatCompletion.model_validate(whole)
    whole = answer("text", explain=explain).whole([Completion("Hello", 5, 3, "stop")])
    assert whole == shared | {"id": "cmpl-r1", "object": "text_completion", "choices": [choice("stop", text="Hello")]}
    TextCompletion.model_validate(whole)


def test_chat_chunks_start_with_role_and_plan_and_end_with_the_reason() -> None:
    one = answer()
    parts = [one.opening(), one.chunk(0, Delta("Hel", 5, 1)), one.chunk(0, Delta("lo", 5, 3, "stop"))]
    identity = IDENTITY | {"id": "chatcmpl-r1", "object": "chat.completion.chunk"}
    assert parts == [
        identity | {"choices": [choice(None, delta={"role": "assistant", "content": ""})], "lora": LORA},
        identity | {"choices": [choice(None, delta={"content": "Hel"})]},
        identity | {"choices": [choice("stop", delta={"content": "lo"})]},
    ]
    usage = one.usage_chunk([Delta("lo", 5, 3, "stop")])
    assert usage == identity | {"choices": [], "usage": USAGE}
    for part in (*parts, usage):
        ChatCompletionChunk.model_validate(part)


def test_text_chunks_have_the_completions_format() -> None:
    one = answer("text")
    identity = IDENTITY | {"id": "cmpl-r1", "object": "text_completion"}
    assert one.opening() == identity | {"choices": [choice(None, text="")], "lora": LORA}
    assert one.chunk(0, Delta("lo", 5, 3, "length")) == identity | {"choices": [choice("length", text="lo")]}


def test_two_answers_differ_in_their_ids() -> None:
    one, other = (Answer("chat", "auto", [Planned(BASE_PLAN)]) for _ in range(2))
    assert one.opening()["id"] != other.opening()["id"]
    assert one.opening()["id"] == one.chunk(0, Delta("", 1, 1))["id"]


def test_cached_tokens_of_a_prompt_are_those_that_all_its_answers_found() -> None:
    """The second answer to each prompt found the blocks that the first one had computed."""
    both = answer("text", plans=[Planned(PLAN, CANDIDATES), BASE], num_choices=2)
    ends = [Completion("", 50, 3, "stop", num_cached_tokens=count) for count in (16, 48, 32, 0)]
    assert both.whole(ends)["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    lasts = [Delta("", 50, 3, "stop", num_cached_tokens=count) for count in (48, 32, 32, 32)]
    assert both.usage_chunk(lasts)["usage"]["prompt_tokens_details"] == {"cached_tokens": 64}


def test_with_several_prompts_choices_have_plans_and_each_prompt_counts_once() -> None:
    both = answer("text", plans=[Planned(PLAN, CANDIDATES), BASE], num_choices=2)
    ends = [Completion(text, 5 if index < 2 else 7, 3, "stop") for index, text in enumerate("abcd")]
    whole = both.whole(ends)
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in whole["choices"]] == list("abcd")
    assert [c["lora"]["strategy"] for c in whole["choices"]] == ["selection", "selection", "base", "base"]
    assert "lora" not in whole
    usage = {"prompt_tokens": 12, "completion_tokens": 12, "total_tokens": 24} | NOTHING_CACHED
    assert whole["usage"] == usage
    assert both.usage_chunk([Delta("", end.num_prompt_tokens, 3, "stop") for end in ends])["usage"] == usage
    opening = both.opening()
    assert [c["lora"]["strategy"] for c in opening["choices"]] == ["selection", "selection", "base", "base"]
    assert "lora" not in opening
    assert both.chunk(3, Delta("x", 7, 1))["choices"] == [choice(None, 3, text="x")]


def test_a_chunk_has_the_logprobs_of_its_own_tokens_and_an_empty_answer_has_none() -> None:
    one = answer(num_logprobs=2)
    reported = one.chunk(0, Delta("é", 5, 2, logprobs=(HALF, REST)))
    assert [entry["logprob"] for entry in reported["choices"][0]["logprobs"]["content"]] == [-0.5, -0.25]
    ChatCompletionChunk.model_validate(reported)
    assert one.chunk(0, Delta("", 5, 3, "stop"))["choices"][0]["logprobs"] is None
    whole = one.whole([Completion("", 5, 1, "stop")])
    assert whole["choices"][0]["logprobs"] == {"content": [], "refusal": None}


def test_headers_contain_a_short_form_of_the_plan() -> None:
    rows = (PlannedAdapter(POET.ref, "w1", 0.5, 0.75), PlannedAdapter(CODER.ref, "w2", 1 / 3))
    short = answer(plans=[Planned(Plan("mixture", rows, 7))]).headers()
    assert short == {
        "x-lora-strategy": "mixture",
        "x-lora-adapters": f"poet@{POET.ref.digest[:12]};weight=0.5, coder@{CODER.ref.digest[:12]};weight=0.333333",
        "x-lora-generation": "7",
    }


def test_headers_of_several_prompts_name_every_adapter_once_and_stay_short() -> None:
    refs = [replace(POET.ref, name=f"a{number}") for number in range(20)]
    plans = [Planned(Plan("selection", (PlannedAdapter(ref, ref.name, 1.0),), 7)) for ref in refs]
    short = answer("text", plans=[*plans[:2], plans[0], BASE]).headers()
    assert short["x-lora-strategy"] == "selection, base"
    assert [part.partition("@")[0] for part in short["x-lora-adapters"].split(", ")] == ["a0", "a1"]
    assert short["x-lora-generation"] == "9"
    assert answer("text", plans=plans).headers()["x-lora-adapters"].endswith(", ...")
    assert "x-lora-reason" not in short  # these plans were named


def test_headers_say_why_the_server_chose() -> None:
    away = Planned(Plan("base"), abstained=True, reason="below_threshold")
    short = answer(plans=[away]).headers()
    assert (short["x-lora-reason"], short["x-lora-why"]) == ("below_threshold", why(away, "local"))
    chosen = Planned(Plan("selection", (PlannedAdapter(POET.ref, "w", 1.0),), 7), reason="fits")
    several = answer("text", plans=[chosen, away, chosen]).headers()
    assert several["x-lora-reason"] == "fits, below_threshold"
    assert "x-lora-why" not in several


def test_headers_are_safe_for_any_name() -> None:
    ref = replace(POET.ref, name="a\r\nset-cookie: x, é")
    plan = Plan("selection", (PlannedAdapter(ref, "w", 1.0),), 7)
    headers = answer(plans=[Planned(plan, (Candidate(ref, 0.5, 0.25),), reason="fits")]).headers()
    assert "," not in headers["x-lora-adapters"]
    assert "set-cookie" in headers["x-lora-why"]
    for value in headers.values():
        assert value.isascii() and value.isprintable()


EMPTY = [Delta("", 5, 1, "stop")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "hint"),
    [
        ("/v1/completions", {"prompt": "Hi"}, "use /v1/chat/completions"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, "with `template` set"),
    ],
)
def test_an_empty_answer_of_adapters_carries_a_warning(path: str, body: Any, hint: str, stream: bool) -> None:
    response = post(path, body | {"model": "poet", "stream": stream}, worker=FakeWorker(EMPTY))
    assert '"warning"' in response.text and hint in response.text
    base = post(path, body | {"model": BASE_NAME, "stream": stream}, worker=FakeWorker(EMPTY))
    assert '"warning"' not in base.text
    full = post(path, body | {"model": "poet", "stream": stream})
    assert '"warning"' not in full.text


SCORED = (
    PromptToken(256, b"<s>", 0),
    PromptToken(79, b"O", 0, -2.0, 3, ((80, b"P", -0.5), (81, b"Q", -1.0))),
    PromptToken(110, b"n", 1, -0.25, 1, ((110, b"n", -0.25), (81, b"Q", -1.0))),
)
LAST = TokenLogprob(b"!", -3.0, ((b"?", -0.5),), 0)


def test_an_echoed_prompt_comes_before_the_answer_with_its_log_probabilities() -> None:
    both = answer("text", plans=[BASE, BASE], num_choices=2, num_logprobs=1, echo=("On", "Other"))
    ends = [Completion("!", 3, 1, "length", (LAST,), SCORED)] * 4
    whole = both.whole(ends)
    assert [choice["text"] for choice in whole["choices"]] == ["On!", "On!", "Other!", "Other!"]
    assert whole["choices"][0]["logprobs"] == {
        "tokens": ["<s>", "O", "n", "!"],
        "token_logprobs": [None, -2.0, -0.25, -3.0],
        "top_logprobs": [None, {"P": -0.5, "O": -2.0}, {"n": -0.25}, {"?": -0.5, "!": -3.0}],
        "text_offset": [0, 0, 1, 2],
    }
    unscored = answer("text", plans=[BASE], echo=("On",)).whole([Completion("!", 3, 1, "length")])
    assert (unscored["choices"][0]["text"], unscored["choices"][0]["logprobs"]) == ("On!", None)


def test_a_stream_echoes_the_prompt_in_the_first_chunk_of_each_choice() -> None:
    one = answer("text", plans=[BASE], num_logprobs=0, echo=("On",))
    first = one.chunk(0, Delta("!", 3, 1, logprobs=(LAST,), prompt=SCORED), is_first=True)["choices"][0]
    assert first["text"] == "On!"
    assert first["logprobs"]["token_logprobs"] == [None, -2.0, -0.25, -3.0]
    later = one.chunk(0, Delta("?", 3, 2, "length", logprobs=(LAST,)))["choices"][0]
    assert (later["text"], later["logprobs"]["tokens"], later["logprobs"]["text_offset"]) == ("?", ["!"], [2])
    only = one.chunk(0, Delta("", 3, 0, "length", prompt=SCORED), is_first=True, is_empty=True)
    assert (only["choices"][0]["text"], len(only["choices"][0]["logprobs"]["tokens"])) == ("On", 3)


def test_log_probabilities_of_the_prompt_are_part_of_chats_and_of_choices() -> None:
    end, expected = Completion("!", 3, 1, "length", (), SCORED), prompt_logprobs(SCORED, 1)
    assert answer(num_prompt_logprobs=1).whole([end])["prompt_logprobs"] == expected
    assert answer("text", num_prompt_logprobs=1).whole([end])["choices"][0]["prompt_logprobs"] == expected
    assert "prompt_logprobs" not in answer().whole([end])


def test_a_request_for_no_new_token_gets_no_warning_of_an_empty_answer() -> None:
    assert "warning" not in answer("text", echo=("On",)).whole([Completion("", 3, 0, "length")])
    assert "warning" not in answer("text").chunk(0, Delta("", 3, 0, "length"), is_empty=True)


CALLS = (
    Delta("", 5, 1, tool_calls=(ToolCallPiece(0, "", "c1", "f"),)),
    Delta("", 5, 2, tool_calls=(ToolCallPiece(0, '{"a": '), ToolCallPiece(0, "1}"))),
    Delta("", 5, 3, "tool_calls", tool_calls=(ToolCallPiece(1, "", "c2", "g"), ToolCallPiece(1, "{}"))),
)
SHOWN = [
    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
    {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
]


@pytest.mark.parametrize("text", ["", "I look."])
def test_a_whole_answer_with_calls_has_the_openai_shape(text: str) -> None:
    whole = answer().whole([Completion.joined([Delta(text, 5, 1), *CALLS])])
    message = {"role": "assistant", "content": text or None, "tool_calls": SHOWN}
    assert whole["choices"] == [choice("tool_calls", message=message)]
    assert "warning" not in whole
    ChatCompletion.model_validate(whole)


def test_streamed_calls_begin_with_id_and_name() -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    response = post("/v1/chat/completions", body, worker=FakeWorker(CALLS))
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [ChatCompletionChunk.model_validate_json(line) for line in lines]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "tool_calls"]
    assert '"warning"' not in response.text
    calls = [json.loads(line)["choices"][0]["delta"] for line in lines[1:]]
    assert calls == [
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 1}'}}]},
        {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
    ]


NEAR = Candidate(POET.ref, 0.4567, threshold=0.5, confidence=0.02)
FAR = Candidate(CODER.ref, 0.47, threshold=0.6, confidence=0.001)
FITS = Candidate(CODER.ref, 0.75, threshold=0.5, confidence=0.625)


def explained(planned: Planned, tenant: str = "local") -> tuple[str | None, str | None]:
    shown = plan_object(planned, tenant, explain=True)
    return shown.get("reason"), shown.get("why")


NONE_FITS = Planned(BASE_PLAN, abstained=True)
LED_BY_CODER = replace(PLAN, adapters=(replace(PLAN.adapters[0], ref=CODER.ref),))
HIGHER = Candidate(CODER.ref, 0.6, threshold=0.1, confidence=0.9)  # further above its threshold than POET_FITS
POET_FITS = Candidate(POET.ref, 0.75, 0.7, 0.5)
BY_POET = "poet fits: it scores 0.750 and needs 0.700, and is right with a probability of about 50%."


@pytest.mark.parametrize(
    ("planned", "says"),
    [
        (
            replace(NONE_FITS, candidates=(FAR, NEAR), reason="below_threshold"),
            "No adapter fits, so the base model answers. poet comes nearest: it scores 0.457 and needs 0.500.",
        ),
        (
            replace(NONE_FITS, candidates=(replace(FAR, score=0.45), NEAR), reason="below_threshold"),
            "No adapter fits, so the base model answers. poet comes nearest: it scores 0.457 and needs 0.500. "
            "lora.min_score 0.456 would choose it.",
        ),
        (
            Planned(LED_BY_CODER, (NEAR, FITS), reason="fits"),
            "coder fits: it scores 0.750 and needs 0.500, and is right with a probability of about 62%.",
        ),
        (Planned(PLAN, (POET_FITS, HIGHER), reason="fits"), BY_POET),
        (
            replace(NONE_FITS, reason="no_candidates", tags=("a",)),
            "The pool has no adapter with samples and the tag 'a' that this request may use, so the base model"
            " answers.",
        ),
        (
            replace(NONE_FITS, reason="no_candidates", tags=("a", "b")),
            "The pool has no adapter with samples and the tags 'a' and 'b' that this request may use, so the base model"
            " answers.",
        ),
    ],
    ids=[
        "what lacks least",
        "what is nearest too",
        "how well the best fits",
        "the one that leads",
        "a tag",
        "two tags",
    ],
)
def test_a_choice_is_explained(planned: Planned, says: str) -> None:
    assert explained(planned) == (planned.reason, says)
    assert NEAR.score >= 0.456, "the score that would choose it"


def test_an_adapter_of_another_tenant_is_explained_with_its_tenant() -> None:
    _, why = explained(Planned(LED_BY_CODER, (FITS,), reason="fits"), tenant="us")
    assert why is not None and why.startswith("local/coder fits: ")


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_a_choice_is_explained_by_the_live_version_of_the_one_that_answers(share: float) -> None:
    new = adapter("poet", version="new")
    trial = TrialVersion(POET.ref, new.ref, new.weights_digest, Trial(new.ref.digest, share))
    routed = Planned(replace(PLAN, trials=(trial,)), (POET_FITS, HIGHER), reason="fits")
    drawn = routed.drawn("request/0")
    assert drawn.plan.adapters[0].ref == (new.ref if share else POET.ref)
    assert explained(drawn) == ("fits", BY_POET)


@pytest.mark.parametrize(("needs", "stays"), [(0.5, True), (0.9, False)])
def test_an_adapter_that_stays_for_the_next_turn_is_explained(needs: float, stays: bool) -> None:
    nearer = Candidate(CODER.ref, 0.8, threshold=needs)  # if it does not fit, there is nothing to explain
    _, why = explained(Planned(PLAN, (nearer, Candidate(POET.ref, 0.75, 0.5, 0.5)), reason="fits"))
    assert why is not None
    said = " It answered the previous turn and stays: coder scores 0.800, which is not clearly better."
    assert why.endswith(said) == stays


def test_an_adapter_that_outcomes_exclude_is_not_said_to_give_way_to_an_earlier_turn() -> None:
    nearer = Candidate(CODER.ref, 0.9, threshold=0.5, outcome=-1.0)
    said = f"{BY_POET} Outcomes of nearly the same prompts speak against coder."
    assert explained(Planned(PLAN, (nearer, POET_FITS), reason="fits")) == ("fits", said)


def test_a_pool_without_candidates_and_a_clients_own_prompt_have_their_reasons() -> None:
    for reason, said in (("no_candidates", "no adapter with samples"), ("housekeeping", "the client's own")):
        found, why = explained(replace(NONE_FITS, reason=reason))
        assert found == reason and why is not None and said in why


def test_named_adapters_need_no_reason_and_explanations_come_on_request_only() -> None:
    assert explained(Planned(PLAN)) == (None, None)
    assert "why" not in plan_object(Planned(PLAN, (FITS,), reason="fits"), "local", explain=False)
