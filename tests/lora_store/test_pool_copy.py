"""Export and import of pools, between stores in folders and on S3, and archives."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_store import AdapterRef, BlobCorrupted, LoraStore, Snapshot, StoreUnavailable
from lora_store.catalogue import CATALOGUE, Catalogue
from lora_store.errors import StoreDamaged, StoreFull, StoreIsNewer
from lora_store.events import SCHEMA, Publish, SetName
from lora_store.files import Files
from lora_store.leases import Leases
from lora_store.location import Location
from lora_store.names import NamedPolicy, policy_digest
from lora_store.pool_copy import ArchiveTarget, StoreTarget, export_pool, import_pool
from lora_store.pool_files import CATALOGUE_FILE, ArchivedPool, PoolState, StoredPool, blob_file
from lora_store.staging import version_digest
from lora_store.validation import Label
from tests.lora_store.builders import BASE, NOON, MakeFolder, MakeRecord, embedding, ranking
from tests.lora_store.pools.make import facts_of
from tests.lora_store.test_table_format import POOLS

ADMIN = "admin"
OnRead = Callable[[int, str], object]
Put = Callable[..., None]


def opened(uri: str) -> LoraStore:
    return LoraStore(uri, accepts_base=[BASE])


def without_generations(facts: dict[str, Any]) -> dict[str, Any]:
    """Drop the generations, which differ in a copy."""
    for versions in facts["adapters"].values():
        for version in versions:
            del version["generation"]
    return facts


def facts(uri: str) -> dict[str, Any]:
    """Return what a pool says."""
    return without_generations(facts_of(opened(uri)))


@pytest.fixture
def store_uri(folder_uri: str) -> str:
    """Keep most copies off S3, where each takes seconds."""
    return folder_uri


@pytest.fixture
def s3_uri(s3_endpoint: Any, request: pytest.FixtureRequest) -> str:
    uri: str = s3_endpoint.uri(f"copies/{abs(hash(request.node.name))}")
    return uri


@pytest.fixture
def new(tmp_path: Path) -> str:
    """Return the place of a copy."""
    return str(tmp_path / "new")


@pytest.fixture
def pool(store: LoraStore, make_folder: MakeFolder) -> LoraStore:
    """Publish a poet with an older approved version and one under trial, a private one, names, and a ranking."""
    ranked = []
    for name, seed, options in [
        ("poet", 1, {}),
        ("poet", 2, {"tags": ["fun"], "template": "chat"}),
        ("poet", 3, {"share": 0.25, "is_shadow": True}),
        ("secret", 4, {"tenant": "acme", "visibility": "private"}),
    ]:
        staged = store.stage(make_folder(name, seed), **options)
        store.commit([staged], [embedding(seed)], [0.5], "maker")
        if seed == 1:
            store.approve([staged.ref], ADMIN)
        ranked.append(staged.ref)
    for policy in ('{"k": 1}', '{"k": 2}'):
        store.set_name(("local", "support"), policy, ADMIN)
    store.rank("local", [ranking(ranked[1], ranked[3])], ADMIN)
    return store


@pytest.fixture
def archive(pool: LoraStore, store_uri: str, tmp_path: Path) -> Path:
    path = tmp_path / "pool.tar"
    with ArchiveTarget(path) as target:
        export_pool(StoredPool(store_uri), target)
    return path


@pytest.fixture
def put(make_folder: MakeFolder) -> Put:
    """Publish an adapter without an embedding."""

    def run(store: LoraStore, name: str, actor: str = "maker", **label: Any) -> None:
        store.commit([store.stage(make_folder(name, 50), **label)], [None], [0.5], actor)

    return run


def state_of(snapshot: Snapshot) -> dict[str, object]:
    """Return everything in a snapshot but generations."""
    versions = {key: [replace(record, generation=0) for record in snapshot.versions(key)] for key in snapshot.records}
    return {"versions": versions, "ranks": dict(snapshot.rankings), "names": dict(snapshot.names)}


def test_an_archive_restores_versions_trials_approvals_and_rankings(pool: LoraStore, archive: Path, new: str) -> None:
    assert archive.stat().st_mode & 0o777 == 0o600
    done = import_pool(ArchivedPool(archive), new)
    restored = opened(new)
    assert state_of(restored.snapshot()) == state_of(pool.snapshot())
    names = {"new": ["acme/secret", "local/poet"], "equal": [], "skipped": [], "replaced": []}
    assert done == {"generation": 2, **names, "names_left_out": [], "num_unembedded": 0, "num_restored": 0}
    assert all(check.problem is None for check in restored.verify())
    assert restored.snapshot().referenced() == pool.snapshot().referenced()


@pytest.mark.parametrize("released", POOLS, ids=lambda path: path.name)
def test_a_pool_of_each_release_is_copied_as_it_is(released: Path, tmp_path: Path, new: str, s3_uri: str) -> None:
    shutil.copytree(released, tmp_path / "old")
    with ArchiveTarget(tmp_path / "pool.tar") as target:
        export_pool(StoredPool(str(tmp_path / "old")), target)
    export_pool(StoredPool(str(tmp_path / "old")), StoreTarget(s3_uri))
    import_pool(ArchivedPool(tmp_path / "pool.tar"), new)
    import_pool(StoredPool(s3_uri), f"{new}er")
    expected = without_generations(json.loads((released / "expected.json").read_text()))
    assert facts(new) == facts(s3_uri) == facts(f"{new}er") == expected
    assert Catalogue(Location(s3_uri).child(CATALOGUE)).created_at.year == 1970


class Interrupted(Exception):
    """Ends a copy at some file."""


class Scripted:
    """A pool whose files are read through `on_read`, which gets the number of the read from 1."""

    def __init__(self, uri: str, on_read: OnRead) -> None:
        self._pool, self._on_read, self.num_reads = StoredPool(uri), on_read, 0

    def state(self) -> PoolState:
        return self._pool.state()

    def read(self, name: str) -> Iterator[bytes | memoryview]:
        self.num_reads += 1
        self._on_read(self.num_reads, name)
        return self._pool.read(name)


def fail_at(number: int) -> OnRead:
    def on_read(at: int, name: str) -> None:
        if at == number:
            raise Interrupted

    return on_read


def test_an_adapter_withdrawn_during_an_export_is_left_out_whole(pool: LoraStore, store_uri: str, new: str) -> None:
    def withdraw(at: int, name: str) -> None:
        if at == 2:
            gone = pool.withdraw("local", ["poet"], ADMIN)
            pool.sweep([digest for record in gone.records for digest in record.blobs])

    target = StoreTarget(new)
    target.num_threads = 1
    copied = export_pool(Scripted(store_uri, withdraw), target)
    assert list(copied.snapshot.records) == [("acme", "secret")]
    copy = opened(new)
    assert all(check.problem is None for check in copy.verify())
    stored = {file.name.rpartition("/")[2] for file in Files(Location(new).child("blobs")).entries()}
    assert stored == set(copy.snapshot().referenced())


@pytest.mark.parametrize("is_missing", [False, True])
def test_an_export_of_a_damaged_pool_names_the_adapter_and_copies_the_others(
    is_missing: bool, pool: LoraStore, store_uri: str, new: str
) -> None:
    secret = pool.snapshot().records["acme", "secret"]
    blob = Path(store_uri, blob_file(secret.weights_digest))
    if is_missing:
        blob.unlink()
    else:
        blob.write_bytes(b"damaged")
    problem = "is missing" if is_missing else "is corrupted"
    with pytest.raises(StoreDamaged, match=rf"{secret.weights_digest} of {secret.ref} {problem}.* --adapter NAME"):
        export_pool(StoredPool(store_uri), StoreTarget(new))
    export_pool(StoredPool(store_uri), StoreTarget(new), ["poet"])
    assert list(opened(new).snapshot().records) == [("local", "poet")]


def test_an_import_writes_missing_and_damaged_files_of_equal_versions_again(
    pool: LoraStore, archive: Path, store_uri: str
) -> None:
    live, older, *_ = pool.snapshot().versions(("local", "poet"))
    assert live.samples_digest is not None
    Path(store_uri, blob_file(older.weights_digest)).unlink()
    for digest in (live.weights_digest, live.samples_digest):
        Path(store_uri, blob_file(digest)).write_bytes(b"damaged")
    before = pool.snapshot()
    plan = import_pool(ArchivedPool(archive), store_uri, is_dry=True)
    num_damaged = sum(check.problem is not None for check in pool.verify())
    done = import_pool(ArchivedPool(archive), store_uri)
    assert (plan["num_restored"], num_damaged, done["num_restored"], done["new"]) == (3, 3, 3, [])
    assert all(check.problem is None for check in pool.verify())
    assert pool.snapshot() is before
    assert Files(Location(store_uri)).entries("holds") == []
    assert import_pool(ArchivedPool(archive), store_uri)["num_restored"] == 0


def test_an_interrupted_export_is_no_pool_and_continues(
    pool: LoraStore, store_uri: str, new: str, tmp_path: Path
) -> None:
    target = StoreTarget(new)
    target.num_threads = 1
    with pytest.raises(Interrupted):
        export_pool(Scripted(store_uri, fail_at(4)), target)
    require_unusable(store_uri, new)
    export_pool(StoredPool(store_uri), StoreTarget(new))
    assert facts(new) == facts(store_uri)
    with pytest.raises(ValueError, match="holds a pool"):
        StoreTarget(new)
    with pytest.raises(Interrupted), ArchiveTarget(tmp_path / "pool.tar") as archive:
        export_pool(Scripted(store_uri, fail_at(3)), archive)
    assert list(tmp_path.glob("pool.tar*")) == []


def test_of_two_exports_to_a_store_the_first_to_finish_completes_it(
    pool: LoraStore, store_uri: str, put: Put, new: str
) -> None:
    class Overtaken(StoreTarget):
        def finish(self, state: PoolState) -> None:
            put(pool, "later")
            export_pool(StoredPool(store_uri), StoreTarget(new))
            super().finish(state)

    with pytest.raises(ValueError, match="new: holds another export, which was finished meanwhile"):
        export_pool(StoredPool(store_uri), Overtaken(new))
    assert facts(new) == facts(store_uri)
    assert all(check.problem is None for check in opened(new).verify())


def test_an_empty_export_takes_no_blobs_of_one_that_runs(pool: LoraStore, store_uri: str, new: str) -> None:
    opened(f"{new}er")

    class Overtaken(StoreTarget):
        def finish(self, state: PoolState) -> None:
            export_pool(StoredPool(f"{new}er"), StoreTarget(new))
            super().finish(state)

    export_pool(StoredPool(store_uri), Overtaken(new))
    assert facts(new) == facts(store_uri)
    assert all(check.problem is None for check in opened(new).verify())


def test_of_two_exports_to_an_archive_the_first_to_finish_gets_its_name(
    pool: LoraStore, store_uri: str, tmp_path: Path
) -> None:
    path = tmp_path / "pool.tar"
    with ArchiveTarget(path) as late, pytest.raises(ValueError, match=r"pool.tar: was written by another export"):
        with ArchiveTarget(path) as target:
            with pytest.raises(Interrupted), ArchiveTarget(path) as killed:
                export_pool(Scripted(store_uri, fail_at(2)), killed)
            export_pool(StoredPool(store_uri), target)
        export_pool(StoredPool(store_uri), late, ["secret"])
    assert ArchivedPool(path).state().snapshot.records.keys() == pool.snapshot().records.keys()
    assert list(tmp_path.glob("pool.tar*")) == [path]


def require_unusable(store_uri: str, new: str) -> None:
    """Check that nothing takes the store `new` for a pool."""
    uses: list[Callable[[], object]] = [
        lambda: opened(new),
        lambda: StoredPool(new),
        lambda: import_pool(StoredPool(store_uri), new),
    ]
    for use in uses:
        with pytest.raises(StoreDamaged, match="an export to this store was interrupted; repeat the export"):
            use()


def test_an_export_whose_catalogue_is_still_empty_is_no_pool_and_continues(
    pool: LoraStore, store_uri: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(Catalogue):
        def commit(self, *_: object) -> int:
            raise StoreFull("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(StoreFull):
        patched.setattr("lora_store.pool_copy.Catalogue", FullDisk)
        export_pool(StoredPool(store_uri), StoreTarget(new))
    assert Files(Location(new)).entries(CATALOGUE)
    require_unusable(store_uri, new)
    export_pool(StoredPool(store_uri), StoreTarget(new))
    assert facts(new) == facts(store_uri)


def test_a_copy_collects_blobs_that_are_older_than_its_catalogue(pool: LoraStore, store_uri: str, new: str) -> None:
    export_pool(StoredPool(store_uri), StoreTarget(new))
    unused = Path(new, blob_file("0" * 64))
    unused.parent.mkdir(exist_ok=True)
    unused.write_bytes(b"left by a crash")
    os.utime(unused, (0, 0))
    assert opened(new).gc(3600).num_blobs == 1


@pytest.mark.parametrize("how", ["export", "import", "dry import"])
def test_a_store_that_lost_its_catalogue_is_never_written_to(
    how: str, pool: LoraStore, store_uri: str, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(Path(store_uri) / "blobs", damaged / "blobs")
    before = sorted(damaged.rglob("*"))
    with pytest.raises(ValueError, match="blobs but no catalogue"):
        if how == "export":
            StoreTarget(str(damaged))
        else:
            import_pool(StoredPool(store_uri), str(damaged), is_dry=how == "dry import")
    assert sorted(damaged.rglob("*")) == before


def test_an_interrupted_import_continues_with_what_is_missing(
    pool: LoraStore, store_uri: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_store.pool_copy._TOGETHER", 1)
    with pytest.raises(Interrupted):
        import_pool(Scripted(store_uri, fail_at(3)), new)
    assert len(opened(new).snapshot().records) == 1
    done = import_pool(StoredPool(store_uri), new)
    assert (len(done["equal"]), len(done["new"])) == (1, 1)
    assert facts(new) == facts(store_uri)
    assert import_pool(StoredPool(store_uri), new)["generation"] == done["generation"]


def test_an_import_without_all_its_leases_keeps_none(
    pool: LoraStore, store_uri: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = Leases.acquire

    def fail_second(leases: Leases, digests: Collection[str]) -> str:
        if Files(Location(new)).entries("holds"):
            raise StoreUnavailable("down")
        return acquire(leases, digests)

    monkeypatch.setattr(Leases, "acquire", fail_second)
    with pytest.raises(StoreUnavailable):
        import_pool(StoredPool(store_uri), new)
    assert Files(Location(new)).entries("holds") == []


def test_conflicts_are_refused_or_skipped_or_replaced(pool: LoraStore, archive: Path, put: Put, new: str) -> None:
    store = opened(new)
    for name in ("poet", "mine"):
        put(store, name)
    before, blobs = store.snapshot(), sorted(Path(new, "blobs").rglob("*"))
    with pytest.raises(ValueError, match=r"1 of 2 .* local/poet is live as another version, .* --conflict skip"):
        import_pool(ArchivedPool(archive), new)
    assert store.snapshot() is before
    assert sorted(Path(new, "blobs").rglob("*")) == blobs
    done = import_pool(ArchivedPool(archive), new, "skip")
    assert (done["skipped"], done["new"]) == (["local/poet"], ["acme/secret"])
    assert store.snapshot().records["local", "poet"] == before.records["local", "poet"]
    assert ("acme", "secret") in store.snapshot().records
    plan = import_pool(ArchivedPool(archive), new, "replace", is_dry=True)
    assert store.snapshot().versions(("local", "poet")) == before.versions(("local", "poet"))
    done = import_pool(ArchivedPool(archive), new, "replace")
    assert plan["replaced"] == done["replaced"] == ["local/poet"]
    live, *older = store.snapshot().versions(("local", "poet"))
    assert live.live_since is not None and live.live_since > live.created_at
    assert (live.ref, live.trial) == (pool.snapshot().records["local", "poet"].ref, None)
    assert older == list(before.versions(("local", "poet")))


@pytest.mark.parametrize("on_conflict", ["refuse", "replace"])
def test_a_public_name_is_never_taken(store: LoraStore, store_uri: str, put: Put, new: str, on_conflict: Any) -> None:
    put(store, "poet", tenant="acme")
    put(opened(new), "poet")
    with pytest.raises(ValueError, match="acme/poet is public, and its name belongs to tenant 'local'"):
        import_pool(StoredPool(store_uri), new, on_conflict)


@pytest.mark.parametrize("visibility", ["private", "public"])
def test_only_a_public_adapter_is_in_conflict_with_an_approved_model_name_of_another_tenant(
    pool: LoraStore, store_uri: str, put: Put, new: str, visibility: str
) -> None:
    put(pool, "support", tenant="acme", visibility=visibility)
    store = opened(new)
    store.set_name(("local", "support"), '{"k": 1}', ADMIN)
    store.approve_name(store.snapshot().names["local", "support"][0].ref)
    if visibility == "public":
        with pytest.raises(ValueError, match="acme/support is public, and its name belongs to tenant 'local'"):
            import_pool(StoredPool(store_uri), new)
        return
    assert "acme/support" in import_pool(StoredPool(store_uri), new)["new"]
    assert store.snapshot().records["acme", "support"].visibility == "private"


def test_a_model_name_that_an_adapter_has_is_left_out(pool: LoraStore, archive: Path, put: Put, new: str) -> None:
    store = opened(new)
    put(store, "support")
    store.set_name(("acme", "secret"), '{"k": 3}', ADMIN)
    with pytest.raises(ValueError, match="acme/secret is called like a model name of the store"):
        import_pool(ArchivedPool(archive), new)
    dry = import_pool(ArchivedPool(archive), new, "skip", is_dry=True)
    done = import_pool(ArchivedPool(archive), new, "skip")
    assert list(store.snapshot().names) == [("acme", "secret")]
    assert dry["names_left_out"] == done["names_left_out"] == ["local/support"]


def test_a_model_name_is_restored_beside_a_public_adapter_if_it_is_not_approved(
    pool: LoraStore, store_uri: str, put: Put, new: str, tmp_path: Path
) -> None:
    put(pool, "support", tenant="acme")
    for _ in range(2):  # the second time the names are the same
        assert import_pool(StoredPool(store_uri), new)["names_left_out"] == []
    assert opened(new).snapshot().names == pool.snapshot().names
    pool.withdraw("acme", ["support"], ADMIN)
    pool.approve_name(pool.snapshot().names["local", "support"][0].ref)
    other = opened(str(tmp_path / "other"))
    put(other, "support", tenant="acme")
    assert import_pool(StoredPool(store_uri), str(tmp_path / "other"))["names_left_out"] == ["local/support"]
    assert not other.snapshot().names


def test_replace_keeps_who_may_use_the_adapter(pool: LoraStore, store_uri: str, put: Put, new: str) -> None:
    """Otherwise a public version would take the bare name that another tenant has."""
    store = opened(new)
    put(store, "poet", tenant="acme", visibility="public")
    put(store, "poet", tenant="local", visibility="private")
    import_pool(StoredPool(store_uri), new, "replace")
    assert store.snapshot().records["local", "poet"].visibility == "private"
    assert store.snapshot().public["poet"].ref.tenant == "acme"


def test_replace_keeps_an_adapter_private_that_became_private_meanwhile(
    pool: LoraStore, store_uri: str, put: Put, new: str
) -> None:
    target = opened(new)
    put(target, "poet")

    def hide(at: int, name: str) -> None:
        if at == 1:
            target.set_visibility("local", "poet", "private", ADMIN)
            put(target, "poet", tenant="acme")

    import_pool(Scripted(store_uri, hide), new, "replace")
    live = target.snapshot().records
    assert live["local", "poet"].ref == pool.snapshot().records["local", "poet"].ref
    assert (live["local", "poet"].visibility, live["acme", "poet"].visibility) == ("private", "public")


def test_a_listed_adapter_does_not_get_the_end_of_the_unlisted_one_that_it_replaces(
    pool: LoraStore, store_uri: str, put: Put, new: str
) -> None:
    put(opened(new), "poet", ttl_s=600)
    import_pool(StoredPool(store_uri), new, "replace")
    assert not opened(new).snapshot().records["local", "poet"].is_unlisted


def test_a_name_published_meanwhile_is_not_overwritten(pool: LoraStore, store_uri: str, put: Put, new: str) -> None:
    target = opened(new)

    def publish(at: int, name: str) -> None:
        if at == 1:
            put(target, "poet", "rival")

    with pytest.raises(ValueError, match="was published while it was imported"):
        import_pool(Scripted(store_uri, publish), new)
    assert list(target.snapshot().records) == [("local", "poet")]
    assert target.snapshot().records["local", "poet"].actor == "rival"


def damage(archive: Path, change: Callable[[str, bytes], bytes]) -> ArchivedPool:
    """Write the archive again with other contents."""
    damaged = archive.with_name("damaged.tar")
    with tarfile.open(archive) as old, tarfile.open(damaged, "w") as new:
        for member in old:
            data = change(member.name, old.extractfile(member).read())  # type: ignore[union-attr]
            member.size = len(data)
            (archive.parent / "part").write_bytes(data)
            with (archive.parent / "part").open("rb") as file:
                new.addfile(member, file)
    return ArchivedPool(damaged)


def test_a_damaged_blob_is_refused_and_leaves_no_file(pool: LoraStore, archive: Path, s3_uri: str) -> None:
    bad = pool.snapshot().records["local", "poet"].weights_digest
    damaged = damage(archive, lambda name, data: data[:-1] + b"!" if name.endswith(bad) else data)
    with pytest.raises(BlobCorrupted, match=bad):
        import_pool(damaged, s3_uri)
    assert bad not in {file.name.rpartition("/")[2] for file in Files(Location(s3_uri)).entries("blobs")}
    assert opened(s3_uri).snapshot().records == {}


@pytest.mark.parametrize("target", ["new", "s3_uri"])
def test_a_damaged_blob_leaves_the_good_one_of_a_publish_meanwhile(
    target: str, pool: LoraStore, store_uri: str, make_folder: MakeFolder, request: pytest.FixtureRequest
) -> None:
    uri = request.getfixturevalue(target)
    store, digest = opened(uri), pool.snapshot().records["acme", "secret"].weights_digest
    source = Path(store_uri, blob_file(digest))
    source.write_bytes(source.read_bytes()[:-1] + b"!")

    def publish(at: int, name: str) -> None:
        if name == blob_file(digest):
            store.commit([store.stage(make_folder("mine", 4))], [None], [0.5], "maker")

    with pytest.raises(BlobCorrupted, match=digest):
        import_pool(Scripted(store_uri, publish), uri)
    assert store.snapshot().records["local", "mine"].weights_digest == digest
    assert [check.problem for check in store.verify()] == [None, None]


def changed_rows(change: Callable[[list[dict[str, Any]]], None]) -> Callable[[str, bytes], bytes]:
    def write(name: str, data: bytes) -> bytes:
        if name != CATALOGUE_FILE:
            return data
        table = pq.read_table(pa.BufferReader(data))
        rows = table.to_pylist()
        change(rows)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), sink)
        return bytes(sink.getvalue())

    return write


def forged_blob(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose weights are a file elsewhere, with a digest that fits."""
    weights = "../../" + row["weights_digest"]
    parts = (weights, row["samples_digest"], row["base_model"])
    return {"weights_digest": weights, "digest": version_digest(Label("secret"), *parts)}


@pytest.mark.parametrize(
    ("name", "forge", "problem"),
    [
        ("secret", lambda row: {"tags": ["forged"]}, r"acme/secret@\w+ is not what its digest says"),
        ("secret", lambda row: {"name": "../../secret"}, r"name '../../secret' must be 1 to 64 of"),
        ("secret", forged_blob, r"acme/secret@\w+ is not what its digest says"),
        ("support", lambda row: {"source": "{}"}, r"local/support@\w+ is not what its digest says"),
        ("support", lambda row: {"name": "auto"}, r"model name: name 'auto' must be 1 to 64 of"),
    ],
)
def test_a_changed_record_is_refused(
    name: str, forge: Callable[[dict[str, Any]], dict[str, Any]], problem: str, archive: Path, new: str
) -> None:
    def forge_rows(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["name"] == name:
                row |= forge(row)

    forged = damage(archive, changed_rows(forge_rows))
    with pytest.raises(ValueError, match=problem):
        forged.state()  # which every copy of it reads first
    with pytest.raises(ValueError, match=problem):
        import_pool(forged, new)
    assert not Path(new).exists()


@pytest.mark.parametrize("facts", [b"{", b"[]", b"{}", b'{"format": "1", "generation": 1, "projections": []}'])
def test_a_catalogue_with_damaged_facts_is_refused_by_its_name(facts: bytes) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(SCHEMA.empty_table().replace_schema_metadata({b"loraretriever.pool": facts}), sink)
    with pytest.raises(ValueError, match=f"{CATALOGUE_FILE} cannot be read: "):
        PoolState.from_parquet(sink.getvalue().to_pybytes())


def test_an_archive_of_a_newer_release_or_a_cut_one_is_refused(archive: Path, new: str, tmp_path: Path) -> None:
    def add(rows: list[dict[str, Any]]) -> None:
        rows.append(rows[-1] | {"event": "unheard_of", "row": len(rows)})

    with pytest.raises(StoreIsNewer):
        import_pool(damage(archive, changed_rows(add)), new)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(archive.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"has no catalogue.parquet|is not a tar file"):
        ArchivedPool(cut)


def test_the_active_encoder_comes_with_a_new_pool_and_its_projection(pool: LoraStore, store_uri: str, new: str) -> None:
    refs = [record.ref for record in pool.snapshot().records.values()]
    pool.add_embeddings({ref: embedding(encoder="e5+abc") for ref in refs})
    pool.activate_encoder("the-model", "e5+abc", ADMIN)
    projections = ["e5+abc.safetensors", "e5-1.ordinary.safetensors"]
    for name in (*projections, "unused.safetensors"):
        Files(Location(store_uri)).write(f"projections/{name}", name.encode())
    import_pool(StoredPool(store_uri), new)
    assert opened(new).snapshot().encoder == pool.snapshot().encoder
    assert sorted(path.name for path in Path(new, "projections").iterdir()) == projections


def test_adapters_of_another_encoder_are_counted(
    pool: LoraStore, store_uri: str, make_folder: MakeFolder, new: str
) -> None:
    other = opened(new)
    other.commit([other.stage(make_folder("mine", 70))], [embedding(encoder="other")], [0.5], "maker")
    assert import_pool(StoredPool(store_uri), new)["num_unembedded"] == 2
    assert other.snapshot().rankings == {}


def test_a_part_of_a_pool_is_copied_with_its_own_files_only(pool: LoraStore, store_uri: str, new: str) -> None:
    copied = export_pool(StoredPool(store_uri), StoreTarget(new), ["secret"])
    copy = opened(new).snapshot()
    assert copy.referenced() == set(pool.snapshot().records["acme", "secret"].blobs)
    assert list(copied.snapshot.records) == [("acme", "secret")]
    assert (copy.rankings, copy.names) == ({}, {})


def test_what_a_tenant_may_use_of_a_pool_has_nothing_private_of_others(make_record: MakeRecord) -> None:
    records = [
        make_record("mine", "acme", visibility="private"),
        make_record("shared", "globex", "a" * 64, visibility="private"),
        make_record("shared", "globex", "b" * 64),
        make_record("hidden", "globex", visibility="private"),
    ]
    names = [
        NamedPolicy(AdapterRef(tenant, name, policy_digest("{}")), "{}", "me", NOON, approved=approved)
        for tenant, name, approved in (("acme", "own", False), ("globex", "open", True), ("globex", "closed", False))
    ]
    whole = Snapshot(0, {}).after([*map(Publish, records), *map(SetName, names)], 7)
    part = PoolState(whole).usable_by("acme").snapshot
    assert (part.generation, list(part.records)) == (7, [("acme", "mine"), ("globex", "shared")])
    assert part.versions(("globex", "shared")) == (whole.records["globex", "shared"],)
    assert set(part.names) == {("acme", "own"), ("globex", "open")}
