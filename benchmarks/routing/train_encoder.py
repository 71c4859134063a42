"""Train the packaged encoder to recognise a task in any words: `python -m benchmarks.routing.train_encoder`.

The paper trains its encoder by contrast on tasks; this does so in the way in which `auto` uses it. A step is a pool of
small adapters: some tasks of a few domains, each with two samples of one wording, or with its description. Prompts of
these tasks in other wordings, in other languages and about other contents must be nearer to their own adapter than to
the others and to ordinary prompts.

The training learns a low-rank change of each linear layer, and the projection that follows the encoder. The command
downloads BIG-bench (358 MB, once), takes 20 minutes on two cores that multiply bfloat16, and writes three files into
`retriever_svc/data`. One domain in twelve is not trained on but measured, unless `--held-out 0` says so.

Dims: N texts, A adapters of a step, Q prompts, J ordinary prompts, D dimensions.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.paper.common.workspace import DEFAULT_ROOT, Workspace, fetch_archive
from benchmarks.routing.encoder_network import EncoderNetwork
from benchmarks.routing.training_tasks import Domains, TrainingTask, other_domains, read_domains
from benchmarks.routing.wording_pools import INPUT
from lora_store.location import DEFAULT_CACHE_DIR
from retriever_svc import BulkEncoding, Encoder, Whitening
from retriever_svc.embedding import CORE_WEIGHT
from retriever_svc.ordinary_prompts import bare_words, ordinary_prompts
from retriever_svc.packaged_encoder import NAME, SECOND_FACTOR, TRAINING_FILE, packaged_encoder
from retriever_svc.projection_files import ordinary_file, shipped_file

RANK, RATE, PROJECTION_RATE, WEIGHT_DECAY = 4, 1e-3, 3e-4, 0.01
TEMPERATURE = 0.05
DOMAINS = 6  # in a step
SIBLINGS = 4  # adapters of a domain
SAMPLES, PROMPTS = 2, 2  # of an adapter
ORDINARY, WORDS = 12, 4  # ordinary prompts in a step: sentences, and bare words
BY_DESCRIPTION, BY_TWO_WORDINGS = 0.15, 0.25  # shares of the adapters
DIRECT, IN_OTHER_LANGUAGE = 0.12, 0.2  # shares of the prompts
BUCKETS = 6  # forward passes of a step, by length
WARM_STEPS, REPORTED = 20, 50
KEPT = 0.7  # the share of each change that ships; on the tune pools more prompts were right than with all of it
TASKS_FOR_MEAN = 3  # tasks of each domain whose texts give the mean that the projection subtracts
MAX_NORM = 1.0
out = Console(width=160)


@dataclass
class Step:
    """A small pool with its prompts. Texts are given by their places in `texts`."""

    texts: dict[str, int] = field(default_factory=dict)
    adapters: list[tuple[list[int], list[int]]] = field(default_factory=list)  # samples, and their contents alone
    prompts: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)  # the adapter of each prompt
    ordinary: list[int] = field(default_factory=list)

    def place(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))

    def add_adapter(self, samples: Iterable[str], contents: Iterable[str]) -> None:
        self.adapters.append(([self.place(text) for text in samples], [self.place(text) for text in contents]))

    def add_prompt(self, text: str, own: int) -> None:
        self.prompts.append(self.place(text))
        self.own.append(own)


def make_step(rng: random.Random, domains: Domains) -> Step:
    """Return a pool of tasks of a few domains."""
    step = Step()
    for name in rng.sample(sorted(domains), min(DOMAINS, len(domains))):
        tasks, order = domains[name], rng.random()
        chosen = _choose(rng, tasks)
        for task in chosen:
            contents = list(task.contents)
            random.Random(order).shuffle(contents)  # alike for tasks that share them, so their samples share them too
            _add_task(step, rng, task, contents)
    every = ordinary_prompts()
    is_word = bare_words(len(every))
    for wanted, count in ((False, ORDINARY), (True, WORDS)):
        texts = [text for text, word in zip(every, is_word, strict=True) if word == wanted]
        step.ordinary += [step.place(text) for text in rng.sample(texts, count)]
    return step


def _choose(rng: random.Random, tasks: Sequence[TrainingTask]) -> list[TrainingTask]:
    """Return tasks of one domain; of topics and formats mostly two of each, so that either alone says too little."""
    if tasks[0].topic and rng.random() < 0.7:
        topics = rng.sample(sorted({task.topic for task in tasks}), 2)
        forms = rng.sample(sorted({task.form for task in tasks}), 2)
        return [task for task in tasks if task.topic in topics and task.form in forms]
    return rng.sample(list(tasks), min(SIBLINGS, len(tasks)))


def _add_task(step: Step, rng: random.Random, task: TrainingTask, contents: Sequence[str]) -> None:
    number, samples, rest = len(step.adapters), contents[:SAMPLES], contents[SAMPLES:]
    used: list[str] = []
    kind = rng.random()
    if kind < BY_DESCRIPTION and task.description:
        step.add_adapter([task.description], [task.description])
    else:
        used = rng.sample(task.wordings, min(2 if kind > 1 - BY_TWO_WORDINGS else 1, len(task.wordings)))
        filled = [used[place % len(used)].replace(INPUT, text) for place, text in enumerate(samples)]
        step.add_adapter(filled, samples)
    for _ in range(PROMPTS):
        step.add_prompt(_prompt(rng, task, [text for text in task.wordings if text not in used], rest), number)


def _prompt(rng: random.Random, task: TrainingTask, wordings: Sequence[str], contents: Sequence[str]) -> str:
    kind = rng.random()
    if kind < DIRECT and task.direct:
        return rng.choice(task.direct)
    if kind < DIRECT + IN_OTHER_LANGUAGE and task.other:
        return rng.choice(task.other).replace(INPUT, rng.choice(contents))
    return rng.choice([*wordings, *task.other] or task.wordings).replace(INPUT, rng.choice(contents))


class Training(nn.Module):
    """The network and the projection after it, compared with what a step asks for."""

    def __init__(self, folder: Path, start: Whitening) -> None:
        super().__init__()
        self.network = EncoderNetwork(folder, RANK)
        self.mean = nn.Parameter(torch.tensor(start.mean))
        self._start = torch.tensor(start.matrix)
        self._scale = float(self._start.norm()) / len(self._start) ** 0.5
        self._change = nn.Parameter(torch.zeros_like(self._start))

    @property
    def matrix(self) -> Tensor:
        return self._start + self._scale * self._change

    def kept(self) -> tuple[dict[str, Tensor], np.ndarray]:
        """Return what ships: the share `KEPT` of the changes of the weights and of the change of the matrix."""
        changes = self.network.changes()
        scaled = {name: KEPT * part if name.endswith(SECOND_FACTOR) else part for name, part in changes.items()}
        matrix = torch.lerp(self._start, self.matrix.detach(), KEPT).numpy()
        return {name: part.half().contiguous() for name, part in scaled.items()}, matrix

    def slow_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the projection, which learn more slowly."""
        return [self.mean, self._change]

    def vectors(self, texts: Sequence[str]) -> Tensor:  # (N, D)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        size = math.ceil(len(order) / BUCKETS)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        rows = torch.cat([self.network([texts[place] for place in part]) for part in parts])
        projected = (functional.normalize(rows) - self.mean) @ self.matrix
        return functional.normalize(projected)[torch.tensor(order).argsort()]

    def loss(self, step: Step) -> tuple[Tensor, float]:
        """Return the loss, and the share of prompts whose own adapter is the nearest."""
        rows = self.vectors(list(step.texts))
        weight = CORE_WEIGHT
        means = [(1 - weight) * rows[own].mean(0) + weight * rows[cores].mean(0) for own, cores in step.adapters]
        asked, own = rows[step.prompts], torch.tensor(step.own)
        cosines = asked @ functional.normalize(torch.stack(means)).T  # (Q, A)
        logits = torch.cat([cosines, asked @ rows[step.ordinary].T], 1) / TEMPERATURE  # (Q, A + J)
        return functional.cross_entropy(logits, own), float((cosines.argmax(1) == own).float().mean())


def train(training: Training, domains: Domains, held_out: Domains, steps: int, seed: int) -> None:
    """Train for this many steps, and report the shares of training steps and of pools of the held-out domains."""
    rng = random.Random(seed)
    fixed = random.Random(0)
    pools = [make_step(fixed, held_out) for _ in range(16)] if held_out else []
    slow = training.slow_parameters()
    groups = [{"params": list(training.network.parameters()), "lr": RATE}, {"params": slow, "lr": PROJECTION_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    start, losses, shares = time.monotonic(), list[float](), list[float]()
    for number in range(1, steps + 1):
        loss, first = training.loss(make_step(rng, domains))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(training.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        shares.append(first)
        if number % REPORTED == 0 or number == steps:
            with torch.no_grad():
                held = np.mean([[float(found) for found in training.loss(pool)] for pool in pools], axis=0)
            seconds = (time.monotonic() - start) / number
            found = f"loss {np.mean(losses):.3f}, own adapter first {np.mean(shares):.3f}"
            known = f"; held out {held[0]:.3f}, {held[1]:.3f}" if pools else ""
            out.print(f"{number}: {found}{known}; {seconds:.1f} s a step", highlight=False)
            losses.clear()
            shares.clear()


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARM_STEPS)
    return warm * max(0.02, 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


def write_files(training: Training, texts: Sequence[str], cache_dir: Path) -> str:
    """Write the changes, the projection and the vectors of the ordinary prompts. Return the encoder's identity.

    `texts`: of the tasks. The projection subtracts the mean of their vectors, which the training has moved.
    """
    changes, matrix = training.kept()
    TRAINING_FILE.write_bytes(save(changes))
    encoder = Encoder(dtype="float32", cache_dir=cache_dir)
    mean = BulkEncoding(encoder, texts).encode_all().mean(axis=0)
    projection = Whitening(encoder.identity, mean, matrix, np.empty((0, *matrix.shape), np.float32))
    shipped_file(encoder.identity).write_bytes(projection.to_bytes())
    vectors = BulkEncoding(encoder, ordinary_prompts()).encode_all()
    shipped_file(f"{encoder.identity}.ordinary").write_bytes(ordinary_file(vectors))
    return encoder.identity


def choose_texts(domains: Domains) -> list[str]:
    """Return two texts of three tasks of each domain."""
    rng = random.Random(0)
    texts = []
    for tasks in domains.values():
        for task in rng.sample(list(tasks), min(TASKS_FOR_MEAN, len(tasks))):
            wordings = [*task.wordings, *task.other]
            texts += [rng.choice(wordings).replace(INPUT, rng.choice(task.contents)) for _ in range(2)]
    return texts


def main(
    steps: int = 600,
    seed: int = 1,
    held_out: Annotated[float, typer.Option(help="share of domains that are only reported")] = 1 / 12,
    root: Path = DEFAULT_ROOT,
    cache_dir: Path = DEFAULT_CACHE_DIR,
) -> None:
    """Train, report and write the files."""
    torch.manual_seed(seed)
    domains: dict[str, Sequence[TrainingTask]] = {**read_domains(), **other_domains(fetch_archive(Workspace(root)))}
    names = sorted(domains)
    random.Random(0).shuffle(names)
    kept = {name: domains[name] for name in names[round(held_out * len(names)) :]}
    rest = {name: domains[name] for name in names if name not in kept}
    out.print(f"{sum(map(len, domains.values()))} tasks of {len(domains)} domains, of which {len(rest)} held out")
    start = Encoder(NAME, cache_dir=cache_dir)
    shipped = shipped_file(start.identity)
    training = Training(packaged_encoder(cache_dir, NAME), Whitening.from_bytes(shipped.read_bytes()))
    train(training, kept, rest, steps, seed)
    out.print(f"encoder {write_files(training, choose_texts(read_domains()), cache_dir)}")


if __name__ == "__main__":
    typer.run(main)
