"""Compare RAMoLE's learned gate with uniform and softmax weights: `python -m benchmarks.paper.stages.gate`.

One torch model answers in all three ways, so only the weights differ. The gate is trained on the tasks that the encoder
was trained on, 40 % of all, as in the paper.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench, scored_rows
from benchmarks.paper.answering.stores import fetch_from
from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.markdown import table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import Step, key_of, run_steps, write_parquet
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.stages.answer_tables import Answers
from benchmarks.paper.stages.main_table import Loaded, load_bench
from benchmarks.paper.training.packing import Packed
from benchmarks.paper.training.ramole import GatedModel, GateRecipe, train_gates
from benchmarks.training.adapter_files import load_base
from benchmarks.training.lora_training import AnswerLoss, Recipe, tokenize
from gpu_worker.front.request.prompts import alpaca_prompt
from gpu_worker.model.base_model import model_source
from lora_store import AdapterWeights, Plan
from retriever_svc import Encoder, choose_tasks
from retriever_svc.encoder_files import ENGLISH_MODEL
from retriever_svc.training import RECORD_FILE

ROWS = "gate.parquet"
WAYS, POOLS = ("uniform", "softmax", "gate"), {"iid": False, "ood": True}
SHARE = 0.4  # of the tasks; the gate is trained on these
_EXAMPLES_A_TASK = 40
_BATCH = 24
LOSSES = "losses"  # of the training, in the file of the gates
_ANSWER_S = 0.2  # two idle cores, short answers; the first estimate
IN_TRAINING = "in_training"  # the column that marks tasks of the gate's training
_OWN_WEIGHT = "The gate's weight on own adapters in the mixture: {} percent.\n"


def prompt_inputs(tokenizer: Any, questions: Sequence[Question]) -> Any:
    """Return the prompts' ids and mask, padded on the left."""
    prompts = [alpaca_prompt(question.item.input) for question in questions]
    return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")


@torch.inference_mode()
def greedy_texts(model: Any, tokenizer: Any, questions: Sequence[Question], inputs: Any) -> list[str]:
    """Return the greedy answers of a torch model. `inputs`: as returned by `prompt_inputs`."""
    longest = max(question.max_tokens for question in questions)
    ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False, top_k=None, top_p=None)
    new = ids[:, inputs["input_ids"].shape[1] :]
    cut = [row[: question.max_tokens] for row, question in zip(new, questions, strict=True)]
    return list(tokenizer.batch_decode(cut, skip_special_tokens=True))


class Gates:
    """The pool's adapters in a torch model with gates trained on the tasks `learnt`."""

    def __init__(self, base: Any, adapters: dict[str, AdapterWeights], tokenizer: Any, learnt: Sequence[str]) -> None:
        self._base, self._adapters, self._tokenizer, self.learnt = base, adapters, tokenizer, learnt

    def key(self, recipe: GateRecipe) -> str:
        """Return a name for gates trained on these inputs."""
        return key_of(recipe, [(name, self._adapters[name].weights_digest) for name in self.learnt])

    def trained(self, bench: Bench, recipe: GateRecipe) -> GatedModel:
        """Return the model with all adapters. Train its gates once, on the learnt tasks' adapters only."""
        kept = bench.study.workspace.root / "routers" / f"gates-{self.key(recipe)}.safetensors"
        if not kept.exists():
            self._train(bench, kept, recipe)
        model = GatedModel(self._base, list(self._adapters.values()))
        model.load_gates(load_file(kept))
        return model

    def _train(self, bench: Bench, kept: Path, recipe: GateRecipe) -> None:
        items = [item for name in self.learnt for item in bench.study.parts[name].train[:_EXAMPLES_A_TASK]]
        examples = tokenize(items, self._tokenizer)
        model = GatedModel(self._base, [self._adapters[name] for name in self.learnt])
        losses: list[float] = []

        def tell(loss: float) -> None:
            losses.append(loss)
            if len(losses) % 10 == 0:
                mean = sum(losses[-10:]) / 10
                bench.out.print(f"gate: {len(losses)} of {recipe.num_steps} steps, loss {mean:.3f}", markup=False)

        loss_of = AnswerLoss(self._base.model.embed_tokens.weight, examples, Recipe())
        train_gates(model, examples, loss_of, Packed(examples, self._base.config), recipe, tell)
        kept.parent.mkdir(parents=True, exist_ok=True)
        gates = {name: value.detach() for name, value in model.gates().items()}
        save_file(gates | {LOSSES: torch.tensor(losses)}, kept)

    def answers(self, model: GatedModel, questions: Sequence[Question], plans: Sequence[Plan], way: str) -> list[str]:
        """Return greedy texts, in order. `gate`: let the gate weigh a plan's adapters by token, not the plan."""
        order = sorted(range(len(questions)), key=lambda row: questions[row].max_tokens)
        texts: dict[int, str] = {}
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            weights = self._weights([plans[row] for row in rows])
            model.chosen.allowed, model.chosen.fixed = weights > 0, None if way == "gate" else weights
            asked = [questions[row] for row in rows]
            found = greedy_texts(model.model, self._tokenizer, asked, prompt_inputs(self._tokenizer, asked))
            texts |= zip(rows, found, strict=True)
        return [texts[row] for row in range(len(questions))]

    @torch.inference_mode()
    def weighed(self, model: GatedModel, questions: Sequence[Question], plans: Sequence[Plan]) -> list[Plan]:
        """Return the plans with the gate's weights at the prompt's last token, averaged over the layers."""
        found: list[Plan] = []
        for start in range(0, len(questions), _BATCH):
            chosen = plans[start : start + _BATCH]
            model.chosen.allowed, model.chosen.fixed = self._weights(chosen) > 0, None
            inputs = prompt_inputs(self._tokenizer, questions[start : start + _BATCH])
            model.chosen.seen = seen = list[Tensor]()
            model.model.get_submodule("model")(**inputs, use_cache=False)
            model.chosen.seen = None
            found += map(self._with_weights, chosen, torch.stack(seen).mean(dim=0))
        return found

    def _with_weights(self, plan: Plan, weights: Tensor) -> Plan:
        place = {name: number for number, name in enumerate(self._adapters)}
        return replace(
            plan, adapters=tuple(replace(a, weight=float(weights[place[a.ref.name]])) for a in plan.adapters)
        )

    def _weights(self, plans: Sequence[Plan]) -> Tensor:
        """Return the plan's weights (B, P)."""
        place = {name: number for number, name in enumerate(self._adapters)}
        weights = torch.zeros(len(plans), len(place))
        for row, plan in enumerate(plans):
            for adapter in plan.adapters:
                weights[row, place[adapter.ref.name]] = adapter.weight
        return weights


def steps_of(bench: Bench, gates: Gates, model: GatedModel, per_task: int, key: str) -> list[Step]:
    """Return a step for each way of weighing, in and out of distribution. Rows are saved under `key`."""
    folder = bench.study.workspace.rows / "gate" / key
    cost = float(per_task * len(bench.study.specs))

    def rows(name: str, way: str, masked: bool) -> pa.Table:
        questions = bench.study.questions("test", per_task)
        weighting = "softmax" if way == "softmax" else "uniform"
        plans = Routed("mixture", weighting=weighting, masks_own=masked).plans(bench.retriever, questions)
        texts = gates.answers(model, questions, plans, way)
        if way == "gate":
            plans = gates.weighed(model, questions, plans)
        return scored_rows(name, questions, plans, texts, bench.study)

    return [
        Step(
            f"{way}_{pool}",
            folder / f"{way}_{pool}-{per_task}.parquet",
            cost,
            lambda way=way, pool=pool, masked=masked: rows(f"{way}_{pool}", way, masked),
        )
        for pool, masked in POOLS.items()
        for way in WAYS
    ]


def section(rows: pd.DataFrame, learnt: Sequence[str]) -> str:
    """Return the report's section."""
    answers = Answers(rows, {})
    num_tasks, num_questions = answers.scores(answers.runs[0]).shape
    is_learnt = rows["task"].isin(learnt)
    parts = {
        "all": answers,
        f"{len(learnt)} in the gate's training": Answers(rows[is_learnt], {}),
        f"{num_tasks - len(learnt)} not in it": Answers(rows[~is_learnt], {}),
    }
    lines = [
        [pool, label]
        + [own.interval(f"{way}_{pool}").in_percent() for way in WAYS]
        + [own.difference(f"gate_{pool}", f"{way}_{pool}").in_percent() for way in WAYS[:2]]
        for pool in POOLS
        for label, own in parts.items()
    ]
    words = (
        f"Mixtures of three in one torch model, {num_tasks} tasks, {num_questions} questions each. RAMoLE's gate is"
        " trained on the encoder's training tasks, with their adapters only; percent and points with 95 % intervals.\n"
    )
    header = ["", "tasks", *WAYS, *[f"gate − {way}" for way in WAYS[:2]]]
    weight = own_weight(rows)
    recorded = [] if weight is None else [_OWN_WEIGHT.format(weight.in_percent())]
    return "\n".join(["## A learned gate\n", words, table(header, lines), *recorded])


def own_weight(rows: pd.DataFrame) -> Interval | None:
    """Return the gate's weight on own adapters that are in the mixture; None if it was not recorded."""
    found: dict[str, list[float]] = {}
    for row in rows[rows["run"] == "gate_iid"].itertuples():
        names = list(row.adapters)
        if row.task in names:
            found.setdefault(row.task, []).append(float(row.weights[names.index(row.task)]))
    means = np.array([np.mean(weights) for weights in found.values()])
    if not len(means) or np.allclose(means, 1 / 3, atol=1e-3):
        return None
    return bootstrap(means[np.newaxis, :, np.newaxis], resamples_tasks=True)


def sentence(folder: Path) -> str:
    """Return how the gate was trained, and how much of the weight it gives to the own adapter."""
    found = own_weight(pd.read_parquet(folder / ROWS)) if (folder / ROWS).exists() else None
    if found is None:
        return (
            "RAMoLE's gate was trained for 150 steps. Its weight on the own adapter was not recorded, so either it has"
            " not learnt, or it cannot help."
        )
    words = (
        "RAMoLE's gate was trained until its loss stopped falling. At the end of the prompt it gives"
        f" {found.in_percent()} % of the weight to the own adapter; equal weights give 33.3 %."
    )
    rows = pd.read_parquet(folder / ROWS)
    if IN_TRAINING not in rows:
        return words
    parts = [rows[rows[IN_TRAINING] == learnt] for learnt in (True, False)]
    points = [Answers(part, {}).difference("gate_iid", "uniform_iid").in_percent() for part in parts]
    weights = [own_weight(part) for part in parts]
    shares = ["the same" if weight is None else f"{weight.in_percent()} %" for weight in weights]
    return (
        f"{words} On the tasks of its training it gives {shares[0]}, and changes right answers by {points[0]} points"
        f" against equal weights; on the others, whose adapters it has not seen, {shares[1]} and {points[1]}."
    )


def learnt_by(encoder: str, names: Sequence[str]) -> list[str]:
    """Return those of `names` that the encoder in this folder was trained on; a share of them if untrained."""
    record = Path(encoder) / RECORD_FILE
    if not record.exists():
        return choose_tasks(names, SHARE, 0)
    trained = json.loads(record.read_text(encoding="utf-8"))["num_texts_of_task"]
    return [name for name in names if name in trained]


def adapters_of(loaded: Loaded) -> dict[str, AdapterWeights]:
    """Return the pool's adapters by task."""
    snapshot = loaded.store.snapshot()
    return {
        name: fetch_from(loaded.store, snapshot.resolve("local", name).weights_digest)
        for name in loaded.bench.study.specs
    }


def measure(loaded: Loaded, encoder: Encoder, gates: Gates, folder: Path, per_task: int, recipe: GateRecipe) -> None:
    """Write rows and section into `folder`. Reuse trained gates and known answers."""
    bench = loaded.bench
    steps = steps_of(bench, gates, gates.trained(bench, recipe), per_task, f"{encoder.identity}-{gates.key(recipe)}")
    run_steps(steps, _ANSWER_S, bench.out)
    rows = pa.concat_tables([pq.read_table(step.path) for step in steps])
    learnt = [task in gates.learnt for task in rows["task"].to_pylist()]
    write_parquet(folder / ROWS, rows.append_column(IN_TRAINING, pa.array(learnt)))
    (folder / "gate.md").write_text(section(pd.read_parquet(folder / ROWS), gates.learnt), encoding="utf-8")


def main(
    per_task: PerTask = 10,
    encoder: EncoderName = ENGLISH_MODEL,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Train the gate, answer under every way of weighing, write rows and the report's section."""
    loaded = load_bench(Workspace(root), encoder, Console(width=120))
    source = Path(model_source(loaded.bench.asker.engine.config))
    base, tokenizer = load_base(source), AutoTokenizer.from_pretrained(source)
    learnt = learnt_by(encoder, list(loaded.bench.study.specs))
    gates = Gates(base, adapters_of(loaded), tokenizer, learnt)
    measure(loaded, Encoder(encoder), gates, PAPER_RESULTS, per_task, GateRecipe())


if __name__ == "__main__":
    typer.run(main)
