"""The retrieval study on made-up tasks with a tiny encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from benchmarks import plots, results_file
from benchmarks.paper.common.resumable import Step, run_steps
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.retrieval.__main__ import collect
from benchmarks.paper.retrieval.bases import base_rows
from benchmarks.paper.retrieval.draws import draws_step
from benchmarks.paper.retrieval.experiments import BEST, Experiments
from benchmarks.paper.retrieval.extra_experiments import extra_steps, latency_step
from benchmarks.paper.retrieval.growth import growth_rows
from benchmarks.paper.retrieval.ranking import index_of, nearest, place_of, rank_rows
from benchmarks.paper.retrieval.rankings import Rankings
from benchmarks.paper.retrieval.results import write_tables
from benchmarks.paper.retrieval.samples import sample_rows
from benchmarks.paper.retrieval.study import UNTRAINED, Study, Task, main_draws
from retriever_svc import Encoder
from retriever_svc.training import TrainingSettings
from tests.tiny_encoder import save_tiny_encoder, topic_texts

NAMES = [f"topic{number:02}_" for number in range(24)]
NUM_POOL, NUM_TEXTS = 20, 4


def tasks_of(names: list[str]) -> tuple[Task, ...]:
    """Return four tasks per cluster."""
    parts = [topic_texts(NUM_TEXTS, seed=seed, topics=names) for seed in range(4)]
    return tuple(
        Task(name, f"cluster{number // 4}", *[tuple(part[name]) for part in parts]) for number, name in enumerate(names)
    )


STUDY = Study(tasks_of(NAMES[:NUM_POOL]), tasks_of(NAMES)[NUM_POOL:], shares=(0.4, 1.0), seeds=(0, 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny", NAMES)


@pytest.fixture(scope="module")
def encoder(model: Path) -> Encoder:
    return Encoder(model)


@pytest.fixture(scope="module")
def experiments(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiments:
    """Run the whole study."""
    settings = TrainingSettings(num_epochs=1, learning_rate=3e-3)
    experiments = Experiments(STUDY, Workspace(tmp_path_factory.mktemp("paper")), model, settings)
    for steps in stages(experiments):
        run_steps(steps, 0.001, Console(quiet=True))
    return experiments


def stages(experiments: Experiments) -> Iterator[list[Step]]:
    yield [*experiments.ranking_steps(), draws_step(experiments)]
    yield extra_steps(experiments, lambda: {name: f"{name}0" for name in STUDY.names})
    yield [latency_step(experiments)]


@pytest.fixture(scope="module")
def folder(experiments: Experiments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = tmp_path_factory.mktemp("results")
    collect(experiments, rows)
    return rows


def test_draws_are_shares_of_tasks_or_whole_clusters_with_the_main_ones_first() -> None:
    draws = STUDY.draws()
    assert len(draws) == len({draw.name for draw in draws}) == 6
    assert [draw.name for draw in draws[:2]] == ["share40-seed0", "share40-seed1"]
    for draw in draws:
        sizes = [
            sum(task.name in draw.tasks for task in STUDY.tasks if task.cluster == f"cluster{n}") for n in range(5)
        ]
        if draw.whole_clusters:
            assert sorted(sizes) == [0, 0, 0, 4, 4]
        else:
            assert len(draw.tasks) == round(draw.share * NUM_POOL)


def test_the_comparison_with_the_projection_has_more_draws_of_the_same_share() -> None:
    named = {draw.name: draw for draw in main_draws(STUDY.names)}
    assert len({draw.tasks for draw in named.values()}) == len(named) == 5
    assert [draw for draw in STUDY.draws() if draw.is_main] == [named["share40-seed0"], named["share40-seed1"]]


def test_places_equal_a_slow_loop_for_both_scores(encoder: Encoder) -> None:
    rows = rank_rows(encoder, "tiny", STUDY.tasks, ["test"]).to_pylist()
    means = {task.name: encoder.encode(task.samples).mean(axis=0).astype(float) for task in STUDY.tasks}
    cluster_of = {task.name: task.cluster for task in STUDY.tasks}
    tests = {task.name: encoder.encode(task.test).astype(float) for task in STUDY.tasks}
    assert len(rows) == 2 * NUM_POOL * NUM_TEXTS
    num_clear = 0
    for row in rows:
        own, query = row["task"], tests[row["task"]][row["query"]]
        lengths = {name: 1.0 if row["score"] == "inner product" else np.linalg.norm(m) for name, m in means.items()}
        scores = {name: query @ mean / lengths[name] for name, mean in means.items()}
        order = sorted(scores, key=lambda name: -scores[name])
        if min(-np.diff([scores[name] for name in order])) < 1e-6:
            continue  # too close for float32 to order
        num_clear += 1
        assert row["own"] == (order.index(own) + 1 if own in order[:9] else 0)
        near = [cluster_of[name] == cluster_of[own] for name in order if name != own]
        assert (row["cluster_of_1"], row["cluster_of_3"]) == (near[0], sum(near[:3]))
    assert num_clear > len(rows) // 2


def test_a_query_whose_own_adapter_is_not_found_still_has_neighbours() -> None:
    cluster_of = {task.name: task.cluster for task in STUDY.tasks}
    place = place_of(STUDY.tasks[0], [NAMES[5], NAMES[1], NAMES[2], NAMES[3]], cluster_of)
    assert (place.own, place.cluster_of_1, place.cluster_of_3) == (0, 0, 2)


def test_the_ranking_uses_all_samples_and_a_description_counts_alone(encoder: Encoder) -> None:
    described = {task.name: task.test[0] for task in STUDY.tasks}
    rows = sample_rows(encoder, "tiny", STUDY.tasks, described).to_pylist()
    assert {row["num_samples"] for row in rows} == {0, 1, 5, 10, 20}
    ranked = [row for row in rank_rows(encoder, "tiny", STUDY.tasks, ["test"]).to_pylist() if row["score"] == "cosine"]
    share = np.mean([row["own"] == 1 for row in ranked])
    assert [row["top1"] for row in rows if row["num_samples"] == 20] == [pytest.approx(share)]
    [by_description] = [row for row in rows if row["num_samples"] == 0]
    assert by_description["top1"] >= 1 / NUM_TEXTS  # at least the query that equals the description


def test_a_pool_grown_step_by_step_equals_the_whole_pool(encoder: Encoder) -> None:
    rows = growth_rows(encoder, "tiny", STUDY.tasks).to_pylist()
    whole = [row for row in rows if row["size"] == NUM_POOL]
    assert len(whole) == 5 and len({row["top1"] for row in whole}) == 1
    small = [row for row in rows if row["size"] == 10]
    assert all(row["top1"] == row["first_top1"] for row in small)
    assert np.mean([row["top1"] for row in small]) > whole[0]["top1"]
    assert all(row["index_bytes"] < whole[0]["index_bytes"] for row in small)


def test_a_filter_by_base_leaves_only_usable_adapters(encoder: Encoder) -> None:
    for row in base_rows(encoder, "tiny", STUDY.tasks).to_pylist():
        if row["filtered"]:
            assert row["usable"] == 1.0
        elif row["pool"] == "all of both":
            assert 0.3 < row["usable"] < 0.8 and row["own_top1"] <= row["task_top1"]
    plain = index_of(encoder, {task.name: task.samples for task in STUDY.tasks})
    alone = np.mean(
        [nearest(plain, encoder.encode([text]), 1)[0][0] == task.name for task in STUDY.tasks for text in task.test]
    )
    [filtered] = [
        row["own_top1"]
        for row in base_rows(encoder, "tiny", STUDY.tasks).to_pylist()
        if row["filtered"] and row["base"] == "a" and row["pool"] == "all of both"
    ]
    assert filtered == pytest.approx(alone)


def test_a_study_is_measured_once(experiments: Experiments) -> None:
    assert all(step.path.exists() for steps in stages(experiments) for step in steps)


def test_the_best_encoder_is_the_one_that_ranks_the_choice_queries_best(experiments: Experiments) -> None:
    shares = {}
    for seed in range(2):
        rows = pq.read_table(experiments.rows / f"ranks-share40-seed{seed}.parquet").to_pylist()
        places = [row["own"] for row in rows if row["part"] == "choice" and row["score"] == "cosine"]
        shares[f"share40-seed{seed}"] = np.mean([place == 1 for place in places])
    assert shares[experiments.choose_best()] == max(shares.values())
    assert experiments.encoder(BEST).identity == experiments.encoder(experiments.choose_best()).identity


def test_an_encoder_that_saw_everything_has_no_unseen_tasks(folder: Path) -> None:
    rankings = Rankings(folder)
    everything = rankings.groups()["100 %"]
    assert rankings.top(everything, "cosine", 1, "seen") == rankings.top(everything, "cosine", 1)
    assert rankings.top(everything, "cosine", 1, "unseen") is rankings.gain(everything, "cosine", 1) is None
    assert rankings.top([UNTRAINED], "cosine", 1, "seen") is None


def test_gains_count_unseen_tasks_only(folder: Path) -> None:
    rankings = Rankings(folder)
    draws = {draw.name: draw for draw in STUDY.draws()}
    trained = rankings.groups()["40 %"]
    gain = rankings.gain(trained, "cosine", 1)
    by_hand = []
    for name, after in zip(trained, rankings.hits(trained, "cosine", 1), strict=True):
        before = rankings.hits([UNTRAINED], "cosine", 1)[0]
        unseen = [number for number, task in enumerate(rankings.tasks) if task not in draws[name].tasks]
        by_hand.append((after - before)[unseen].mean())
    assert gain is not None and gain.mean == pytest.approx(np.mean(by_hand))
    assert rankings.unseen_gains().query("draw == @trained[0]")["gain"].mean() == pytest.approx(by_hand[0])


def test_section_and_results_are_written_from_the_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    write_tables(folder)
    results = json.loads((tmp_path / "paper" / "results.json").read_text())["figures"]
    names = {"retrieval_top1_untrained", "retrieval_top1_40", "retrieval_top3_40", "unseen_top1_gain_40"}
    assert results.keys() == {f"{name}{bound}" for name in names for bound in ("", "_lo", "_hi")}
    assert all(results[f"{name}_lo"] <= results[name] <= results[f"{name}_hi"] for name in names)
    section = (folder / "retrieval.md").read_text()
    assert section.startswith("## Retrieval\n")
    assert section.count("| 40 % | 2 |") == 3
    assert "Not measured yet: projections, hardness.\n" in section  # a command of their own measures them
    latency = (folder / "retrieval_latency.parquet").rename(tmp_path / "aside")
    ranks = folder / "retrieval_ranks.parquet"
    whole = pq.read_table(ranks)
    pq.write_table(whole.filter(pc.field("encoder") != "share100-seed0"), ranks)
    write_tables(folder)
    assert (
        (folder / "retrieval.md")
        .read_text()
        .endswith("Not measured yet: share100-seed0, projections, hardness, latency.\n")
    )
    latency.rename(folder / "retrieval_latency.parquet")
    pq.write_table(whole, ranks)
