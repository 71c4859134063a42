"""`loraretriever pool export` and `import`: the pools that they read, and what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import yaml
from rich.progress import MofNCompleteColumn

from deployments.cli.client import check, open_client
from deployments.cli.output import counted, fail, print_json, progress, report, say, show_warning
from deployments.config.loading import load_config
from deployments.json_types import JsonObject
from lora_store import (
    AdapterNotFound,
    AdapterRecord,
    LoraStoreError,
    ModuleWeights,
    weights_in,
    write_peft_folder,
)
from lora_store.contract_files import CONTRACT_FILE
from lora_store.pool_copy import (
    ArchiveTarget,
    Conflict,
    Report,
    StoreTarget,
    export_pool,
    import_pool,
    read_checked,
)
from lora_store.pool_files import ArchivedPool, PoolSource, PoolState, StoredPool, blob_file
from lora_store.sample_files import parse_samples

ARCHIVE = ".tar"
POOL_FILE = "pool.yaml"
_MISSING = 404
_NOTHING = "there is no adapter to export"
_UNLISTED = "unlisted adapters expire, and would not if they were published again"
_NO_OWN = "a key copies the adapters of its tenant, which has none; --store STORE copies those of all tenants"


@dataclass(frozen=True, slots=True)
class ServedPool:
    """The pool of a running server, or there the adapters of the key's tenant."""

    client: httpx.Client

    def state(self) -> PoolState:
        response = self.client.get("/v1/pool/export")
        check(response)
        return PoolState.from_parquet(response.content)

    def read(self, name: str) -> Iterator[bytes | memoryview]:
        with self._open(name) as response:
            try:
                yield from response.iter_bytes()
            except (httpx.RemoteProtocolError, httpx.ReadError):
                with self._open(name):  # raises AdapterNotFound if the file was deleted while it was sent
                    raise

    @contextmanager
    def _open(self, name: str) -> Iterator[httpx.Response]:
        """Yield the answer with a file. Raises: AdapterNotFound if it is gone."""
        with self.client.stream("GET", f"/v1/pool/files/{quote(name)}") as response:
            if response.status_code == _MISSING:
                raise AdapterNotFound(name.rpartition("/")[2])
            check(response)
            yield response


def export_to(target: str, names: Sequence[str], store: str | None, url: str, *, as_peft: bool, as_json: bool) -> None:
    """Export to a new archive, store, or folder of PEFT folders. On an error, print it and exit."""
    num_unlisted = 0
    with open_pool(store, url) as source, _progress("copying") as copied:
        if as_peft:
            if "://" in target:
                raise ValueError(f"{target}: PEFT folders are written on this machine; give a folder")
            whole = source.state().named(names)
            if not whole.snapshot.records:
                raise ValueError(f"{_NOTHING}: {_NO_OWN if store is None else 'the pool has none'}")
            state = _write_peft(source, whole, Path(target))
            num_unlisted = len(whole.snapshot.records) - len(state.snapshot.records)
        elif target.endswith(ARCHIVE):
            with ArchiveTarget(_archive_path(target)) as archive:
                state = export_pool(source, archive, names, copied)
        else:
            state = export_pool(source, StoreTarget(target), names, copied)
    snapshot, num_bytes = state.snapshot, sum(size or 0 for size in state.blobs().values())
    if not snapshot.records and store is None and not as_json:
        show_warning(_NO_OWN)
    if num_unlisted and not as_json:
        show_warning(f"{counted(num_unlisted, 'adapter')} left out: {_UNLISTED}")
    facts = {"target": target, "generation": snapshot.generation, "num_adapters": len(snapshot.records)}
    said = f"{counted(len(snapshot.records), 'adapter')} as of generation {snapshot.generation} are in {target}"
    left_out = {"num_left_out": num_unlisted} if as_peft else {}
    report({**facts, "num_bytes": num_bytes, **left_out}, said, as_json=as_json)


def import_from(
    source: str,
    names: Sequence[str],
    store: str | None,
    config: Path | None,
    conflict: Conflict,
    *,
    is_dry: bool,
    as_json: bool,
) -> None:
    """Import into the store of the settings, or `store`. On an error, print it and exit."""
    with _failures(), _progress("importing") as copied:
        uri = load_config(config, **({} if store is None else {"store_uri": store})).store_uri
        pool: PoolSource = ArchivedPool(_archive_path(source)) if source.endswith(ARCHIVE) else StoredPool(source)
        done = import_pool(pool, uri, conflict, names, is_dry=is_dry, progress=copied)
    if as_json:
        print_json({"store": uri, **done})
        return
    for kind in ("new", "skipped", "replaced"):
        if done[kind]:
            say(f"{kind}: {', '.join(done[kind])}")
    counts = ", ".join(f"{len(done[kind])} {kind}" for kind in ("new", "equal", "skipped", "replaced"))
    would = "would be imported into" if is_dry else "are now in"
    say(f"{counts}; {would} {uri}, generation {done['generation']}")
    if done["num_restored"]:
        written = "to be written" if is_dry else "written"
        say(f"missing or damaged in {uri}, and {written} again: {counted(done['num_restored'], 'file')}")
    if done["names_left_out"]:
        show_warning(
            f"not imported, since {uri} has something else by that name: {', '.join(done['names_left_out'])}; set these"
            " model names by other names with `loraretriever name set` if you need them"
        )
    if done["num_unembedded"]:
        show_warning(
            f"auto does not find {counted(done['num_unembedded'], 'adapter')} yet, embedded by another encoder than"
            " the pool's: run `loraretriever pool reindex`"
        )


def _archive_path(name: str) -> Path:
    """Raises: ValueError for an archive in a bucket."""
    if "://" in name:
        raise ValueError(f"{name}: an archive is a file on this machine; without {ARCHIVE} it is a store in a bucket")
    return Path(name)


@contextmanager
def open_pool(store: str | None, url: str) -> Iterator[PoolSource]:
    """Yield the pool of a store, or of the server at `url`. On an error, print it and exit."""
    with _failures(), ExitStack() as stack:
        yield ServedPool(stack.enter_context(open_client(url))) if store is None else StoredPool(store)


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except (LoraStoreError, ValueError, OSError) as exc:
        fail(exc)


@contextmanager
def _progress(title: str) -> Iterator[Report]:
    with progress(title, MofNCompleteColumn()) as update:
        yield lambda done, total: update(completed=done, total=total)


def read_modules(source: PoolSource, record: AdapterRecord) -> dict[str, ModuleWeights]:
    """Return the weights of a version by module. Raises: BlobCorrupted."""
    data = b"".join(read_checked(source, blob_file(record.weights_digest)))
    return dict(weights_in(record.weights_digest, np.frombuffer(data, np.uint8)).modules)


def write_contract(folder: Path, contract: str) -> None:
    """Write a stored contract into an adapter's folder."""
    text = yaml.safe_dump(json.loads(contract), sort_keys=False, allow_unicode=True)
    (folder / CONTRACT_FILE).write_text(text, encoding="utf-8")


def _make_place(names: Sequence[str]) -> str:
    """Return the folder of an adapter, other than the file that lists them. No name has a "~"."""
    top, *rest = names
    return "/".join([f"{top}~" if top == POOL_FILE else top, *rest])


def _write_peft(source: PoolSource, state: PoolState, folder: Path) -> PoolState:
    """Write the listed live versions as PEFT folders and a file that lists them. Return the state of what is written.

    The folders are below their owners' if there are several. Raises: ValueError if there is nothing to write.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; name a new folder")
    records = {key: record for key, record in state.snapshot.records.items() if not record.is_unlisted}
    if not records:
        raise ValueError(f"{_NOTHING}: {_UNLISTED}")
    has_owners = len({tenant for tenant, _ in records}) > 1
    entries = []
    for (tenant, name), record in sorted(records.items()):
        place = _make_place([tenant, name] if has_owners else [name])
        digest = record.samples_digest
        samples = () if digest is None else parse_samples(b"".join(read_checked(source, blob_file(digest))))
        modules = read_modules(source, record)
        write_peft_folder(folder / place, modules, base_model=record.base_model, samples=samples)
        entry: JsonObject = {"name": name, "source": place, "visibility": record.visibility}
        entry |= {"tags": list(record.tags), "template": record.template or "server"}
        if record.contract is None:
            entry["contract"] = {}
        else:
            write_contract(folder / place, record.contract)
        entries.append(entry | ({"owner": tenant} if has_owners else {}))
    (folder / POOL_FILE).write_text(yaml.safe_dump({"adapters": entries}, sort_keys=False))
    return replace(state, snapshot=replace(state.snapshot, records=records, previous={}))
