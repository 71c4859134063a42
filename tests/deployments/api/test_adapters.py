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
    ApproveRequest,
    GcRequest,
    LoadAdapterRequest,
    PublishBatch,
    PublishItem,
    RollbackRequest,
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
        (PublishItem(files={}, name="bard"), "bard"),
        (PublishItem(files={}), ""),
    ],
)
def test_its_default_name_comes_from_its_origin(upload: PublishItem, name: str) -> None:
    assert upload.adapter_name == name


def test_a_source_becomes_the_item_that_it_describes() -> None:
    said = {"path": "/a/poet", "name": "bard", "tags": ["fun"], "template": "chat", "visibility": "private"}
    item = PublishItem(Path("/a/poet"), "bard", tags=("fun",), template="chat", visibility="private")
    assert AdapterSource.model_validate(said).upload() == item
    assert AdapterSource(path="/a", ttl_s=60).upload().ttl_s == 60
    assert AdapterSource(path="/a", share=0.1).share == 0.1
    assert AdapterSource.model_validate({"source": "s3://b/a"}).upload() == PublishItem(source="s3://b/a")


def test_vllms_path_is_a_folder_or_a_uri() -> None:
    load = {"lora_name": "poet", "lora_path": "/a/x"}
    assert LoadAdapterRequest.model_validate(load).upload() == PublishItem(Path("/a/x"), "poet")
    load["lora_path"] = "s3://b/x"
    assert LoadAdapterRequest.model_validate(load).upload() == PublishItem(name="poet", source="s3://b/x")


@pytest.mark.parametrize(
    ("model", "body", "field"),
    [
        (PublishBatch, {"adapters": []}, "adapters"),
        (PublishBatch, {"adapters": [{"path": "/a"}] * (MAX_BATCH + 1)}, "adapters"),
        (AdapterSource, {"path": "/a", "tags": ["x"] * (MAX_TAGS + 1)}, "tags"),
        (AdapterSource, {"path": "/a", "template": "jinja"}, "template"),
        (AdapterSource, {"path": "/a", "nmae": "poet"}, "nmae"),
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
        (RollbackRequest, {"digest": "abc"}, "digest"),
        (ApproveRequest, {"digest": "d" * 12}, "digest"),
        (ApproveRequest, {"digest": "D" * 64}, "digest"),
        (LoadAdapterRequest, {"lora_name": "a", "lora_path": "/a", "is_3d_lora_weight": True}, "is_3d_lora_weight"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_field(
    model: type[BaseModel], body: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValidationError, match=field):
        model.model_validate(body)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("s3://bucket/pool/poet/", "poet"),
        ("hf://acme/sql@v2", "sql"),
        ("hf://acme/many@v2/sql", "sql"),
        ("runs:/0af3/model/peft", "peft"),
        ("models:/sql/3", "sql"),
        ("models:/sql@champion/peft", "sql"),
    ],
)
def test_a_source_names_its_adapter_without_a_revision(source: str, name: str) -> None:
    assert PublishItem(source=source).adapter_name == name
    assert LoadAdapterRequest(lora_name="x", lora_path=source).upload().source == source


def test_blobs_are_kept_for_ten_years_at_most_and_for_a_day_by_default() -> None:
    assert GcRequest().retention_s == 86_400
    for retention_s in (0, 315_360_000):
        assert GcRequest(retention_s=retention_s).retention_s == retention_s
