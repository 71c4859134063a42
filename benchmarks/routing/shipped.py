"""Make the files that ship with the packaged encoder: its projection, and its vectors of the ordinary prompts.

`python -m benchmarks.routing.shipped` downloads BIG-bench (358 MB, once) and writes into `retriever_svc/data`. The
projection is fitted to two kinds of tasks. `worded`: those of the wording benchmark's `train` and `tune` pools, each in
several wordings and languages. `plain`: tasks of BIG-bench of families of which neither the study nor the starter pool
has a task, as clients send their inputs: without their options, and with them. The weights of the two kinds and of the
identity were chosen on `tune` pools that the fit left out.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, Workspace, fetch_archive
from benchmarks.routing.wording_pools import REWORDED, read_pools, trained_tasks
from benchmarks.training.bigbench_tasks import read_specs, task_rng
from retriever_svc import BulkEncoding, Encoder, Whitening
from retriever_svc.ordinary_prompts import ordinary_prompts
from retriever_svc.projection_files import ordinary_file, shipped_file

NUM_PLAIN, NUM_SHOWN = 20, 40  # inputs of each task, without their options and with them
MIN_EXAMPLES = 10
WORDED_SHARE, IDENTITY_SHARE = 0.7, 0.5
TEXTS_OF_TASK = 24  # of the `train` pool
NUM_SAMPLES = 9  # of an adapter of a `tune` pool, besides its prompts
MAX_OF_FAMILY = 8  # tasks; two families have hundreds of near copies
MAX_CHARS = 4000
_PREFIX, _SUFFIX = "bigbench/benchmark_tasks/", "/task.json"
STARTER_TASKS = Path(__file__).parents[2] / "examples" / "starter_tasks.yaml"
out = Console(soft_wrap=True)


def known_paths() -> set[str]:
    """Return the files of all tasks that a pool or a test of this repository uses."""
    listed = read_task_list()
    return {spec.path for spec in (*listed.tasks, *listed.spares, *read_specs(STARTER_TASKS))}


def family_of(path: str) -> str:
    """Return the top folder of a task, which its variants share."""
    return path.removeprefix(_PREFIX).partition("/")[0]


def other_tasks(archive: Path) -> dict[str, list[str]]:
    """Return inputs of each task outside the known families: two groups, without options and with them."""
    families, examples = {family_of(path) for path in known_paths()}, dict(sorted(_read_examples(archive)))
    counts: Counter[str] = Counter()
    chosen = {}
    for name, own in examples.items():
        family = family_of(name)
        counts[family] += 1
        if family not in families and counts[family] <= MAX_OF_FAMILY:
            chosen[f"{name}, plain"] = plain_inputs(name, own)[:NUM_PLAIN]
            chosen[f"{name}, shown"] = shown_inputs(name, own)[:NUM_SHOWN]
    return chosen


def _read_examples(archive: Path) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yield (name, examples with a text as input) of every task of enough inputs in the source distribution."""
    with tarfile.open(archive) as source:
        for member in source:
            path = member.name.partition("/")[2]
            if not path.startswith(_PREFIX) or not path.endswith(_SUFFIX):
                continue
            stream = source.extractfile(member)
            assert stream is not None
            examples = json.load(stream).get("examples", [])
            texts = {e["input"] for e in examples if isinstance(e.get("input"), str) and e["input"].strip()}
            if len(texts) >= MIN_EXAMPLES:
                yield path.removeprefix(_PREFIX).removesuffix(_SUFFIX), examples


def plain_inputs(name: str, examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the distinct inputs in a random order that depends on the task's name."""
    inputs = [example.get("input") for example in examples]
    texts = list(dict.fromkeys(text for text in inputs if isinstance(text, str) and text.strip()))
    task_rng(name).shuffle(texts)
    return [text.strip()[:MAX_CHARS] for text in texts]


def shown_inputs(name: str, examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the distinct inputs in a random order that depends on the task's name, with their options in another."""
    rng, mixed = random.Random(name), list(examples)
    rng.shuffle(mixed)
    texts = []
    for example in mixed:
        text, options = example.get("input"), list(example.get("target_scores") or {})
        if isinstance(text, str) and text.strip():
            rng.shuffle(options)
            shown = "".join(f"\n- {option}" for option in options)
            texts.append((f"{text.strip()}\nOPTIONS:{shown}" if options else text.strip()).strip()[:MAX_CHARS])
    return list(dict.fromkeys(texts))


def worded_tasks() -> list[list[str]]:
    """Return texts of each task of the `train` and `tune` pools, in several wordings and languages."""
    groups = list(trained_tasks(TEXTS_OF_TASK))
    for pool in read_pools("tune"):
        for adapter in pool.adapters if "__" not in pool.adapters[0].name else ():
            own = [prompt.text for prompt in pool.of_kind(*REWORDED) if prompt.own == adapter.name]
            groups.append([*own, *adapter.samples("three")[:NUM_SAMPLES]])
    return groups


def fit(encoder: Encoder, worded: Sequence[Sequence[str]], plain: Sequence[Sequence[str]]) -> Whitening:
    """Fit the projection. It needs no folds, since its tasks are in no pool."""
    (mean, within), (plain_mean, plain_within) = (_moments(encoder, groups) for groups in (worded, plain))
    mean, within = _mixed(mean, plain_mean), _mixed(within, plain_within)
    level = np.trace(within) / len(within)
    shrunk = (1 - IDENTITY_SHARE) * within + IDENTITY_SHARE * level * np.eye(len(within))
    matrix = np.linalg.cholesky(np.linalg.inv(shrunk))
    rows = np.asarray(mean, np.float32), np.asarray(matrix, np.float32)
    fitted = Whitening(encoder.identity, *rows, np.empty((0, *matrix.shape), np.float32))
    return Whitening.from_bytes(fitted.to_bytes())  # as every replica will read it


def _moments(encoder: Encoder, groups: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (D,) of the groups' means, and the covariance (D, D) within the groups."""
    vectors = [np.asarray(BulkEncoding(encoder, texts).encode_all(), np.float64) for texts in groups]
    centred = [rows - rows.mean(axis=0) for rows in vectors]
    freedom = sum(len(rows) - 1 for rows in vectors)
    return np.mean([rows.mean(axis=0) for rows in vectors], axis=0), sum(rows.T @ rows for rows in centred) / freedom


def _mixed(worded: np.ndarray, plain: np.ndarray) -> np.ndarray:
    return WORDED_SHARE * worded + (1 - WORDED_SHARE) * plain


def main(root: Path = DEFAULT_ROOT) -> None:
    """Write both files and name the tasks."""
    encoder = Encoder()
    tasks = other_tasks(fetch_archive(Workspace(root)))
    fitted = fit(encoder, worded_tasks(), list(tasks.values()))
    shipped_file(encoder.identity).write_bytes(fitted.to_bytes())
    vectors = BulkEncoding(encoder, ordinary_prompts()).encode_all()
    shipped_file(f"{encoder.identity}.ordinary").write_bytes(ordinary_file(vectors))
    names = [name.removesuffix(", plain") for name in tasks if name.endswith(", plain")]
    out.print(f"{len(names)} tasks of {len({family_of(name) for name in names})} families: {', '.join(names)}")
    out.print(f"projection {fitted.identity}")


if __name__ == "__main__":
    typer.run(main)
