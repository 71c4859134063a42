from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.paper.retrieval.projected import EVERYDAY
from benchmarks.routing.conversations import read_cases, starter_retriever, table_of
from benchmarks.starter_pool import HELD_OUT, POOL
from retriever_svc import Route, RouteRequest
from retriever_svc.ordinary_prompts import ordinary_prompts

ODD = (
    *("", "   ", "\n\n\n", "\x00", "\x01\x1b[31m\x07", "\u200b\u200b", "\ud800", "\u202eabc", "...", '"', "🙂" * 50),
    *("x" * 100_000, "a " * 20_000, '{"a": [1, 2]}', "https://example.org/a?b=c", "1234567890"),
    *(
        "Was ist die Hauptstadt von Frankreich?",
        "法国的首都是哪里？",
        "ما هي عاصمة فرنسا؟",
        "რა არის საფრანგეთის დედაქალაქი?",
    ),
)


@pytest.mark.parametrize(("name", "count"), [("conversations", 35), ("unseen_prompts", 160)])
def test_every_case_ends_with_a_user_turn_and_expects_a_task_of_the_pool_or_the_base(name: str, count: int) -> None:
    cases = read_cases(name)
    tasks = {path.name for path in POOL.iterdir() if path.is_dir()}
    assert len(cases) == count
    assert all(case.messages[-1]["role"] == "user" for case in cases)
    assert {case.expected for case in cases} - {None} <= tasks
    assert all(case.expected is None for case in cases if case.kind in {"everyday", "housekeeping"})


def test_unseen_prompts_are_neither_samples_nor_held_out_prompts_nor_ordinary_ones() -> None:
    files = [*POOL.glob("*/lora_samples.jsonl"), *HELD_OUT.glob("*.jsonl"), EVERYDAY]
    known = {json.loads(line)["input"] for file in files for line in file.read_text(encoding="utf-8").splitlines()}
    known |= set(ordinary_prompts())
    assert len(known) > 900
    assert not known & {case.messages[-1]["content"] for case in read_cases("unseen_prompts")}


def test_the_pool_is_searched_with_the_projection_and_the_thresholds_of_the_server(tmp_path: Path) -> None:
    retriever = starter_retriever(tmp_path, [POOL / "past_tense"])
    [own, everyday] = retriever.route([RouteRequest("Today I jump. Yesterday I"), RouteRequest("Tell me a joke.")])
    assert isinstance(own, Route)
    assert isinstance(everyday, Route)
    assert (own.candidates[0].ref.name, own.abstained, everyday.abstained) == ("past_tense", False, True)
    answers = retriever.route([RouteRequest(text) for text in ODD])
    assert [
        text for text, route in zip(ODD, answers, strict=True) if not isinstance(route, Route) or not route.abstained
    ] == []
    record = retriever.resolve("local", "past_tense")
    assert record.encoder is not None
    assert "+" in record.encoder  # a projection


def test_the_table_counts_right_choices_by_kind_and_in_all() -> None:
    rows: list[dict[str, str | None]] = [
        {"kind": "short", "expected": "a", "conversation": "a", "last_turn": "b"},
        {"kind": "short", "expected": None, "conversation": "a", "last_turn": None},
        {"kind": "system", "expected": "a", "conversation": "a", "last_turn": None},
    ]
    table, figures = table_of(rows)
    assert figures["short_conversation_right"] == figures["short_last_turn_right"] == 0.5
    assert (figures["all_conversation_right"], figures["all_last_turn_right"]) == (2 / 3, 1 / 3)
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["short", "2", "1", "1"],
        ["system", "1", "0", "1"],
        ["all", "3", "1", "2"],
    ]
