"""`loraretriever batch`: answer many prompts offline through Ray Data, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deployments.cli.options import JsonOutcome, Options, read_options
from deployments.cli.output import fail

commands = typer.Typer()


@commands.command()
def batch(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="input: a file, a folder, or an s3:// or gs:// URI")],
    target: Annotated[str, typer.Argument(metavar="OUTPUT", help="output folder; a second run resumes it")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings")] = None,
    store: Annotated[str | None, typer.Option(help="the pool; default: store_uri of the settings")] = None,
    tenant: Annotated[str, typer.Option(help="tenant whose private adapters may be used")] = "local",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="default model: auto, the base model, or an adapter")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="default max_tokens of rows")] = None,
    temperature: Annotated[float | None, typer.Option(help="default temperature of rows")] = None,
    strategy: Annotated[str | None, typer.Option(help="default strategy of rows")] = None,
    k: Annotated[int | None, typer.Option("--k", "-k", help="default number of adapters per row")] = None,
    weights: Annotated[str | None, typer.Option(help="default weights of rows")] = None,
    option: Options = None,
    concurrency: Annotated[int, typer.Option(min=1, help="number of engines")] = 1,
    part_rows: Annotated[int, typer.Option(min=1, help="rows per output part")] = 256,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster; default: this machine only")] = None,
    as_json: JsonOutcome = False,
) -> None:
    """Answer every row of a parquet file as the server would. A second run resumes an interrupted one."""
    from deployments.batch.run import BatchSettings
    from deployments.cli.run_batch import run_batch  # Ray takes seconds to import
    from deployments.config.loading import load_config, require_base_model

    defaults = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
    options = {"strategy": strategy, "strategy_options": read_options(option), "k": k, "weights": weights}
    retrieval = {name: value for name, value in options.items() if value is not None}
    try:
        settings = load_config(config, retrieval=retrieval, **({} if store is None else {"store_uri": store}))
        if address is None:  # a cluster has files of its own
            for served in settings.by_model.values():
                require_base_model(served.base_model, served.worker.engine)
    except (ValueError, OSError) as exc:
        fail(exc)
    given = {name: value for name, value in defaults.items() if value is not None}
    run = BatchSettings(settings, source, target, part_rows, tenant, given)
    run_batch(run, address=address, concurrency=concurrency, as_json=as_json)
