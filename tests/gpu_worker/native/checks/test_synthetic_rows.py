"""The engine's own requests: they need no prompt, fit every model, and an adapter changes its logits."""

from __future__ import annotations

import torch

from gpu_worker.native.checks.synthetic_rows import (
    DIGEST,
    NUM_ROWS,
    synthetic_adapter,
    synthetic_rows,
    without_adapter,
)
from tests.gpu_worker.engine_driver import MakeEngine


def test_one_row_is_without_the_adapter_and_one_samples(make_engine: MakeEngine) -> None:
    rows = synthetic_rows(make_engine({}).prepare, 20, 3, lambda event: None)
    assert len(rows) == NUM_ROWS
    assert [row.plan.strategy for row in rows] == ["base", "mixture", "fusion"]
    assert [row.draw().is_greedy for row in rows] == [True, False, True]
    assert [row.weights_digests for row in rows] == [[], [DIGEST], [DIGEST]]
    assert without_adapter(rows) == rows[:1]
    for row in rows:
        assert (row.num_prompt_tokens, row.max_new_tokens, row.end_ids) == (20, 3, frozenset())
        assert max(row.tokens) < 8, "these ids exist in every vocabulary"


def test_the_adapter_has_every_module_of_the_bank(make_engine: MakeEngine) -> None:
    bank = make_engine({}).bank
    adapter = synthetic_adapter(bank)
    assert set(adapter.modules) == set(bank.shapes) and len(adapter.modules) == 7 * 3
    assert adapter.max_rank == 1
    for name, (num_out, num_in) in bank.shapes.items():
        module = adapter.modules[name]
        assert (module.a.shape, module.bt.shape) == ((1, num_in), (1, num_out))
        assert bool((torch.cat([module.a, module.bt], dim=1) > 0).all())
