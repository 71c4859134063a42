"""Measure the paper's main table: `python -m benchmarks.paper.stages.main_table`."""

from __future__ import annotations

from benchmarks.paper.answering.methods import MAIN
from benchmarks.paper.common.tasks import NUM_TEST
from benchmarks.paper.stages.answers import Claim
from benchmarks.paper.stages.stage import Stage, answer_over_pool, run

STAGE = Stage(
    name="answers",
    title="The paper's ways to choose and compose adapters",
    note="`iid`: every adapter can be chosen; `ood`: the question's own is masked. `majority`: the better guess.",
    rows=answer_over_pool(lambda _: MAIN, with_guesses=True),
    claims=(
        Claim("Own adapters are better than the base model.", "perfect", "base"),
        Claim("In distribution the mixture is as good as selection.", "mixture_iid", "selection_iid", "equal"),
        Claim("Out of distribution the mixture is better than selection.", "mixture_ood", "selection_ood"),
        Claim("In distribution the mixture is better than fusion.", "mixture_iid", "fusion_iid"),
        Claim("Out of distribution the mixture is better than fusion.", "mixture_ood", "fusion_ood"),
        Claim("Out of distribution the mixture is better than AdapterSoup.", "mixture_ood", "adaptersoup"),
        Claim("Out of distribution the mixture is better than guessing.", "mixture_ood", "majority"),
        Claim("`auto` is at least as good as selection, in distribution.", "auto_iid", "selection_iid", "at least"),
        Claim("`auto` is at least as good as the mixture, out of distribution.", "auto_ood", "mixture_ood", "at least"),
    ),
    per_task=NUM_TEST,
)

if __name__ == "__main__":
    run(STAGE)
