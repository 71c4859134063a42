"""LoRAHub's loss, on the tiny study."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from benchmarks.paper.answering.stores import fetch_from
from benchmarks.paper.common.expert_draws import one_a_cluster
from benchmarks.paper.stages import baselines
from benchmarks.paper.stages.baselines import Expert, Routers, chunks_of
from benchmarks.paper.stages.main_table import Loaded
from benchmarks.paper.training.experts import ExpertModel
from benchmarks.paper.training.packing import Packed
from benchmarks.training.adapter_files import load_base
from benchmarks.training.lora_training import NO_LABEL, AnswerLoss, Padded, Recipe, tokenize
from retriever_svc import Encoder
from tests.benchmarks.tiny_study import SPECS


def test_the_loss_is_that_of_each_example_alone(
    loaded: Loaded,
    encoder: Encoder,
    tiny_folders: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of many examples, and lower layers that are computed once, against one padded example after the other."""
    study, snapshot = loaded.bench.study, loaded.store.snapshot()
    items = [item for name in study.specs for item in study.parts[name].samples[:3]]
    records = [snapshot.resolve("local", name) for name in one_a_cluster(SPECS)]
    experts = [Expert(record.ref, fetch_from(loaded.store, record.weights_digest)) for record in records]
    routers = Routers(load_base(tiny_folders["gemma3"]), items, encoder, study.tokenizer, tmp_path)
    base, examples = load_base(tiny_folders["gemma3"]), tokenize(items, study.tokenizer)
    model = ExpertModel(base, [expert.weights for expert in experts], "fusion")
    loss_of = AnswerLoss(base.model.embed_tokens.weight, examples, Recipe())
    packed = Packed(examples, base.config)
    monkeypatch.setattr(baselines, "_ROW_TOKENS", packed.num_tokens(examples[:4]))
    assert len({len(chunk) for chunk in chunks_of(examples, packed)}) > 1
    counts = [int((example.labels != NO_LABEL).sum()) for example in examples]
    found = []
    with torch.no_grad(), routers.hub_loss(experts) as loss:
        for weights in (torch.zeros(2), torch.tensor([0.9, -0.4])):
            alone = [float(model.loss(Padded().batch([one]), weights[None], loss_of)) for one in examples]
            found.append(loss(weights))
            expected = sum(own * count for own, count in zip(alone, counts, strict=True)) / sum(counts)
            assert found[-1] == pytest.approx(expected, rel=2e-3)
    assert abs(found[0] - found[1]) > 0.05 * found[0]


def test_rows_of_examples_are_full_but_not_longer_than_allowed(
    loaded: Loaded, tiny_folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = loaded.bench.study
    examples = tokenize([item for name in study.specs for item in study.parts[name].samples], study.tokenizer)
    packed = Packed(examples, load_base(tiny_folders["gemma3"]).config)
    most = 4 * packed.num_tokens(examples[:1])
    monkeypatch.setattr(baselines, "_ROW_TOKENS", most)
    chunks = chunks_of(examples, packed)
    assert sorted(map(id, examples)) == sorted(id(one) for chunk in chunks for one in chunk)
    assert len(chunks) > 2 and all(packed.num_tokens(chunk) <= most for chunk in chunks)
    for chunk, following in itertools.pairwise(chunks):
        assert packed.num_tokens([*chunk, following[0]]) > most
