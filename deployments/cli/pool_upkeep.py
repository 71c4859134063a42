"""`loraretriever pool`: look after the pool of a running server, and repair or train without one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import MofNCompleteColumn
from rich.table import Column, Table

from deployments.cli.client import call, follow, pages
from deployments.cli.options import DEFAULT_URL, Commands, Json, JsonOutcome, Url, check_local_folder
from deployments.cli.output import behind_note, counted, fail, out, print_json, progress, report, say, show_error
from deployments.cli.routing import Labelled, read_labelled, require_known
from deployments.json_types import JsonObject

if TYPE_CHECKING:
    from lora_store.repair import Repaired

commands = typer.Typer(cls=Commands, help="Look after a pool: check, clean, measure and repair it.")
_SHOWN_OTHERS = 3
_SHOWN = 20  # damaged files and generations; a lost checkpoint may take the whole log with it


@commands.command()
def repair(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings")] = None,
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
        fail(exc)
    lines = [f"the catalogue of {uri} is whole; nothing was changed"] if done is None else _lines(done)
    report(_facts(done), "\n".join(lines), as_json=as_json)
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


Store = Annotated[str | None, typer.Option("--store", help="folder or URI of the pool, instead of a server's")]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="new .tar file, or new store: a folder, s3:// or gs://")]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", help="copy only this one, as NAME or OWNER/NAME; repeatable")
]


@commands.command()
def export(
    target: Target,
    adapter: Adapters = None,
    store: Store = None,
    as_peft: Annotated[
        bool, typer.Option("--peft", help="write a folder of PEFT folders, and pool.yaml for `publish --file`")
    ] = False,
    as_json: JsonOutcome = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Copy the pool as of one moment, with samples, versions, approvals and what was measured.

    From a running server with a key that has the role admin: the adapters of its tenant. With --store: all, also while
    servers run. Repeated after an interruption, it copies to a store only what is missing there.
    """
    from deployments.cli.pool_transfer import export_to  # pyarrow takes a second to import

    export_to(target, adapter or [], store, url, as_peft=as_peft, as_json=as_json)


@commands.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="a .tar file of `pool export`, or a store")],
    store: Annotated[str | None, typer.Option("--store", help="folder or URI to import into")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings that name it")] = None,
    adapter: Adapters = None,
    conflict: Annotated[
        Literal["refuse", "skip", "replace"],
        typer.Option(help="for a live name with another version: refuse all, leave it, or publish a new version of it"),
    ] = "refuse",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what it would do, import nothing")] = False,
    as_json: JsonOutcome = False,
) -> None:
    """Add the adapters of a copy to a store. Its servers may run: they see the adapters within seconds.

    Weights and samples are compared with their digests. Repeated after an interruption, it imports what is missing.
    Import only copies that you made: it does not validate adapters as publishing does, and takes over approvals.
    """
    from deployments.cli.pool_transfer import import_from  # pyarrow takes a second to import

    import_from(source, adapter or [], store, config, conflict, is_dry=dry_run, as_json=as_json)


@commands.command()
def verify(store: Store = None, as_json: JsonOutcome = False, url: Url = DEFAULT_URL) -> None:
    """Compare stored blobs with their digests.

    On a server those of the adapters that the key sees: its tenant's and the public ones. With --store: all, also while
    servers run.
    """
    result = follow(url, "/v1/pool/verify", {}, "verifying") if store is None else _verify_store(store)
    if as_json:
        print_json(result)
    else:
        for problem in result["problems"]:
            show_error(f"{problem['adapter']}: {problem['problem']}")
        say(f"{counted(result['num_blobs'], 'blob')}, {len(result['problems'])} bad")
    if result["problems"]:
        raise typer.Exit(1)


def _verify_store(uri: str) -> JsonObject:
    """Return what a server answers, for the blobs of all tenants. On an error, print it and exit."""
    from lora_store import LoraStore, LoraStoreError  # pyarrow takes a second to import
    from lora_store.pool_files import StoredPool

    problems: list[JsonObject] = []
    done = 0
    try:
        StoredPool(uri)  # refuses a place without a pool, where a store would begin one
        opened = LoraStore(uri, accepts_base=())
        wanted = opened.to_verify()
        with progress("verifying", MofNCompleteColumn(), total=len(wanted)) as update:
            for done, found in enumerate(opened.verify(wanted), start=1):
                update(completed=done)
                if found.problem is not None:
                    problems.append({"digest": found.digest, "adapter": str(found.ref), "problem": found.problem})
    except (LoraStoreError, ValueError, OSError) as exc:
        fail(exc)
    return {"num_blobs": done, "problems": problems}


@commands.command()
def gc(
    retention: Annotated[float, typer.Option(help="seconds; blobs written more recently are kept")] = 86_400,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Delete stored blobs that no version refers to, and projections that no embedding uses."""
    answer = call(url, "POST", "/v1/pool/gc", json={"retention_s": retention})
    blobs, projections = counted(answer["num_blobs"], "blob"), counted(answer["num_projections"], "projection")
    report(answer, f"removed {blobs} and {projections}, {counted(answer['num_bytes'], 'byte')}", as_json=as_json)


@commands.command()
def reindex(
    encoder: Annotated[str, typer.Option("--encoder", "-e", help="sentence-transformers model: a folder or a hub id")],
    projection: Annotated[
        str, typer.Option(help="auto: the packaged one, if any; none; refit: fit one to the pool's samples")
    ] = "auto",
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Embed the pool with another encoder, then switch to it. The old index serves until then."""
    result = follow(url, "/v1/pool/reindex", {"encoder": encoder, "projection": projection}, "embedding")
    behind = result["replicas"]["behind"]
    note = f" ({behind_note(behind)})" if behind else ""
    report(result, f"the pool uses {encoder} since generation {result['generation']}{note}", as_json=as_json)


@commands.command()
def doctor(
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='also route real prompts: JSON lines {"input" or "prompt": text}, perhaps with "adapter": name, '
            "list of names, or null for the base model"
        ),
    ] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Route the samples of every adapter, and report adapters that are hard to find or collide, with advice."""
    body: JsonObject = {}
    if prompts is not None:
        from deployments.api.adapters import MAX_DOCTOR_PROMPTS  # it imports Ray, which takes a second

        rows = read_labelled(prompts, needs_adapter=False)
        if len(rows) > MAX_DOCTOR_PROMPTS:
            fail(f"--prompts: at most {MAX_DOCTOR_PROMPTS} lines, {prompts} has {len(rows)}")
        if any(row.adapters for row in rows):
            require_known(prompts, rows, {row["id"] for page in pages(url, "/v1/loras") for row in page["data"]})
        body = {"prompts": [_asked(row) for row in rows]}
    found = follow(url, "/v1/pool/doctor", body, "routing")
    if as_json:
        print_json(found)
        return
    k = found["k"]
    shares = f"own adapter first {found['first_share']:.1%}, among the best {k} {found['found_share']:.1%}"
    say(f"{counted(found['num_adapters'], 'adapter')}, {counted(found['num_samples'], 'sample')}: {shares}")
    points = ", ".join(f"{point} {share:.1%}" for point, share in found["turned_away_share"].items())
    say(f"samples that the base model would answer, each left out of its adapter: {points}")
    for row in found["collisions"]:
        first, second = row["adapters"]
        swapped = " and ".join(map(str, row["num_swapped"]))
        say(f"collision: {first} and {second}, cosine {row['cosine']:.3f}, {swapped} samples swapped")
    for row in found["always_shadowed"]:
        say(f"{row['name']} is never chosen first: {row['by']} always scores higher")
    _print_rankings(found["rankings"])
    for name, row in found.get("outcomes", {}).items():  # a server of an earlier version has none
        say(f"outcomes of {name or 'the base model'}: {row['positive']} positive, {row['negative']} negative")
    for title, key in (("never chosen", "never_chosen"), ("unreadable samples", "unreadable")):
        for name in found[key]:
            say(f"{title}: {name}")
    if "prompts" in found:
        _print_asked(found["prompts"])
    for advice in found["advice"]:
        say(f"advice: {advice['text']}")


def _asked(row: Labelled) -> JsonObject:
    return {"prompt": row.prompt} | ({} if row.adapters is None else {"adapters": sorted(row.adapters)})


def _print_asked(asked: JsonObject) -> None:
    """Print which adapters answer real prompts."""
    columns = ("right", "another adapter", "the base model")
    if asked["num"]:
        table = Table(Column("should answer", overflow="fold"), "prompts", *columns, Column("mostly", overflow="fold"))
        for row in asked["adapters"]:
            others = ", ".join(f"{other['name']} {other['num']}" for other in row["others"][:_SHOWN_OTHERS])
            table.add_row(row["name"] or "the base model", str(row["num"]), *_shares(row), others)
        table.add_row("all", str(asked["num"]), *_shares(asked), "")
        out.print(table)
    for row in asked["unlabelled"]:
        say(f"{row['name'] or 'the base model'} answers {counted(row['num'], 'other prompt')}")


def _shares(row: JsonObject) -> list[str]:
    return [f"{row[key] / row['num']:.1%}" for key in ("num_right", "num_other", "num_base")]


@commands.command()
def evaluate(as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Measure which adapters answer each other's samples best. `auto` then prefers them. Samples need outputs."""
    result = follow(url, "/v1/pool/evaluate", {}, "evaluating")
    if as_json:
        print_json(result)
        return
    num_compared, num_measurable = len(result["rankings"]), result["num_regions"]
    said = f"{num_compared} of {num_measurable} adapters with sample outputs are ranked among similar ones"
    if num_compared < num_measurable:
        said += "; the others have no similar one, or too few answers were the sample outputs"
    say(said)
    _print_rankings(result["rankings"])
    beaten = {item["name"] for ranking in result["rankings"] for item in ranking["adapters"] if item["is_beaten"]}
    if num_compared and not beaten:
        say("none is clearly beaten by a similar one, so `auto` chooses as before")


def _print_rankings(rankings: Sequence[JsonObject]) -> None:
    """Print a line for each adapter whose samples were used: shares of right answers to them, best first."""
    for ranking in rankings:
        adapters = [
            f"{item['name']} {item['score']:.0%} of {item['num_examples']}{' (beaten)' if item['is_beaten'] else ''}"
            for item in ranking["adapters"]
        ]
        say(f"right answers to the samples of {ranking['region']}: {', '.join(adapters)}")


@commands.command()
def train(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", callback=check_local_folder, help="folder for the new encoder; use it with `pool reindex`"
        ),
    ],
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
    """Train an encoder as in the paper. Use `pool reindex` to switch a running server to it."""
    if (store is None) == (samples is None):
        fail("give either --store or --samples")
    from deployments.cli.run_training import TrainingJob, run_training  # torch takes seconds to import

    run_training(TrainingJob(target, store, tenant, samples, share, seed, encoder, epochs), as_json=as_json)
