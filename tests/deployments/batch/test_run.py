"""What an offline run begins with."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deployments.batch.run import BatchSettings, begin
from deployments.config.app import AppConfig
from deployments.errors import BatchRefused
from lora_store import Catalogue, Location, Publish
from tests.deployments.adapter_records import adapter


def test_a_run_whose_generation_was_collected_is_refused_with_the_remedy(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["one", "two"]}), tmp_path / "in.parquet")
    config = AppConfig(store_uri=str(tmp_path / "store"))
    settings = BatchSettings(config, str(tmp_path / "in.parquet"), str(tmp_path / "out"))
    catalogue = Catalogue(Location(config.store_uri).child("catalogue"))
    catalogue.commit(lambda _: [Publish(adapter("poet"))])
    assert begin(settings).generation == 1
    catalogue.commit(lambda _: [Publish(adapter("poet", version="2"))])
    assert (begin(settings).generation, begin(settings).num_adapters) == (1, 1)
    catalogue.vacuum(datetime.now(UTC) + timedelta(days=1))
    with pytest.raises(BatchRefused, match=r"generation 1 of the pool is no longer stored.* in another output folder"):
        begin(settings)
