"""What the paper's study measures in process is what the server answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.paper.served import METHODS, Case, Reply, cases_of, evaluated, report, served, starter
from deployments.config import AppConfig


def test_server_and_evaluation_agree_on_plans_and_texts(url: str, config: AppConfig, tmp_path: Path) -> None:
    cases = cases_of(starter()[1], 12)
    assert {case.method for case in cases} == METHODS.keys()
    over_http = asyncio.run(served(url, cases))
    in_process = evaluated(config, cases, tmp_path / "answers.jsonl", Console(quiet=True))
    _, plans, texts = report(cases, over_http, in_process)
    assert (plans, texts) == (1.0, 1.0)
    assert len({reply.text for reply in over_http}) > 6


def test_other_plans_and_texts_are_counted() -> None:
    cases = [Case(question, "mixture") for question in starter()[1][:4]]
    reply = Reply("mixture", (("d", 0.5, 0.7), ("e", 0.5, 0.6)), "yes")
    others = [
        replace(reply, adapters=(("d", 0.5, 0.700001), ("e", 0.5, 0.6))),
        replace(reply, adapters=(("e", 0.5, 0.7), ("d", 0.5, 0.6))),
        replace(reply, adapters=reply.adapters[:1]),
        replace(reply, text="no"),
    ]
    text, plans, texts = report(cases, [reply] * 4, others)
    assert (plans, texts) == (0.5, 0.75)
    assert "| mixture | 4 | 2 | 3 |" in text
