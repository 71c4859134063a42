from __future__ import annotations

import numpy as np
import pytest

from retriever_svc.encoder import unit_rows
from retriever_svc.refit_gain import RefitGain, refit_gain
from retriever_svc.whitening import Whitening, fit_whitening
from tests.retriever_svc.projectable import Projectable
from tests.retriever_svc.test_whitening import DIM, SAMPLES, TASKS, texts_of, world


def encoder_of(projection: Whitening | None = None) -> Projectable:
    return Projectable({}, dim=DIM, identity="plain").projected(projection)


def slow_hits(groups: list[np.ndarray], texts: list[list[str]], projection: Whitening | None) -> list[bool]:
    """Rank every sample against adapters without it, in a space without its text."""
    spaces = {"": groups}
    if projection is not None:
        every = [text for own in texts for text in own]
        rows = np.concatenate(groups)
        for held_out, projected in projection.held_out(rows, every):
            split = list(np.split(projected, np.cumsum([len(group) for group in groups])[:-1]))
            spaces |= {text: split for text, is_out in zip(every, held_out, strict=True) if is_out}
    hits = []
    for task, own in enumerate(texts):
        for place, text in enumerate(own):
            space = spaces.get(text, spaces[""])
            rest = [np.delete(rows, place, axis=0) if other == task else rows for other, rows in enumerate(space)]
            scores = [unit_rows(rows.sum(axis=0)) @ space[task][place] for rows in rest]
            hits.append(int(np.argmax(scores)) == task)
    return hits


@pytest.mark.parametrize("has_projection", [False, True])
def test_the_gain_equals_a_slow_loop(has_projection: bool) -> None:
    groups = world(num_tasks=12)
    texts = texts_of(groups)
    current = fit_whitening("plain", world(seed=3, num_tasks=12)) if has_projection else None
    gain = refit_gain(encoder_of(current), groups, texts, None)
    now = np.asarray(slow_hits(groups, texts, current))
    then = np.asarray(slow_hits(groups, texts, fit_whitening("plain", groups, texts)))
    expected = RefitGain(len(now), int(now.sum()), int((then & ~now).sum()), int((now & ~then).sum()))
    assert gain == expected
    assert gain.num_refitted == then.sum()


def test_a_refit_pays_once_and_where_samples_spread_in_directions_that_tasks_share() -> None:
    groups = world()
    texts = texts_of(groups)
    gain = refit_gain(encoder_of(), groups, texts, None)
    assert gain is not None
    assert (gain.num_samples, gain.pays) == (TASKS * SAMPLES, True)
    assert gain.num_refitted > 1.5 * gain.num_first
    again = refit_gain(encoder_of(fit_whitening("plain", groups, texts)), groups, texts, None)
    assert again is not None
    assert (again.num_won, again.num_lost, again.pays) == (0, 0, False)
    rng = np.random.default_rng(4)
    noise = [unit_rows(rng.standard_normal((20, DIM)).astype(np.float32)) for _ in range(20)]
    without_structure = refit_gain(encoder_of(), noise, texts_of(noise), None)
    assert without_structure is not None and not without_structure.pays


@pytest.mark.parametrize(
    ("won", "lost", "pays"), [(9, 0, False), (10, 0, True), (30, 20, False), (200, 180, False), (60, 20, True)]
)
def test_a_gain_must_be_a_percent_and_more_than_chance(won: int, lost: int, pays: bool) -> None:
    assert RefitGain(1000, 800, won, lost).pays is pays


def test_a_pool_that_is_too_small_is_not_measured() -> None:
    groups = world(num_tasks=9)
    assert refit_gain(encoder_of(), groups, texts_of(groups), None) is None  # 180 samples
    assert (
        refit_gain(encoder_of(), world(count=300, num_tasks=1), texts_of(world(count=300, num_tasks=1)), None) is None
    )
    assert refit_gain(encoder_of(), [], [], None) is None
