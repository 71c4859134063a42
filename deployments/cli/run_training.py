"""Run `loraretriever pool train`."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from deployments.cli.output import counted, fail, progress, report, show_warning
from deployments.config.loading import load_config
from lora_store import LoraStore, LoraStoreError
from retriever_svc import RetrieverError, TooFewSamples, choose_tasks
from retriever_svc.encoder_files import DEFAULT_MODEL
from retriever_svc.training import TrainingSettings, train_encoder
from retriever_svc.training_pairs import MIN_TEXTS


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """The command line. Either `store` or `samples` is None."""

    target: Path
    store: str | None
    tenant: str
    samples: Path | None
    share: float
    seed: int
    encoder: str | None
    epochs: int


def run_training(job: TrainingJob, *, as_json: bool = False) -> None:
    """Train the encoder. On an error, print it and exit. `as_json`: print an object for scripts."""
    try:
        texts = _read_texts(job)
        started = time.monotonic()
        _train(job, texts)
    except (RetrieverError, LoraStoreError, ValueError, OSError) as exc:
        fail(exc)
    took_s = time.monotonic() - started
    outcome = {"encoder": str(job.target), "tasks": sorted(texts), "seconds": round(took_s, 1)}
    done = f"trained {job.target} on {counted(len(texts), 'task')} in {took_s:.0f} s"
    report(outcome, done, as_json=as_json)


def _read_texts(job: TrainingJob) -> dict[str, list[str]]:
    """Return the texts to train on, by task. Raises: TooFewSamples; ValueError, naming the line of the file."""
    if job.samples is not None:
        texts, source = read_texts(job.samples), str(job.samples)
    else:
        source = load_config(None, store_uri=job.store).store_uri
        texts = stored_texts(source, job.tenant)
    if not texts:
        raise TooFewSamples(f"{source} has no samples to train on")
    return {task: texts[task] for task in choose_tasks(list(texts), job.share, job.seed)}


def stored_texts(store_uri: str, tenant: str) -> dict[str, list[str]]:
    """Return the samples of each adapter that `tenant` can use, by the adapter's name for that tenant.

    Leave out those with too few, as with a description only, and print how many these are.
    """
    store = LoraStore(store_uri, accepts_base=())
    records = [record for record in store.snapshot().records.values() if record.is_visible_to(tenant)]
    texts = {
        record.ref.name_for(tenant): [sample.input for sample in store.samples(record.samples_digest)]
        for record in records
        if record.samples_digest is not None
    }
    enough = {name: own for name, own in texts.items() if len(set(own)) >= MIN_TEXTS}
    if few := len(texts) - len(enough):
        show_warning(f"left out {counted(few, 'adapter')} with fewer than {MIN_TEXTS} different samples")
    return enough


def read_texts(file: Path) -> dict[str, list[str]]:
    """Return the texts of the file by task. Raises: OSError; ValueError, naming the first invalid line."""
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            task, text = _read_line(line, f"{file}:{number}")
            texts[task].append(text)
    return dict(texts)


def _read_line(line: str, place: str) -> tuple[str, str]:
    try:
        raw = json.loads(line)
    except (RecursionError, ValueError) as exc:
        raise ValueError(f"{place}: invalid JSON: {exc}") from exc
    task, text = (raw.get("task"), raw.get("text")) if isinstance(raw, dict) else (None, None)
    if not isinstance(task, str) or not isinstance(text, str) or not task or not text.strip():
        raise ValueError(f'{place}: must be {{"task": name, "text": text}}')
    return task, text


def _train(job: TrainingJob, texts: Mapping[str, Sequence[str]]) -> None:
    settings = TrainingSettings(num_epochs=job.epochs, seed=job.seed)
    title = f"training on {counted(len(texts), 'task')}"
    with progress(title, MofNCompleteColumn(), TimeRemainingColumn()) as update:
        train_encoder(
            texts,
            job.target,
            model=job.encoder or DEFAULT_MODEL,
            settings=settings,
            about={"share": job.share},
            progress=lambda done, total: update(completed=done, total=total),
        )
