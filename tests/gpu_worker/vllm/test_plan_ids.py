"""Ids of plans: stable while a plan is in use, never used twice, bounded in number."""

from __future__ import annotations

from gpu_worker.vllm.plan_ids import PlanIds


def test_a_path_keeps_its_id_and_other_paths_have_others() -> None:
    ids = PlanIds()
    assert [ids("a"), ids("b"), ids("a"), ids("c"), ids("b")] == [1, 2, 1, 3, 2]


def test_the_path_that_was_not_used_for_the_longest_is_forgotten_and_its_id_is_not_used_again() -> None:
    ids = PlanIds(max_kept=2)
    assert [ids("a"), ids("b"), ids("a"), ids("c")] == [1, 2, 1, 3]
    assert ids("a") == 1
    assert ids("b") == 4
