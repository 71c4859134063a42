from __future__ import annotations

from collections import Counter
from pathlib import Path

import httpx
import pytest

from benchmarks.paper.retrieval.projected import FRESH, read_everyday, read_fresh
from benchmarks.routing.conversations import read_cases
from benchmarks.routing.over_http import Answered, Chat, ask, ask_all, chats, figures_of, shares, table_of
from benchmarks.starter_pool import POOL
from retriever_svc.ordinary_prompts import ordinary_prompts
from tests.deployments.scripted import Script, scripted

PAST = Chat("own", ({"role": "user", "content": "Today I jump. Yesterday I"},), frozenset(["past_tense"]))
JOKE = Chat("everyday", ({"role": "user", "content": "Tell me a joke."},), frozenset())


def answer(*adapters: tuple[str, float]) -> tuple[int, dict[str, object]]:
    return 200, {"lora": {"adapters": [{"name": name, "weight": weight} for name, weight in adapters]}}


def names_in_header(script: Script, adapters: str) -> None:
    script.headers = {"x-lora-adapters": adapters, "x-lora-why": "it fits"}


def test_all_kinds_are_asked_and_your_own_prompts_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a", "adapter": ["x", "y"]}\n{"prompt": "b", "adapter": null}\n')
    every = list(chats([file]))
    counts = Counter(chat.kind for chat in every)
    assert counts == {
        "own, held out": 144,
        "own, written later": 40,
        "everyday, written later": 80,
        "other tasks": 40,
        "everyday": 131,
        "everyday, fresh": 60,
        "mine.jsonl, own": 1,
        "mine.jsonl, others": 1,
    }
    tasks = {path.name for path in POOL.iterdir() if path.is_dir()}
    assert set().union(*(chat.expected for chat in every)) == tasks | {"x", "y"}
    assert {bool(chat.expected) for chat in every if chat.kind.startswith("own")} == {True}
    assert {bool(chat.expected) for chat in every if chat.kind.startswith(("everyday", "other"))} == {False}


def test_fresh_prompts_are_in_no_other_set() -> None:
    fresh = read_fresh()
    assert len(set(fresh)) == len(fresh) == 60, FRESH
    known = {case.messages[-1]["content"] for name in ("conversations", "unseen_prompts") for case in read_cases(name)}
    known |= {*ordinary_prompts(), *read_everyday()}
    known |= set(Path("tests/retriever_svc/foreign_prompts.txt").read_text(encoding="utf-8").splitlines())
    assert len(known) > 800
    assert not known & set(fresh)


def test_the_adapter_of_the_largest_weight_is_the_best_and_none_is_the_base_model() -> None:
    with scripted(answer(("negation", 0.25), ("past_tense", 0.75))) as server:
        names_in_header(server, "negation@0011;weight=0.25, past_tense@2233;weight=0.75")
        [found] = ask_all(server.url, [PAST])
    assert (found.best, found.is_right, found.why) == ("past_tense", True, "it fits")
    sent = {"model": "auto", "max_tokens": 1, "temperature": 0, "messages": list(PAST.messages)}
    assert (server.asked, server.sent) == ([("POST", "/v1/chat/completions")], [sent])
    with scripted(answer()) as server:
        names_in_header(server, "")
        found, own = ask_all(server.url, [JOKE, PAST])
    assert (found.best, found.is_right, own.is_right) == (None, True, False)


@pytest.mark.parametrize(
    ("status", "header", "said"), [(503, "past_tense@00;weight=1", "503 for"), (200, "other@00;weight=1", "header")]
)
def test_a_refusal_and_a_header_that_disagrees_with_the_body_end_the_run(status: int, header: str, said: str) -> None:
    with scripted((status, answer(("past_tense", 1.0))[1])) as server, httpx.Client(base_url=server.url) as client:
        names_in_header(server, header)
        with pytest.raises(RuntimeError, match=said):
            ask(client, PAST)


def test_shares_are_by_kind_and_an_own_prompt_without_an_adapter_is_not_right() -> None:
    answered = [
        Answered(PAST, "past_tense", ""),
        Answered(PAST, "negation", ""),
        Answered(PAST, None, ""),
        Answered(PAST, "past_tense", ""),
        Answered(JOKE, None, ""),
        Answered(JOKE, "past_tense", ""),
    ]
    own, everyday = shares(answered)
    assert own == {"kind": "own", "prompts": 4, "to_adapters": 0.75, "right": 0.5, "right_of_kept": 2 / 3}
    assert everyday == {"kind": "everyday", "prompts": 2, "to_adapters": 0.5, "right": 0.5, "right_of_kept": None}
    assert figures_of([own, everyday]) == {"http_own_right": 0.5, "http_everyday_right": 0.5}
    assert table_of([own, everyday]).row_count == 2
