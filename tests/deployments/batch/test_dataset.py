"""What a run asks of Ray Data."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import ray
from ray.data import DataContext

from deployments.batch.dataset import answer_parts
from tests.deployments.batching import Place, prompts


def test_a_part_may_take_longer_than_ray_data_waits_for_progress(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 1)
    monkeypatch.setattr(ray.data, "from_items", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        next(answer_parts(place.begin(prompts(1)), concurrency=1))
    assert DataContext.get_current().execution_no_progress_timeout_s == -1
