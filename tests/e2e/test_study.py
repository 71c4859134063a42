"""The server gives the same answers as the paper's study measures in process."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console

from benchmarks.paper.stages.served import METHODS, cases_of, evaluated, report, served, starter
from deployments.config.app import AppConfig


def test_server_and_evaluation_agree_on_plans_and_texts(url: str, config: AppConfig, tmp_path: Path) -> None:
    cases = cases_of(starter()[1], 12)
    assert {case.method for case in cases} == METHODS.keys()
    over_http = asyncio.run(served(url, cases))
    in_process = evaluated(config, cases, tmp_path / "answers.jsonl", Console(quiet=True))
    _, plans, texts = report(cases, over_http, in_process)
    assert (plans, texts) == (1.0, 1.0)
    assert len({reply.text for reply in over_http}) > 6
