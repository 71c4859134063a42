"""Compose the three retrieved adapters by their answers' probabilities: `python -m benchmarks.paper.stages.ensemble`.

Each adapter reads the prompt alone. The next token has the highest mean log probability, and all adapters read it.
This needs no common layers, so adapters of any kind and of several base models with one tokenizer can be composed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench, scored_rows
from benchmarks.paper.common.markdown import table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import Step, key_of, run_steps, write_parquet
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.stages.answer_tables import Answers, differences
from benchmarks.paper.stages.gate import adapters_of, prompt_inputs
from benchmarks.paper.stages.main_table import load_bench
from benchmarks.paper.training.ramole import GatedModel
from benchmarks.training.adapter_files import load_base
from gpu_worker.model.base_model import model_source
from lora_store import AdapterWeights
from retriever_svc import Encoder
from retriever_svc.encoder_files import ENGLISH_MODEL

ROWS = "ensemble.parquet"
POOLS = {"iid": False, "ood": True}
_BATCH = 8  # questions
_ANSWER_S = 0.5  # two idle cores; the first estimate


class Member:
    """A base model with adapters in torch. Each row of a batch uses one of them."""

    def __init__(self, base: Any, adapters: Mapping[str, AdapterWeights]) -> None:
        self.gated = GatedModel(base, list(adapters.values()))
        self._place = {name: number for number, name in enumerate(adapters)}
        self._past: Any = None

    def begin(self, names: Sequence[str]) -> None:
        """Forget the last batch. The next has a row with each of these adapters."""
        weights = torch.zeros(len(names), len(self._place))
        weights[torch.arange(len(names)), [self._place[name] for name in names]] = 1.0
        self.gated.chosen.fixed, self._past = weights, None

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read the next tokens of all rows (B, T). Return the log probabilities of the tokens after them (B, V)."""
        found = self.gated.model(
            input_ids=ids, attention_mask=mask, past_key_values=self._past, use_cache=True, logits_to_keep=1
        )
        self._past = found.past_key_values
        logprobs: Tensor = found.logits[:, -1].float().log_softmax(dim=-1)
        return logprobs

    @property
    def ends(self) -> set[int]:
        """The tokens that end an answer."""
        ends = self.gated.model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends])


Names = Sequence[Sequence[str]]
"""The adapters of one question, for each member in turn."""


class Ensemble:
    """Members that share a tokenizer. The next token has the highest mean log probability over all their adapters."""

    def __init__(self, members: Sequence[Member], tokenizer: Any) -> None:
        self.members, self._tokenizer = members, tokenizer
        self.ends = set[int]().union(*[member.ends for member in members]) | {tokenizer.eos_token_id}

    def answers(self, questions: Sequence[Question], names: Sequence[Names]) -> list[str]:
        """Return greedy texts, in order. A member has equally many adapters in all questions."""
        order = sorted(range(len(questions)), key=lambda row: questions[row].max_tokens)
        texts: dict[int, str] = {}
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            found = self._batch([questions[row] for row in rows], [names[row] for row in rows])
            texts |= zip(rows, self._tokenizer.batch_decode(found, skip_special_tokens=True), strict=True)
        return [texts[row] for row in range(len(questions))]

    @torch.inference_mode()
    def _batch(self, questions: Sequence[Question], names: Sequence[Names]) -> list[list[int]]:
        counts = [len(own) for own in names[0]]
        inputs = prompt_inputs(self._tokenizer, questions)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for place, member in enumerate(self.members):
            member.begin([name for own in names for name in own[place]])
        said: list[list[int]] = [[] for _ in questions]
        open_rows = set(range(len(questions)))
        while open_rows:
            sums = sum(self._read(member, ids, mask, count) for member, count in zip(self.members, counts, strict=True))
            assert isinstance(sums, Tensor)
            tokens = sums.argmax(dim=-1)
            for row in sorted(open_rows):
                if (token := int(tokens[row])) in self.ends:
                    open_rows.discard(row)
                    continue
                said[row].append(token)
                if len(said[row]) == questions[row].max_tokens:
                    open_rows.discard(row)
            ids = tokens[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        return said

    def _read(self, member: Member, ids: Tensor, mask: Tensor, count: int) -> Tensor:
        """Return the sum of the log probabilities of a question's `count` adapters of this member."""
        found = member.read(ids.repeat_interleave(count, dim=0), mask.repeat_interleave(count, dim=0))
        return found.unflatten(0, (len(ids), count)).sum(dim=1)


def ensemble_rows(bench: Bench, ensemble: Ensemble, pool: str, per_task: int) -> pa.Table:
    """Return the rows of the ensemble of the three nearest adapters."""
    questions = bench.study.questions("test", per_task)
    plans = Routed("mixture", masks_own=POOLS[pool]).plans(bench.retriever, questions)
    texts = ensemble.answers(questions, [[[adapter.ref.name for adapter in plan.adapters]] for plan in plans])
    return scored_rows(f"ensemble_{pool}", questions, plans, texts, bench.study)


def sentence(folder: Path) -> str:
    """Return what averaging log probabilities changes against selection and against the sum in every layer."""
    if not (folder / ROWS).exists():
        return "Averaged log probabilities were not measured yet."
    answers = Answers(pd.read_parquet(folder / ROWS), {})
    points = [answers.difference("ensemble_iid", f"{way}_iid").in_percent() for way in ("selection", "mixture")]
    tasks, questions = answers.scores("ensemble_iid").shape
    return (
        "The three nearest adapters read the prompt separately, and the mean of their log probabilities chooses each"
        f" token. That costs three times the work and changes right answers by {points[0]} points against selection,"
        f" and by {points[1]} against the mixture ({tasks} tasks, {questions} questions each). So the sum in the layers"
        " explains at most a small part of the loss; equal weights of other functions do harm either way."
    )


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


def main(per_task: PerTask = 8, encoder: EncoderName = ENGLISH_MODEL, root: Root = DEFAULT_ROOT) -> None:
    """Answer by the ensemble, the mixture and selection, write rows and the appendix."""
    loaded = load_bench(Workspace(root), encoder, Console(width=120))
    adapters = adapters_of(loaded)
    base = load_base(Path(model_source(loaded.bench.asker.engine.config)))
    digests = [(name, adapter.weights_digest) for name, adapter in adapters.items()]
    key = key_of(Encoder(encoder).identity, digests)
    made = Ensemble([Member(base, adapters)], loaded.bench.study.tokenizer)
    measure(loaded.bench, made, key, PAPER_RESULTS, per_task)


if __name__ == "__main__":
    typer.run(main)
