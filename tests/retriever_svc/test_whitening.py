from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from retriever_svc.calibration import leave_one_out_scores
from retriever_svc.encoder import unit_rows
from retriever_svc.errors import ProjectionUnusable
from retriever_svc.whitening import MIN_SAMPLES, NUM_FOLDS, Whitening, fit_whitening, fold_of_text, split_identity

DIM, TASKS, SAMPLES = 12, 30, 20


def world(seed: int = 0, count: int = SAMPLES, num_tasks: int = TASKS) -> list[np.ndarray]:
    """Tasks that differ in the last dimensions, with samples that spread much more in the first ones."""
    rng = np.random.default_rng(seed)
    spread = np.where(np.arange(DIM) < 4, 1.0, 0.1)
    centres = 0.3 * rng.standard_normal((num_tasks, DIM)) * (np.arange(DIM) >= 4) + 2 * np.eye(DIM)[5]
    return [unit_rows(centre + spread * rng.standard_normal((count, DIM))).astype(np.float32) for centre in centres]


def texts_of(groups: list[np.ndarray]) -> list[list[str]]:
    return [[f"text {number} of {task}" for number in range(len(rows))] for task, rows in enumerate(groups)]


def hits(groups: list[np.ndarray], queries: list[np.ndarray]) -> float:
    means = np.stack([unit_rows(rows.mean(axis=0)) for rows in groups])
    return float(np.mean([(rows @ means.T).argmax(axis=1) == task for task, rows in enumerate(queries)]))


def test_a_projection_equals_a_slow_loop() -> None:
    groups = world()
    fitted = fit_whitening("plain", groups)
    mean = np.mean([rows.mean(axis=0) for rows in groups], axis=0)
    within = np.zeros((DIM, DIM))
    for rows in groups:
        for row in rows - rows.mean(axis=0):
            within += np.outer(row, row)
    freedom = TASKS * (SAMPLES - 1)
    within = (within + 50 * np.trace(within) / freedom / DIM * np.eye(DIM)) / (freedom + 50)
    root = np.linalg.cholesky(np.linalg.inv(within))
    np.testing.assert_allclose(fitted.project(groups[3]), unit_rows((groups[3] - mean) @ root), atol=5e-3)


def test_unseen_prompts_find_their_task_better_in_the_projected_space() -> None:
    groups = world()
    queries, rest = [rows[:10] for rows in groups], [rows[10:] for rows in groups]
    fitted = fit_whitening("plain", world(seed=1, num_tasks=60))  # of other tasks
    project = fitted.project
    assert hits(rest, queries) < 0.5
    assert hits([project(rows) for rows in rest], [project(rows) for rows in queries]) > 0.8


def test_own_scores_of_fitted_samples_are_as_low_as_those_of_new_ones() -> None:
    rng = np.random.default_rng(2)
    centres = np.repeat(rng.standard_normal((25, 1, 96)), 20, axis=1)  # few samples for this many dimensions
    every = unit_rows((centres + rng.standard_normal(centres.shape)).astype(np.float32))
    groups, fresh = list(every[:, :10]), list(every[:, 10:])
    texts = texts_of(groups)
    fitted = fit_whitening("plain", groups, texts)
    naive, new = (np.mean([leave_one_out_scores(fitted.project(rows)) for rows in part]) for part in (groups, fresh))
    folded = np.mean([fitted.own_scores(rows, own) for rows, own in zip(groups, texts, strict=True)])
    assert naive > new + 0.05
    assert folded == pytest.approx(new, abs=0.02)


def test_a_score_comes_from_the_matrix_made_without_its_text() -> None:
    groups = world()
    texts = texts_of(groups)
    fitted = fit_whitening("plain", groups, texts)
    assert fitted.folds.shape == (NUM_FOLDS, DIM, DIM)
    scores = fitted.own_scores(groups[2], texts[2])
    for number, text in enumerate(texts[2]):
        fold = fold_of_text(text)
        without = [
            np.asarray([row for row, t in zip(rows, own, strict=True) if fold_of_text(t) != fold])
            for rows, own in zip(groups, texts, strict=True)
        ]
        matrix = fit_whitening("plain", without).matrix
        space = replace(fitted, matrix=matrix, folds=np.empty((0, DIM, DIM), np.float32))
        expected = leave_one_out_scores(space.project(groups[2]))[number]
        assert scores[number] == pytest.approx(expected, abs=5e-3)
    assert len(fitted.own_scores(groups[0][:1], texts[0][:1])) == 0


def test_without_folds_own_scores_are_those_of_the_projected_rows() -> None:
    groups = world()
    fitted = fit_whitening("plain", groups)
    expected = leave_one_out_scores(fitted.project(groups[0]))
    np.testing.assert_array_equal(fitted.own_scores(groups[0], ["any"] * SAMPLES), expected)


@pytest.mark.parametrize("count", [10, 100])
def test_with_a_prior_the_covariance_is_shrunk_towards_that_of_the_prior_alone(count: int) -> None:
    groups, prior = world(count=count), fit_whitening("plain", world(seed=7))
    fitted = fit_whitening("plain", groups, prior=prior)
    centred = np.concatenate([rows - rows.mean(axis=0) for rows in groups]).astype(np.float64)
    of_prior = np.linalg.inv(prior.matrix.astype(np.float64) @ prior.matrix.T)
    within = (centred.T @ centred + 200 * of_prior) / (TASKS * (count - 1) + 200)
    mean = np.mean([rows.mean(axis=0) for rows in groups], axis=0)
    mean = (TASKS * count * mean + 200 * prior.mean) / (TASKS * count + 200)
    expected = unit_rows((groups[3] - mean) @ np.linalg.cholesky(np.linalg.inv(within)))
    np.testing.assert_allclose(fitted.project(groups[3]), expected, atol=5e-3)


def test_a_projection_is_read_as_it_was_written_and_named_by_its_content() -> None:
    fitted = fit_whitening("plain", world(), texts_of(world()))
    again = Whitening.from_bytes(fitted.to_bytes())
    assert again.identity == fitted.identity == fit_whitening("plain", world(), texts_of(world())).identity
    for name in ("mean", "matrix", "folds"):
        np.testing.assert_array_equal(getattr(again, name), getattr(fitted, name))
    assert split_identity(fitted.identity) == ("plain", fitted.digest[:16])
    assert split_identity("plain") == ("plain", "")
    assert fit_whitening("plain", world(seed=1)).identity != fitted.identity


@pytest.mark.parametrize("damage", [lambda d: d[:100], lambda d: b"", lambda d: d.replace(b"folds", b"folde")])
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes]) -> None:
    data = fit_whitening("plain", world()).to_bytes()
    with pytest.raises(ProjectionUnusable, match="damaged"):
        Whitening.from_bytes(damage(data))
    fitted = Whitening.from_bytes(data)
    with pytest.raises(ProjectionUnusable, match="disagree"):
        Whitening.from_bytes(replace(fitted, mean=fitted.mean[:-1]).to_bytes())


def test_too_few_samples_are_refused() -> None:
    groups = [*world(count=MIN_SAMPLES // TASKS), *(rows[:1] for rows in world())]
    with pytest.raises(ProjectionUnusable, match=f"at least {MIN_SAMPLES} samples, but these adapters have 180"):
        fit_whitening("plain", groups)


def test_a_rows_projection_does_not_depend_on_its_batch() -> None:
    rows = np.random.default_rng(3).standard_normal((240, 96)).astype(np.float32)
    fitted = fit_whitening("encoder", np.split(rows, 12))
    assert np.array_equal(fitted.project(rows), np.concatenate([fitted.project(row[None]) for row in rows]))
