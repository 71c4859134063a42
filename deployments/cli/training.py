"""`loraretriever train-retriever`: fine-tune an encoder for the tasks of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deployments.cli.client import JsonOutcome, fail

commands = typer.Typer()


@commands.command("train-retriever")
def train_retriever(
    target: Annotated[Path, typer.Argument(help="folder for the new encoder; use it as `retrieval.encoder`")],
    store: Annotated[str | None, typer.Option(help="train on the samples of the adapters in this store")] = None,
    tenant: Annotated[str, typer.Option(help="tenant whose private adapters are used too")] = "local",
    samples: Annotated[
        Path | None, typer.Option(help='train on a file of JSON lines {"task": name, "text": text}')
    ] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="share of the adapters or tasks to train on")] = 1.0,
    seed: Annotated[int, typer.Option(help="random seed of the share, the pairs and their order")] = 0,
    encoder: Annotated[str | None, typer.Option(help="encoder to start from; default: the standard encoder")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="number of passes over the samples")] = 3,
    as_json: JsonOutcome = False,
) -> None:
    """Train an encoder as in the paper. Use `reindex` to switch a running server to it."""
    if (store is None) == (samples is None):
        fail("give either --store or --samples")
    from deployments.cli.run_training import TrainingJob, run_training  # torch takes seconds to import

    job = TrainingJob(target, store, tenant, samples, share, seed, encoder, epochs)
    if code := run_training(job, as_json=as_json):
        raise typer.Exit(code)
