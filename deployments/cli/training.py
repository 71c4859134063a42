"""`loraretriever train-retriever`: an encoder fine-tuned to tell a pool's tasks apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deployments.cli.client import fail

commands = typer.Typer()


@commands.command("train-retriever")
def train_retriever(
    target: Annotated[Path, typer.Argument(help="the new encoder's folder, for the setting `retrieval.encoder`")],
    store: Annotated[str | None, typer.Option(help="train on the samples of this store's adapters")] = None,
    tenant: Annotated[str, typer.Option(help="whose adapters of the store, beside the public ones")] = "local",
    samples: Annotated[Path | None, typer.Option(help='or on a file of lines {"task": name, "text": text}')] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="of the adapters or tasks, drawn by the seed")] = 1.0,
    seed: Annotated[int, typer.Option(help="draws the share, the pairs and their order")] = 0,
    encoder: Annotated[str | None, typer.Option(help="what to start from; else the default encoder")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="how often every sample is an anchor")] = 3,
) -> None:
    """Train the encoder on samples that belong together, as the paper does; a server's pool then needs `reindex`."""
    if (store is None) == (samples is None):
        fail("train on either --store or --samples")
    from deployments.cli.run_training import Wanted, run_training  # torch takes seconds to import

    wanted = Wanted(target, store, tenant, samples, share, seed, encoder, epochs)
    if code := run_training(wanted):
        raise typer.Exit(code)
