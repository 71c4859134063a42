"""`all` runs every stage in order, continues after a failure, and swaps adapters that are not kept."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.paper import __main__ as paper_main
from benchmarks.paper.__main__ import QUICK, QUICK_TASKS, STAGES, Stage, cli, run_stage, run_stages
from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.common.workspace import PAPER_RESULTS
from benchmarks.paper.pool.choose import Verdict, choose_pool, read_pool, read_rounds, write_pool
from benchmarks.paper.stages.claim_list import PAPERS
from benchmarks.paper.stages.claims import Results, judged_claims
from benchmarks.paper.stages.claims_beyond import BEYOND
from benchmarks.paper.stages.report import SECTIONS


class Modules:
    """Records the modules that run. Trained adapters are kept except those in `failing`, which do not beat guessing."""

    def __init__(self, pool_file: Path, failing: set[str]) -> None:
        self.ran: list[str] = []
        self._pool_file, self._failing, self.broken, self.num_left = pool_file, failing, "", 1000
        self.trained = [spec.name for spec in read_task_list().tasks]

    def __call__(self, name: str, arguments: Sequence[str]) -> None:
        if name == self.broken:
            raise RuntimeError(name)
        if self.num_left == 0:
            raise KeyboardInterrupt
        self.num_left -= 1
        self.ran.append(name)
        if name == "train_pool":
            self.trained += [word for word in arguments if word != "--only" and word not in self.trained]
        if name == "choose":
            listed = read_task_list()
            cluster = {task: spec.cluster for task, spec in listed.by_name.items()}
            verdicts = {
                task: Verdict(task, cluster[task], 0.9, 0.1, -0.1 if task in self._failing else 0.5)
                for task in self.trained
            }
            pool = choose_pool(listed, verdicts)
            write_pool(self._pool_file, pool, verdicts.values(), read_rounds(self._pool_file))


@pytest.fixture
def pool_file(tmp_path: Path) -> Path:
    return tmp_path / "pool.json"


def test_every_stage_runs_once_in_order_and_a_fixed_pool_is_kept(pool_file: Path) -> None:
    modules = Modules(pool_file, failing=set())
    run_stages(STAGES, modules, Console(quiet=True), pool_file)
    assert modules.ran == [stage.name for stage in STAGES]
    run_stages(STAGES, modules, Console(quiet=True), pool_file)
    assert modules.ran.count("choose") == 1 and modules.ran.count("report") == 2


def test_a_task_that_fails_is_swapped_for_a_trained_spare_of_its_cluster(pool_file: Path) -> None:
    modules = Modules(pool_file, failing={"senti_hotels"})
    run_stages(STAGES[:2], modules, Console(quiet=True), pool_file)
    assert modules.ran == ["train_pool", "choose", "train_pool", "choose"]
    pool, listed = read_pool(pool_file), read_task_list()
    [spare] = set(pool) - {spec.name for spec in listed.tasks}
    assert "senti_hotels" not in pool and listed.by_name[spare].cluster == "sentiment" and len(pool) == 48


@pytest.mark.parametrize("num_done", range(1, 8))
def test_an_interrupted_choice_continues_to_the_same_pool(pool_file: Path, tmp_path: Path, num_done: int) -> None:
    failing = {spec.name for spec in read_task_list().by_name.values() if spec.cluster in ("sentiment", "logic")}
    whole = Modules(pool_file, failing)
    run_stages(STAGES[:2], whole, Console(quiet=True), pool_file)
    cut = tmp_path / "cut.json"
    modules = Modules(cut, failing)
    modules.num_left = num_done
    with pytest.raises(KeyboardInterrupt):
        run_stages(STAGES[:2], modules, Console(quiet=True), cut)
    modules.num_left = len(whole.ran)
    run_stages(STAGES[:2], modules, Console(quiet=True), cut)
    assert cut.read_text() == pool_file.read_text()
    assert len(set(modules.trained)) == len(set(whole.trained)) > len(read_task_list().tasks)


def test_the_next_run_tries_failed_stages_again(pool_file: Path) -> None:
    modules = Modules(pool_file, failing=set())
    modules.broken = "retrieval"
    with pytest.raises(RuntimeError):
        run_stages(STAGES, modules, Console(quiet=True), pool_file)
    assert modules.ran == ["train_pool", "choose"]
    modules.broken = ""
    run_stages(STAGES, modules, Console(quiet=True), pool_file)
    assert modules.ran[2:] == [stage.name for stage in STAGES if stage.name != "choose"]


def test_two_stages_run_at_a_time_and_a_stage_alone_waits_for_those_before_it(pool_file: Path) -> None:
    stages = [Stage("first", 1), Stage("second", 1), Stage("sum", 1, alone=True), Stage("last", 1)]
    together, ended = threading.Barrier(2, timeout=20), list[str]()

    def run(name: str, arguments: Sequence[str]) -> None:
        if name in ("first", "second"):
            together.wait()
        else:
            assert set(ended) >= {"first", "second"}
        ended.append(name)

    run_stages(stages, run, Console(quiet=True), pool_file, jobs=2)
    assert ended[2:] == ["sum", "last"]


def test_after_a_failure_running_stages_end_and_no_other_starts(pool_file: Path) -> None:
    stages = [Stage("long", 1), Stage("broken", 1), Stage("waiting", 1), Stage("report", 0, alone=True)]
    failed, ended = threading.Event(), list[str]()

    def run(name: str, arguments: Sequence[str]) -> None:
        if name == "broken":
            failed.set()
            raise RuntimeError(name)
        assert failed.wait(20)
        ended.append(name)

    with pytest.raises(RuntimeError, match="broken"):
        run_stages(stages, run, Console(quiet=True), pool_file, jobs=2)
    assert ended == ["long"]


def test_the_stages_that_run_together_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(paper_main, "usable_cpus", lambda: 4)
    threads = list[str]()
    monkeypatch.setattr(subprocess, "run", lambda *_, check, env: threads.append(env["OMP_NUM_THREADS"]))
    run_stage("ablations", (), jobs=2)
    run_stage("report", (), jobs=2)
    assert threads == ["2", "4"]


def test_the_report_names_commands_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each claim's last column, as an option of `all`, reaches its stage with the number of questions."""
    ran = list[tuple[str, ...]]()
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(tuple(command[2:])))
    claims = judged_claims((*PAPERS, *BEYOND), Results(PAPER_RESULTS))
    commands = {str(claim["stage"]) for claim in claims}
    assert "retrieval" in commands and any(command.startswith("companions --per-task ") for command in commands)
    for command in commands:
        result = CliRunner().invoke(cli, ["all", "--only", *command.split()])
        assert result.exit_code == 0, result.output
        stage, *asked = command.split()
        module, *arguments = ran[-1]
        assert module.rpartition(".")[2] in (stage, "paper") and arguments[len(arguments) - len(asked) :] == asked
        if asked:
            assert "per_task" in inspect.signature(importlib.import_module(module).main).parameters, command


def test_the_number_of_questions_needs_a_stage() -> None:
    result = CliRunner().invoke(cli, ["all", "--per-task", "3"])
    assert result.exit_code == 2 and "only together with --only" in result.output


def test_a_stage_without_questions_is_refused_before_any_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[str]()
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command))
    result = CliRunner().invoke(cli, ["all", "--only", "companions", "--only", "report", "--per-task", "8"])
    assert result.exit_code == 2 and "not for report" in result.output and not ran


def test_an_unknown_stage_is_refused_by_name() -> None:
    result = CliRunner().invoke(cli, ["all", "--only", "report", "--only", "main-table"])
    assert result.exit_code == 2 and "no such stage: main-table" in result.output


def test_the_estimated_time_is_printed_first(pool_file: Path) -> None:
    out = Console(record=True, width=1000)
    run_stages(STAGES, Modules(pool_file, failing=set()), out, pool_file)
    assert f"about {sum(stage.minutes for stage in STAGES)} minutes" in out.export_text().splitlines()[0]


def test_the_quick_run_takes_ten_minutes_over_tasks_of_the_list() -> None:
    """Its adapters are trained under the names of the whole study, which then finds them."""
    assert set(QUICK_TASKS) <= read_task_list().by_name.keys()
    assert sum(stage.minutes for stage in QUICK) <= 10
    assert {stage.name for stage in QUICK} <= {stage.name for stage in STAGES}
    assert all(stage.arguments.count("--only") == len(QUICK_TASKS) == 8 for stage in QUICK)


@pytest.mark.parametrize("stage", [*STAGES, *QUICK], ids=lambda stage: stage.name)
def test_a_stage_takes_the_arguments_it_is_given(stage: Stage) -> None:
    module = importlib.import_module(stage.module)
    if hasattr(module, "main"):
        app = typer.Typer()
        app.command()(module.main)
        options = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
        assert {word for word in stage.arguments if word.startswith("--")} <= options
        assert not any(p.default is inspect.Parameter.empty for p in inspect.signature(module.main).parameters.values())
    else:
        importlib.import_module(f"{stage.module}.__main__")


def test_every_section_of_the_report_is_written_by_a_module() -> None:
    folder = Path(inspect.getfile(run_stages)).parent
    sources = [path.read_text() for path in folder.rglob("*.py") if path.name != "report.py"]
    for name in SECTIONS:
        of_a_pool = f'"{name.rpartition("_")[0]}_{{pool}}.md"'
        of_a_stage = f'NAME = "{name.removesuffix(".md")}"\n'
        written = (f'"{name}"', of_a_pool, of_a_stage)
        assert any(words in source for source in sources for words in written), name
