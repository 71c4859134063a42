"""Compare retrieval with and without the paper's instruction: `python -m benchmarks.routing.instruction`.

On the `choice` part of the paper's study, with and without a projection fitted to the pool. No test question is read,
and nothing is generated. About three minutes on an idle machine. Downloads BIG-bench (358 MB) once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, Workspace
from benchmarks.paper.retrieval.loading import load_experiments
from benchmarks.paper.retrieval.projected import Others, others_of
from benchmarks.paper.retrieval.ranking import retriever_of
from benchmarks.paper.retrieval.study import Task
from benchmarks.results_file import write_results
from deployments.cli.routing import auroc
from retriever_svc import Encoder, Retriever, Route, RouteRequest, fit_whitening
from retriever_svc.encoder import INSTRUCTION
from retriever_svc.encoder_files import ENGLISH_MODEL

PER_TASK = 25  # choice questions
EVERY_FOREIGN = 5  # of the foreign prompts, one in five
_BATCH = 512
_MANY_TEXTS = 8192  # so that each text is encoded once
out = Console(width=120)


def encoders(
    samples: Mapping[str, Sequence[str]], load: Callable[[str], Encoder]
) -> Iterator[tuple[str, str, Encoder]]:
    """Yield (instruction, projection, encoder). Both projections are fitted in the same way, without an earlier one.

    `load`: returns the encoder with an instruction.
    """
    for name, instruction in (("paper", INSTRUCTION), ("none", "")):
        encoder = load(instruction)
        groups = [encoder.encode_plain(own, [""] * len(own)) for own in samples.values()]
        yield name, "none", encoder
        yield name, "refit", encoder.projected(fit_whitening(encoder.identity, groups, list(samples.values())))


def rows_of(
    tasks: Sequence[Task], others: Others, loaded: Iterable[tuple[str, str, Encoder]]
) -> list[dict[str, object]]:
    """Return a row for each encoder: top-1, the share kept at the default point, and how others are distinguished."""
    samples = {task.name: task.samples for task in tasks}
    own = [(text, task.name) for task in tasks for text in task.choice[:PER_TASK]]
    groups = {"foreign": others.foreign["choice"][::EVERY_FOREIGN], "everyday": others.everyday}
    rows: list[dict[str, object]] = []
    for instruction, projection, encoder in loaded:
        retriever = retriever_of(samples, encoder)
        found = _routed(retriever, [text for text, _ in own])
        first = [route.candidates[0].ref.name for route in found]
        row: dict[str, object] = {"instruction": instruction, "projection": projection, "questions": len(own)}
        row["top1"] = float(np.mean([name == right for name, (_, right) in zip(first, own, strict=True)]))
        row["kept"] = float(np.mean([not route.abstained for route in found]))
        for kind, texts in groups.items():
            away = _routed(retriever, texts)
            row[f"{kind}_to_base"] = float(np.mean([route.abstained for route in away]))
            row[f"{kind}_auroc"] = auroc(_confidences(found), _confidences(away))
        rows.append(row)
    return rows


def _routed(retriever: Retriever, texts: Sequence[str]) -> list[Route]:
    batches = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    answers = [answer for batch in batches for answer in retriever.route([RouteRequest(text) for text in batch])]
    return [answer for answer in answers if isinstance(answer, Route)]


def _confidences(routes: Sequence[Route]) -> list[float]:
    return [max(candidate.confidence for candidate in route.candidates) for route in routes]


def main(root: Path = DEFAULT_ROOT) -> None:
    """Measure, print the table and write results/routing_instruction."""
    study = load_experiments(Workspace(root)).study
    samples = {task.name: task.samples for task in study.tasks}
    loaded = encoders(samples, lambda text: Encoder(ENGLISH_MODEL, instruction=text, max_cached_texts=_MANY_TEXTS))
    rows = rows_of(study.tasks, others_of(read_task_list(), study.tasks, study.spares), loaded)
    table = Table(*rows[0], title="choice part; shares of prompts, AUROC of the confidence")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    with out.capture() as captured:
        out.print(table)
    out.print(table)
    figures = {
        f"instruction_{row['instruction']}_{row['projection']}_{name}": value
        for row in rows
        for name, value in row.items()
        if isinstance(value, float)
    }
    write_results("routing_instruction", figures=figures, table=captured.get(), runs=rows)


if __name__ == "__main__":
    typer.run(main)
