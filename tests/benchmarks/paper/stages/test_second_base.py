"""Two base models behind one index, on the tiny study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.likelihood import Candidate
from benchmarks.paper.answering.study import Study
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.pool.train_pool import train_on
from benchmarks.paper.stages import second_base
from benchmarks.paper.stages.ensemble import Ensemble
from benchmarks.paper.stages.second_base import FIRST, SECOND, TwoBases, load_two, task_of, voted
from benchmarks.paper.training.second_base import BaseRecipe, make_second_base
from benchmarks.training.adapter_files import BASE_NAME
from benchmarks.training.lora_training import Recipe
from gpu_worker.config import WorkerConfig
from gpu_worker.front.request.prompts import alpaca_prompt
from lora_store import BASE_PLAN, LOCAL_TENANT
from retriever_svc import Encoder
from tests.benchmarks.tiny_study import RECIPE, SPECS
from tests.tiny import tiny_config

Loaded = tuple[TwoBases, Ensemble]


@pytest.fixture(scope="module")
def both(
    study: Study,
    workspace: Workspace,
    encoder: Encoder,
    config: WorkerConfig,
    tiny_folders: Mapping[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Loaded:
    """Return the tiny base, and one of two of its layers with adapters of its own."""
    own = Workspace(tmp_path_factory.mktemp("second"))
    base, texts = own.root / "base", [item.input for item in study.parts["animals"].train[:20]]
    recipe = BaseRecipe(2, Recipe(num_steps=2, batch_tokens=400, learning_rate=1e-2, vocabulary_len=300))
    make_second_base(tiny_folders["gemma3"], base, texts, texts[:2], recipe, lambda step, loss: None)
    parts = {name: replace(own, samples=own.train[:20]) for name, own in study.parts.items()}
    with Progress(disable=True) as progress:
        train_on(parts, dict.fromkeys(parts, RECIPE), own, base, progress, second_base.SECOND_NAME)
    configs = {FIRST: config, SECOND: tiny_config(base, max_model_len=400, max_step_tokens=600, max_wait_s=1e6)}
    return load_two(study, own, configs, encoder, Console(quiet=True))


def test_each_base_finds_and_uses_its_own_adapters_only(both: Loaded) -> None:
    two, _ = both
    names = {base: two._retriever.resolve(LOCAL_TENANT, f"animals.{base}").base_model for base in (FIRST, SECOND)}
    assert names == {FIRST: BASE_NAME, SECOND: second_base.SECOND_NAME}
    rows = two.base_rows(2).to_pandas()
    for base in (FIRST, SECOND):
        own = rows[rows["run"].isin([f"{way}_{base}" for way in ("perfect", "selection", "mixture")])]
        assert {name.rpartition(".")[2] for names in own["adapters"] for name in names} == {base}
        means = rows.groupby("run")["score"].mean()
        assert means[f"perfect_{base}"] == 1.0 > means[f"base_{base}"]
    mixed = rows[rows["run"].str.startswith("mixture")]["weights"]
    assert len(mixed) == 12 and all(list(weights) == pytest.approx([1 / 3] * 3, abs=1e-4) for weights in mixed)
    assert rows[rows["run"] == "selection_second"]["adapters"].map(len).eq(1).all()


def test_a_request_without_a_base_finds_adapters_of_both(both: Loaded) -> None:
    two, _ = both
    found = two.hits(3).to_pandas()
    means = found.groupby("base").mean(numeric_only=True)
    assert means.loc["both", "is_own"] == means.loc[FIRST, "is_own"] == 1.0
    assert means.loc[FIRST, "num_second"] == 0 and means.loc[SECOND, "num_second"] == 3
    assert means.loc[FIRST, "num_tasks"] == 3 > means.loc["both", "num_tasks"]
    assert 0 < means.loc["both", "second_weight"] < 1
    assert means.loc["both", "own_weight"] > means.loc[FIRST, "own_weight"]
    assert second_base.nearer(found).mean == 0


def test_the_next_token_has_the_highest_mean_log_probability_of_both_bases(both: Loaded) -> None:
    """A loop without cache, batch and padding chooses the same tokens, with another task's adapter on each base."""
    two, ensemble = both
    tokenizer = two.study.tokenizer
    questions = [replace(question, max_tokens=4) for question in two.study.questions("test", 1)]
    names = [[["animals"], ["cities"]], [["sums"], ["animals"]], [["cities"], ["sums"]]]
    expected, by_first = [], []
    for question, pair in zip(questions, names, strict=True):
        ids = tokenizer([alpaca_prompt(question.item.input)], return_tensors="pt")["input_ids"]
        for members, into in ((ensemble.members, expected), (ensemble.members[:1], by_first)):
            said: list[int] = []
            while len(said) < question.max_tokens:
                whole = torch.cat([ids, torch.tensor([said], dtype=ids.dtype)], dim=1)
                total = torch.zeros(1)
                for member, [name] in zip(members, pair, strict=False):
                    member.begin([name])
                    with torch.no_grad():
                        logits = member.gated.model(input_ids=whole).logits[0, -1]
                    total = total + logits.float().log_softmax(dim=-1)
                if (token := int(total.argmax())) in ensemble.ends:
                    break
                said.append(token)
            into.append(tokenizer.decode(said, skip_special_tokens=True))
    assert ensemble.answers(questions, names) == expected != by_first


class Mistaken(TwoBases):
    """Finds the adapters of another task for every question."""

    def found_tasks(self, questions: Sequence[Question]) -> list[str]:
        return ["cities" if question.task == "animals" else "animals" for question in questions]


def test_both_bases_use_the_task_that_is_found_or_the_own_one(both: Loaded) -> None:
    two, ensemble = both
    mistaken = Mistaken(two.study, two.bases, two._retriever, two.out)
    alone = mistaken.base_rows(1).to_pandas().groupby("run")["score"].mean()
    for base in (FIRST, SECOND):
        assert alone[f"found_{base}"] == 0.0 < alone[f"perfect_{base}"] == 1.0
    for rows in (mistaken.voted_rows(1), mistaken.averaged_rows(ensemble, 1)):
        means = rows.to_pandas().groupby("run")["score"].mean()
        assert sorted(means) == [0.0, 1.0] and means.idxmax() in ("voted_own", "averaged_own")


def test_equal_answers_are_taken_and_of_others_the_more_probable_one() -> None:
    def candidate(text: str, logprob: float) -> Candidate:
        return Candidate(BASE_PLAN, text, logprob)

    assert voted([candidate("a", -2.0), candidate("a ", -1.0)]).logprob == -2.0
    assert voted([candidate("a", -2.0), candidate("b", -1.0)]).text == "b"
    assert voted([candidate("a", -1.0), candidate("b", -2.0)]).text == "a"


def test_the_stage_answers_once_and_writes_its_tables(both: Loaded, tmp_path: Path) -> None:
    two, ensemble = both
    kept = tmp_path / "kept"
    second_base.measure(two, ensemble, kept, tmp_path, 1)
    counters = [base.asker.engine.counters for base in two.bases]
    before = [one.num_requests for one in counters]
    second_base.measure(two, ensemble, kept, tmp_path, 1)
    assert [one.num_requests for one in counters] == before
    rows = pd.read_parquet(tmp_path / second_base.ROWS)
    assert {name for pair in second_base.PAIRS for name in pair} <= set(rows["run"])
    assert rows.groupby("run").size().eq(len(SPECS)).all()
    means = rows.groupby("run")["score"].mean()
    assert means["averaged_own"] == means["voted_own"] == means["voted_found"] == 1.0
    record = {"kept": [0, 2], "divergence_before": 4.0, "divergence_after": 0.5}
    second_base.write_tables(tmp_path, record)
    text = (tmp_path / "second_base.md").read_text()
    assert "2 layers of the first (0, 2;" in text and "fell from 4.00 to 0.50 nats" in text
    assert "| without a base |" in text and "| averaged found − found first |" in text
    assert "not measured yet" in second_base.sentence(tmp_path / "none")
    sentence = second_base.sentence(tmp_path)
    assert "has 100.0 % with own adapters where the first has 100.0 (3 tasks)" in sentence


def test_the_task_of_an_adapter_is_its_name_without_the_base(both: Loaded) -> None:
    two, _ = both
    [route, *_] = two.routes(two.study.questions("test", 1), SECOND, 1)
    assert route.candidates[0].ref.name == second_base.adapter_name(task_of(route.candidates[0].ref), SECOND)
