"""`publish --file`: what it sends, what it reports, and what it withdraws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deployments.scripted import Outcome, refusal, run_with


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


def publish(answers: Any, file: Path, *options: str) -> Outcome:
    return run_with(answers, "publish", "--file", file, *options)


def test_each_adapter_is_sent_with_its_own_description(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"source": "adapters/poet", "tags": ["fun"], "template": "chat"},
        {"source": "s3://bucket/other", "name": "far", "visibility": "private", "base_name": "tiny", "contract": {}},
        {"source": "adapters/theirs", "owner": "beta"},
        defaults={"visibility": "public", "owner": "acme"},
    )
    said = publish([listing(), answers(published("poet"), published("far"))], file)
    poet = {"path": str(tmp_path / "adapters" / "poet"), "tags": ["fun"], "template": "chat", "visibility": "public"}
    far = {"source": "s3://bucket/other", "name": "far", "visibility": "private", "base_model": "tiny", "contract": {}}
    assert (said.code, said.sent[1]) == (0, {"adapters": [poet, far]})
    assert "1 adapter of other owners" in said.err


def test_samples_of_a_training_file_are_sent_with_their_adapter_and_refuse_that_one_only(tmp_path: Path) -> None:
    rows = ({"source": name, "samples": f"data/{name}.jsonl"} for name in ("bad", "poet"))
    file = write(tmp_path, *rows, {"source": "plain"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.jsonl").write_text('{"label": 1}')
    (tmp_path / "data" / "poet.jsonl").write_text('{"instruction": "Rhyme", "output": "time"}')
    said = publish([listing(), (201, published("poet")), answers(published("plain"))], file)
    assert (said.code, [method for method, _ in said.asked]) == (1, ["GET", "POST", "POST"])
    upload, batch = said.server.bodies[1:]
    assert b'"input": "Rhyme"' in upload and b'filename="lora_samples.jsonl"' in upload
    assert json.loads(batch) == {"adapters": [{"path": str(tmp_path / "plain")}]}
    assert "bad.jsonl: has no row with a user's text" in said.err
    assert said.out.endswith("2 new, 0 changed, 0 unchanged, 1 refused")


def test_new_changed_and_unchanged_adapters_are_told_apart(tmp_path: Path) -> None:
    file = write(tmp_path, *({"source": name} for name in ("new", "tagged", "heavier", "same")))
    rows = [
        published("new"),
        published("tagged", "d2", changed={"tags": {"from": [], "to": ["fun"]}}),
        published("heavier", "d2", kept={"tags": ["fun"]}),
        published("same"),
    ]
    before = [live(name) for name in ("tagged", "heavier", "same", "stray")]
    said = publish([listing(*before, live("new", tenant="beta")), answers(*rows)], file, "--dry-run")
    assert said.asked == [("GET", "/v1/loras?after="), ("POST", "/v1/loras?dry_run=true")]
    for part in (
        "new: new is fit to publish",
        "changed: tagged is fit to publish; tags: fun (was none)",
        "its weights, samples or base model changed",
        f"not in {file}: stray (--prune withdraws them)",
    ):
        assert part in said.out
    assert "same is" not in said.out and said.out.endswith("1 new, 2 changed, 1 unchanged, 0 refused")
    row = published("same", changed={"visibility": {"from": "public", "to": "private"}})
    labelled = publish([listing(live("same")), answers(row)], write(tmp_path, {"source": "same"}), "--json")
    assert labelled.json["data"][0]["change"] == "changed", "although the digest is equal"


@pytest.mark.parametrize("dry", [True, False])
def test_only_prune_withdraws_what_is_not_listed(dry: bool, tmp_path: Path) -> None:
    file = write(tmp_path, {"source": "poet"})
    gone = (200, {"names": ["stray"], "generation": 5})
    options = ("--prune", "--json", *(["--dry-run"] if dry else []))
    said = publish([listing(live("poet"), live("stray")), answers(published("poet")), gone], file, *options)
    assert (said.json["not_listed"], said.json["withdrawn"]) == (["stray"], [] if dry else ["stray"])
    assert (("DELETE", "/v1/loras/stray") in said.asked) == (not dry)


def test_a_malformed_entry_does_not_affect_the_others(tmp_path: Path) -> None:
    problem = "contract.sampling.temperature: must be a number, got 'hot'"
    wrong = 400, {"error": {"message": f"adapters.1.{problem}", "param": "adapters.1.contract.sampling.temperature"}}
    hot = {"source": "hot", "contract": {"sampling": {"temperature": "hot"}}}
    file = write(tmp_path, {"source": "bard"}, hot, {"source": "poet"})
    said = publish([listing(), wrong, answers(published("bard"), published("poet"))], file)
    assert said.code == 1 and said.out.endswith("2 new, 0 changed, 0 unchanged, 1 refused")
    assert said.err.endswith(f"{tmp_path / 'hot'}: {problem}") and "adapters.1" not in said.err


def test_a_refused_adapter_stops_the_withdrawal(tmp_path: Path) -> None:
    file = write(tmp_path, {"source": "poet"}, {"source": "bard"})
    rows = [{"status": 400, **refusal(f"adapter {name!r} refused: it is bad")} for name in ("poet", "bard")]
    said = publish([listing(live("stray")), answers(*rows)], file, "--prune")
    assert (said.code, [method for method, _ in said.asked]) == (1, ["GET", "POST"])
    assert "2 adapters refused: it is bad poet, bard" in said.err


@pytest.mark.parametrize(
    ("owners", "problem"),
    [(["beta"], "lists no adapter of your tenant 'acme'"), (["acme", None], "a name is listed twice")],
)
def test_a_file_for_others_or_with_a_name_twice_changes_nothing(
    owners: list[str | None], problem: str, tmp_path: Path
) -> None:
    file = write(tmp_path, *({"source": "poet"} | ({"owner": owner} if owner else {}) for owner in owners))
    said = publish(listing(live("poet"), live("stray")), file, "--prune")
    assert (said.code, [method for method, _ in said.asked]) == (1, ["GET"])
    assert problem in said.err


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
        ("adapters: [{source: poet, tags: [2026-02-30]}]", "pool.yaml: a value cannot be read"),
        (
            "adapters: [{source: poet, contract: {output_schema: {enum: [2026-01-01]}}}]",
            "adapters.0.contract: has a value that JSON does not have",
        ),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_sent(content: Any, problem: str, tmp_path: Path) -> None:
    file = write(tmp_path, {"source": "poet"})
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    said = publish((500, {}), file)
    assert (said.code, said.asked) == (1, []) and problem in said.err
