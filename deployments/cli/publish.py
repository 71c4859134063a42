"""`loraretriever publish`: the command and its options."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import DownloadColumn, TransferSpeedColumn

from deployments.cli.adapter_publisher import SOURCE, AdapterPublisher, Item
from deployments.cli.client import REMEDY, answers, open_client, reads_paths
from deployments.cli.options import DEFAULT_URL, Json, Url
from deployments.cli.output import err, fail, progress, show_warning
from deployments.cli.publish_report import report_json, report_lines
from deployments.json_types import JsonObject
from deployments.publishing.adapter_folders import adapter_folders, folder_bytes

commands = typer.Typer()
Places = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FOLDER",
        help="adapter folders, folders of them, outputs of training runs, or URIs that the server may read: "
        "s3://, gs://, hf://OWNER/REPOSITORY@REVISION, runs:/RUN/FOLDER, models:/NAME/VERSION",
    ),
]
TrainingFile = Annotated[
    Path | None,
    typer.Option("--samples", help="take the samples for auto from this training file: Alpaca, ShareGPT or messages"),
]
Share = Annotated[
    float | None,
    typer.Option(min=0, max=100, help="keep the live version, and give this one a share of its requests, in percent"),
]
TimeToLive = Annotated[
    float | None,
    typer.Option("--ttl", help="seconds until it is withdrawn; until then it is unlisted: only its name finds it"),
]


@commands.command()
def publish(
    places: Places = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="publish the adapters that this file lists, and report what it changes"),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="with --file: withdraw your live adapters that it does not list")
    ] = False,
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="name of the adapter; default: name of its folder")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", "-t", help="tag for filtering; repeatable; default: unchanged")
    ] = None,
    no_tags: Annotated[bool, typer.Option("--no-tags", help="remove the tags of the live version")] = False,
    template: Annotated[
        Literal["alpaca", "chat", "server"] | None,
        typer.Option(help="prompt template, or server for the server's own; default: unchanged"),
    ] = None,
    public: Annotated[
        bool | None, typer.Option("--public/--private", help="whether all tenants may use it; default: unchanged")
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(help="accepted base model it was trained on; default: the one that its folder names"),
    ] = None,
    contract: Annotated[
        Path | None,
        typer.Option(help="file with its instruction, output schema, stop strings and sampling; default: the folder's"),
    ] = None,
    no_contract: Annotated[
        bool, typer.Option("--no-contract", help="publish without a contract, whatever the folder or live version has")
    ] = False,
    samples: TrainingFile = None,
    no_samples: Annotated[
        bool, typer.Option("--no-samples", help="publish without samples, so that only its name finds it")
    ] = False,
    ttl: TimeToLive = None,
    share: Share = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="with --share: answer copies of these requests, which no client sees")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="let the server check everything, publish nothing; without a server, check what needs none",
        ),
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="with --dry-run: check without a server, by these settings")
    ] = None,
    parity: Annotated[
        bool,
        typer.Option("--parity", help="with --dry-run, without a server: compare log probabilities with those of PEFT"),
    ] = False,
    upload: Annotated[bool, typer.Option(help="upload the files even if the server is on this machine")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Publish adapters to a running server.

    A new version of a live name keeps its tags, template, contract, visibility and samples unless they are given.
    """
    visibility = None if public is None else "public" if public else "private"
    tags = [] if no_tags else tag or None
    given = {"name": name, "tags": tags, "template": template, "visibility": visibility, "ttl_s": ttl}
    given |= {"share": None if share is None else share / 100, "shadow": shadow or None, "base_model": base_name}
    given |= {"samples": [] if no_samples else None}
    fields: JsonObject = {key: value for key, value in given.items() if value is not None}
    has_more = bool(places or fields or samples or config or parity or contract or no_contract)
    needs_dry = not dry_run and (config is not None or parity)
    for is_wrong, option, problem in (
        (prune and file is None, "--prune", "needs --file"),
        (file is not None and has_more, "--file", "describes each adapter: leave out folders and other options"),
        (file is None and not places, "FOLDER", "is missing; give a folder, or --file"),
        (needs_dry, "--parity" if parity else "--config", "needs --dry-run"),
        (contract is not None and no_contract, "--no-contract", "cannot be combined with --contract"),
        (shadow and share is None, "--shadow", "needs --share, 100 for a copy of every request"),
        (share == 0, "--share", "must be above 0; without --share the version becomes live"),
        (tag and no_tags, "--no-tags", "cannot be combined with --tag"),
        (samples and no_samples, "--no-samples", "cannot be combined with --samples"),
    ):
        if is_wrong:
            raise typer.BadParameter(problem, param_hint=option)
    if contract is not None or no_contract:
        fields["contract"] = {} if contract is None else _contract_from(contract)
    if file is not None:
        from deployments.cli.pool_file import publish_file  # pydantic takes half a second to import

        publish_file(file, url, is_dry=dry_run, prunes=prune, upload=upload, as_json=as_json)
        return
    assert places
    items = [item for place in places for item in _find_items(place)]
    names = Counter(_published_name(item) for item in items) if len(items) > 1 else Counter()
    if twice := next((label for label, count in names.items() if count > 1), None):
        problem = f"{twice!r} would be the name of {names[twice]} adapters: publish them one by one, with --name"
        raise typer.BadParameter(problem, param_hint="FOLDER")
    if name is not None and len(items) != 1:
        raise typer.BadParameter(f"one name cannot be used for {len(items)} adapters", param_hint="--name")
    if samples is not None and (len(items) != 1 or items[0].is_source):
        raise typer.BadParameter("one training file goes with one adapter folder", param_hint="--samples")
    if dry_run and (config is not None or parity or _is_alone(url)):
        _check_alone(places, config, fields, samples, parity=parity, as_json=as_json)
        return
    params = {"dry_run": "true"} if dry_run else {}
    if samples is not None:
        items = [replace(items[0], samples=samples)]
    remedy = "start it, or add --config FILE to check without a server" if dry_run else REMEDY
    with open_client(url, waits=True, remedy=remedy) as client, _upload_progress(items) as sent:
        publisher = AdapterPublisher(client, fields, params, sent)
        send = publisher.by_path if reads_paths(url, upload=upload) else publisher.by_upload
        failed = (report_json if as_json else report_lines)(send(items), len(items), dry_run)
    if failed:
        raise typer.Exit(1)


def _is_alone(url: str) -> bool:
    """Return whether no address was given and no server answers at the usual one. Say so."""
    if url != DEFAULT_URL or answers(url):
        return False
    err.print(f"no server answers at {url}: checked without one", style="dim", highlight=False)
    return True


def _check_alone(
    places: Sequence[str],
    config: Path | None,
    fields: JsonObject,
    samples: Path | None,
    *,
    parity: bool,
    as_json: bool,
) -> None:
    """Check folders in this process. Exit with 1 if one is not fit. Raises: BadParameter for a source."""
    if sources := [place for place in places if SOURCE.match(place)]:
        raise typer.BadParameter(f"only a server can read {sources[0]}; start one, or give --url", param_hint="FOLDER")
    from deployments.cli.check_adapter import check_adapters  # the store's libraries take most of a second to import

    check_adapters([Path(place) for place in places], config, parity, fields=fields, samples=samples, as_json=as_json)


def _find_items(place: str) -> list[Item]:
    """Return the adapters at `place`. A folder without any is sent as it is, so that the server says what it lacks."""
    if SOURCE.match(place):
        return [Item(place)]
    try:
        found = [Item(adapter.path, adapter.new_name) for adapter in adapter_folders(Path(place))]
    except OSError as exc:
        fail(exc)
    return found or [Item(Path(place))]


def _published_name(item: Item) -> str:
    """Return the name that the server publishes the adapter under."""
    if item.name is not None or not item.is_source:
        return item.label
    from deployments.api.adapters import PublishItem  # it imports Ray, which takes seconds

    return PublishItem(source=str(item.place)).adapter_name


def _contract_from(file: Path) -> JsonObject:
    """Return the contract in a file. Exit if it is none."""
    from deployments.publishing.contract_files import read_contract  # pydantic takes half a second to import
    from lora_store import FileRefused

    try:
        text, notes = read_contract(file.name, file.read_bytes())
    except FileRefused as exc:
        fail(f"{file}: {exc.problems[0]}")
    except OSError as exc:
        fail(f"{file}: {exc.strerror}")
    for note in notes:
        show_warning(f"warning: {note}")
    found: JsonObject = json.loads(text or "{}")
    return found


@contextmanager
def _upload_progress(items: Sequence[Item]) -> Iterator[Callable[[int], object]]:
    """Yield a function that adds bytes to a progress bar, which appears with the first upload of a single adapter."""
    if len(items) != 1 or items[0].is_source:
        yield lambda _: None
        return
    total = folder_bytes(Path(items[0].place))
    with progress("uploading", DownloadColumn(), TransferSpeedColumn(), total=total, visible=False) as update:
        yield lambda num_bytes: update(advance=num_bytes, visible=True)
