"""The retrieval study on made-up tasks with a tiny encoder."""

from __future__ import annotations

import json
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
from benchmarks.paper.retrieval.draws import draws_step
from benchmarks.paper.retrieval.experiments import BEST, Experiments
from benchmarks.paper.retrieval.ranking import place_of, rank_rows
from benchmarks.paper.retrieval.rankings import Rankings
from benchmarks.paper.retrieval.results import write_tables
from benchmarks.paper.retrieval.study import UNTRAINED, Study, Task
from benchmarks.results_file import TreeChanged
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


at_full_counts = pytest.mark.usefixtures("scale")  # by which `make soak` finds them
STUDY = Study(tasks_of(NAMES[:NUM_POOL]), tasks_of(NAMES)[NUM_POOL:], shares=(0.4, 1.0), seeds=(0, 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny", NAMES)


@pytest.fixture(scope="module")
def encoder(model: Path) -> Encoder:
    return Encoder(model)


@pytest.fixture(scope="module")
def experiments(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiments:
    """Run the whole study, at full counts only."""
    if request.config.getoption("--scale") != "full":
        pytest.skip("it trains six encoders: in make soak")
    settings = TrainingSettings(num_epochs=1, learning_rate=3e-3)
    experiments = Experiments(STUDY, Workspace(tmp_path_factory.mktemp("paper")), model, settings)
    for steps in stages(experiments):
        run_steps(steps, 0.001, Console(quiet=True))
    return experiments


def stages(experiments: Experiments) -> list[list[Step]]:
    return [[*experiments.ranking_steps(), draws_step(experiments)]]


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


@at_full_counts
def test_the_best_encoder_is_the_one_that_ranks_the_choice_queries_best(experiments: Experiments) -> None:
    shares = {}
    for seed in range(2):
        rows = pq.read_table(experiments.rows / f"ranks-share40-seed{seed}.parquet").to_pylist()
        places = [row["own"] for row in rows if row["part"] == "choice" and row["score"] == "cosine"]
        shares[f"share40-seed{seed}"] = np.mean([place == 1 for place in places])
    assert shares[experiments.choose_best()] == max(shares.values())
    assert experiments.encoder(BEST).identity == experiments.encoder(experiments.choose_best()).identity


@at_full_counts
def test_an_encoder_that_saw_everything_has_no_unseen_tasks(folder: Path) -> None:
    rankings = Rankings(folder)
    everything = rankings.groups()["100 %"]
    assert rankings.top(everything, "cosine", 1, "seen") == rankings.top(everything, "cosine", 1)
    assert rankings.top(everything, "cosine", 1, "unseen") is rankings.gain(everything, "cosine", 1) is None
    assert rankings.top([UNTRAINED], "cosine", 1, "seen") is None


@at_full_counts
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


@at_full_counts
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
    with monkeypatch.context() as changed, pytest.raises(TreeChanged):
        changed.setattr(results_file, "commit", lambda: "0123456789ab+")
        write_tables(folder)
    assert (folder / "retrieval.md").read_text() == section
    assert section.startswith("## Retrieval\n")
    assert section.count("| 40 % | 2 |") == 3
    assert "Not measured yet: projections.\n" in section  # a command of its own measures them
    ranks = folder / "retrieval_ranks.parquet"
    whole = pq.read_table(ranks)
    pq.write_table(whole.filter(pc.field("encoder") != "share100-seed0"), ranks)
    write_tables(folder)
    assert (folder / "retrieval.md").read_text().endswith("Not measured yet: share100-seed0, projections.\n")
    pq.write_table(whole, ranks)
