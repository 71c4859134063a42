"""Compose the three retrieved adapters by their answers' probabilities: `python -m benchmarks.paper.stages.ensemble`.

Each adapter reads the prompt alone. The next token has the highest mean log probability, and all adapters read it.
This needs no common layers, so adapters of any kind and of several base models with one tokenizer can be composed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench, rows_of
from benchmarks.paper.common.markdown import table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import Step, key_of, run_steps, write_parquet
from benchmarks.paper.common.scoring import score
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.stages.answer_tables import Answers, differences
from benchmarks.paper.stages.gate import adapters_of, prompt_inputs
from benchmarks.paper.stages.main_table import load_bench
from benchmarks.paper.training.ramole import GatedModel
from benchmarks.training.adapter_files import load_base
from gpu_worker.model.base_model import model_source
from lora_store import AdapterWeights, Plan
from retriever_svc import Encoder
from retriever_svc.encoder_files import DEFAULT_MODEL

ROWS = "ensemble.parquet"
POOLS = {"iid": False, "ood": True}
_BATCH = 8  # questions
_ANSWER_S = 0.5  # two idle cores; the first estimate


class Ensemble:
    """The pool's adapters in a torch model. Each row of a batch uses one of them."""

    def __init__(self, base: Any, adapters: dict[str, AdapterWeights], tokenizer: Any) -> None:
        self._gated, self._tokenizer = GatedModel(base, list(adapters.values())), tokenizer
        self._place = {name: number for number, name in enumerate(adapters)}
        ends = base.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}

    def answers(self, questions: Sequence[Question], plans: Sequence[Plan]) -> list[str]:
        """Return greedy texts, in order. All plans have as many adapters; their weights are not used."""
        order = sorted(range(len(questions)), key=lambda row: questions[row].max_tokens)
        texts: dict[int, str] = {}
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            found = self._batch([questions[row] for row in rows], [plans[row] for row in rows])
            texts |= zip(rows, self._tokenizer.batch_decode(found, skip_special_tokens=True), strict=True)
        return [texts[row] for row in range(len(questions))]

    @torch.inference_mode()
    def _batch(self, questions: Sequence[Question], plans: Sequence[Plan]) -> list[list[int]]:
        [count] = {len(plan.adapters) for plan in plans}
        inputs = prompt_inputs(self._tokenizer, [question for question in questions for _ in range(count)])
        ids, mask, past = inputs["input_ids"], inputs["attention_mask"], None
        self._use([adapter.ref.name for plan in plans for adapter in plan.adapters])
        said: list[list[int]] = [[] for _ in questions]
        open_rows = set(range(len(questions)))
        while open_rows:
            found = self._gated.model(
                input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True, logits_to_keep=1
            )
            past = found.past_key_values
            logprobs = found.logits[:, -1].float().log_softmax(dim=-1)
            tokens = logprobs.unflatten(0, (len(questions), count)).mean(dim=1).argmax(dim=-1)
            for row in sorted(open_rows):
                if (token := int(tokens[row])) in self._ends:
                    open_rows.discard(row)
                    continue
                said[row].append(token)
                if len(said[row]) == questions[row].max_tokens:
                    open_rows.discard(row)
            ids = tokens.repeat_interleave(count)[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        return said

    def _use(self, names: Sequence[str]) -> None:
        weights = torch.zeros(len(names), len(self._place))
        weights[torch.arange(len(names)), [self._place[name] for name in names]] = 1.0
        self._gated.chosen.fixed = weights


def ensemble_rows(bench: Bench, ensemble: Ensemble, pool: str, per_task: int) -> pa.Table:
    """Return the rows of the ensemble of the three nearest adapters."""
    questions = bench.study.questions("test", per_task)
    plans = Routed("mixture", masks_own=POOLS[pool]).plans(bench.retriever, questions)
    texts = ensemble.answers(questions, plans)
    specs = bench.study.specs
    scores = [score(specs[q.task], q.item, text) for q, text in zip(questions, texts, strict=True)]
    return rows_of(f"ensemble_{pool}", questions, plans, scores)


def section(rows: pd.DataFrame) -> str:
    """Return the appendix."""
    answers = Answers(rows, {})
    ways = ("ensemble", "mixture", "selection")
    lines = [[way, *[answers.interval(f"{way}_{pool}").in_percent() for pool in POOLS]] for way in ways]
    pairs = [(f"ensemble_{pool}", f"{way}_{pool}") for pool in POOLS for way in ways[1:]]
    tasks, questions = answers.scores("ensemble_iid").shape
    return "\n".join(
        [
            "## Averaged log probabilities\n",
            f"{tasks} tasks, {questions} questions each; percent with 95 % intervals. `ensemble`: the three nearest",
            "adapters read the prompt separately, and the mean of their log probabilities chooses each token. It costs",
            "three times the work of one adapter. `mixture`: the paper's sum in every layer.\n",
            table(["", *POOLS], lines),
            differences(answers, pairs),
        ]
    )


def measure(bench: Bench, ensemble: Ensemble, key: str, folder: Path, per_task: int) -> None:
    """Write rows and the appendix. Rows under `key` are reused, and so are known answers."""
    kept = bench.study.workspace.rows / "ensemble" / key
    steps = [
        Step(
            f"ensemble {pool}",
            kept / f"{pool}-{per_task}.parquet",
            float(per_task * len(bench.study.specs)),
            lambda pool=pool: ensemble_rows(bench, ensemble, pool, per_task),
        )
        for pool in POOLS
    ]
    run_steps(steps, _ANSWER_S, bench.out)
    tables = [pq.read_table(step.path) for step in steps]
    for pool, masked in POOLS.items():
        tables.append(bench.run(f"mixture_{pool}", Routed("mixture", masks_own=masked), per_task))
        tables.append(bench.run(f"selection_{pool}", Routed("selection", 1, masks_own=masked), per_task))
    write_parquet(folder / ROWS, pa.concat_tables(tables))
    (folder / "ensemble.md").write_text(section(pd.read_parquet(folder / ROWS)), encoding="utf-8")


def main(per_task: PerTask = 8, encoder: EncoderName = DEFAULT_MODEL, root: Root = DEFAULT_ROOT) -> None:
    """Answer by the ensemble, the mixture and selection, write rows and the appendix."""
    loaded = load_bench(Workspace(root), encoder, Console(width=120))
    adapters = adapters_of(loaded)
    base = load_base(Path(model_source(loaded.bench.asker.engine.config)))
    digests = [(name, adapter.weights_digest) for name, adapter in adapters.items()]
    key = key_of(Encoder(encoder).identity, digests)
    measure(loaded.bench, Ensemble(base, adapters, loaded.bench.study.tokenizer), key, PAPER_RESULTS, per_task)


if __name__ == "__main__":
    typer.run(main)
