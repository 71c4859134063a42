"""The reference without training, among the encoders by share."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper.answering.study import Study
from benchmarks.paper.common.tasks import Parts
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.stages.shares import projected
from benchmarks.training.bigbench_tasks import Item
from retriever_svc import Encoder
from tests.benchmarks.tiny_study import SPECS
from tests.tiny_encoder import save_tiny_encoder, topic_texts

NAMES = [f"topic{number:02}_" for number in range(20)]


def test_the_projection_is_fitted_to_the_samples_of_the_pool_alone(tmp_path: Path) -> None:
    encoder = Encoder(save_tiny_encoder(tmp_path / "tiny", NAMES))
    samples, others = (topic_texts(12, seed=seed, topics=NAMES) for seed in (0, 1))

    def study(others: dict[str, list[str]]) -> Study:
        parts = {
            name: Parts(*[tuple(Item(text, ("",)) for text in own[name]) for own in (others, samples, others, others)])
            for name in NAMES
        }
        return Study(Workspace(tmp_path), dict.fromkeys(NAMES, SPECS[0]), parts, None)

    found = projected(encoder, study(others))
    assert found.projection is not None and found.identity.startswith(encoder.identity)
    assert found.identity == projected(encoder, study(samples)).identity != encoder.identity
