from __future__ import annotations

import numpy as np
import pytest

from benchmarks.paper.retrieval.study import Task
from benchmarks.routing.margins import MARGINS, NEAR, nearness, rows_of, stickiness
from retriever_svc import Encoder
from retriever_svc.encoder import unit_rows


def test_twins_and_others_are_counted_like_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    adapters, twins = (unit_rows(rng.standard_normal((6, 3)).astype(np.float32)) for _ in range(2))
    found = sum(float(twins[i] @ adapters[i]) >= 0.3 for i in range(6)) / 6
    others = sum(float(twins[i] @ adapters[j]) >= 0.3 for i in range(6) for j in range(6) if i != j) / 6
    assert nearness(adapters, twins, 0.3) == pytest.approx((found, others))


def test_an_adapter_stays_within_the_margin_if_it_is_a_candidate() -> None:
    rng = np.random.default_rng(1)
    adapters = unit_rows(rng.standard_normal((6, 4)).astype(np.float32))
    prompts = [unit_rows(rng.standard_normal((5, 4)).astype(np.float32)) for _ in range(6)]
    kept = held = switches = 0
    for own, rows in enumerate(prompts):
        for row in rows:
            scores = [float(row @ vector) for vector in adapters]
            first = sorted(range(6), key=lambda i: -scores[i])
            stays = [place for place in first[:3] if scores[place] >= scores[first[0]] - 0.4]
            kept += own in stays
            for other in range(6):
                if first[0] == own != other:
                    switches += 1
                    held += other in stays
    assert stickiness(adapters, prompts, 0.4) == pytest.approx((kept / 30, held / switches))
    assert 0 < held < switches


def test_a_wider_margin_keeps_more_and_a_lower_nearness_finds_more(encoder: Encoder) -> None:
    texts = {name: [f"{name} number {n}" for n in range(8)] for name in ("the red house", "a sum of", "Berlin street")}
    tasks = [Task(name, "c", tuple(t[:3]), tuple(t[3:6]), tuple(t[6:]), ("never read",)) for name, t in texts.items()]
    rows = rows_of(tasks, [("none", encoder)])
    for kind, values in (("near", NEAR), ("sticky", MARGINS)):
        mine = [row for row in rows if row["margin"] == kind]
        assert [row["value"] for row in mine] == list(values)
        kept = [float(str(row["own"])) for row in mine]
        assert kept == sorted(kept, reverse=kind == "near")
        assert kept[0] > 0.9
