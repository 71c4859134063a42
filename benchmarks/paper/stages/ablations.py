"""Measure how many adapters to compose, and with which weights: `python -m benchmarks.paper.stages.ablations`."""

from __future__ import annotations

from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.stages.answers import Claim
from benchmarks.paper.stages.stage import Stage, answer_over_pool, run

NUM_ADAPTERS = (1, 2, 3, 5, 8, 10, 15)
_MASKED = {"iid": False, "ood": True}


def make_arms() -> dict[str, Routed]:
    """Return mixture and fusion of each number of adapters, and the mixture with softmax weights of the scores."""
    found = {
        f"{strategy}_k{number}_{pool}": Routed(strategy, number, masks_own=masked)
        for number in NUM_ADAPTERS
        for strategy in ("mixture", "fusion")
        for pool, masked in _MASKED.items()
    }
    return found | {f"softmax_{pool}": Routed("mixture", 3, "softmax", masked) for pool, masked in _MASKED.items()}


STAGE = Stage(
    name="ablations",
    title="How many adapters, and their weights",
    note="`k`: the number of adapters, with equal weights; `softmax`: three, weights softmax(score / 0.05).",
    rows=answer_over_pool(lambda _: make_arms()),
    claims=(
        Claim("Three in a mixture are at least as good as one.", "mixture_k3_iid", "mixture_k1_iid", "at least"),
        Claim("Three in a mixture are better than one, out of distribution.", "mixture_k3_ood", "mixture_k1_ood"),
        Claim("With fifteen, fusion is worse than the mixture.", "mixture_k15_iid", "fusion_k15_iid"),
        Claim("Softmax weights are better than equal ones.", "softmax_iid", "mixture_k3_iid"),
    ),
    per_task=20,
)

if __name__ == "__main__":
    run(STAGE)
