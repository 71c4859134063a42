"""Rerank the three retrieved adapters by the model or by their weights: `python -m benchmarks.paper.stages.rerank`.

Each candidate answers alone, once. Every way of choosing is then a choice among known answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.paper.answering.answers import Asker, Question
from benchmarks.paper.answering.auto import Auto
from benchmarks.paper.answering.likelihood import Candidate, Confidences, candidates_of, most_likely
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench, Method, rows_of
from benchmarks.paper.answering.spectral import SIGNALS, Spectra, calibrated
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.scoring import score
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.stages.answer_tables import Answers, differences
from benchmarks.paper.stages.gate import adapters_of
from benchmarks.paper.stages.main_table import Loaded, load_bench
from benchmarks.training.adapter_files import load_base
from gpu_worker.front.request.prompts import alpaca_prompt
from gpu_worker.model.base_model import model_source
from lora_store import AdapterWeights
from retriever_svc.encoder_files import ENGLISH_MODEL

NAME = "rerank"
ROWS, TOPS = f"{NAME}.parquet", f"{NAME}_tops.parquet"
POOLS = {"iid": False, "ood": True}
FIRST, BEST = "first", "best"  # the nearest adapter, and the best of the three by its score: the most that is possible
AUTO, SOFTMAX, MIXTURE = (
    "auto",
    "softmax",
    "mixture",
)  # compositions of the three; auto: the default, without abstention
COMPOSED = (AUTO, SOFTMAX, MIXTURE)
TITLE = "Reranking the three nearest adapters"
_REFERENCE_PER_TASK = 5
_BATCH = 8
Scores = list[dict[str, float]]
"""For each question, the adapters' scores by name."""


class Reader:
    """Reads prompts with the base model alone and scores every adapter by its weights."""

    def __init__(self, base: Any, tokenizer: Any, adapters: dict[str, AdapterWeights]) -> None:
        self._spectra, self._tokenizer = Spectra(base, list(adapters.values())), tokenizer
        self._names = list(adapters)
        self.seconds, self.num_prompts = 0.0, 0

    def signals(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return (N, P) by signal, in the order of the questions."""
        order = sorted(range(len(questions)), key=lambda row: len(questions[row].item.input))
        found: dict[str, list[Tensor]] = {name: [] for name in SIGNALS}
        began = time.perf_counter()
        for start in range(0, len(order), _BATCH):
            texts = [alpaca_prompt(questions[row].item.input) for row in order[start : start + _BATCH]]
            batch = self._tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
            for name, values in self._spectra.scores(batch["input_ids"], batch["attention_mask"]).items():
                found[name].append(values)
        self.seconds += time.perf_counter() - began
        self.num_prompts += len(order)
        back = torch.argsort(torch.tensor(order))
        return {name: torch.cat(values)[back] for name, values in found.items()}

    def scores(self, questions: Sequence[Question], reference: Sequence[Question]) -> dict[str, Scores]:
        """Return each signal as it is, and calibrated on the reference prompts."""
        own, others = self.signals(questions), self.signals(reference)
        tables = own | {f"{name}_calibrated": calibrated(own[name], others[name]) for name in SIGNALS}
        return {
            name: [dict(zip(self._names, row, strict=True)) for row in values.tolist()]
            for name, values in tables.items()
        }


def chosen(candidates: Sequence[Sequence[Candidate]], place_of: Callable[[int], int]) -> list[Candidate]:
    """Return one candidate of each question. `place_of`: its place by the question's position."""
    return [row[place_of(number)] for number, row in enumerate(candidates)]


def pool_rows(
    bench: Bench, scored: Asker, pool: str, per_task: int, confidences: Confidences, by_weights: dict[str, Scores]
) -> pa.Table:
    """Return rows of every way of choosing."""
    questions = bench.study.questions("test", per_task)
    plans = Routed("mixture", masks_own=POOLS[pool]).plans(bench.retriever, questions)
    candidates = candidates_of(scored, questions, plans, bench.out, f"candidates {pool}")
    values = [
        [score(bench.study.specs[q.task], q.item, c.text) for c in row]
        for q, row in zip(questions, candidates, strict=True)
    ]
    ways: dict[str, Callable[[int], int]] = {
        FIRST: lambda _: 0,
        "likelihood": lambda n: most_likely(candidates[n]),
        "likelihood_calibrated": lambda n: most_likely(candidates[n], confidences),
        BEST: lambda n: max(range(len(values[n])), key=values[n].__getitem__),
    }
    for name, scores in by_weights.items():
        ways[name] = lambda n, scores=scores: _best_of(candidates[n], scores[n])  # type: ignore[misc]
    tables = []
    for name, place_of in ways.items():
        found = chosen(candidates, place_of)
        right = [values[n][place_of(n)] for n in range(len(questions))]
        tables.append(rows_of(f"{name}_{pool}", questions, [c.plan for c in found], right))
    return pa.concat_tables(tables)


def _best_of(candidates: Sequence[Candidate], scores: dict[str, float]) -> int:
    return max(range(len(candidates)), key=lambda place: scores[candidates[place].name])


def top_rows(questions: Sequence[Question], by_weights: dict[str, Scores]) -> pa.Table:
    """Return a row per signal and question: the place of the own adapter among all, from 1."""
    rows = [
        {
            "signal": name,
            "task": q.task,
            "number": q.number,
            "place": 1 + sum(other > found[q.task] for other in found.values()),
        }
        for name, scores in by_weights.items()
        for q, found in zip(questions, scores, strict=True)
    ]
    return pa.Table.from_pylist(rows)


def composed(way: str, *, masked: bool) -> Method:
    """Return a composition of the three nearest adapters as a method."""
    if way == MIXTURE:
        return Routed("mixture", masks_own=masked)
    return Auto(weighting="evidence" if way == AUTO else "softmax", abstains=False, masks_own=masked)


def section(rows: pd.DataFrame, tops: pd.DataFrame, title: str) -> str:
    """Return the appendix."""
    answers = Answers(rows, {})
    names = list(dict.fromkeys(run.rpartition("_")[0] for run in answers.runs))
    lines = [
        [name.replace("_", " "), *[answers.interval(f"{name}_{pool}").in_percent() for pool in POOLS]] for name in names
    ]
    pairs = [(f"{name}_{pool}", f"{FIRST}_{pool}") for pool in POOLS for name in names if name != FIRST]
    pairs += [(f"{name}_{pool}", f"{AUTO}_{pool}") for pool in POOLS for name in names if name not in (AUTO, FIRST)]
    places = [
        [str(name).replace("_", " "), *[percent((own["place"] <= depth).mean()) for depth in (1, 3)]]
        for name, own in tops.groupby("signal", sort=False)
    ]
    count = answers.scores(f"{FIRST}_iid").shape[1]
    return "\n".join(
        [
            f"## {title}\n",
            f"{count} questions a task. `{FIRST}`: the nearest adapter. `{BEST}`: the best of the three for each",
            f"question, the most that any reranking can reach. `{AUTO}`, `{SOFTMAX}`, `{MIXTURE}`: all three, with the",
            "server's default weights, softmax weights and equal ones. `likelihood`: by the log probability of its own",
            "answer.",
            "The others use the adapters' weights and one pass of the base model over the prompt; `calibrated`: in",
            "standard deviations of the adapter's scores on prompts of all tasks.\n",
            table(["choice", *POOLS], lines),
            differences(answers, pairs),
            "The own adapter among all of the pool by its weights alone, percent; no samples are used:\n",
            table(["signal", "top-1", "top-3"], places),
        ]
    )


def sentence(folder: Path) -> str:
    """Return what a reranking could gain, and how many of the measured ones do."""
    if not (folder / ROWS).exists():
        return "Reranking was not measured yet."
    answers = Answers(pd.read_parquet(folder / ROWS), {})
    first = f"{FIRST}_iid"
    ways = [
        run for run in answers.runs if run.endswith("_iid") and run.removesuffix("_iid") not in (FIRST, BEST, *COMPOSED)
    ]
    better = [run for run in ways if answers.difference(run, first).low > 0]
    most = answers.difference(f"{BEST}_iid", first).in_percent()
    return (
        f"Choosing the best of the three nearest adapters for each question would gain {most} points in distribution;"
        f" {len(better)} of {len(ways)} ways to rerank them are better than the nearest with their whole interval."
    )


def measure(
    bench: Bench, scored: Asker, reader: Reader, folder: Path, per_task: int, name: str = NAME, title: str = TITLE
) -> None:
    """Write rows and the appendix to files of this name. Known answers are not computed again."""
    study = bench.study
    reference = study.questions("choice", _REFERENCE_PER_TASK)
    plans = Routed("mixture").plans(bench.retriever, reference)
    confidences = Confidences.of(candidates_of(scored, reference, plans, bench.out, "reference"))
    questions = study.questions("test", per_task)
    by_weights = reader.scores(questions, reference)
    tables = [pool_rows(bench, scored, pool, per_task, confidences, by_weights) for pool in POOLS]
    for pool, masked in POOLS.items():
        for way in COMPOSED:
            tables.append(bench.run(f"{way}_{pool}", composed(way, masked=masked), per_task))
    rows, tops = folder / f"{name}.parquet", folder / f"{name}_tops.parquet"
    write_parquet(rows, pa.concat_tables(tables))
    write_parquet(tops, top_rows(questions, by_weights))
    each_ms = 1000 * reader.seconds / reader.num_prompts
    bench.out.print(f"signals of {reader.num_prompts} prompts: {each_ms:.0f} ms each", markup=False)
    text = section(pd.read_parquet(rows), pd.read_parquet(tops), title)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


def main(per_task: PerTask = 20, encoder: EncoderName = ENGLISH_MODEL, root: Root = DEFAULT_ROOT) -> None:
    """Answer with each of three candidates, choose in every way, write rows and the appendix."""
    workspace = Workspace(root)
    rerank(load_bench(workspace, encoder, Console(width=120)), workspace, per_task)


def rerank(loaded: Loaded, workspace: Workspace, per_task: int, name: str = NAME, title: str = TITLE) -> None:
    """Measure over a loaded pool, with the results of the study as the folder."""
    engine = loaded.bench.asker.engine
    scored = Asker(engine, workspace.root / "answers_logprobs.jsonl", with_logprobs=True)
    base = load_base(Path(model_source(engine.config)))
    reader = Reader(base, loaded.bench.study.tokenizer, adapters_of(loaded))
    measure(loaded.bench, scored, reader, PAPER_RESULTS, per_task, name, title)


if __name__ == "__main__":
    typer.run(main)
