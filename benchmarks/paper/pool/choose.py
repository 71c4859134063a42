"""Choose the adapters of the pool: those that beat guessing on the choice part. Test items are not used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from benchmarks.paper.answering.answers import Asker
from benchmarks.paper.answering.study import Study, load_asker, load_study, scores_by_task, worker_config
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.options import Root
from benchmarks.paper.common.scoring import majority_scores, score
from benchmarks.paper.common.tasks import NUM_CHOICE, TaskList, read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.training.bigbench_tasks import Item, TaskSpec
from lora_store import BASE_PLAN, AdapterRecord, LoraStore, Plan, PlannedAdapter

POOL_FILE = Path(__file__).with_name("pool.json")
_NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Verdict:
    """Scores of a task's own adapter and of the better of its references on the choice part, as shares of 1.

    `margin`: the lower end of the one-sided 95 % interval of own minus reference.
    """

    task: str
    cluster: str
    own: float
    reference: float
    margin: float

    @property
    def is_kept(self) -> bool:
        return self.margin > 0


def verdict(spec: TaskSpec, own: Sequence[float], references: Sequence[Sequence[float]]) -> Verdict:
    """Judge a task. `own` and each of `references` have one score per item, in the same order."""
    reference = max(references, key=sum)
    difference = np.array(own) - np.array(reference)
    chosen = np.random.default_rng(0).integers(0, len(difference), (_NUM_RESAMPLES, len(difference)))
    margin = float(np.quantile(difference[chosen].mean(axis=1), 0.05))
    return Verdict(spec.name, spec.cluster, float(np.mean(own)), float(np.mean(reference)), margin)


def choose_pool(listed: TaskList, verdicts: Mapping[str, Verdict]) -> dict[str, str]:
    """Return, for each task of the pool, the listed task whose place it has.

    That is the task itself, or for a kept spare the place it fills, first one of its cluster. A place without a spare
    stays empty.
    """
    spares = [spec for spec in listed.spares if spec.name in verdicts and verdicts[spec.name].is_kept]
    places = {spec.name: spec.name for spec in listed.tasks if spec.name in verdicts and verdicts[spec.name].is_kept}
    for is_same_cluster in (True, False):
        for spec in listed.tasks:
            if spec.name in places.values():
                continue
            fitting = (s.name for s in spares if s.cluster == spec.cluster or not is_same_cluster)
            if (spare := next((name for name in fitting if name not in places), None)) is not None:
                places[spare] = spec.name
    return places


def empty_places(listed: TaskList, verdicts: Mapping[str, Verdict]) -> list[TaskSpec]:
    """Return the listed tasks whose places are empty."""
    filled = set(choose_pool(listed, verdicts).values())
    return [spec for spec in listed.tasks if spec.name not in filled]


def next_spares(listed: TaskList, verdicts: Mapping[str, Verdict], *, any_cluster: bool = False) -> list[str]:
    """Return an untried spare of the same cluster for every empty place, as far as there are any.

    `any_cluster`: also of other clusters, one of each in turn, first those whose tasks are learnt most often.
    """
    untried = [spec for spec in listed.spares if spec.name not in verdicts]
    if any_cluster:
        untried = [spec for _, _, spec in sorted(_turns(untried, verdicts), key=lambda turn: turn[:2])]
    chosen: list[str] = []
    for place in empty_places(listed, verdicts):
        fitting = [spec.name for spec in untried if any_cluster or spec.cluster == place.cluster]
        chosen += [name for name in fitting if name not in chosen][:1]
    return chosen


def _turns(specs: Sequence[TaskSpec], verdicts: Mapping[str, Verdict]) -> Iterator[tuple[int, float, TaskSpec]]:
    place: Counter[str] = Counter()
    for spec in specs:
        yield place[spec.cluster], -_share_kept(spec.cluster, verdicts), spec
        place[spec.cluster] += 1


def _share_kept(cluster: str, verdicts: Mapping[str, Verdict]) -> float:
    kept = [verdict.is_kept for verdict in verdicts.values() if verdict.cluster == cluster]
    return sum(kept) / max(len(kept), 1)


def own_plan(record: AdapterRecord) -> Plan:
    return Plan("selection", (PlannedAdapter(record.ref, record.weights_digest, 1.0),))


def judge(study: Study, store: LoraStore, asker: Asker, out: Console, per_task: int) -> dict[str, Verdict]:
    """Return every task's verdict, from greedy answers to its choice items."""
    questions = study.questions("choice", per_task)
    snapshot = store.snapshot()
    own = [(question, own_plan(snapshot.resolve("local", question.task))) for question in questions]
    texts = asker.answers(own, out, "own adapters on the choice part")
    base = asker.answers([(question, BASE_PLAN) for question in questions], out, "base model on the choice part")

    def rate(task: str, item: Item, text: str) -> float:
        return score(study.specs[task], item, text)

    own_scores, base_scores = scores_by_task(questions, texts, rate), scores_by_task(questions, base, rate)
    verdicts = {}
    for name, spec in study.specs.items():
        items = study.parts[name].choice[:per_task]
        references = [majority_scores(spec, study.parts[name].train, items), base_scores[name]]
        verdicts[name] = verdict(spec, own_scores[name], references)
    return verdicts


def write_pool(path: Path, places: Mapping[str, str], verdicts: Iterable[Verdict], num_rounds: int) -> None:
    """Write the pool, every verdict behind it, and the number of completed rounds of swaps."""
    rows = [asdict(item) | {"is_kept": item.is_kept} for item in verdicts]
    rounded = [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows
    ]
    lines = ",\n  ".join(json.dumps(row) for row in rounded)
    path.write_text(
        f'{{"rounds": {num_rounds},\n "pool": {json.dumps(dict(places), indent=1)},\n "verdicts": [\n  {lines}\n]}}\n',
        encoding="utf-8",
    )


def read_pool(path: Path = POOL_FILE) -> list[str]:
    """Return the tasks of the pool."""
    return list(json.loads(path.read_text(encoding="utf-8"))["pool"])


def read_rounds(path: Path = POOL_FILE) -> int:
    """Return the number of completed rounds of swaps; 0 if no pool was chosen yet."""
    return int(json.loads(path.read_text(encoding="utf-8"))["rounds"]) if path.exists() else 0


def read_verdicts(path: Path = POOL_FILE) -> dict[str, Verdict]:
    """Return the verdicts by which the pool was chosen."""
    rows = json.loads(path.read_text(encoding="utf-8"))["verdicts"]
    return {row["task"]: Verdict(**{key: value for key, value in row.items() if key != "is_kept"}) for row in rows}


def pool_table(verdicts: Mapping[str, Verdict], places: Mapping[str, str]) -> str:
    """Return a table of every trained adapter: its score on the choice part, and whether it was kept."""
    fates = {
        name: "kept" if name in places else "kept, not needed" if v.is_kept else "not kept"
        for name, v in verdicts.items()
    }
    fates |= {name: f"in place of {place}" for name, place in places.items() if name != place}
    rows = [
        [v.task, v.cluster, percent(v.own), percent(v.reference), f"{100 * v.margin:+.1f}", fates[v.task]]
        for v in verdicts.values()
    ]
    header = ["task", "cluster", "own adapter", "better of guessing and base", "lower bound", ""]
    return table(header, rows)


def write_section(folder: Path, verdicts: Mapping[str, Verdict], places: Mapping[str, str]) -> None:
    """Write the pool's section of the report."""
    words = (
        f"{len(places)} tasks, rank 6, lora_alpha 12, all linear layers of layers 9 to 17. On the choice part, percent;"
        " `lower bound`: of own minus reference, one-sided, 95 %; adapters with a bound above 0 are kept."
    )
    parts = ["## The pool\n", words + "\n", pool_table(verdicts, places)]
    (folder / "pool.md").write_text("\n".join(parts), encoding="utf-8")


def main(
    per_task: Annotated[int, typer.Option(help="choice items per task")] = NUM_CHOICE,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Judge every trained adapter and write benchmarks/paper/pool/pool.json."""
    workspace, listed, out = Workspace(root), read_task_list(), Console(width=120)
    specs = [spec for spec in listed.by_name.values() if (workspace.adapters / spec.name).exists()]
    config = worker_config(len(specs))
    study = load_study(specs, workspace, config)
    asker, store, _ = load_asker(workspace, config, [spec.name for spec in specs])
    verdicts = judge(study, store, asker, out, per_task)
    for item in verdicts.values():
        mark = "kept" if item.is_kept else "[red]not kept"
        out.print(f"{item.task:34} own {item.own:.2f} reference {item.reference:.2f} margin {item.margin:+.2f} {mark}")
    places = choose_pool(listed, verdicts)
    write_pool(POOL_FILE, places, verdicts.values(), read_rounds())
    write_section(PAPER_RESULTS, verdicts, places)
    out.print(f"{len(places)} of {len(listed.tasks)} places are filled")


if __name__ == "__main__":
    typer.run(main)
