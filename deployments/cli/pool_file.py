"""`loraretriever publish --file`: make the adapters of a key's tenant those that a file lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import typer
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from deployments.cli.adapter_publisher import SAMPLES_FILE, SOURCE, AdapterPublisher, Item
from deployments.cli.client import find_message, lora_path, open_client, pages, reads_paths
from deployments.cli.output import counted, err, fail, print_json, say, show_error
from deployments.cli.publish_report import Refused, describe_outcome, note_refusal, show_refusals
from deployments.field_problems import describe_problem
from deployments.json_types import JsonObject
from deployments.publishing.adapter_folders import adapter_folders
from deployments.yaml_files import load_yaml, require_json

_NOT_SENT = ("source", "name", "owner", "samples")


class _Described(BaseModel):
    """The description of an adapter in a file. A field that is not given stays as it is in the live version."""

    model_config = ConfigDict(extra="forbid", strict=True)

    owner: str | None = None  # the tenant; None: that of the key
    tags: list[str] | None = None
    visibility: Literal["public", "private"] | None = None
    template: Literal["alpaca", "chat", "server"] | None = None
    base_name: str | None = None
    contract: Annotated[dict[str, Any], AfterValidator(require_json)] | None = (
        None  # {}: none; None: that of its folder
    )


class _Entry(_Described):
    source: str = Field(min_length=1)  # a folder, relative to the file, or a URI that the server reads
    name: str | None = None
    samples: str | None = None  # a training file, relative to this one, whose samples come instead of the folder's


class PoolFile(BaseModel):
    """`defaults` apply to each adapter that does not say otherwise."""

    model_config = ConfigDict(extra="forbid", strict=True)

    defaults: _Described = _Described()
    adapters: list[_Entry] = Field(min_length=1)


def publish_file(file: Path, url: str, *, is_dry: bool, prunes: bool, upload: bool, as_json: bool) -> None:
    """Publish what the file lists for the key's tenant, say what that changes, and exit with 1 if a part failed."""
    listed = _read(file)
    live: dict[str, JsonObject] = {}
    tenant = None
    for page in pages(url, "/v1/loras"):
        tenant = page.get("tenant")
        live |= {row["name"]: row for row in page["data"] if row["tenant"] == tenant}
    own = [item for owner, item in listed if owner in (None, tenant)]
    items = {item.label: item for item in own}
    if len(items) < len(own):
        fail(f"{file}: adapters: a name is listed twice for tenant {tenant!r}, with and without owner")
    if prunes and not items:
        fail(f"{file}: lists no adapter of your tenant {tenant!r}, so --prune would withdraw all of your adapters")
    rows: list[JsonObject] = []
    refused: Refused = {}
    with open_client(url, waits=True) as client:
        publisher = AdapterPublisher(client, {}, {"dry_run": "true"} if is_dry else {})
        send = publisher.by_path if reads_paths(url, upload=upload) else publisher.by_upload
        for item, answer in send(list(items.values())):
            change = _change(answer, live.get(item.label))
            rows.append({"name": item.label, "change": change, **answer})
            if change == "refused":
                note_refusal(refused, item, answer)
            elif change != "unchanged" and not as_json:
                is_said = change == "new" or answer.get("changed")
                note = "" if is_said else "; its weights, samples or base model changed"
                say(f"{change}: {describe_outcome(answer, is_dry)}{note}")
        others = sorted(live.keys() - items.keys())
        goes = prunes and not is_dry and not refused
        failed = {name: problem for name in others if goes and (problem := _withdraw(client, name))}
    if as_json:
        print_json({"data": rows, "not_listed": others, "withdrawn": [n for n in others if goes and n not in failed]})
    else:
        show_refusals(refused)
        for name, problem in failed.items():
            show_error(f"{name}: {problem}")
        _say(file, rows, others, len(listed) - len(own), prunes=prunes, goes=goes)
    if refused or failed:
        raise typer.Exit(1)


def _change(answer: JsonObject, live: JsonObject | None) -> str:
    """Return what publishing an adapter changes. `live`: what was live under its name before."""
    if "error" in answer:
        return "refused"
    if live is None:
        return "new"
    is_equal = answer["digest"] == live["digest"] and not answer.get("changed")
    return "unchanged" if is_equal else "changed"


def _withdraw(client: httpx.Client, name: str) -> str | None:
    """Withdraw an adapter. Return why that failed, None if it did not."""
    response = client.delete(lora_path(name))
    return find_message(response) if response.is_error else None


def _say(file: Path, rows: list[JsonObject], others: list[str], num_left: int, *, prunes: bool, goes: bool) -> None:
    """Print the adapters that the file does not list, and counts."""
    if others:
        later = "would be withdrawn, once none is refused" if prunes else "--prune withdraws them"
        say(f"not in {file}: {', '.join(others)} ({'withdrawn' if goes else later})")
    if num_left:
        left = f"{counted(num_left, 'adapter')} of other owners, whose own keys publish them"
        err.print(f"left out: {left}", highlight=False)
    changes = [row["change"] for row in rows]
    say(", ".join(f"{changes.count(kind)} {kind}" for kind in ("new", "changed", "unchanged", "refused")))


def _read(file: Path) -> list[tuple[str | None, Item]]:
    """Return the adapters of the file with their owners. On an error, print it and exit."""
    try:
        described = PoolFile.model_validate(load_yaml(file.read_text(encoding="utf-8")))
    except ValidationError as exc:
        fail("\n".join(_problems(file, exc)))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        fail(f"{file}: {' '.join(str(exc).split())}")
    found = [_item(file, entry, described.defaults) for entry in described.adapters]
    seen = set()
    for owner, item in found:
        if (owner, item.label) in seen:
            fail(f"{file}: adapters: {item.label!r} is listed twice")
        seen.add((owner, item.label))
    return found


def _problems(file: Path, error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"])) or "the file"
        known = [*_Entry.model_fields] if "adapters" in problem["loc"] else [*PoolFile.model_fields]
        yield f"{file}: {place}: {describe_problem(dict(problem), known)}"


def _item(file: Path, entry: _Entry, defaults: _Described) -> tuple[str | None, Item]:
    given: Mapping[str, object] = defaults.model_dump(exclude_none=True) | entry.model_dump(exclude_none=True)
    owner = given.get("owner")
    named = {"base_name": "base_model"}
    fields = {named.get(key, key): value for key, value in given.items() if key not in _NOT_SENT}
    owner = None if owner is None else str(owner)
    if SOURCE.match(entry.source):
        if entry.name is None:
            fail(f"{file}: adapters: {entry.source}: needs a name")
        if entry.samples is not None:
            fail(f"{file}: adapters: {entry.source}: samples go with a folder; give the source a {SAMPLES_FILE}")
        return owner, Item(entry.source, entry.name, fields)
    folder = file.parent / entry.source
    try:
        found = adapter_folders(folder)  # the last checkpoint of a training run
    except OSError as exc:
        fail(f"{file}: adapters: {entry.source}: {exc.strerror}")
    if len(found) != 1:
        what = "no adapter" if not found else f"{len(found)} adapters"
        fail(f"{file}: adapters: {entry.source}: has {what}; list each adapter's own folder")
    samples = None if entry.samples is None else file.parent / entry.samples
    if samples is not None and not samples.is_file():
        fail(f"{file}: adapters: {entry.source}: samples: there is no file {samples}")
    return owner, Item(found[0].path, entry.name or found[0].new_name, fields, samples)
