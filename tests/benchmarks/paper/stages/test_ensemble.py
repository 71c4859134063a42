"""Averaged log probabilities on the tiny study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks.paper.answering.methods import Perfect, Routed
from benchmarks.paper.stages import ensemble
from benchmarks.paper.stages.ensemble import Ensemble, Member
from benchmarks.paper.stages.gate import adapters_of
from benchmarks.paper.stages.main_table import Loaded
from benchmarks.training.adapter_files import load_base
from gpu_worker.front.request.prompts import alpaca_prompt
from lora_store import Plan
from tests.benchmarks.tiny_study import SPECS


@pytest.fixture
def made(loaded: Loaded, tiny_folders: Mapping[str, Path]) -> Ensemble:
    member = Member(load_base(tiny_folders["gemma3"]), adapters_of(loaded))
    return Ensemble([member], loaded.bench.study.tokenizer)


def names_of(plans: Sequence[Plan]) -> list[list[list[str]]]:
    return [[[adapter.ref.name for adapter in plan.adapters]] for plan in plans]


def test_one_adapter_answers_as_the_engine_does(loaded: Loaded, made: Ensemble) -> None:
    bench = loaded.bench
    questions = bench.study.questions("test", 2)
    plans = Perfect().plans(bench.retriever, questions)
    wanted = bench.asker.answers(list(zip(questions, plans, strict=True)), bench.out, "own")
    assert made.answers(questions, names_of(plans)) == wanted and len(set(wanted)) == len(SPECS)


def test_the_next_token_has_the_highest_mean_log_probability(loaded: Loaded, made: Ensemble) -> None:
    """A loop without cache, batch and padding chooses the same tokens."""
    bench, tokenizer = loaded.bench, loaded.bench.study.tokenizer
    questions = [replace(question, max_tokens=4) for question in bench.study.questions("test", 1)]
    plans = Routed("mixture").plans(bench.retriever, questions)
    expected = []
    for question, plan in zip(questions, plans, strict=True):
        ids = tokenizer([alpaca_prompt(question.item.input)], return_tensors="pt")["input_ids"]
        said: list[int] = []
        while len(said) < question.max_tokens:
            logprobs = []
            for adapter in plan.adapters:
                made.members[0].begin([adapter.ref.name])
                whole = torch.cat([ids, torch.tensor([said], dtype=ids.dtype)], dim=1)
                with torch.no_grad():
                    logits = made.members[0].gated.model(input_ids=whole).logits
                logprobs.append(logits[0, -1].float().log_softmax(dim=-1))
            token = int(torch.stack(logprobs).mean(dim=0).argmax())
            if token in made.ends:
                break
            said.append(token)
        expected.append(tokenizer.decode(said, skip_special_tokens=True))
    assert made.answers(questions, names_of(plans)) == expected


def test_the_stage_answers_once(loaded: Loaded, made: Ensemble, tmp_path: Path) -> None:
    bench = loaded.bench
    assert ensemble.sentence(tmp_path) == "Averaged log probabilities were not measured yet."
    ensemble.measure(bench, made, "key", tmp_path, 1)
    before = bench.asker.engine.counters.num_requests
    ensemble.measure(bench, made, "key", tmp_path, 1)
    assert bench.asker.engine.counters.num_requests == before
    rows = pd.read_parquet(tmp_path / ensemble.ROWS)
    names = {f"{way}_{pool}" for way in ("ensemble", "mixture", "selection") for pool in ensemble.POOLS}
    assert set(rows["run"]) == names and rows.groupby("run").size().eq(len(SPECS)).all()
    ood = rows[rows["run"] == "ensemble_ood"]
    assert not any(row.task in row.adapters for row in ood.itertuples())
    assert "| ensemble iid − mixture iid |" in (tmp_path / "ensemble.md").read_text()
    means = rows.groupby("run")["score"].mean()
    gains = [100 * (means["ensemble_iid"] - means[f"{way}_iid"]) for way in ("selection", "mixture")]
    found = ensemble.sentence(tmp_path)
    assert f"answers by {gains[0]:.1f} (" in found and f"and by {gains[1]:.1f} (" in found
    assert "(3 tasks, 1 questions each)" in found
