"""Measure `auto` as a server has it by default: `python -m benchmarks.paper.stages.defaults`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import pyarrow as pa

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.methods import MAIN, Nearest, Perfect, Routed
from benchmarks.paper.answering.runs import Method, pool_retriever
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.retrieval.projected import projected_encoders
from benchmarks.paper.stages.answers import Claim
from benchmarks.paper.stages.stage import PACKAGED, Context, Loaded, Stage, answer_over_pool, run
from lora_store import Plan
from retriever_svc import Retriever

PLACES = ("selection", "second", "third")
ARMS: dict[str, Method] = {
    "own": Perfect(),
    "auto": Routed("mixture", weighting="evidence", abstains=True),
    "auto_always": MAIN["auto_iid"],
    **{name: Nearest(place) for place, name in enumerate(PLACES)},
}
BEST = "best_of_three"


@dataclass(frozen=True, slots=True)
class Refitted:
    """`auto` with a projection that was fitted to the pool's samples, as after `pool reindex --projection refit`."""

    retriever: Retriever

    @classmethod
    def of(cls, loaded: Loaded) -> Refitted:
        study, asker = loaded.bench.study, loaded.bench.asker
        samples = {name: [item.input for item in study.parts[name].samples] for name in study.specs}
        fitted = dict(projected_encoders(loaded.encoder.projected(None), samples))["refit"]
        return cls(pool_retriever(study, asker, fitted))

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        return ARMS["auto"].plans(self.retriever, questions)


def answer_defaults(context: Context) -> pa.Table:
    """Return the rows of all arms."""
    return add_best(answer_over_pool(lambda loaded: ARMS | {"auto_refit": Refitted.of(loaded)})(context))


def add_best(answered: pa.Table) -> pa.Table:
    """Add the rows of the best of the three nearest adapters for each question."""
    rows = answered.to_pandas()
    three = rows[rows["run"].isin(PLACES)].sort_values("score", ascending=False, kind="stable")
    best = three.drop_duplicates(["task", "number"]).assign(run=BEST)
    return pa.Table.from_pandas(pd.concat([rows, best]), preserve_index=False)


def name_choice(task: str, adapters: Sequence[str], weights: Sequence[float]) -> str:
    """Return what the plan of a question of `task` is led by. A sibling is an adapter of the same cluster."""
    if len(adapters) == 0:
        return "the base model"
    first = max(zip(weights, adapters, strict=True))[1]
    clusters = {name: spec.cluster for name, spec in read_task_list().by_name.items()}
    if first == task:
        return "the own adapter"
    return "a sibling" if clusters.get(first) == clusters.get(task) else "another adapter"


def losses_table(rows: pd.DataFrame) -> str:
    """Return what `auto` loses against the own adapter, by what leads its plan."""
    auto, own = (rows[rows["run"] == run].set_index(["task", "number"]).sort_index() for run in ("auto", "own"))
    chosen = zip(auto.index.get_level_values("task"), auto["adapters"], auto["weights"], strict=True)
    led_by = [name_choice(*choice) for choice in chosen]
    lost = pd.DataFrame({"led_by": led_by, "lost": (own["score"] - auto["score"]).to_numpy()})
    found = lost.groupby("led_by")["lost"]
    cells = [
        [name, percent(len(own) / len(lost)), percent(own.mean()), percent(own.sum() / len(lost))]
        for name, own in found
    ]
    return table(["`auto` is led by", "percent of questions", "points lost of these", "points lost of all"], cells)


STAGE = Stage(
    name="defaults",
    title="`auto` with the server's defaults",
    note="`selection`, `second`, `third`: one of the three nearest adapters; `best of three`: the best of these.",
    rows=answer_defaults,
    claims=(
        Claim("`auto` is at least as good as selection.", "auto", "selection", "at least"),
        Claim("Abstention costs no answers.", "auto", "auto_always", "at least"),
        Claim("A projection fitted to the pool is better than the packaged one.", "auto_refit", "auto"),
        Claim("Choosing rightly among three is better than `auto`.", BEST, "auto"),
    ),
    per_task=25,
    encoder=PACKAGED,
    more=losses_table,
)

if __name__ == "__main__":
    run(STAGE)
