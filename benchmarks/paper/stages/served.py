"""Compare the server over HTTP with the study's evaluation: plans must be equal, in float32 also greedy texts.

`python -m benchmarks.paper.stages.served` asks questions of the study's pool; `--starter`: of the starter pool.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from openai import AsyncOpenAI
from rich.console import Console

from benchmarks.paper.answering.answers import Asker, Question, loading
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.stores import fetch_from, open_store
from benchmarks.paper.answering.study import load_study, worker_config
from benchmarks.paper.common.markdown import table
from benchmarks.paper.common.options import Root
from benchmarks.paper.common.tasks import NUM_TEST, read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.retrieval.experiments import BEST
from benchmarks.results_file import write_part
from benchmarks.starter_pool import HELD_OUT, POOL, read_prompts
from benchmarks.training.bigbench_tasks import Item
from deployments.cli.local_server import Server
from deployments.config.app import AppConfig, RetrievalSettings, WorkerSettings
from deployments.retriever_factory import live_pool, retriever_over
from gpu_worker.bank.load_threads import load_executor
from gpu_worker.native.loop import Engine
from lora_store import Plan
from retriever_svc.encoder_files import ENGLISH_MODEL

MAX_TOKENS = 20
_PER_STARTER_TASK = 12
METHODS = {"mixture": Routed("mixture"), "selection": Routed("selection"), "fusion": Routed("fusion")}
_TIMEOUT_S = 600.0
_TOLERANCE = 1e-5  # tolerance of weights and scores, which are float32 sums in another order


@dataclass(frozen=True, slots=True)
class Case:
    """A question and its method."""

    question: Question
    method: str


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. `adapters`: digest, weight and score of each, best first."""

    strategy: str
    adapters: tuple[tuple[str, float, float], ...]
    text: str

    def has_plan_of(self, other: Reply) -> bool:
        if (self.strategy, len(self.adapters)) != (other.strategy, len(other.adapters)):
            return False
        pairs = zip(self.adapters, other.adapters, strict=True)
        return all(a[0] == b[0] and _near(a[1], b[1]) and _near(a[2], b[2]) for a, b in pairs)


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE


def cases_of(questions: Sequence[Question], count: int) -> list[Case]:
    """Draw `count` of all pairs of a question and a method, by a fixed seed."""
    pairs = [Case(question, method) for question in questions for method in METHODS]
    return random.Random(0).sample(pairs, min(count, len(pairs)))


async def served(url: str, cases: Sequence[Case]) -> list[Reply]:
    """Return the server's answers to all cases at once, with `model: auto`."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=_TIMEOUT_S, max_retries=0) as client:

        async def ask(case: Case) -> Reply:
            method = METHODS[case.method]
            lora = {"strategy": method.strategy, "k": method.top_k, "weights": method.weighting, "min_score": -1.0}
            answer = await client.chat.completions.create(
                model="auto",
                messages=[{"role": "user", "content": case.question.item.input}],
                temperature=0,
                max_tokens=case.question.max_tokens,
                extra_body={"lora": lora},
            )
            said = (answer.model_extra or {})["lora"]
            adapters = tuple((row["digest"], row["weight"], row["score"]) for row in said["adapters"])
            return Reply(said["strategy"], adapters, answer.choices[0].message.content or "")

        return list(await asyncio.gather(*[ask(case) for case in cases]))


def evaluated(config: AppConfig, cases: Sequence[Case], kept: Path, out: Console) -> list[Reply]:
    """Return the study's answers over the same store, by a Retriever and an Engine in this process."""
    store = open_store(config.store_uri)
    retriever = retriever_over(live_pool(config, store.snapshot), config)
    plans = [METHODS[case.method].plans(retriever, [case.question])[0] for case in cases]
    worker = config.worker_config()
    executor = load_executor(worker.load_threads)
    engine = Engine(worker, loading(lambda digest: fetch_from(store, digest), executor), executor=executor)
    asked = [(case.question, plan) for case, plan in zip(cases, plans, strict=True)]
    texts = Asker(engine, kept).answers(asked, out, "evaluation")
    return [_reply(plan, text) for plan, text in zip(plans, texts, strict=True)]


def _reply(plan: Plan, text: str) -> Reply:
    return Reply(plan.strategy, tuple((a.ref.digest, a.weight, a.score or 0.0) for a in plan.adapters), text)


def report(cases: Sequence[Case], over_http: Sequence[Reply], in_process: Sequence[Reply]) -> tuple[str, float, float]:
    """Return a table by method, and the shares of equal plans and of equal texts."""
    pairs = list(zip(cases, over_http, in_process, strict=True))
    rows = []
    for method in METHODS:
        own = [(a.has_plan_of(b), a.text == b.text) for case, a, b in pairs if case.method == method]
        rows.append([method, str(len(own)), str(sum(plan for plan, _ in own)), str(sum(text for _, text in own))])
    same = [(a.has_plan_of(b), a.text == b.text) for _, a, b in pairs]
    plans, texts = (sum(pair[number] for pair in same) / len(same) for number in (0, 1))
    return table(["method", "questions", "same plan", "same text"], rows), plans, texts


def section_of(pool: str, encoder: str, shares: str) -> str:
    """Return the report's section."""
    said = f"`model: auto` over HTTP, all questions at once, and in process: float32, {encoder}."
    return f"## The server and the evaluation, {pool} pool\n\n{said}\n\n{shares}"


def starter() -> tuple[list[Path], list[Question]]:
    """Return the folders and the held-out prompts of the starter pool."""
    rows = read_prompts(HELD_OUT, _PER_STARTER_TASK)
    return [POOL], [_question(row.task, n, row.input) for n, row in enumerate(rows)]


def _question(task: str, number: int, text: str) -> Question:
    return Question(task, "test", number, Item(text, ("",)), MAX_TOKENS)


def of_the_study(workspace: Workspace) -> tuple[list[Path], list[Question]]:
    """Return the fixed pool's folders and test questions."""
    names, listed = read_pool(), read_task_list().by_name
    study = load_study([listed[name] for name in names], workspace, worker_config(len(names)))
    return [workspace.adapters / name for name in names], study.questions("test", NUM_TEST)


def main(
    starter_pool: Annotated[
        bool, typer.Option("--starter", help="use the starter pool instead of the study's")
    ] = False,
    count: Annotated[int, typer.Option(help="questions asked")] = 200,
    encoder: Annotated[str, typer.Option(help="default: the study's trained encoder if there is one")] = "",
    root: Root = DEFAULT_ROOT,
) -> None:
    """Ask both, report differences and save the shares. Fail if anything differs."""
    out, workspace = Console(width=120), Workspace(root)
    folders, questions = starter() if starter_pool else of_the_study(workspace)
    best = workspace.encoders / BEST
    chosen = encoder or (str(best) if best.is_dir() else ENGLISH_MODEL)
    cases = cases_of(questions, count)
    with tempfile.TemporaryDirectory() as scratch:
        config = AppConfig(
            store_uri=f"{scratch}/pool",
            preload=tuple(folders),
            retrieval=RetrievalSettings(encoder=chosen, encoder_dtype="float32"),  # rows that no batch changes
            worker=WorkerSettings(dtype="float32", max_wait_s=_TIMEOUT_S),  # all requests are sent at once
        )
        with Server(config, port=0) as server:
            server.prepare(out.print)
            url = server.start()
            server.wait_ready(timeout_s=_TIMEOUT_S)
            over_http = asyncio.run(served(url, cases))
        in_process = evaluated(config, cases, Path(scratch) / "answers.jsonl", out)
    text, plans, texts = report(cases, over_http, in_process)
    out.print(text, markup=False)
    pool = "starter" if starter_pool else "study"
    (PAPER_RESULTS / f"served_{pool}.md").write_text(section_of(pool, Path(chosen).name, text), encoding="utf-8")
    figures = {f"served_same_plan_{pool}": plans, f"served_same_text_{pool}": texts}
    write_part("paper", f"served, {pool} pool", figures=figures, table=text, runs=[])
    if (plans, texts) != (1.0, 1.0):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
