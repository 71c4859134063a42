"""`loraretriever pool repair`: repair a damaged catalogue, without a server."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli.client import JsonOutcome, out, print_json, show_error
from deployments.json_types import JsonObject

if TYPE_CHECKING:
    from lora_store.repair import Repaired

commands = typer.Typer(no_args_is_help=True, help="Look after the files of a pool that no server uses.")
_SHOWN = 20  # damaged files and generations; a lost checkpoint may take the whole log with it


@commands.callback()
def pool() -> None:
    """Look after the files of a pool that no server uses."""


@commands.command()
def repair(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings")] = None,
    store: Annotated[str | None, typer.Option(help="folder or URI of the pool; overrides the settings")] = None,
    as_json: JsonOutcome = False,
) -> None:
    """Repair a damaged catalogue. Stop every server of the pool first.

    Every whole publish is kept. Damaged files are moved to a folder of their own. What is lost is listed, and then the
    exit code is 1.
    """
    from deployments.config.loading import load_config  # pydantic and pyarrow take a second to import
    from lora_store import Location, LoraStoreError
    from lora_store.repair import repair

    try:
        uri = load_config(config, **({} if store is None else {"store_uri": store})).store_uri
        done = repair(Location(uri), datetime.now(UTC))
    except (LoraStoreError, ValueError, OSError) as exc:
        show_error(str(exc))
        raise typer.Exit(1) from exc
    if as_json:
        print_json(_facts(done))
    else:
        lines = [f"the catalogue of {uri} is whole; nothing was changed"] if done is None else _lines(done)
        for line in lines:
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    if done is not None and done.lost:
        raise typer.Exit(1)


def _facts(done: Repaired | None) -> JsonObject:
    """Return the outcome for scripts."""
    if done is None:
        return {"damaged": {}, "restored": [], "lost": []}
    return {
        "generation": done.generation,
        "num_adapters": done.num_adapters,
        "damaged": dict(done.damaged),
        "restored": list(done.restored),
        "lost": list(done.lost),
        "moved_to": done.aside or None,
    }


def _lines(done: Repaired) -> list[str]:
    """Return the outcome for people."""
    damaged = [f"damaged: {file} {problem}" for file, problem in done.damaged.items()]
    lines = damaged[:_SHOWN]
    if len(damaged) > _SHOWN:
        lines.append(f"and {len(damaged) - _SHOWN} other files")
    if done.restored:
        shown = ", ".join(map(str, done.restored[:_SHOWN]))
        lines.append(f"restored generations: {shown}{', …' if len(done.restored) > _SHOWN else ''}")
    lines += [f"lost: {sentence}" for sentence in done.lost] or ["nothing is lost"]
    if done.aside:
        lines.append(f"the damaged files are in {done.aside}")
    return [*lines, f"the pool has {done.num_adapters} adapters at generation {done.generation}"]
