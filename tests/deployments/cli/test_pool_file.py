"""`publish --file`: what it sends, what it reports, and what it withdraws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deployments.scripted import Script, refusal, run, scripted, words


def write(folder: Path, *entries: dict[str, Any], **more: Any) -> Path:
    for entry in entries:
        if "://" not in entry.get("source", "://"):
            (folder / entry["source"]).mkdir(parents=True, exist_ok=True)
            (folder / entry["source"] / "adapter_config.json").write_text("{}")
    file = folder / "pool.yaml"
    file.write_text(yaml.safe_dump({"adapters": list(entries)} | more))
    return file


def live(name: str, digest: str = "d1", tenant: str = "acme") -> dict[str, Any]:
    return {"id": name if tenant == "acme" else f"{tenant}/{name}", "name": name, "tenant": tenant, "digest": digest}


def listing(*rows: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return 200, {"tenant": "acme", "data": list(rows), "has_more": False, "last_id": None}


def published(name: str, digest: str = "d1", **more: Any) -> dict[str, Any]:
    row = {"status": 201, "name": name, "digest": digest, "generation": 4, "found_by_auto": True}
    return row | {"replicas": {"ready": 1, "behind": 0}} | more


def answers(*rows: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return 207, {"object": "list", "data": list(rows)}


def publish(server: Script, file: Path, *options: str) -> Any:
    return run("publish", "--file", file, "--url", server.url, *options)


def test_each_adapter_is_sent_with_its_own_description(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"source": "adapters/poet", "tags": ["fun"], "template": "chat"},
        {"source": "s3://bucket/other", "name": "far", "visibility": "private", "base_name": "tiny", "contract": {}},
        {"source": "adapters/theirs", "owner": "beta"},
        defaults={"visibility": "public", "owner": "acme"},
    )
    with scripted(listing(), answers(published("poet"), published("far"))) as server:
        result = publish(server, file)
    poet = {"path": str(tmp_path / "adapters" / "poet"), "tags": ["fun"], "template": "chat", "visibility": "public"}
    far = {"source": "s3://bucket/other", "name": "far", "visibility": "private", "base_model": "tiny", "contract": {}}
    assert (result.exit_code, server.sent[1]) == (0, {"adapters": [poet, far]})
    assert "1 adapter of other owners" in words(result.stderr)


def test_samples_of_a_training_file_are_sent_with_their_adapter(tmp_path: Path) -> None:
    file = write(tmp_path, {"source": "poet", "samples": "data/poet.jsonl"}, {"source": "plain"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "poet.jsonl").write_text(json.dumps({"instruction": "Rhyme", "output": "time"}))
    with scripted(listing(), (201, published("poet")), answers(published("plain"))) as server:
        result = publish(server, file)
    assert (result.exit_code, [method for method, _ in server.asked]) == (0, ["GET", "POST", "POST"])
    assert b'"input": "Rhyme"' in server.bodies[1] and b'filename="lora_samples.jsonl"' in server.bodies[1]
    assert json.loads(server.bodies[2]) == {"adapters": [{"path": str(tmp_path / "plain")}]}
    assert words(result.stdout).endswith("2 new, 0 changed, 0 unchanged, 0 refused")


def test_a_training_file_is_read_when_its_adapter_is_sent_and_refuses_that_one_only(tmp_path: Path) -> None:
    rows = ({"source": name, "samples": f"{name}.jsonl"} for name in ("bad", "poet"))
    file = write(tmp_path, *rows)
    (tmp_path / "bad.jsonl").write_text('{"label": 1}')
    (tmp_path / "poet.jsonl").write_text('{"instruction": "Rhyme", "output": "time"}')
    with scripted(listing(), (201, published("poet"))) as server:
        result = publish(server, file)
    assert (result.exit_code, [method for method, _ in server.asked]) == (1, ["GET", "POST"])
    assert "bad.jsonl: has no row with a user's text" in words(result.stderr)
    assert words(result.stdout).endswith("1 new, 0 changed, 0 unchanged, 1 refused")


def test_new_changed_and_unchanged_adapters_are_told_apart(tmp_path: Path) -> None:
    file = write(tmp_path, *({"source": name} for name in ("new", "tagged", "heavier", "same")))
    rows = [
        published("new"),
        published("tagged", "d2", changed={"tags": {"from": [], "to": ["fun"]}}),
        published("heavier", "d2", kept={"tags": ["fun"]}),
        published("same"),
    ]
    before = [live(name) for name in ("tagged", "heavier", "same", "stray")]
    with scripted(listing(*before, live("new", tenant="beta")), answers(*rows)) as server:
        result = publish(server, file, "--dry-run")
    assert server.asked == [("GET", "/v1/loras?after="), ("POST", "/v1/loras?dry_run=true")]
    said = words(result.stdout)
    assert "new: new is fit to publish" in said
    assert "changed: tagged is fit to publish; tags: fun (was none)" in said
    assert "its weights, samples or base model changed" in said
    assert "same is" not in said
    assert f"not in {file}: stray (--prune withdraws them)" in said
    assert said.endswith("1 new, 2 changed, 1 unchanged, 0 refused")


def test_a_changed_visibility_counts_although_the_digest_is_equal(tmp_path: Path) -> None:
    file = write(tmp_path, {"source": "poet", "visibility": "private"})
    row = published("poet", changed={"visibility": {"from": "public", "to": "private"}})
    with scripted(listing(live("poet")), answers(row)) as server:
        result = publish(server, file, "--json")
    assert json.loads(result.stdout)["data"][0]["change"] == "changed"


@pytest.mark.parametrize("dry", [True, False])
def test_only_prune_withdraws_what_is_not_listed(dry: bool, tmp_path: Path) -> None:
    file = write(tmp_path, {"source": "poet"})
    gone = (200, {"names": ["stray"], "generation": 5})
    with scripted(listing(live("poet"), live("stray")), answers(published("poet")), gone) as server:
        result = publish(server, file, "--prune", "--json", *(["--dry-run"] if dry else []))
    said = json.loads(result.stdout)
    assert said["not_listed"] == ["stray"]
    assert said["withdrawn"] == ([] if dry else ["stray"])
    assert (("DELETE", "/v1/loras/stray") in server.asked) == (not dry)


def test_a_refused_adapter_stops_the_withdrawal(tmp_path: Path) -> None:
    file = write(tmp_path, {"source": "poet"}, {"source": "bard"})
    rows = [{"status": 400, **refusal(f"adapter {name!r} refused: it is bad")} for name in ("poet", "bard")]
    with scripted(listing(live("stray")), answers(*rows)) as server:
        result = publish(server, file, "--prune")
    assert result.exit_code == 1
    assert [method for method, _ in server.asked] == ["GET", "POST"]
    assert "2 adapters refused: it is bad poet, bard" in words(result.stderr)


@pytest.mark.parametrize(
    ("owners", "problem"),
    [(["beta"], "no adapter of it belongs to tenant 'acme'"), (["acme", None], "a name is listed twice")],
)
def test_a_file_for_others_or_with_a_name_twice_changes_nothing(
    owners: list[str | None], problem: str, tmp_path: Path
) -> None:
    file = write(tmp_path, *({"source": "poet"} | ({"owner": owner} if owner else {}) for owner in owners))
    with scripted(listing(live("poet"), live("stray"))) as server:
        result = publish(server, file, "--prune")
    assert (result.exit_code, [method for method, _ in server.asked]) == (1, ["GET"])
    assert problem in words(result.stderr)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, "adapters: "),
        ({"adapters": []}, "adapters: must have at least 1 items"),
        ({"adapters": [{"source": "poet", "tag": ["x"]}]}, "adapters.0.tag: unknown; did you mean 'tags'?"),
        ({"adapters": [{"source": "poet", "template": "llama"}]}, "adapters.0.template: must be 'alpaca', 'chat' or"),
        ({"adapters": [{"source": "poet"}, {"source": "poet"}]}, "'poet' is listed twice"),
        ({"adapters": [{"source": "nowhere"}]}, "nowhere: has no adapter"),
        ({"adapters": [{"source": "s3://bucket/x"}]}, "s3://bucket/x: needs a name"),
        ({"adapters": [{"source": "s3://b/x", "name": "x", "samples": "x.jsonl"}]}, "samples go with a folder"),
        ({"adapters": [{"source": "poet", "samples": "no.jsonl"}]}, "poet: samples: there is no file"),
        ("adapters: [", "while parsing"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_sent(content: Any, problem: str, tmp_path: Path) -> None:
    write(tmp_path, {"source": "poet"})
    file = tmp_path / "pool.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with scripted((500, {})) as server:
        result = publish(server, file)
    assert (result.exit_code, server.asked) == (1, [])
    assert problem in words(result.stderr)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--file", "pool.yaml", "folder"], "--file"),
        (["--file", "pool.yaml", "--tag", "x"], "--file"),
        (["folder", "--prune"], "--prune"),
        ([], "FOLDER"),
    ],
)
def test_a_file_is_not_combined_with_folders_and_options(options: list[str], problem: str) -> None:
    result = run("publish", *options)
    assert result.exit_code == 2
    assert problem in words(result.stderr)
