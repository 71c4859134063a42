"""Requests that publish and change adapters: what they accept, and the item that they mean."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from deployments.api.adapters import (
    MAX_BATCH,
    MAX_TAGS,
    AdapterSource,
    GcRequest,
    LoadAdapterRequest,
    PublishBatch,
    PublishItem,
)


@pytest.mark.parametrize(
    "given",
    [{}, {"path": Path("a"), "source": "s3://b/a"}, {"path": Path("a"), "files": {}}, {"files": {}, "source": ""}],
)
def test_an_upload_is_exactly_one_thing(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="one of path, files and source"):
        PublishItem(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("upload", "name"),
    [
        (PublishItem(Path("/a/poet")), "poet"),
        (PublishItem(Path("/a/poet"), "bard"), "bard"),
        (PublishItem(source="s3://bucket/pool/poet/"), "poet"),
        (PublishItem(source="s3://bucket/poet", name="bard"), "bard"),
        (PublishItem(source="hf://acme/sql@v2"), "sql"),
        (PublishItem(source="hf://acme/many@v2/sql"), "sql"),
        (PublishItem(source="hf://acme/many@v2/sql@old"), "sql@old"),  # only the repository has a revision
        (PublishItem(source="s3://bucket/poet@old"), "poet@old"),
        (PublishItem(source="runs:/0af3/sql@old"), "sql@old"),
        (PublishItem(source="runs:/0af3/model/peft"), "peft"),
        (PublishItem(source="models:/sql/3"), "sql"),
        (PublishItem(source="models:/sql@champion/peft"), "sql"),
        (PublishItem(files={}, name="bard"), "bard"),
        (PublishItem(files={}), ""),
    ],
)
def test_its_default_name_comes_from_its_origin(upload: PublishItem, name: str) -> None:
    assert upload.adapter_name == name


@pytest.mark.parametrize("source", ["s3://b/x", "hf://acme/sql@v2", "runs:/0af3/model/peft", "models:/sql/3"])
def test_vllms_path_may_be_a_source_of_any_kind(source: str) -> None:
    assert LoadAdapterRequest(lora_name="x", lora_path=source).upload() == PublishItem(name="x", source=source)


def test_a_source_becomes_the_item_that_it_describes() -> None:
    said = {"path": "/a/poet", "name": "bard", "tags": ["fun"], "template": "chat", "visibility": "private"}
    item = PublishItem(Path("/a/poet"), "bard", tags=("fun",), template="chat", visibility="private")
    assert AdapterSource.model_validate(said).upload() == item
    assert AdapterSource(path="/a", ttl_s=60).upload().ttl_s == 60
    assert AdapterSource(path="/a", share=0.1).share == 0.1
    assert AdapterSource.model_validate({"source": "s3://b/a"}).upload() == PublishItem(source="s3://b/a")


@pytest.mark.parametrize(
    ("model", "body", "field"),
    [
        (PublishBatch, {"adapters": []}, "adapters"),
        (PublishBatch, {"adapters": [{"path": "/a"}] * (MAX_BATCH + 1)}, "adapters"),
        (AdapterSource, {"path": "/a", "tags": ["x"] * (MAX_TAGS + 1)}, "tags"),
        (AdapterSource, {"path": "/a", "template": "jinja"}, "template"),
        (AdapterSource, {}, "exactly one of `path` and `source`"),
        (AdapterSource, {"path": "/a", "source": "s3://b/a"}, "exactly one of `path` and `source`"),
        (AdapterSource, {"path": "/a", "share": 0.1, "ttl_s": 60}, "`ttl_s` cannot be combined with `share`"),
        (
            AdapterSource,
            {"path": "/a", "share": 0.1, "visibility": "private"},
            "`visibility` cannot be combined with `share`",
        ),
        *((AdapterSource, {"path": "/a", "ttl_s": ttl_s}, "ttl_s") for ttl_s in (0.5, 31 * 86_400, inf, nan)),
        *((GcRequest, {"retention_s": retention_s}, "retention_s") for retention_s in (315_360_001, -1)),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_field(
    model: type[BaseModel], body: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValidationError, match=field):
        model.model_validate(body)


def test_blobs_are_kept_for_ten_years_at_most() -> None:
    assert GcRequest(retention_s=315_360_000).retention_s == 315_360_000
