"""From a job to a row: refusals before a job can reach a step."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
from tokenizers import processors

from gpu_worker.errors import GrammarInvalid, PromptInvalid, PromptTooLong, SamplingInvalid
from gpu_worker.front.preprocess import RequestPreprocessor, grammar_compiler
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.prompts import ALPACA_STOPS, Message
from gpu_worker.front.request.request import Job, SamplingParams, TokenIds
from gpu_worker.front.request.tools import NO_PARAMETERS, Function, Tools
from gpu_worker.front.row import Row
from gpu_worker.model.base_model import BaseModel
from tests.clocks import Clock
from tests.gpu_worker.engine_driver import MakeEngine, ask
from tests.gpu_worker.front.grammar.small_vocabulary import ids_of
from tests.tiny import VOCABULARY, TinyBase, byte_tokenizer


def ignore(event: object) -> None:
    """Receive the events of a row that never runs."""


LAST, BEYOND = "<last>", "<image_soft_token>"  # the last id in the embedding, and the first one outside


@pytest.fixture
def wide_base(tiny_base: TinyBase) -> BaseModel:
    """Return a tiny model whose tokenizer has one more id than the embedding has rows, like published models."""
    tokenizer = byte_tokenizer()
    spare = [f"<spare{i}>" for i in range(VOCABULARY - len(tokenizer) - 1)]
    tokenizer.add_tokens([*spare, LAST, BEYOND], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids([LAST, BEYOND]) == [VOCABULARY - 1, VOCABULARY]
    return replace(tiny_base(), tokenizer=tokenizer)


@pytest.mark.parametrize("is_raw", [True, False], ids=["raw", "messages"])
def test_only_a_token_outside_the_embedding_is_refused(is_raw: bool, wide_base: BaseModel) -> None:
    prepare = RequestPreprocessor(wide_base, 400)

    def find_row(token: str) -> Row:
        text = f"look at {token}"
        return prepare(Job("1", text if is_raw else (Message("user", text),)), ignore)

    assert VOCABULARY - 1 in find_row(LAST).tokens
    with pytest.raises(PromptInvalid, match=rf"'{BEYOND}' \(id {VOCABULARY}\).*ids 0 to {VOCABULARY - 1}"):
        find_row(BEYOND)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "new_tokens"),
    [(159, None, 1), (159, 1, 1), (160, None, None), (159, 2, None), (5000, None, None), (10, 150, 150)],
)
def test_prompt_and_new_tokens_fit_the_context_or_are_refused(
    num_prompt_tokens: int, max_tokens: int | None, new_tokens: int | None, tiny_base: TinyBase
) -> None:
    prepare = RequestPreprocessor(tiny_base(), 160)
    job = Job("1", "x" * (num_prompt_tokens - 1), sampling=SamplingParams(max_tokens=max_tokens))  # <bos> comes first
    says = {
        160: "the prompt is too long: .* 160 tokens, and the prompt has 160 tokens, which leave no room for an answer;",
        159: "the prompt is too long for max_tokens 2: this model's maximum context length is 160 tokens, .* has 159",
        5000: "the prompt is too long: this model's maximum context length is 160 tokens, and the prompt has 5000",
    }.get(num_prompt_tokens)
    with pytest.raises(PromptTooLong, match=says) if new_tokens is None else nullcontext():
        assert prepare(job, ignore).max_new_tokens == new_tokens


@pytest.mark.parametrize(("num_prompt_tokens", "new_tokens"), [(10, 40), (120, 40), (121, 39), (159, 1), (160, None)])
def test_a_default_of_max_tokens_is_shortened_to_the_room_that_the_prompt_leaves(
    num_prompt_tokens: int, new_tokens: int | None, tiny_base: TinyBase
) -> None:
    sampling = SamplingParams(max_tokens=40, max_tokens_is_default=True)
    job = Job("1", "x" * (num_prompt_tokens - 1), sampling=sampling)
    prepare = RequestPreprocessor(tiny_base(), 160)
    with pytest.raises(PromptTooLong, match="leave no room") if new_tokens is None else nullcontext():
        assert prepare(job, ignore).max_new_tokens == new_tokens
    within_the_servers = RequestPreprocessor(tiny_base(), 160, max_new_tokens=30)
    assert new_tokens is None or within_the_servers(job, ignore).max_new_tokens == min(new_tokens, 30)


def test_a_prompt_of_too_many_characters_is_refused(tiny_base: TinyBase) -> None:
    """It is refused before it is tokenized: 64 characters per token, a template's included."""
    prepare = RequestPreprocessor(tiny_base(), 10)
    for num_chars, what in ((641, "641 characters"), (640, "641 tokens")):
        with pytest.raises(PromptTooLong, match=what):
            prepare(Job("1", "x" * num_chars), ignore)


def test_the_servers_sampling_applies_to_what_a_request_leaves_unset_alone(
    tiny_base: TinyBase, make_engine: MakeEngine
) -> None:
    engine = make_engine({}, base=replace(tiny_base(), sampling_defaults={"temperature": 0, "top_k": 5}))
    unset = SamplingParams(max_tokens=4, unset=frozenset({"temperature"}))
    answers = [ask(engine, Job(str(n), "Hi", sampling=params)) for n, params in enumerate((unset, SamplingParams()))]
    assert [(answer.row.sampling.temperature, answer.row.sampling.top_k) for answer in answers] == [(0, 0), (1, 0)]


def test_a_marker_that_is_not_called_special_is_no_text_of_a_grammar(tiny_base: TinyBase) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[multimodal]", "<table>", "<tool_call>"])
    marker, tag, call = tokenizer.convert_tokens_to_ids(["[multimodal]", "<table>", "<tool_call>"])
    base = replace(tiny_base(), tokenizer=tokenizer)
    compiler = grammar_compiler(base)
    state = compiler.state(Grammar("regex", "(.|\n)*"), "local", [], 0, base.vocab_size)
    state.update()
    compiler.close()
    assert {tag, call} <= set(ids_of(state))
    assert marker not in ids_of(state)


def test_a_model_without_a_token_that_ends_an_answer_follows_no_format(tiny_base: TinyBase) -> None:
    base = replace(tiny_base(), eos_token_ids=frozenset())
    compiler = grammar_compiler(base)
    with pytest.raises(GrammarInvalid, match="no token that ends an answer") as refused:
        compiler.state(Grammar("regex", "ab", "guided_regex"), "local", [], 0, base.vocab_size)
    compiler.close()
    assert refused.value.param == "guided_regex"


@pytest.mark.parametrize("work", ["tokenize", "detokenize"])
def test_other_threads_run_while_a_long_text_is_read(tiny_base: TinyBase, work: str) -> None:
    """A thread that held the interpreter's lock all the time would delay the steps of every answer."""
    prepare, stops, count = RequestPreprocessor(tiny_base(), 65_536), threading.Event(), 0
    ids = TokenIds(prepare.tokenize("a bc " * 13_000, "auto").ids)

    def run() -> None:
        nonlocal count
        while not stops.is_set():
            count += 1
            time.sleep(0)  # gives the lock back

    def others_ran() -> bool:
        before = count
        if work == "tokenize":
            prepare.tokenize("a bc " * 13_000, "auto")
        else:
            prepare.detokenize([ids], skip_special_tokens=True)
        return count > before

    other, interval = threading.Thread(target=run), sys.getswitchinterval()
    sys.setswitchinterval(1000)  # no thread has to give the lock back
    try:
        other.start()
        assert any(others_ran() for _ in range(50))
    finally:
        sys.setswitchinterval(interval)
        stops.set()
        other.join()


def test_a_counted_prompt_has_its_tools_as_a_jobs_prompt_has(tiny_base: TinyBase, make_engine: MakeEngine) -> None:
    base, prompt = tiny_base(), (Message("user", "Hi"),)
    tools = Tools((Function("look", "Look out.", NO_PARAMETERS),))
    prepare = RequestPreprocessor(base, 512)
    counted = [len(prepare.tokenize(prompt, "alpaca", tools=given).ids) for given in (tools, None)]
    assert counted[0] > counted[1]
    with pytest.raises(PromptTooLong, match=f"has {counted[0]} tokens;"):  # the context of a tiny model
        ask(make_engine({}, base=base), Job("tools", prompt, template="alpaca", tools=tools))


def test_without_max_tokens_an_answer_may_fill_the_context_within_the_workers_limit(
    tiny_base: TinyBase, make_engine: MakeEngine
) -> None:
    base = tiny_base()
    for limit, expected in ((8192, 510), (300, 300)):
        row = RequestPreprocessor(base, 512, max_new_tokens=limit)(Job("1", "x"), ignore)  # two tokens
        assert row.max_new_tokens == expected
        assert row.expected_len == 2 + 256, "estimates of load do not count a whole context"
    engine = make_engine({}, max_model_len=512, max_new_tokens=300)
    assert engine.prepare(Job("1", "x"), ignore).max_new_tokens == 300
    with pytest.raises(SamplingInvalid, match="min_tokens must be at most the 510 new tokens"):
        RequestPreprocessor(base, 512)(Job("1", "x", sampling=SamplingParams(min_tokens=511)), ignore)


def test_a_bias_for_an_invalid_id_is_refused(tiny_base: TinyBase) -> None:
    job = Job("1", "x", sampling=SamplingParams(logit_bias=((300, 1.0),)))
    with pytest.raises(SamplingInvalid, match=r"logit_bias must have ids from 0 to .*, got 300"):
        RequestPreprocessor(tiny_base(), 160)(job, ignore)


def test_an_empty_prompt_is_invalid(tiny_base: TinyBase) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")  # no <bos>
    with pytest.raises(PromptInvalid, match="no tokens"):
        RequestPreprocessor(replace(tiny_base(), tokenizer=tokenizer), 160)(Job("1", ""), ignore)


def test_messages_are_rendered_and_the_answer_ends_with_the_template(tiny_base: TinyBase) -> None:
    prepare = RequestPreprocessor(base := tiny_base(), 400)
    for stop_string in ALPACA_STOPS:
        row = prepare(Job("1", (Message("user", "Hi"),), sampling=SamplingParams(max_tokens=8, stop=("mine",))), ignore)
        text = base.tokenizer.decode(row.tokens, skip_special_tokens=True)
        assert text.endswith("### Instruction:\nHi\n\n### Response:\n")
        for token in base.tokenizer(f"yes{stop_string}", add_special_tokens=False).input_ids:
            row.detokenizer.push(token)
        assert row.detokenizer.stopped


@pytest.mark.parametrize("template", ["chat", "auto"])
def test_a_chat_prompt_begins_with_one_bos(template: str, tiny_base: TinyBase) -> None:
    base = tiny_base()
    base.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    row = RequestPreprocessor(base, 160)(Job("1", (Message("user", "Hi"),), template=template), ignore)
    assert row.tokens.count(256) == 1


def test_the_time_left_counts_from_the_arrival_of_the_job(tiny_base: TinyBase) -> None:
    prepare, job = RequestPreprocessor(tiny_base(), 160, Clock(1000.0)), Job("1", "x", time_left_s=10.0)
    assert [prepare(job, ignore).deadline, prepare(job, ignore, arrived=995.0).deadline] == [1010.0, 1005.0]


def test_the_models_ends_and_the_clients_end_an_answer_unless_it_ignores_the_models(tiny_base: TinyBase) -> None:
    prepare, own = RequestPreprocessor(base := tiny_base(), 160), SamplingParams(stop_token_ids=(5,))
    assert prepare(Job("1", "x", sampling=own), ignore).end_ids == {5} | base.eos_token_ids
    assert prepare(Job("1", "x", sampling=replace(own, ignore_eos=True)), ignore).end_ids == {5}
