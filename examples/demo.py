"""Start the server, send the held-out prompts of the starter pool under every strategy, and print the scores."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from benchmarks.results_file import TreeChanged, write_results
from benchmarks.starter_pool import HELD_OUT, POOL, HeldOutPrompt, read_prompts
from deployments.cli.local_server import Server
from deployments.config.loading import load_config
from lora_store import ROUTED_STRATEGIES

_MAX_TOKENS = 20
_PER_TASK = 12  # as many as there are
STARTER = Path(__file__).with_name("starter.yaml")
COMPOSITIONS: dict[str, dict[str, str]] = {
    "auto": {},  # the server's defaults
    **{name: {"strategy": name} for name in ROUTED_STRATEGIES},
    "uniform": {"strategy": "mixture", "weights": "uniform"},  # the paper's mixture
}
SETTINGS = (*COMPOSITIONS, "own", "base")
_READY_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the server. `lora`: the field of the response that describes the adapters."""

    question: HeldOutPrompt
    text: str
    lora: Mapping[str, Any]
    seconds: float

    @property
    def is_right(self) -> bool:
        return normalised(self.text) == normalised(self.question.output)

    def hit(self, k: int) -> bool:
        """Return whether the task's own adapter is among the k best candidates."""
        return self.question.task in [candidate["name"] for candidate in self.lora["candidates"][:k]]


def normalised(text: str) -> str:
    """Return the first line in lower case without outer blanks, for an exact match."""
    return text.strip().partition("\n")[0].strip().lower()


def settings_of(name: str, question: HeldOutPrompt, base: str) -> dict[str, Any]:
    """Return the request fields for one column of the comparison."""
    if name == "own":
        return {"model": question.task}
    if name == "base":
        return {"model": base}
    return {"model": "auto", "extra_body": {"lora": {"explain": True, **COMPOSITIONS[name]}}}


async def ask_all(client: AsyncOpenAI, name: str, questions: Sequence[HeldOutPrompt], base: str) -> list[Reply]:
    """Send all questions at once with greedy decoding."""

    async def ask(question: HeldOutPrompt) -> Reply:
        started = time.perf_counter()
        answer = await client.chat.completions.create(
            messages=[{"role": "user", "content": question.input}],
            temperature=0,
            max_tokens=_MAX_TOKENS,
            **settings_of(name, question, base),
        )
        seconds = time.perf_counter() - started
        return Reply(question, answer.choices[0].message.content or "", answer.model_extra["lora"], seconds)

    return list(await asyncio.gather(*[ask(question) for question in questions]))


def replies_table(replies: Sequence[Reply]) -> Table:
    table = Table("prompt", "adapters (score × weight)", "answer", "expected", "seconds", title="model: auto")
    for reply in replies:
        adapters = ", ".join(f"{a['name']} ({a['score']:.2f} × {a['weight']:.2f})" for a in reply.lora["adapters"])
        prompt = reply.question.input.replace("\n", " ")[:60]
        mark = "" if reply.is_right else "[red]"
        table.add_row(
            prompt, adapters, f"{mark}{reply.text.strip()[:40]}", reply.question.output, f"{reply.seconds:.1f}"
        )
    return table


def shares_table(by_name: Mapping[str, Sequence[Reply]]) -> Table:
    tasks = sorted({reply.question.task for reply in by_name["auto"]})
    table = Table("task", *by_name, title="share right")
    for task in tasks:
        shares = [share([r.is_right for r in replies if r.question.task == task]) for replies in by_name.values()]
        table.add_row(task, *[f"{value:.2f}" for value in shares])
    table.add_section()
    table.add_row("all", *[f"{share([r.is_right for r in replies]):.3f}" for replies in by_name.values()])
    return table


def share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def figures_of(by_name: Mapping[str, Sequence[Reply]]) -> dict[str, float]:
    hits = {f"hit@{k}": share([reply.hit(k) for reply in by_name["auto"]]) for k in (1, 3)}
    hits["abstained"] = share([reply.lora["abstained"] for reply in by_name["auto"]])
    return hits | {f"{name}_right": share([r.is_right for r in replies]) for name, replies in by_name.items()}


def main(
    per_task: Annotated[int, typer.Option(help="held-out prompts of each task; fewer write no results")] = _PER_TASK,
    config: Annotated[Path, typer.Option(help="YAML file of server settings")] = STARTER,
) -> None:
    """Run the comparison, print it, and write benchmarks/results/demo/results.json."""
    out = Console(width=160)
    questions = read_prompts(HELD_OUT, per_task)
    with tempfile.TemporaryDirectory() as scratch:
        settings = load_config(config, store_uri=f"{scratch}/pool", preload=[POOL])
        with Server(settings, port=0) as server:
            server.prepare(out.print)
            url = server.start()
            ready = server.wait_ready(timeout_s=_READY_TIMEOUT_S)
            out.print(
                f"{ready['num_adapters']} adapters are live; {len(questions)} prompts at once, {len(SETTINGS)} times"
            )
            by_name = asyncio.run(compare(url, questions, settings.served_model.name))
    report(out, by_name)
    if per_task >= _PER_TASK:
        try:
            write(by_name)
        except TreeChanged as exc:
            out.print(f"not kept as results: {exc}", markup=False, highlight=False)


async def compare(url: str, questions: Sequence[HeldOutPrompt], base: str) -> dict[str, list[Reply]]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0) as client:
        return {name: await ask_all(client, name, questions, base) for name in SETTINGS}


def report(out: Console, by_name: Mapping[str, Sequence[Reply]]) -> None:
    figures = figures_of(by_name)
    out.print(replies_table(by_name["auto"]))
    out.print(shares_table(by_name), highlight=False)
    order = ("hit@1", "hit@3", "auto_right", "own_right", "base_right")
    print(" ".join(f"{name}={figures[name]:.3f}" for name in order))


def write(by_name: Mapping[str, Sequence[Reply]]) -> None:
    """Write the results. Raises: TreeChanged."""
    plain = Console(width=160)
    with plain.capture() as captured:
        plain.print(shares_table(by_name))
    runs = [
        {
            "setting": name,
            "task": r.question.task,
            "answer": r.text,
            "expected": r.question.output,
            "adapters": [a["name"] for a in r.lora["adapters"]],
            "seconds": round(r.seconds, 3),
        }
        for name, replies in by_name.items()
        for r in replies
    ]
    figures = {name: round(value, 4) for name, value in figures_of(by_name).items()}
    write_results("demo", figures=figures, table=captured.get(), runs=runs)


if __name__ == "__main__":
    typer.run(main)
