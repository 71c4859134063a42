"""`loraretriever compose`: write a mixture of stored adapters as one PEFT adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from deployments.cli.options import DEFAULT_URL, Url, check_local_folder
from deployments.cli.output import say, show_warning
from deployments.cli.pool_upkeep import Store

commands = typer.Typer()


@commands.command()
def compose(
    name: Annotated[str, typer.Argument(metavar="NAME", help="name of the new adapter and of its folder")],
    adapters: Annotated[
        str, typer.Option(metavar="NAME=WEIGHT,…", help="the adapters with their weights in the mixture")
    ],
    target: Annotated[
        Path, typer.Option("--out", callback=check_local_folder, help="folder that gets the new adapter's folder")
    ] = Path(),
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="approximate with at most this rank; default: the sum of the ranks, which is exact"),
    ] = None,
    store: Store = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Write a mixture of adapters as one PEFT folder, which gives the answers of `strategy: mixture`.

    `strategy: fusion` averages the parameters instead of the outputs, so its answers differ. A server gives the
    adapters of its key's tenant, and the key needs the role admin.
    """
    weights = _weights_in(adapters)
    from deployments.cli.pool_transfer import open_pool, read_modules, write_contract  # torch takes seconds to import
    from lora_store import is_valid_name, write_peft_folder
    from lora_store.composition import compose

    if not is_valid_name(name):
        raise typer.BadParameter("must be 1 to 64 of A-Z a-z 0-9 . _ - and not 'auto'", param_hint="NAME")
    folder = target / name
    with open_pool(store, url) as source:
        if folder.exists():
            raise ValueError(f"{folder}: exists; choose another name or folder")
        state = source.state()
        records = {part: state.find(part) for part in weights}
        templates = {record.template for record in records.values()}
        base = records[max(weights, key=lambda part: abs(weights[part]))].base_model
        others = sorted({record.base_model for record in records.values()} - {base})
        half = sum(map(abs, weights.values())) / 2
        leader = next((records[part] for part, weight in weights.items() if weight > half), None)
        parts = [(read_modules(source, record), weights[part]) for part, record in records.items()]
        modules, error = compose(parts, rank)
        if others:
            show_warning(f"{folder}: names the base model {base}; is that the same model as {', '.join(others)}?")
        write_peft_folder(folder, modules, base_model=base)
        if leader is not None and leader.contract is not None:
            write_contract(folder, leader.contract)
    said = f"{folder}: rank {max(module.rank for module in modules.values())}"
    said += ", exact" if rank is None else f", relative error {error:.2%}"
    said += ". It has no samples: add lora_samples.jsonl for auto"
    if len(templates) == 1 and (template := templates.pop()):
        said += f". Publish it with --template {template}, which its adapters have"
    say(said)


def _weights_in(text: str) -> dict[str, float]:
    """Return the weights by adapter. Raises: BadParameter."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or name in found or not math.isfinite(weight):
            raise typer.BadParameter(f"must be NAME=WEIGHT,…, each name once, got {part!r}", param_hint="--adapters")
        found[name] = weight
    return found
