"""All stages share one budget of bytes: a stage without room waits its turn, or gets a 503."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deployments.api.adapters import PublishItem
from deployments.api.error_table import describe
from deployments.errors import UploadMemoryFull
from deployments.publishing.source_folders import ByteBudget, folder_of


def test_eight_stagers_never_exceed_the_budget() -> None:
    budget, most, lock = ByteBudget(100, 30.0), 0, threading.Lock()
    taken = 0

    def stage(num_bytes: int) -> None:
        nonlocal taken, most
        with budget.taken(num_bytes):
            with lock:
                taken += num_bytes
                most = max(most, taken)
            time.sleep(0.002)
            with lock:
                taken -= num_bytes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(stage, [60, 30, 45, 100, 10, 5, 70, 40] * 4))
    assert 60 <= most <= 100
    assert (budget.num_taken, budget.most_taken) == (0, most)


def test_a_stage_without_room_in_time_is_a_503_with_the_budgets_size() -> None:
    budget = ByteBudget(100, 0.01)
    with budget.taken(80):
        with pytest.raises(UploadMemoryFull) as caught, budget.taken(21):
            pass
        with budget.taken(20):
            pass
    status, body = describe(caught.value)
    assert (status, "100 bytes" in body["error"]["message"]) == (503, True)
    with budget.taken(100):
        pass


def test_a_large_stage_is_not_overtaken_by_small_ones() -> None:
    budget, order = ByteBudget(100, 30.0), []
    began = threading.Event()

    def large() -> None:
        began.set()
        with budget.taken(100):
            order.append("large")

    def small() -> None:
        with budget.taken(10):
            order.append("small")

    with budget.taken(50):
        threads = [threading.Thread(target=large)]
        threads[0].start()
        assert began.wait(10)
        while len(budget._waiting) < 1:
            time.sleep(0.001)
        threads.append(threading.Thread(target=small))
        threads[1].start()
        while len(budget._waiting) < 2:
            time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert order == ["large", "small"]


def test_a_stage_above_the_budget_runs_alone() -> None:
    budget = ByteBudget(100, 0.01)
    with budget.taken(1000):
        assert budget.num_taken == 100


def test_uploads_folders_and_sources_count_until_they_are_staged(tmp_path: Path) -> None:
    folder = tmp_path / "pool" / "poet"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(b"x" * 30)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 20)
    (folder / "optimizer.pt").write_bytes(b"x" * 999)
    prefixes = [f"file://{tmp_path}/pool"]
    cases = {
        "upload": (PublishItem(name="x", files={"a": b"x" * 50}), 50),
        "folder": (PublishItem(folder), 50),
        "source": (PublishItem(source=f"file://{folder}"), 50),
    }
    budget = ByteBudget(60, 0.01)
    for upload, num_bytes in cases.values():
        with folder_of(upload, prefixes, 1000, budget):
            assert budget.num_taken == num_bytes
            with pytest.raises(UploadMemoryFull), folder_of(upload, prefixes, 1000, budget):
                pass
        assert budget.num_taken == 0
    assert len(cases) == 3
