"""Find the adapters of conversations: `python -m benchmarks.routing.conversations`.

Compares the rule of `deployments.generation.conversation` with the last user turn alone, on hand-written conversations
about the starter pool's tasks, with the packaged encoder. Nothing is generated. `unseen_prompts.jsonl` has everyday
prompts, and prompts of the pool's tasks and of other tasks. They were written after all rules and thresholds were set.
In the pool of 46 adapters they had a part in choosing the packaged projection; they changed nothing else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from benchmarks.results_file import write_results
from benchmarks.starter_pool import POOL
from deployments.api.completions import ChatCompletionRequest
from deployments.batch.planning import BatchRouting
from deployments.config.app import AppConfig
from deployments.generation.planner import Planner
from deployments.retriever_factory import live_pool, retriever_over
from lora_store import LoraStore
from retriever_svc import Retriever

CASES = {name: Path(__file__).with_name(f"{name}.jsonl") for name in ("conversations", "unseen_prompts")}
BASE = "gemma-3-270m"
_ACTOR = "benchmark"


@dataclass(frozen=True, slots=True)
class Case:
    """One conversation. `expected`: the adapter that should be the best of its plan, None for the base model."""

    kind: str
    expected: str | None
    messages: tuple[dict[str, str], ...]


def read_cases(name: str) -> list[Case]:
    """Return the conversations of a file in `CASES`."""
    rows = [json.loads(line) for line in CASES[name].read_text(encoding="utf-8").splitlines()]
    return [Case(row["kind"], row["expected"], tuple(row["messages"])) for row in rows]


def starter_retriever(folder: Path, adapters: Sequence[Path] | None = None) -> Retriever:
    """Publish these adapters, by default the starter pool, into a new store in `folder`.

    Return a Retriever over it with the server's defaults.
    """
    paths = adapters or [path for path in sorted(POOL.iterdir()) if path.is_dir()]
    config, store = AppConfig(store_uri=str(folder)), LoraStore(str(folder), accepts_base=[BASE])
    staged = [store.stage(path) for path in paths]
    pools = live_pool(config, store.snapshot)
    embeddings = Retriever(pools).embed_groups([item.samples for item in staged])
    store.commit(staged, embeddings, [None] * len(staged), _ACTOR)
    pools.catch_up()
    return retriever_over(pools, config)


async def chosen(planner: Planner, case: Case, *, whole: bool) -> str | None:
    """Return the best adapter of the case's plan, None for the base model. Read the `whole` case or its last turn."""
    messages = case.messages if whole else case.messages[-1:]
    lora = {} if whole else {"query": messages[0]["content"]}
    [question] = ChatCompletionRequest.model_validate({"messages": messages, "lora": lora}).questions()
    [planned] = await planner.plan_all([question], "local")
    return planned.plan.adapters[0].ref.name if planned.plan.adapters else None


async def measure(planner: Planner, cases: Sequence[Case]) -> list[dict[str, str | None]]:
    """Return one row per case: its kind, what was expected, and what each rule chose."""
    return [
        {
            "kind": case.kind,
            "expected": case.expected,
            "conversation": await chosen(planner, case, whole=True),
            "last_turn": await chosen(planner, case, whole=False),
            "text": case.messages[-1]["content"][:60],
        }
        for case in cases
    ]


def table_of(rows: Sequence[dict[str, str | None]]) -> tuple[str, dict[str, float]]:
    """Return the table and the numbers: right choices of each rule by kind and in all."""
    kinds = [*dict.fromkeys(str(row["kind"]) for row in rows), "all"]
    lines, figures = [f"{'kind':26}{'cases':>6}{'last turn':>11}{'conversation':>14}"], {}
    for kind in kinds:
        own = [row for row in rows if kind in (row["kind"], "all")]
        right = {rule: sum(row[rule] == row["expected"] for row in own) for rule in ("last_turn", "conversation")}
        lines.append(f"{kind:26}{len(own):>6}{right['last_turn']:>11}{right['conversation']:>14}")
        figures |= {f"{kind.replace(' ', '_')}_{rule}_right": count / len(own) for rule, count in right.items()}
    return "\n".join(lines), figures


def main() -> None:
    """Measure both rules on both files and write the results."""
    with TemporaryDirectory() as folder:
        planner = Planner(
            AppConfig().served_models, AppConfig().retrieval, BatchRouting(starter_retriever(Path(folder, "store")))
        )
        found = {name: asyncio.run(measure(planner, read_cases(name))) for name in CASES}
    for name, rows in found.items():
        table, figures = table_of(rows)
        print(f"{name}\n{table}")
        write_results(name, figures=figures, table=table, runs=rows)


if __name__ == "__main__":
    typer.run(main)
