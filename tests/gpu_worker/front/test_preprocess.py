"""From a job to a row: refusals before a job can reach a step."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from gpu_worker.errors import PromptInvalid, PromptTooLong
from gpu_worker.front.preprocess import RequestPreprocessor, grammar_compiler
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Job, SamplingParams, TokenIds
from gpu_worker.front.request.tools import NO_PARAMETERS, Function, Tools
from gpu_worker.model.base_model import BaseModel
from tests.gpu_worker.engine_driver import BASE_JOB, Alone, MakeEngine, ask, assert_same, greedy
from tests.gpu_worker.front.grammar.small_vocabulary import ids_of
from tests.tiny import VOCABULARY, byte_tokenizer

LAST, BEYOND = "<last>", "<image_soft_token>"  # the last id in the embedding, and the first one outside


@pytest.fixture
def wide_base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    """Return a tiny model whose tokenizer has one more id than the embedding has rows, like published models."""
    tokenizer = byte_tokenizer()
    spare = [f"<spare{i}>" for i in range(VOCABULARY - len(tokenizer) - 1)]
    tokenizer.add_tokens([*spare, LAST, BEYOND], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids([LAST, BEYOND]) == [VOCABULARY - 1, VOCABULARY]
    return replace(tiny_base(), tokenizer=tokenizer)


@pytest.mark.parametrize(
    "prompt", [f"look at {BEYOND}, please", (Message("user", f"look at {BEYOND}"),)], ids=["raw", "messages"]
)
def test_a_token_outside_the_embedding_is_refused_without_affecting_others(
    prompt: str | tuple[Message, ...],
    wide_base: BaseModel,
    make_engine: MakeEngine,
    alone: Alone,
) -> None:
    engine = make_engine({}, base=wide_base)
    base = ask(engine, BASE_JOB)
    engine.step()
    with pytest.raises(PromptInvalid, match=rf"'{BEYOND}' \(id {VOCABULARY}\).*ids 0 to {VOCABULARY - 1}"):
        ask(engine, Job("bad", prompt))
    engine.run_until_idle()
    assert_same(base, alone(BASE_JOB, {}))


def test_the_last_token_of_the_embedding_is_accepted(wide_base: BaseModel, make_engine: MakeEngine) -> None:
    engine = make_engine({}, base=wide_base)
    answer = ask(engine, greedy(f"look at {LAST}"))
    engine.run_until_idle()
    assert answer.row.tokens[answer.row.num_prompt_tokens - 1] == VOCABULARY - 1
    assert len(answer.tokens) == 8


def test_the_servers_sampling_applies_to_what_a_request_leaves_unset_alone(
    tiny_base: Callable[..., BaseModel], make_engine: MakeEngine
) -> None:
    engine = make_engine({}, base=replace(tiny_base(), sampling_defaults={"temperature": 0, "top_k": 5}))
    unset = SamplingParams(max_tokens=4, unset=frozenset({"temperature"}))
    answers = [ask(engine, Job(str(n), "Hi", sampling=params)) for n, params in enumerate((unset, SamplingParams()))]
    assert [(answer.row.sampling.temperature, answer.row.sampling.top_k) for answer in answers] == [(0, 0), (1, 0)]


def test_a_marker_that_is_not_called_special_is_no_text_of_a_grammar(tiny_base: Callable[..., BaseModel]) -> None:
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


@pytest.mark.parametrize("work", ["tokenize", "detokenize"])
def test_other_threads_run_while_a_long_text_is_read(tiny_base: Callable[..., BaseModel], work: str) -> None:
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


def test_a_counted_prompt_has_its_tools_as_a_jobs_prompt_has(
    tiny_base: Callable[..., BaseModel], make_engine: MakeEngine
) -> None:
    base, prompt = tiny_base(), (Message("user", "Hi"),)
    tools = Tools((Function("look", "Look out.", NO_PARAMETERS),))
    prepare = RequestPreprocessor(base, 512)
    counted = [len(prepare.tokenize(prompt, "alpaca", tools=given).ids) for given in (tools, None)]
    assert counted[0] > counted[1]
    with pytest.raises(PromptTooLong, match=f"^{counted[0]} prompt tokens exceed"):  # the context of a tiny model
        ask(make_engine({}, base=base), Job("tools", prompt, template="alpaca", tools=tools))
