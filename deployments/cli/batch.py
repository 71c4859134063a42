"""`loraretriever batch`: many prompts offline, through Ray Data and without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command()
def batch(
    source: Annotated[str, typer.Argument(metavar="IN.parquet", help="a file, a folder of files, s3:// or gs://")],
    target: Annotated[str, typer.Argument(metavar="OUT.parquet", help="a folder of parts, which a run continues")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; see deployments/config/app.py")] = None,
    store: Annotated[str | None, typer.Option(help="the pool, in place of the settings' store_uri")] = None,
    tenant: Annotated[str, typer.Option(help="whose adapters, beside the public ones")] = "local",
    model: Annotated[str | None, typer.Option(help="of rows that name none: auto, the base, an adapter")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="of rows that say nothing of it")] = None,
    temperature: Annotated[float | None, typer.Option(help="of rows that say nothing of it")] = None,
    strategy: Annotated[str | None, typer.Option(help="of rows whose lora names none")] = None,
    k: Annotated[int | None, typer.Option(help="how many adapters, where a row's lora does not say")] = None,
    weights: Annotated[str | None, typer.Option(help="uniform or softmax, where a row's lora does not say")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="engines at work")] = 1,
    part_rows: Annotated[int, typer.Option(min=1, help="rows of a part: what a crash costs, at most twice")] = 256,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster; without it this machine alone")] = None,
) -> None:
    """Answer every row of a parquet file as the server would; run again, it goes on where it was."""
    from deployments.batch.run import BatchSettings
    from deployments.cli.run_batch import configured, fail, run_batch  # Ray and torch take seconds to import

    said = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
    retrieval = {"strategy": strategy, "k": k, "weights": weights}
    try:
        settings = configured(config, store, {name: value for name, value in retrieval.items() if value is not None})
    except (ValueError, OSError) as exc:
        raise typer.Exit(fail(str(exc))) from exc
    defaults = {name: value for name, value in said.items() if value is not None}
    wanted = BatchSettings(settings, source, target, part_rows, tenant, defaults)
    if code := run_batch(wanted, address=address, concurrency=concurrency):
        raise typer.Exit(code)
