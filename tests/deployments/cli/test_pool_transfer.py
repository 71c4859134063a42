"""`pool export`, `pool import` and `compose`, from stores and over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest
import torch
import yaml

from deployments.cli.pool_transfer import ServedPool
from deployments.publishing.contract_files import read_contract
from lora_store import AdapterNotFound, LoraStore, ModuleWeights, Sample, write_peft_folder
from lora_store.pool_copy import ArchiveTarget, StoreTarget, export_pool, import_pool
from lora_store.pool_files import ArchivedPool, PoolState, blob_file
from tests.deployments.adapter_records import BASE
from tests.deployments.scripted import run, words
from tests.lora_store.builders import read_folder

OnPart = Callable[[str, int], object]
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def publish(store: LoraStore, folder: Path, name: str, rank: int = 2, **options: object) -> None:
    random = torch.Generator().manual_seed(len(name))
    weights = {UP: ModuleWeights(torch.randn(rank, 6, generator=random), torch.randn(8, rank, generator=random), 7 / 6)}
    samples = [Sample(f"{name} one", "yes"), Sample(f"{name} two")]
    write_peft_folder(folder / name, weights, base_model=BASE, samples=samples)
    store.commit([store.stage(folder / name, **options)], [None], [0.5], "maker")  # type: ignore[arg-type]


@pytest.fixture
def pool(tmp_path: Path) -> LoraStore:
    store = LoraStore(str(tmp_path / "pool"), accepts_base=[BASE], read_contract=read_contract)
    contract = '{"instruction":"Rhyme {input}: äöü, \u007f, \\"x\\"","sampling":{"temperature":0.0}}'
    publish(store, tmp_path, "poet", tags=["fun"], template="chat", contract=contract)
    publish(store, tmp_path, "secretary", rank=3, tenant="acme", visibility="private")
    return store


class Sent(httpx.SyncByteStream):
    """The parts of a file as a server sends them. The connection breaks where one is gone."""

    def __init__(self, read: Callable[[int], bytes], error: type[httpx.TransportError]) -> None:
        self._read, self._error, self._opening = read, error, read(0)

    def __iter__(self) -> Iterator[bytes]:
        part, number = self._opening, 0
        while part:
            yield part
            number += 1
            try:
                part = self._read(number)
            except AdapterNotFound:
                raise self._error("peer closed connection") from None


def serve(
    store: LoraStore,
    tenant: str | None,
    on_part: OnPart = lambda name, number: None,
    error: type[httpx.TransportError] = httpx.RemoteProtocolError,
) -> httpx.Client:
    """Return a client of a server with this store, whose key is of this tenant. `on_part` is called before each."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/pool/export":
            return httpx.Response(200, content=store.pool_state(tenant).to_parquet())
        name = unquote(request.url.path).removeprefix("/v1/pool/files/")

        def read(number: int) -> bytes:
            on_part(name, number)
            return store.pool_part(tenant, name, number)

        try:
            return httpx.Response(200, stream=Sent(read, error))
        except AdapterNotFound:
            return httpx.Response(404, json={"error": {"message": "gone"}})

    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server")


@pytest.mark.parametrize(("tenant", "names"), [(None, ["poet", "secretary"]), ("acme", ["secretary"])])
def test_a_server_gives_what_the_key_owns(
    tenant: str | None, names: list[str], pool: LoraStore, tmp_path: Path
) -> None:
    target = str(tmp_path / "copy")
    export_pool(ServedPool(serve(pool, tenant)), StoreTarget(target))
    copy = LoraStore(target, accepts_base=[BASE])
    assert [name for _, name in sorted(copy.snapshot().records, key=lambda key: key[1])] == names
    assert all(check.problem is None for check in copy.verify())


@pytest.mark.parametrize(
    ("kind", "error"),
    [("archive", httpx.RemoteProtocolError), ("store", httpx.RemoteProtocolError), ("store", httpx.ReadError)],
)
def test_an_adapter_withdrawn_while_a_server_sends_it_is_left_out_whole(
    kind: str, error: type[httpx.TransportError], pool: LoraStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_store.store.PART_BYTES", 100)
    weights = blob_file(pool.snapshot().records["local", "poet"].weights_digest)

    def withdraw(name: str, number: int) -> None:
        if (name, number) == (weights, 2):
            pool.withdraw("local", ["poet"], "me")

    target, source = tmp_path / f"copy.{kind}", ServedPool(serve(pool, None, withdraw, error))
    if kind == "archive":
        with ArchiveTarget(target) as archive:
            export_pool(source, archive)
        import_pool(ArchivedPool(target), str(target := tmp_path / "imported"))
    else:
        export_pool(source, StoreTarget(str(target)))
    copy = LoraStore(str(target), accepts_base=[BASE])
    assert list(copy.snapshot().records) == [("acme", "secretary")]
    assert [check.problem for check in copy.verify()] == [None, None]


def test_a_connection_that_breaks_otherwise_ends_the_export(pool: LoraStore, tmp_path: Path) -> None:
    def interrupt(name: str, number: int) -> None:
        if number == 1:
            raise httpx.RemoteProtocolError("peer closed connection")

    with pytest.raises(httpx.RemoteProtocolError, match="peer closed connection"):
        export_pool(ServedPool(serve(pool, None, interrupt)), StoreTarget(str(tmp_path / "copy")))


def test_a_key_without_adapters_is_told_how_to_copy_those_of_all_tenants(
    pool: LoraStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tenant, is_told in (("platform", True), ("acme", False)):
        monkeypatch.setattr("deployments.cli.pool_transfer.open_client", lambda url, who=tenant: serve(pool, who))
        done = run("pool", "export", tmp_path / f"{tenant}.tar")
        assert (done.exit_code, "--store STORE copies those of all" in words(done.stderr)) == (0, is_told)


def test_a_key_gets_no_file_of_another_tenant_and_nobody_another_file(pool: LoraStore) -> None:
    for name in ("catalogue/_delta_log/0.json", "projections/../../etc/passwd", "blobs/aa/../x"):
        with pytest.raises(AdapterNotFound):
            list(ServedPool(serve(pool, None)).read(name))
    file = blob_file(pool.snapshot().records["local", "poet"].weights_digest)
    assert pool.pool_part("local", file, 0)
    with pytest.raises(AdapterNotFound):
        pool.pool_part("acme", file, 0)
    assert pool.pool_part("local", file, 0)
    pool.withdraw("local", ["poet"], "me")
    with pytest.raises(AdapterNotFound):
        pool.pool_part("local", file, 0)


def test_the_files_of_an_export_are_found_without_reading_the_pool_again(
    pool: LoraStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an export takes time by the square of its adapters."""
    record = pool.snapshot().records["local", "poet"]
    tenants: list[str] = []
    of_tenant = PoolState.of_tenant

    def read(state: PoolState, tenant: str) -> PoolState:
        tenants.append(tenant)
        return of_tenant(state, tenant)

    monkeypatch.setattr(PoolState, "of_tenant", read)
    assert all(pool.pool_part("local", blob_file(digest), 0) for digest in record.blobs * 5)
    assert tenants == ["local"]


def test_a_pool_goes_into_an_archive_and_from_it_into_a_store(pool: LoraStore, tmp_path: Path) -> None:
    archive, target = tmp_path / "pool.tar", tmp_path / "new"
    made = run("pool", "export", archive, "--store", tmp_path / "pool", "--json")
    counts = json.loads(made.stdout)
    assert counts["num_adapters"] == 2 and "num_left_out" not in counts
    dry = run("pool", "import", archive, "--store", target, "--dry-run")
    assert "2 new" in words(dry.stdout)
    assert not target.exists()
    done = run("pool", "import", archive, "--store", target)
    assert words(done.stdout).startswith("new: acme/secretary, local/poet")
    again = run("pool", "import", archive, "--store", target, "--json")
    assert json.loads(again.stdout)["equal"] == ["acme/secretary", "local/poet"]
    assert run("pool", "export", archive, "--store", target).exit_code == 1


def test_an_import_names_the_model_names_that_it_leaves_out(pool: LoraStore, tmp_path: Path) -> None:
    pool.set_name(("local", "support"), '{"seed": 1}', "maker")
    target = tmp_path / "new"
    publish(LoraStore(str(target), accepts_base=[BASE]), tmp_path / "other", "support")
    done = run("pool", "import", tmp_path / "pool", "--store", target)
    assert done.exit_code == 0
    assert f"not imported, since {target} has something else by that name: local/support;" in words(done.output)


def test_one_adapter_is_moved_and_a_wrong_name_or_place_is_said(
    pool: LoraStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(pool, tmp_path, "poet", tenant="acme", visibility="private")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    source, target = tmp_path / "pool", tmp_path / "new"
    assert run("pool", "import", source, "--store", target, "--adapter", "acme/secretary").exit_code == 0
    assert list(LoraStore(str(target), accepts_base=[BASE]).snapshot().records) == [("acme", "secretary")]
    for given, says in (
        (("import", source, "--store", target, "--adapter", "nobody"), "no adapter 'nobody' in this pool"),
        (("import", source, "--store", target, "--adapter", "poet"), "say acme/poet or local/poet"),
        (("import", tmp_path / "nowhere", "--store", target), "there is no pool"),
        (("export", "s3://b/x.tar", "--store", source), "s3://b/x.tar: an archive is a file on this machine"),
        (("import", "s3://b/x.tar"), "s3://b/x.tar: an archive is a file on this machine"),
        (("export", "s3://b/x", "--peft", "--store", source), "s3://b/x: PEFT folders are written on this machine"),
    ):
        wrong = run("pool", *given)
        assert wrong.exit_code == 1 and says in words(wrong.stderr)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("given", [("compose", "x", "--adapters", "a=1", "--out"), ("pool", "train", "--samples", "x")])
def test_a_folder_that_is_written_is_no_uri(given: tuple[str, ...]) -> None:
    refused = run(*given, "s3://bucket/x")
    assert refused.exit_code == 2 and "must be a folder on this machine, not a URI" in words(refused.stderr)


def test_peft_folders_are_the_same_versions_when_they_are_published_again(pool: LoraStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("pool", "export", out, "--store", tmp_path / "pool", "--peft").exit_code == 0
    listed = yaml.safe_load((out / "pool.yaml").read_text())["adapters"]
    other = LoraStore(str(tmp_path / "other"), accepts_base=[BASE], read_contract=read_contract)
    for entry in listed:
        options = {key: entry[key] for key in ("tags", "template", "visibility")}
        assert entry.get("contract") == (None if entry["name"] == "poet" else {}), "a folder brings its own"
        staged = other.stage(out / entry["source"], tenant=entry["owner"], **options)
        assert staged.ref == pool.snapshot().records[entry["owner"], entry["name"]].ref
    assert [(entry["owner"], entry["name"]) for entry in listed] == [("acme", "secretary"), ("local", "poet")]
    assert run("pool", "export", out, "--store", tmp_path / "pool", "--peft").exit_code == 1


def test_an_export_of_peft_folders_counts_what_it_wrote(tmp_path: Path) -> None:
    store = LoraStore(str(tmp_path / "pool"), accepts_base=[BASE])
    for name, tenant, ttl_s in (("poet", "us", None), ("step-1", "us", 900), ("step-2", "them", 900)):
        publish(store, tmp_path, name, tenant=tenant, ttl_s=ttl_s, visibility="private")
    publish(store, tmp_path, "poet", rank=3, tenant="us")
    export = ("pool", "export", "--peft", "--store", tmp_path / "pool")
    said, shown = run(*export, tmp_path / "out"), run(*export, tmp_path / "again", "--json")
    assert words(said.stdout).startswith("1 adapter as of generation 4 are in")
    assert words(said.stderr).startswith("2 adapters left out: unlisted adapters expire")
    [entry] = yaml.safe_load((tmp_path / "out" / "pool.yaml").read_text())["adapters"]
    assert (entry["source"], "owner" in entry) == ("poet", False), "one tenant's adapters are written"
    counts = {"num_adapters": 1, "num_left_out": 2, "num_bytes": store.snapshot().records["us", "poet"].num_bytes}
    assert json.loads(shown.stdout).items() > counts.items()


def test_an_export_of_no_peft_folder_says_why_and_writes_nothing(
    pool: LoraStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(pool, tmp_path, "step", ttl_s=900)
    LoraStore(str(tmp_path / "empty"), accepts_base=[BASE])
    monkeypatch.setattr("deployments.cli.pool_transfer.open_client", lambda url: serve(pool, "platform"))
    for options, why in (
        (("--store", tmp_path / "pool", "--adapter", "step"), "unlisted adapters expire"),
        (("--store", tmp_path / "empty"), "the pool has none"),
        ((), "a key copies the adapters of its tenant, which has none"),
    ):
        said = run("pool", "export", "--peft", tmp_path / "out", *options)
        assert (said.exit_code, (tmp_path / "out").exists()) == (1, False)
        assert words(said.stderr).startswith(f"there is no adapter to export: {why}")


def test_a_pool_of_one_tenant_names_no_owner(tmp_path: Path) -> None:
    store = LoraStore(str(tmp_path / "pool"), accepts_base=[BASE])
    publish(store, tmp_path, "poet")
    publish(store, tmp_path, "passing", ttl_s=1000)
    run("pool", "export", tmp_path / "out", "--store", tmp_path / "pool", "--peft")
    [entry] = yaml.safe_load((tmp_path / "out" / "pool.yaml").read_text())["adapters"]
    label = {"visibility": "public", "tags": [], "template": "server", "contract": {}}
    assert entry == {"name": "poet", "source": "poet"} | label


@pytest.mark.parametrize(("tenants", "place"), [(["local"], "pool.yaml~"), (["local", "pool.yaml"], "local/pool.yaml")])
def test_a_name_of_the_file_that_lists_peft_folders_is_exported(tenants: list[str], place: str, tmp_path: Path) -> None:
    store = LoraStore(str(tmp_path / "pool"), accepts_base=[BASE])
    for tenant in tenants:
        publish(store, tmp_path / tenant, "pool.yaml", tenant=tenant, visibility="private")
    made = run("pool", "export", tmp_path / "out", "--store", tmp_path / "pool", "--peft")
    assert made.exit_code == 0
    listed = yaml.safe_load((tmp_path / "out" / "pool.yaml").read_text())["adapters"]
    places = {entry.get("owner", "local"): entry["source"] for entry in listed}
    assert places == {"local": place} | ({"pool.yaml": "pool.yaml~/pool.yaml"} if len(tenants) > 1 else {})
    assert all((tmp_path / "out" / found / "adapter_config.json").exists() for found in places.values())


def test_a_composition_is_written_with_its_error(pool: LoraStore, tmp_path: Path) -> None:
    made = ("--out", tmp_path, "--store", tmp_path / "pool")
    said = run("compose", "both", "--adapters", "poet=0.7,acme/secretary=0.3", *made)
    assert "rank 5, exact" in words(said.stdout)
    assert "--template" not in said.stdout  # they differ, so a mixture of them has the server's
    module = read_folder(tmp_path / "both").modules[UP]
    poet, other = (read_folder(tmp_path / name).modules[UP] for name in ("poet", "secretary"))
    total = sum(w * m.scaling * m.lora_b @ m.lora_a for w, m in [(0.7, poet), (0.3, other)])
    torch.testing.assert_close(module.scaling * module.lora_b @ module.lora_a, total)
    low = run("compose", "low", "--adapters", "poet=0.7,secretary=0.3", "--rank", "1", *made)
    assert "rank 1, relative error" in words(low.stdout)
    publish(pool, tmp_path, "bard", template="chat")
    equal = run("compose", "equal", "--adapters", "poet=0.7,bard=0.3", *made)
    assert "--template chat" in words(equal.stdout), "both have it"
    store = str(tmp_path / "pool")
    folder = LoraStore(store, accepts_base=[BASE], read_contract=read_contract).stage(tmp_path / "both")
    assert folder.record.contract == pool.snapshot().records["local", "poet"].contract, "it leads"
    outside = run("compose", "../outside", "--adapters", "poet=0.7,bard=0.3", *made)
    assert (outside.exit_code, (tmp_path.parent / "outside").exists()) == (2, False)


@pytest.mark.parametrize(
    ("num_out", "exit_code", "said"), [(8, 0, "base model tiny-b; is that the same model as tiny-a?"), (9, 1, "differ")]
)
def test_parts_that_name_other_bases_are_composed_if_their_shapes_are_equal(
    num_out: int, exit_code: int, said: str, tmp_path: Path
) -> None:
    store = LoraStore(str(tmp_path / "pool"), accepts_base=["tiny-a", "tiny-b"])
    for name, num in (("tiny-a", 8), ("tiny-b", num_out)):
        module = ModuleWeights(torch.ones(1, 6), torch.ones(num, 1), 1.0)
        write_peft_folder(tmp_path / name, {UP: module}, base_model=name)
        store.commit([store.stage(tmp_path / name)], [None], [0.5], "maker")
    made = ("--out", tmp_path, "--store", tmp_path / "pool")
    found = run("compose", "both", "--adapters", "tiny-a=0.4,tiny-b=0.6", *made)
    assert (found.exit_code, said in words(found.stderr)) == (exit_code, True)
    assert (tmp_path / "both").exists() == (exit_code == 0)


@pytest.mark.parametrize("adapters", ["poet", "poet=x", "poet=nan", "poet=1,poet=2", "=1", ""])
def test_wrong_weights_are_refused(adapters: str) -> None:
    result = run("compose", "both", "--adapters", adapters)
    assert result.exit_code == 2
    assert "NAME=WEIGHT" in words(result.stderr)


def test_an_import_says_how_many_damaged_files_it_writes_again(pool: LoraStore, tmp_path: Path) -> None:
    store, archive = tmp_path / "pool", tmp_path / "pool.tar"
    assert run("pool", "export", archive, "--store", store).exit_code == 0
    (store / blob_file(pool.snapshot().records["local", "poet"].weights_digest)).unlink()
    damaged = run("pool", "export", tmp_path / "other.tar", "--store", store)
    assert damaged.exit_code == 1 and "of local/poet@" in words(damaged.stderr)
    for options, written in ((["--dry-run"], "to be written"), ([], "written")):
        done = run("pool", "import", archive, "--store", store, *options)
        assert f"missing or damaged in {store}, and {written} again: 1 file" in words(done.stdout)
