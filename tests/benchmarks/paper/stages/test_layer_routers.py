"""Routers in every layer, on the tiny study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from benchmarks.paper.answering.methods import Perfect
from benchmarks.paper.stages import layer_routers
from benchmarks.paper.stages.layer_routers import LayerRouters, experts_of
from benchmarks.paper.stages.main_table import Loaded
from benchmarks.training.adapter_files import load_base
from tests.benchmarks.tiny_study import SPECS


def test_the_stage_trains_and_answers_once(loaded: Loaded, tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    bench, experts = loaded.bench, experts_of(loaded)
    kinds = {name: (how, replace(kind, num_steps=2)) for name, (how, kind) in layer_routers.ROUTERS.items()}
    routers = LayerRouters(bench, load_base(tiny_folders["gemma3"]), experts)
    layer_routers.measure(bench, routers, tmp_path, 2, kinds)
    root = bench.study.workspace.root
    paths = [*(root / "rows" / "layer_routers").iterdir(), *(root / "routers").iterdir()]
    made = {path: path.stat().st_mtime_ns for path in paths}
    assert len(list((root / "rows" / "layer_routers").iterdir())) == len(kinds)
    layer_routers.measure(bench, routers, tmp_path, 2, kinds)
    assert all(path.stat().st_mtime_ns == at for path, at in made.items())
    rows = pd.read_parquet(tmp_path / layer_routers.ROWS)
    assert rows.groupby("run").size().eq(2 * len(SPECS)).all()
    assert set(rows["run"]) == {*kinds, *layer_routers.RETRIEVED}
    assert rows[rows["run"] == "smear"]["adapters"].map(list).tolist() == [[e.ref.name for e in experts]] * 6
    has_words = rows["task"].map({spec.name: spec.metric != "rouge_l" for spec in SPECS})
    assert (rows["without_dots"].notna() == has_words).all() and not has_words.all()
    text = " ".join((tmp_path / "layer_routers.md").read_text().split())
    assert "| moe top3 |" in text and "2 tasks whose" in text and "1 others" in text


def test_a_router_that_is_sure_of_one_expert_answers_as_that_expert_does(
    loaded: Loaded, tiny_folders: Mapping[str, Path]
) -> None:
    bench = loaded.bench
    snapshot, experts = loaded.store.snapshot(), experts_of(loaded)
    names = [expert.ref.name for expert in experts]
    assert all(snapshot.resolve("local", name) for name in names)
    routers = LayerRouters(bench, load_base(tiny_folders["gemma3"]), [*experts, experts[0]])
    how, kind = layer_routers.ROUTERS["moe_top1"]
    routed = layer_routers.LayerRouted(routers._base, [e.weights for e in experts], how, kind)
    questions = [q for q in bench.study.questions("test", 3) if q.task == names[0]]
    plans = Perfect().plans(bench.retriever, questions)
    wanted = bench.asker.answers(list(zip(questions, plans, strict=True)), bench.out, "own")
    with torch.no_grad():
        for gate in routed.gates().values():
            gate.zero_()  # all logits are equal, and the first expert is chosen
    assert routers.answers(routed, questions) == wanted
