from __future__ import annotations

from typing import cast

import numpy as np

from benchmarks.paper.retrieval.projected import Others
from benchmarks.paper.retrieval.study import Task
from benchmarks.routing.instruction import encoders, rows_of
from retriever_svc import Encoder, ProjectionFiles
from retriever_svc.encoder import INSTRUCTION
from tests.benchmarks.routing.test_abstention import OWN, SAMPLES
from tests.retriever_svc.projectable import Projectable
from tests.retriever_svc.test_whitening import DIM, hits, texts_of, world


def test_both_encoders_are_measured_with_and_without_a_projection_of_their_own() -> None:
    groups = world()
    texts = texts_of(groups)
    samples = {f"task-{place}": own for place, own in enumerate(texts)}
    loaded: list[str] = []

    def load(instruction: str) -> Encoder:
        loaded.append(instruction)
        turned = [rows[:, ::-1] if instruction else rows for rows in groups]
        table = {t: row for own, rows in zip(texts, turned, strict=True) for t, row in zip(own, rows, strict=True)}
        return cast(Encoder, Projectable(table, DIM, f"with {instruction or 'nothing'}"))

    found = list(encoders(samples, load))
    assert loaded == [INSTRUCTION, ""]
    assert [(name, projection) for name, projection, _ in found] == [
        *(("paper", "none"), ("paper", "refit")),
        *(("none", "none"), ("none", "refit")),
    ]
    first, second = (encoder.projection for _, projection, encoder in found if projection == "refit")
    assert first is not None and second is not None
    queries = world(seed=0, count=len(groups[0]))
    plain, projected = hits(groups, queries), hits(*[[second.project(rows) for rows in g] for g in (groups, queries)])
    assert projected > plain
    assert not np.allclose(first.project(groups[0]), second.project(groups[0]))


def test_only_choice_questions_and_everyday_prompts_are_read(encoder: Encoder) -> None:
    questions = dict(OWN)
    tasks = [
        Task(
            name, "c", tuple(samples), (), tuple(text for text in questions if questions[text] == name), ("never read",)
        )
        for name, samples in SAMPLES.items()
    ]
    others = Others({"choice": ["Who painted the Sistine Chapel?"] * 6, "test": ["never read"]}, ["Good morning!"])
    projected = encoder.projected(ProjectionFiles().shipped(encoder.identity))
    [row] = rows_of(tasks, others, [("paper", "packaged", projected)])
    assert (row["questions"], row["top1"]) == (2, 1.0)
    assert row["foreign_auroc"] == row["everyday_auroc"] == 1.0
    shares = {name: value for name, value in row.items() if isinstance(value, float)}
    assert set(shares) == {"top1", "kept", "foreign_to_base", "foreign_auroc", "everyday_to_base", "everyday_auroc"}
    assert all(0 <= value <= 1 for value in shares.values())
