"""Reranking by the log probability of the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.paper.answering.answers import Asker
from benchmarks.paper.answering.likelihood import Candidate, Confidences, candidates_of, most_likely
from benchmarks.paper.answering.methods import Perfect, Routed
from benchmarks.paper.answering.runs import Bench
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Completion, Delta, Job, SamplingParams
from lora_store import AdapterRef, Plan, PlannedAdapter


def candidate(name: str, logprob: float) -> Candidate:
    planned = PlannedAdapter(AdapterRef("local", name, name), name, 1.0)
    return Candidate(Plan("selection", (planned,)), "said", logprob)


def test_every_adapter_of_a_plan_answers_alone_and_only_once(bench: Bench, tmp_path: Path) -> None:
    engine, out = bench.asker.engine, Console(quiet=True)
    scored = Asker(engine, tmp_path / "scored.jsonl", with_logprobs=True)
    questions = bench.study.questions("test", 2)
    plans = Routed("mixture").plans(bench.retriever, questions)
    found = candidates_of(scored, questions, plans, out, "")
    assert [[c.name for c in row] for row in found] == [[a.ref.name for a in plan.adapters] for plan in plans]
    before = engine.counters.num_requests
    again = Asker(engine, tmp_path / "scored.jsonl", with_logprobs=True)
    assert candidates_of(again, questions, plans, out, "") == found
    assert engine.counters.num_requests == before


def test_the_log_probability_is_the_mean_of_the_answers_tokens(bench: Bench, tmp_path: Path) -> None:
    scored = Asker(bench.asker.engine, tmp_path / "scored.jsonl", with_logprobs=True)
    questions = bench.study.questions("test", 1)[:1]
    [plan] = Perfect().plans(bench.retriever, questions)
    [text] = scored.answers([(questions[0], plan)], Console(quiet=True), "")
    deltas: list[Delta] = []
    job = Job(
        "0",
        (Message("user", questions[0].item.input),),
        plan,
        SamplingParams(max_tokens=questions[0].max_tokens, temperature=0, logprobs=1),
    )
    engine = bench.asker.engine
    engine.submit(engine.prepare(job, deltas.append))  # type: ignore[arg-type]
    engine.run_until_idle()
    whole = Completion.joined(deltas)
    values = [entry.logprob for entry in whole.logprobs if not entry.is_end]
    assert text == whole.text and values
    assert scored.logprob(questions[0], plan) == pytest.approx(sum(values) / len(values), abs=1e-4)


def test_the_most_likely_answer_wins_and_the_first_of_equal_ones() -> None:
    assert most_likely([candidate("a", -2.0), candidate("b", -1.0), candidate("c", -1.0)]) == 1


def test_an_adapter_that_is_always_sure_is_judged_by_its_own_level() -> None:
    reference = [[candidate("sure", -0.1 - 0.01 * n), candidate("unsure", -2.0 - 0.1 * n)] for n in range(5)]
    confidences = Confidences.of(reference)
    candidates = [candidate("sure", -0.2), candidate("unsure", -1.5)]
    assert most_likely(candidates) == 0
    assert most_likely(candidates, confidences) == 1
    rare = Confidences.of([*reference, [candidate("rare", -5.0)]])
    assert rare.score(candidate("rare", -5.0)) == pytest.approx((-5.0 - rare.overall[0]) / rare.overall[1])
