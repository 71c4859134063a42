"""Train and measure the paper's baselines on the pool: `python -m benchmarks.paper.stages.baselines`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.runs import Method, run_all
from benchmarks.paper.answering.stores import fetch_from
from benchmarks.paper.common.expert_draws import hub_tasks, one_a_cluster
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import key_of, write_parquet
from benchmarks.paper.common.tasks import NUM_TEST
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.stages.answer_tables import BASELINES, write_tables
from benchmarks.paper.stages.main_table import Loaded, load_bench
from benchmarks.paper.training.experts import ExpertModel, Sum
from benchmarks.paper.training.lower_layers import lower_layers
from benchmarks.paper.training.packing import Packed
from benchmarks.paper.training.routers import Router, RouterKind, search_weights, train_router
from benchmarks.training.adapter_files import load_base
from benchmarks.training.bigbench_tasks import Item
from benchmarks.training.lora_training import NO_LABEL, AnswerLoss, Example, Recipe, tokenize
from gpu_worker.model.base_model import model_source
from lora_store import AdapterRef, AdapterWeights, ModuleWeights, Plan, PlannedAdapter
from retriever_svc import Encoder, Retriever
from retriever_svc.encoder_files import ENGLISH_MODEL

ROUTERS: dict[str, tuple[Sum, RouterKind]] = {
    "moe_top1": ("mixture", RouterKind(num_chosen=1)),
    "moe_top3": ("mixture", RouterKind(num_chosen=3)),
    "moe_soft": ("mixture", RouterKind()),
    "smear": ("fusion", RouterKind()),
}
LORAHUB, HUB_STEPS = "lorahub", 40
_ROW_TOKENS = 800  # of LoRAHub's examples, computed together
_NOTHING = 1e-4  # smaller weights are left out of a plan


@dataclass(frozen=True, slots=True)
class Expert:
    """One adapter of the pool."""

    ref: AdapterRef
    weights: AdapterWeights


class Routers:
    """Routers trained on the samples of every task, saved in `folder` under names derived from their inputs."""

    def __init__(self, base: Any, items: Sequence[Item], encoder: Encoder, tokenizer: Any, folder: Path) -> None:
        self._base, self._encoder, self._folder = base, encoder, folder
        self._examples: list[Example] = tokenize(items, tokenizer)
        self._vectors = torch.from_numpy(encoder.encode([item.input for item in items]))
        self._loss_of = AnswerLoss(base.model.embed_tokens.weight, self._examples, Recipe())

    def router(self, name: str, how: Sum, kind: RouterKind, experts: Sequence[Expert], out: Console) -> Router:
        path = self._kept(name, experts, self._encoder.identity, kind)
        router = Router(self._encoder.dim, len(experts), kind)
        if path.exists():
            router.load_state_dict(load_file(path))
            return router
        model = ExpertModel(self._base, [expert.weights for expert in experts], how)
        losses: list[float] = []

        def tell(loss: float) -> None:
            losses.append(loss)
            if len(losses) % 20 == 0:
                out.print(f"{name}: {len(losses)} of {kind.num_steps} steps, loss {sum(losses[-20:]) / 20:.3f}")

        router = train_router(model, self._examples, self._vectors, self._loss_of, len(experts), kind, tell)
        self._folder.mkdir(parents=True, exist_ok=True)
        save_file(router.state_dict(), path)
        return router

    def hub_weights(self, experts: Sequence[Expert], out: Console, num_steps: int = HUB_STEPS) -> Tensor:
        """Search LoRAHub's weights, one per adapter (P,), on the samples of all tasks."""
        path = self._kept(LORAHUB, experts, num_steps, "COBYLA from zeros")
        if not path.exists():
            with self.hub_loss(experts) as loss_of:
                weights, _ = search_weights(logged(loss_of, out), len(experts), num_steps)
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({"weights": weights}, path)
        return load_file(path)["weights"]

    @contextmanager
    def hub_loss(self, experts: Sequence[Expert]) -> Iterator[Callable[[Tensor], float]]:
        """Yield a function from weights (P,) to the mean loss of all answer tokens.

        The layers below the experts are computed once. All examples have the same weights, so they share rows.
        """
        model = ExpertModel(self._base, [expert.weights for expert in experts], "fusion")
        first = min(int(name.split(".")[2]) for name in experts[0].weights.modules)
        packed = Packed(self._examples, self._base.config)
        chunks = chunks_of(self._examples, packed)
        with lower_layers(packed, self._base.model, first, [one for chunk in chunks for one in chunk]) as layout:
            batches = [layout.batch(chunk) for chunk in chunks]
            counts = torch.tensor([int((batch.labels != NO_LABEL).sum()) for batch in batches])

            @torch.no_grad()
            def loss(weights: Tensor) -> float:
                found = torch.stack([model.loss(batch, weights[None], self._loss_of) for batch in batches])
                return float((found * counts).sum() / counts.sum())

            yield loss

    def _kept(self, name: str, experts: Sequence[Expert], *made_of: object) -> Path:
        digests = [expert.weights.weights_digest for expert in experts]
        return self._folder / f"{name}-{key_of(digests, *made_of)}.safetensors"


def logged(loss_of: Callable[[Tensor], float], out: Console) -> Callable[[Tensor], float]:
    """Return the function, which then prints each loss."""

    def loss(weights: Tensor) -> float:
        found = loss_of(weights)
        out.print(f"{LORAHUB}: loss {found:.3f}")
        return found

    return loss


def chunks_of(examples: Sequence[Example], packed: Packed) -> list[list[Example]]:
    """Return the examples, shortest first, in rows of at most `_ROW_TOKENS` tokens, or of one example."""
    chunks: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda example: len(example.ids)):
        if chunks[-1] and packed.num_tokens([*chunks[-1], example]) > _ROW_TOKENS:
            chunks.append([])
        chunks[-1].append(example)
    return chunks


class Weighed:
    """Uses each question's experts with the router's weights."""

    def __init__(self, router: Router, experts: Sequence[Expert], how: Sum, encoder: Encoder) -> None:
        self._router, self._experts, self._how, self._encoder = router, experts, how, encoder

    @torch.no_grad()
    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        vectors = torch.from_numpy(self._encoder.encode([question.item.input for question in questions]))
        return [self._plan(row) for row in self._router(vectors).tolist()]

    def _plan(self, weights: Sequence[float]) -> Plan:
        chosen = [pair for pair in zip(self._experts, weights, strict=True) if abs(pair[1]) > _NOTHING]
        return Plan(
            self._how,
            tuple(PlannedAdapter(expert.ref, expert.weights.weights_digest, weight) for expert, weight in chosen),
        )


class One:
    """Uses one merged adapter for every question."""

    def __init__(self, weights: AdapterWeights, name: str) -> None:
        ref = AdapterRef("local", name, weights.weights_digest)
        self._plan = Plan("selection", (PlannedAdapter(ref, weights.weights_digest, 1.0),))

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        return [self._plan] * len(questions)


def merged(experts: Sequence[Expert], weights: Tensor) -> AdapterWeights:
    """Return (Σ w_i s_i B_i)(Σ w_i A_i) as one adapter of scaling 1, because a plan cannot hold so many adapters."""
    modules = {}
    for name in experts[0].weights.modules:
        parts = [expert.weights.modules[name] for expert in experts]
        lora_a = sum(w * part.lora_a.float() for w, part in zip(weights.tolist(), parts, strict=True))
        lora_b = sum(w * part.scaling * part.lora_b.float() for w, part in zip(weights.tolist(), parts, strict=True))
        assert isinstance(lora_a, Tensor) and isinstance(lora_b, Tensor)
        modules[name] = ModuleWeights(lora_a, lora_b, 1.0)
    named = [(expert.ref.digest, round(weight, 6)) for expert, weight in zip(experts, weights.tolist(), strict=True)]
    return AdapterWeights(hashlib.sha256(repr(named).encode()).hexdigest(), modules)


def trained_baselines(
    loaded: Loaded,
    reader: Encoder,
    kinds: Mapping[str, tuple[Sum, RouterKind]] = ROUTERS,
    num_hub_steps: int = HUB_STEPS,
) -> dict[str, Method]:
    """Return the trained baselines over the pool, without LoRAHub for 0 steps. Train and save the missing ones."""
    bench, snapshot = loaded.bench, loaded.store.snapshot()
    study, out = bench.study, bench.out

    def expert(name: str) -> Expert:
        record = snapshot.resolve("local", name)
        return Expert(record.ref, fetch_from(loaded.store, record.weights_digest))

    items = [item for name in study.specs for item in study.parts[name].samples]
    base = load_base(Path(model_source(bench.asker.engine.config)))
    routers = Routers(base, items, reader, study.tokenizer, study.workspace.root / "routers")
    experts = [expert(name) for name in one_a_cluster(list(study.specs.values()))]
    methods: dict[str, Method] = {
        name: Weighed(routers.router(name, how, kind, experts, out), experts, how, reader)
        for name, (how, kind) in kinds.items()
    }
    if not num_hub_steps:
        return methods
    drawn = [expert(name) for name in hub_tasks(list(study.specs.values()))]
    hub = merged(drawn, routers.hub_weights(drawn, out, num_hub_steps))
    loaded.weights.made[hub.weights_digest] = hub
    return methods | {LORAHUB: One(hub, LORAHUB)}


def with_others(rows: pa.Table, path: Path) -> pa.Table:
    """Return the rows after those of other runs in the file."""
    if not path.exists():
        return rows
    kept = pq.read_table(path)
    return pa.concat_tables(
        [kept.filter(pc.invert(pc.is_in(kept["run"], rows["run"].unique()))), rows], promote_options="default"
    )


def main(
    per_task: PerTask = NUM_TEST,
    encoder: EncoderName = ENGLISH_MODEL,
    root: Root = DEFAULT_ROOT,
    only: Annotated[str, typer.Option(help="measure only this baseline, and keep the rows of the others")] = "",
) -> None:
    """Train the routers and LoRAHub's weights, answer with each, and write the rows and tables."""
    workspace, out = Workspace(root), Console(width=120)
    kinds = {name: kind for name, kind in ROUTERS.items() if only in ("", name)}
    if not kinds and only != LORAHUB:
        raise typer.BadParameter(f"is none of {', '.join([*ROUTERS, LORAHUB])}", param_hint="--only")
    loaded = load_bench(workspace, encoder, out)
    methods = trained_baselines(loaded, Encoder(encoder), kinds, HUB_STEPS if only in ("", LORAHUB) else 0)
    rows = run_all(loaded.bench, methods, per_task, workspace.rows / "answers")
    write_parquet(PAPER_RESULTS / BASELINES, with_others(rows, PAPER_RESULTS / BASELINES))
    write_tables(PAPER_RESULTS, Path(encoder).name)


if __name__ == "__main__":
    typer.run(main)
