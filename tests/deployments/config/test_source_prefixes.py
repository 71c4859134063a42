from __future__ import annotations

import pytest

from deployments.config.source_prefixes import SourcePrefix, SourceUri


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://bucket/pool/poet", ("bucket", "pool", "poet")),
        ("s3://bucket/pool/poet/", ("bucket", "pool", "poet")),
        ("s3://bucket", ("bucket",)),
        ("gs://bucket/a b/100%", ("bucket", "a b", "100%")),
        ("file:///data/pool", ("data", "pool")),
        ("file:///", ()),
        ("s3://bucket/..x/x..", ("bucket", "..x", "x..")),
        ("hf://acme/sql/a b", ("acme", "sql", "a b")),
        ("hf://", ()),
        ("runs:/0af3/model/peft", ("0af3", "model", "peft")),
        ("models:/", ()),
    ],
)
def test_a_uri_is_read_part_by_part(uri: str, parts: tuple[str, ...]) -> None:
    assert SourceUri.parse(uri).parts == parts


@pytest.mark.parametrize(
    "uri",
    [
        *("", "/data/pool", "http://host/pool", "S3://bucket/pool", "s3:/bucket", "s3://", "s3:///pool"),
        *("s3://bucket/../other", "s3://bucket/pool/..", "s3://bucket/./pool", "s3://bucket//pool"),
        *("s3://bucket/pool?endpoint_override=evil", "s3://bucket/pool#x", "s3://key:secret@bucket/pool"),
        *("s3://bucket:9000/pool", "s3://bucket/a\\b", "s3://bucket/a\nb", "s3://bucket/a\0b"),
        *("file://host/data", "file://data", "file:///data/../etc"),
        *("hf:/acme/sql", "hf://acme/sql@", "hf://acme/../sql", "hf://acme@x/sql", "hf://acme/..@main"),
        *("hf://acme/.@main", "hf://acme/sql@..", "hf://acme/sql@.", "hf://user:secret@host/sql", "hf://acme/sql%2e"),
        *(
            "models:/..@champion",
            "models:/sql@..",
            "models:/sql/latest",
            "models:/sql@a?b",
            "runs://0af3",
            "runs:/../x",
        ),
    ],
)
def test_an_ambiguous_uri_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="must"):
        SourceUri.parse(uri)


ON_A_HOST = "s3://bucket/adapters?endpoint_override=localhost:9000&scheme=http"


@pytest.mark.parametrize(
    ("uri", "above", "not_above"),
    [
        ("s3://bucket/adapters/poet", ["s3://bucket/adapters", "s3://bucket/adapters/", ON_A_HOST, "s3://bucket"], []),
        ("s3://bucket/adapters", ["s3://bucket/adapters"], []),
        ("s3://bucket/adapters-evil/poet", [], ["s3://bucket/adapters"]),
        ("s3://bucket-evil/adapters", [], ["s3://bucket"]),
        ("gs://bucket/adapters/poet", [], ["s3://bucket/adapters"]),
        ("file:///data/adapters-evil", [], ["file:///data/adapters"]),
        ("s3://bucket/Adapters/poet", [], ["s3://bucket/adapters"]),
        ("s3://bucket/%61dapters/poet", [], ["s3://bucket/adapters"]),
        ("hf://acme/sql@v2", ["hf://acme", "hf://", "hf://acme/sql@v2"], ["hf://acme/sql@v3"]),
        ("hf://acme-evil/sql", [], ["hf://acme"]),
        ("models:/sql/3", ["models:/sql"], []),
        ("models:/sql@champion/peft", ["models:/sql"], []),
        ("models:/sql-evil/3", [], ["models:/sql"]),
        ("runs:/sql", [], ["models:/sql"]),
    ],
)
def test_prefixes_are_compared_part_by_part(uri: str, above: list[str], not_above: list[str]) -> None:
    parsed = SourceUri.parse(uri)
    assert [p for p in (*above, *not_above) if parsed.is_below(SourcePrefix.parse(p).uri)] == above


def test_an_invalid_prefix_is_quoted_in_the_refusal() -> None:
    with pytest.raises(ValueError, match=r"source prefix 's3://bucket/\.\./x' must not contain"):
        SourcePrefix.parse("s3://bucket/../x")


def test_the_query_of_a_prefix_belongs_only_to_its_location() -> None:
    prefix = SourcePrefix.parse(ON_A_HOST)
    assert prefix.uri == SourceUri("s3", ("bucket", "adapters"))
    assert prefix.location is not None and "endpoint_override=localhost:9000" in prefix.location.uri
    assert [SourcePrefix.parse(other).location for other in ("hf://acme", "runs:/", "models:/sql")] == [None] * 3


@pytest.mark.parametrize(
    ("uri", "revision"),
    [
        ("hf://acme/sql", ""),
        ("hf://acme/sql@v2", "v2"),
        ("hf://acme/sql@v2/deep", "v2"),
        ("models:/sql/3/peft", "3"),
        ("models:/sql@champion", "champion"),
        ("models:/sql", ""),
    ],
)
def test_a_revision_is_not_part_of_the_place(uri: str, revision: str) -> None:
    parsed = SourceUri.parse(uri)
    assert parsed.revision == revision
    assert "@" not in "".join(parsed.parts) and "3" not in parsed.parts
