from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lora_store import Catalogue, Location, Publish
from tests.deployments.scripted import run
from tests.lora_store.builders import MakeRecord
from tests.lora_store.conftest import make_record  # noqa: F401  a fixture


@pytest.fixture
def pool(tmp_path: Path, make_record: MakeRecord) -> Path:  # noqa: F811
    """Return the folder of a pool with two adapters."""
    catalogue = Catalogue(Location(str(tmp_path / "pool")).child("catalogue"))
    for name in ("poet", "coder"):
        catalogue.commit(lambda _, name=name: [Publish(make_record(name))])
    return tmp_path / "pool"


def test_a_whole_catalogue_is_left_alone(pool: Path) -> None:
    result = run("pool", "repair", "--store", pool)
    assert result.exit_code == 0
    assert result.stdout == f"the catalogue of {pool} is whole; nothing was changed\n"


def test_a_repair_says_what_was_damaged_restored_and_where_it_is(pool: Path, tmp_path: Path) -> None:
    commit = pool / "catalogue" / "_delta_log" / f"{2:020}.json"
    commit.write_bytes(b"")
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({"store_uri": str(pool)}))
    result = run("pool", "repair", "--config", settings)
    assert result.exit_code == 0, result.output
    (aside,) = pool.glob("damaged-*")
    assert result.stdout.splitlines() == [
        f"damaged: _delta_log/{2:020}.json is empty",
        "restored generations: 2",
        "nothing is lost",
        f"the damaged files are in {aside}",
        "the pool has 2 adapters at generation 3",
    ]


def test_a_loss_is_named_and_ends_with_exit_code_1(pool: Path) -> None:
    newest = max((pool / "catalogue").glob("*.parquet"), key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:100])
    result = run("pool", "repair", "--store", pool, "--json")
    done = json.loads(result.stdout)
    assert result.exit_code == 1
    assert list(done["damaged"]) == [newest.name] and (done["num_adapters"], done["generation"]) == (1, 3)
    assert len(done["lost"]) == 1 and done["lost"][0].startswith(f"the change of generation 2: {newest.name}")
    assert json.loads(run("pool", "repair", "--store", pool, "--json").stdout) == {
        "damaged": {},
        "restored": [],
        "lost": [],
    }


def test_a_location_without_a_pool_is_named_and_stays_empty(tmp_path: Path) -> None:
    result = run("pool", "repair", "--store", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "_delta_log is missing" in " ".join(result.output.split())
    assert not (tmp_path / "nowhere").exists()
