"""LoRAHub on the tiny study."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.paper.answering.stores import fetch_from
from benchmarks.paper.stages import lorahub
from benchmarks.paper.stages.lorahub import NAME, Expert, One, hub_loss, make_arms, merge, split_rows
from benchmarks.paper.stages.stage import Loaded
from benchmarks.paper.training.lorahub import FusedModel
from benchmarks.paper.training.packing import Packed
from benchmarks.training.adapter_files import load_base
from benchmarks.training.lora_training import NO_LABEL, AnswerLoss, Padded, Recipe, tokenize
from lora_store import Plan, PlannedAdapter
from tests.benchmarks.tiny_study import SPECS


@pytest.fixture
def experts(loaded: Loaded) -> list[Expert]:
    records = [loaded.store.snapshot().resolve("local", spec.name) for spec in SPECS]
    return [Expert(record.ref, fetch_from(loaded.store, record.weights_digest)) for record in records]


def test_the_loss_is_that_of_each_example_alone(
    loaded: Loaded, experts: list[Expert], tiny_folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of many examples, and lower layers that are computed once, against one padded example after the other."""
    study = loaded.bench.study
    items = [item for name in study.specs for item in study.parts[name].samples[:3]]
    base, examples = load_base(tiny_folders["gemma3"]), tokenize(items, study.tokenizer)
    model = FusedModel(base, [expert.weights for expert in experts])
    loss_of = AnswerLoss(base.model.embed_tokens.weight, examples, Recipe())
    packed = Packed(examples, base.config)
    monkeypatch.setattr(lorahub, "MAX_ROW_TOKENS", packed.num_tokens(examples[:4]))
    assert len({len(chunk) for chunk in split_rows(examples, packed, lorahub.MAX_ROW_TOKENS)}) > 1
    counts = [int((example.labels != NO_LABEL).sum()) for example in examples]
    found = []
    with torch.no_grad(), hub_loss(load_base(tiny_folders["gemma3"]), experts, examples) as loss:
        for weights in (torch.zeros(3), torch.tensor([0.9, -0.4, 0.2])):
            alone = [float(model.loss(Padded().batch([one]), weights, loss_of)) for one in examples]
            found.append(loss(weights))
            expected = sum(own * count for own, count in zip(alone, counts, strict=True)) / sum(counts)
            assert found[-1] == pytest.approx(expected, rel=2e-3)
    assert abs(found[0] - found[1]) > 0.05 * found[0]


def test_rows_of_examples_are_full_but_not_longer_than_allowed(
    loaded: Loaded, tiny_folders: Mapping[str, Path]
) -> None:
    study = loaded.bench.study
    examples = tokenize([item for name in study.specs for item in study.parts[name].samples], study.tokenizer)
    packed = Packed(examples, load_base(tiny_folders["gemma3"]).config)
    most = 4 * packed.num_tokens(examples[:1])
    chunks = split_rows(examples, packed, most)
    assert sorted(map(id, examples)) == sorted(id(one) for chunk in chunks for one in chunk)
    assert len(chunks) > 2 and all(packed.num_tokens(chunk) <= most for chunk in chunks)
    for chunk, following in itertools.pairwise(chunks):
        assert packed.num_tokens([*chunk, following[0]]) > most


def test_merged_adapters_are_the_servers_fusion(loaded: Loaded, experts: list[Expert]) -> None:
    bench, shares = loaded.bench, [0.5, 0.3, -0.2]
    one = merge(experts, torch.tensor(shares))
    loaded.weights.made[one.weights_digest] = one
    planned = [PlannedAdapter(e.ref, e.weights.weights_digest, w) for e, w in zip(experts, shares, strict=True)]
    questions = bench.study.questions("test", 2)
    pairs = [(question, Plan("fusion", tuple(planned))) for question in questions]
    fused = bench.asker.answers(pairs, Console(quiet=True), "fusion")
    made = One(one, "made").plans(bench.retriever, questions)
    assert bench.asker.answers(list(zip(questions, made, strict=True)), Console(quiet=True), "made") == fused


def test_a_search_that_ended_is_not_repeated(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = make_arms(loaded, num_attempts=2)
    questions = loaded.bench.study.questions("test", 1)
    plans = arms[NAME].plans(loaded.bench.retriever, questions)
    assert {plan.adapters[0].ref.name for plan in plans} == {NAME}
    monkeypatch.setattr(lorahub, "hub_loss", None)
    assert make_arms(loaded, num_attempts=2)[NAME].plans(loaded.bench.retriever, questions) == plans
