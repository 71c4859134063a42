"""Measure MoE and SMEAR with a router in every layer: `python -m benchmarks.paper.stages.layer_routers`.

The papers have it so. The weights differ from layer to layer, so they are not a plan of the server: one torch model
answers. Experts, samples and questions are those of `baselines`, whose routers read the prompt once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench, scored_rows
from benchmarks.paper.answering.stores import fetch_from
from benchmarks.paper.common.expert_draws import one_a_cluster
from benchmarks.paper.common.markdown import table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import Step, key_of, run_steps, write_parquet
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.stages.answer_tables import Answers
from benchmarks.paper.stages.baselines import ROUTERS as ONCE
from benchmarks.paper.stages.baselines import Expert
from benchmarks.paper.stages.gate import greedy_texts, prompt_inputs
from benchmarks.paper.stages.main_table import Loaded, load_bench
from benchmarks.paper.training.experts import Sum
from benchmarks.paper.training.layer_routers import LayerRouted, train_layers
from benchmarks.paper.training.routers import RouterKind
from benchmarks.training.adapter_files import load_base
from benchmarks.training.lora_training import AnswerLoss, Recipe, tokenize
from gpu_worker.model.base_model import model_source
from lora_store import Plan, PlannedAdapter
from retriever_svc.encoder_files import ENGLISH_MODEL

ROWS = "layer_routers.parquet"
ROUTERS: dict[str, tuple[Sum, RouterKind]] = {
    name: (how, replace(kind, learning_rate=1e-3)) for name, (how, kind) in ONCE.items()
}
RETRIEVED = {
    "selection_iid": Routed("selection", 1),
    "mixture_iid": Routed("mixture"),
    "selection_ood": Routed("selection", 1, masks_own=True),
    "mixture_ood": Routed("mixture", masks_own=True),
}
_BATCH = 24
_STEP_S = 1.5  # of training, on two idle cores; the first estimate


class LayerRouters:
    """Trains and uses routed models over one base model."""

    def __init__(self, bench: Bench, base: Any, experts: Sequence[Expert]) -> None:
        self._bench, self._base, self.experts = bench, base, experts

    def key(self, name: str, how: Sum, kind: RouterKind) -> str:
        """Return a name for a router of these inputs."""
        return key_of(name, how, kind, [expert.weights.weights_digest for expert in self.experts], "layers")

    def trained(self, name: str, how: Sum, kind: RouterKind) -> LayerRouted:
        """Return the model with trained gates. Train them once, on the samples of every task."""
        routed = LayerRouted(self._base, [expert.weights for expert in self.experts], how, kind)
        kept = self._bench.study.workspace.root / "routers" / f"{name}-{self.key(name, how, kind)}.safetensors"
        if kept.exists():
            routed.load_gates(load_file(kept))
            return routed
        study, losses = self._bench.study, list[float]()
        examples = tokenize([i for name in study.specs for i in study.parts[name].samples], study.tokenizer)

        def tell(loss: float) -> None:
            losses.append(loss)
            if len(losses) % 20 == 0:
                words = f"{name}: {len(losses)} of {kind.num_steps} steps, loss {sum(losses[-20:]) / 20:.3f}"
                self._bench.out.print(words, markup=False)

        train_layers(routed, examples, AnswerLoss(self._base.model.embed_tokens.weight, examples, Recipe()), tell)
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: gate.detach().contiguous() for name, gate in routed.gates().items()}, kept)
        return routed

    def answers(self, routed: LayerRouted, questions: Sequence[Question]) -> list[str]:
        """Return greedy texts, in order."""
        order = sorted(range(len(questions)), key=lambda row: questions[row].max_tokens)
        texts: dict[int, str] = {}
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            asked, tokenizer = [questions[row] for row in rows], self._bench.study.tokenizer
            inputs = prompt_inputs(tokenizer, asked)
            routed.reading.prompt = inputs["attention_mask"].float()
            texts |= zip(rows, greedy_texts(routed.model, tokenizer, asked, inputs), strict=True)
        return [texts[row] for row in range(len(questions))]

    def rows(self, name: str, how: Sum, kind: RouterKind, per_task: int) -> pa.Table:
        """Return rows of a router. Their weights are equal: the router's own differ from token to token."""
        bench, routed = self._bench, self.trained(name, how, kind)
        questions = bench.study.questions("test", per_task)
        texts = self.answers(routed, questions)
        share = 1 / len(self.experts)
        held = tuple(PlannedAdapter(e.ref, e.weights.weights_digest, share) for e in self.experts)
        return scored_rows(name, questions, [Plan(how, held)] * len(questions), texts, bench.study)


def steps_of(
    bench: Bench, routers: LayerRouters, per_task: int, kinds: dict[str, tuple[Sum, RouterKind]]
) -> list[Step]:
    """Return a step for each kind of router."""
    folder = bench.study.workspace.rows / "layer_routers"
    cost = {name: kind.num_steps + per_task * len(bench.study.specs) / 8 for name, (_, kind) in kinds.items()}
    return [
        Step(
            name,
            folder / f"{name}-{routers.key(name, how, kind)}-{per_task}.parquet",
            cost[name],
            lambda name=name, how=how, kind=kind: routers.rows(name, how, kind, per_task),
        )
        for name, (how, kind) in kinds.items()
    ]


def section(rows: pd.DataFrame, experts: Sequence[str]) -> str:
    """Return the appendix. `experts`: the tasks whose adapters the routers have."""
    has_own = rows["task"].isin(experts)
    parts = {"iid": Answers(rows[has_own], {}), "ood": Answers(rows[~has_own], {})}
    names = [name for name in parts["iid"].runs if name not in RETRIEVED]
    lines = [
        [name.replace("_", " ")]
        + [
            cell
            for pool, answers in parts.items()
            for cell in (
                answers.interval(name).in_percent(),
                *[answers.difference(f"{way}_{pool}", name).in_percent() for way in ("selection", "mixture")],
            )
        ]
        for name in names
    ]
    counts = [answers.scores("selection_iid").shape for answers in parts.values()]
    header = ["router in every layer"]
    header += [f"{words} {pool}" for pool in parts for words in ("score", "selection − it,", "mixture − it,")]
    return "\n".join(
        [
            "## Routers in every layer\n",
            "The experts of the main table's MoE and SMEAR. Each linear layer has a router that reads its own input,",
            f"for each token (SMEAR: for each prompt). {counts[0][1]} questions a task. `iid`: {counts[0][0]} tasks",
            f"whose adapter the routers have, `ood`: {counts[1][0]} others, with the own adapter masked for the",
            "retrieved methods too. Percent and points with 95 % intervals.\n",
            table(header, lines),
        ]
    )


def measure(
    bench: Bench,
    routers: LayerRouters,
    folder: Path,
    per_task: int,
    kinds: dict[str, tuple[Sum, RouterKind]] | None = None,
) -> None:
    """Write rows and the appendix. Reuse trained gates and known answers."""
    steps = steps_of(bench, routers, per_task, kinds or ROUTERS)
    run_steps(steps, _STEP_S, bench.out)
    tables = [pq.read_table(step.path) for step in steps]
    tables += [bench.run(name, method, per_task) for name, method in RETRIEVED.items()]
    write_parquet(folder / ROWS, pa.concat_tables(tables))
    text = section(pd.read_parquet(folder / ROWS), [expert.ref.name for expert in routers.experts])
    (folder / "layer_routers.md").write_text(text, encoding="utf-8")


def experts_of(loaded: Loaded) -> list[Expert]:
    """Return one adapter of each cluster."""
    snapshot = loaded.store.snapshot()
    records = [snapshot.resolve("local", name) for name in one_a_cluster(list(loaded.bench.study.specs.values()))]
    return [Expert(record.ref, fetch_from(loaded.store, record.weights_digest)) for record in records]


def main(per_task: PerTask = 10, encoder: EncoderName = ENGLISH_MODEL, root: Root = DEFAULT_ROOT) -> None:
    """Train the routers, answer with each, write rows and the appendix."""
    loaded = load_bench(Workspace(root), encoder, Console(width=120))
    base = load_base(Path(model_source(loaded.bench.asker.engine.config)))
    measure(loaded.bench, LayerRouters(loaded.bench, base, experts_of(loaded)), PAPER_RESULTS, per_task)


if __name__ == "__main__":
    typer.run(main)
