"""`all` runs every stage in order and passes options on."""

from __future__ import annotations

import importlib.util

import pytest
from typer.testing import CliRunner

from benchmarks.paper import __main__ as paper
from benchmarks.paper.__main__ import QUICK, QUICK_TASKS, STEPS, Step, cli, run_steps
from benchmarks.paper.common.tasks import read_task_list


def test_every_step_is_a_module() -> None:
    for step in (*STEPS, *QUICK):
        assert importlib.util.find_spec(f"benchmarks.paper.{step.module}"), step.module


def test_a_step_that_fails_ends_the_run() -> None:
    started: list[str] = []

    def start(step: Step) -> None:
        started.append(step.name)
        if step.name == "retrieval":
            raise RuntimeError(step.name)

    with pytest.raises(RuntimeError):
        run_steps(STEPS, start)
    assert started == ["train_pool", "retrieval"]


@pytest.mark.parametrize(
    ("options", "ran"),
    [
        (["--only", "sizes", "--only", "lorahub", "--per-task", "3"], [("lorahub", "3"), ("sizes", "3")]),
        ([], [(step.name, "") for step in STEPS]),
        (["--quick"], [("train_pool", ""), ("main_table", "12")]),
    ],
)
def test_the_options_choose_stages_and_questions(
    options: list[str], ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Step] = []
    monkeypatch.setattr(paper, "start_process", started.append)
    result = CliRunner().invoke(cli, ["all", *options])
    assert result.exit_code == 0, result.output
    assert [(step.name, _option(step, "--per-task")) for step in started] == ran


def _option(step: Step, name: str) -> str:
    return step.arguments[step.arguments.index(name) + 1] if name in step.arguments else ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--per-task", "3"], "only together with --only"),
        (["--only", "sizes", "--only", "retrieval", "--per-task", "8"], "not for retrieval"),
        (["--only", "sizes", "--only", "main-table"], "no such stage: main-table"),
    ],
)
def test_options_that_fit_no_stage_are_refused_before_any_runs(
    options: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Step] = []
    monkeypatch.setattr(paper, "start_process", started.append)
    result = CliRunner().invoke(cli, ["all", *options])
    assert result.exit_code == 2 and words in result.output and not started


def test_the_quick_run_takes_ten_minutes_over_tasks_of_the_list() -> None:
    """Its adapters are trained under the names of the whole study, which then finds them."""
    assert set(QUICK_TASKS) <= read_task_list().by_name.keys()
    assert sum(step.minutes for step in QUICK) <= 10
    assert all(step.arguments.count("--only") == len(QUICK_TASKS) == 8 for step in QUICK)
