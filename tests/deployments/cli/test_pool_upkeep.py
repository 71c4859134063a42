from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_store import Location
from lora_store.catalogue import Catalogue
from lora_store.events import Publish
from lora_store.pool_files import StoredPool
from retriever_svc import Encoder
from tests.deployments.sample_stores import store_of
from tests.deployments.scripted import Outcome, lines, refusal, run, run_with, words
from tests.lora_store.builders import MakeRecord
from tests.lora_store.conftest import make_record  # noqa: F401  a fixture
from tests.tiny_encoder import save_tiny_encoder, topic_texts


def job(result: dict[str, Any], *command: object) -> Outcome:
    """Run a command whose job has this result after some progress."""
    return run_with(lines({"done": 1, "total": 2}, {"done": 2, "total": 2}, {"result": result}), "pool", *command)


def test_verify_prints_the_number_of_intact_blobs_and_names_bad_ones() -> None:
    said = job({"num_blobs": 2, "problems": []}, "verify")
    assert (said.code, said.asked, said.sent) == (0, [("POST", "/v1/pool/verify")], [{}])
    assert "2 blobs, 0 bad" in said.out
    problem = {"adapter": "local/poet@dddddddddddd", "digest": "f" * 64, "problem": "is missing"}
    bad = job({"num_blobs": 1, "problems": [problem]}, "verify")
    assert bad.code == 1 and "local/poet@dddddddddddd: is missing" in bad.err


def test_verify_of_a_store_reads_the_blobs_of_all_tenants(tmp_path: Path) -> None:
    uri = store_of(tmp_path, {"poet": ["a verse"], "coder": ["a loop"]})  # poet is another tenant's, and private
    whole = run("pool", "verify", "--store", uri)
    assert (whole.exit_code, words(whole.stdout)) == (0, "5 blobs, 0 bad")
    [digest] = [
        item.weights_digest for key, item in StoredPool(uri).state().snapshot.records.items() if key[1] == "poet"
    ]
    [file] = (tmp_path / "pool" / "blobs").rglob(digest)
    file.chmod(0o600)
    file.write_bytes(b"damaged")
    bad = run("pool", "verify", "--store", uri, "--json")
    assert bad.exit_code == 1
    [problem] = json.loads(bad.stdout)["problems"]
    assert problem["digest"] == digest and problem["adapter"].startswith("other/poet@")
    nowhere = run("pool", "verify", "--store", tmp_path / "nowhere")
    assert nowhere.exit_code == 1 and "there is no pool" in words(nowhere.stderr)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("options", "seconds"), [((), 86_400), (("--retention", "0"), 0)])
def test_gc_prints_the_removed_blobs(options: tuple[str, ...], seconds: float) -> None:
    said = run_with({"num_blobs": 3, "num_bytes": 12, "num_projections": 1}, "pool", "gc", *options)
    assert (said.asked, said.sent) == ([("POST", "/v1/pool/gc")], [{"retention_s": seconds}])
    assert "removed 3 blobs and 1 projection, 12 bytes" in said.out


@pytest.mark.parametrize(("behind", "note"), [(0, ""), (2, " (2 replicas are not up to date yet)")])
def test_reindex_prints_since_when_the_pool_uses_the_encoder(behind: int, note: str) -> None:
    result = {"encoder": "other", "generation": 9, "replicas": {"ready": 1, "behind": behind}}
    said = job(result, "reindex", "--encoder", "other")
    assert (said.asked, said.sent) == ([("POST", "/v1/pool/reindex")], [{"encoder": "other", "projection": "auto"}])
    assert said.out == f"the pool uses other since generation 9{note}"


@pytest.mark.parametrize(
    ("command", "status", "body", "says"),
    [
        (("verify",), 503, refusal("the store is down"), "the store is down"),
        (("reindex", "--encoder", "x"), 200, lines({"done": 1, "total": 2}, refusal("it went down")), "it went down"),
        (("doctor",), 200, lines(refusal("it went down")), "it went down"),
        (("evaluate",), 200, lines({"done": 1, "total": 2}), "closed the connection"),
    ],
)
def test_a_failing_job_prints_the_reason(command: tuple[str, ...], status: int, body: Any, says: str) -> None:
    said = run_with((status, body), "pool", *command)
    assert said.code == 1 and says in said.err


RANKING: dict[str, Any] = {
    "region": "poet",
    "adapters": [
        {"name": "bard", "score": 0.9, "num_examples": 20, "is_beaten": False},
        {"name": "poet", "score": 0.25, "num_examples": 20, "is_beaten": True},
    ],
}
RANKED = "right answers to the samples of poet: bard 90% of 20, poet 25% of 20 (beaten)"


def test_an_evaluation_prints_its_rankings_or_that_it_changes_nothing() -> None:
    result = {"num_regions": 3, "rankings": [RANKING], "generation": 9, "replicas": {"ready": 1, "behind": 0}}
    said = job(result, "evaluate")
    assert (said.code, said.asked, said.sent) == (0, [("POST", "/v1/pool/evaluate")], [{}])
    assert "1 of 3 adapters with sample outputs are ranked among similar ones; the others have no" in said.out
    assert RANKED in said.out and "none is clearly beaten" not in said.out
    own = RANKING | {"adapters": RANKING["adapters"][:1]}
    same = job(result | {"num_regions": 1, "rankings": [own]}, "evaluate")
    assert "1 of 1 adapters with sample outputs are ranked" in same.out and "the others" not in same.out
    assert "none is clearly beaten by a similar one, so `auto` chooses as before" in same.out


REPORT = {
    "k": 3,
    "num_adapters": 4,
    "num_samples": 80,
    "first_share": 0.75,
    "found_share": 0.9,
    "turned_away_share": {"lenient": 0.012, "balanced": 0.03, "strict": 0.08},
    "collisions": [{"adapters": ["poet", "bard"], "cosine": 0.97, "num_swapped": [4, 1]}],
    "never_chosen": ["mute"],
    "always_shadowed": [{"name": "bard", "by": "poet"}],
    "unreadable": ["torn"],
    "rankings": [RANKING],
    "advice": [{"problem": "refit", "adapters": [], "text": "Reindex with [refit]."}],
}


def test_the_doctor_names_adapters_that_are_hard_to_find() -> None:
    said = job(REPORT, "doctor")
    assert (said.code, said.asked, said.sent) == (0, [("POST", "/v1/pool/doctor")], [{}])
    for part in (
        "4 adapters, 80 samples: own adapter first 75.0%, among the best 3 90.0%",
        "each left out of its adapter: lenient 1.2%, balanced 3.0%, strict 8.0%",
        "collision: poet and bard, cosine 0.970, 4 and 1 samples swapped",
        "bard is never chosen first: poet always scores higher",
        "never chosen: mute",
        "unreadable samples: torn",
        "advice: Reindex with [refit].",
        RANKED,
    ):
        assert part in said.out


@pytest.mark.parametrize("command", ["doctor", "evaluate", "verify"])
def test_a_report_is_printed_as_json(command: str) -> None:
    result = {"rankings": [RANKING], "problems": []}
    said = job(result, command, "--json")
    assert (said.code, said.json) == (0, result)


def test_the_doctor_takes_real_prompts(tmp_path: Path) -> None:
    rows = [
        {"input": "a verse", "adapter": "poet"},
        {"prompt": "hello", "adapter": None},
        {"prompt": "an ode", "adapter": ["coder", "poet"]},
        {"prompt": "and this"},
    ]
    counts = {"num": 8, "num_right": 4, "num_other": 1, "num_base": 3}
    others = {"num": 2, "num_right": 2, "num_other": 0, "num_base": 0}
    found = {"num": 10, "num_right": 6, "num_other": 1, "num_base": 3}
    adapters = [
        {"name": None, **others, "others": []},
        {"name": "poet", **counts, "others": [{"name": "coder", "num": 1}]},
    ]
    unlabelled = [{"name": None, "num": 1}, {"name": "coder", "num": 2}]
    report = REPORT | {"prompts": {**found, "adapters": adapters, "unlabelled": unlabelled}}
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines(*rows))
    listed = {"generation": 4, "data": [{"id": "poet"}, {"id": "coder"}], "last_id": "", "has_more": False}
    said = run_with([(200, listed), (200, lines({"result": report}))], "pool", "doctor", "--prompts", file)
    assert said.code == 0, said.err
    assert said.sent[-1] == {
        "prompts": [
            {"prompt": "a verse", "adapters": ["poet"]},
            {"prompt": "hello", "adapters": []},
            {"prompt": "an ode", "adapters": ["coder", "poet"]},
            {"prompt": "and this"},
        ]
    }
    assert "poet │ 8 │ 50.0% │ 12.5% │ 37.5% │ coder 1" in said.out
    assert "the base model │ 2 │ 100.0% │ 0.0% │ 0.0%" in said.out
    assert "all │ 10 │ 60.0% │ 10.0% │ 30.0%" in said.out
    assert "the base model answers 1 other prompt coder answers 2 other prompts" in said.out


def test_an_invalid_adapter_of_a_prompt_for_the_doctor_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x", "adapter": []}')
    said = run_with((500, {}), "pool", "doctor", "--prompts", tmp_path / "prompts.jsonl")
    assert (said.code, said.asked) == (1, []) and "prompts.jsonl:1: must be" in said.err


def test_more_prompts_than_the_doctor_takes_are_not_sent(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines({"prompt": "a verse", "adapter": "poet"}) * 4001)
    said = run_with((500, {}), "pool", "doctor", "--prompts", file)
    assert (said.code, said.asked, said.err) == (1, [], f"--prompts: at most 4000 lines, {file} has 4001")


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
    (pool / "catalogue" / "_delta_log" / f"{2:020}.json").write_bytes(b"")
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


def test_a_loss_is_named_and_ends_with_exit_code_1(pool: Path, tmp_path: Path) -> None:
    newest = max((pool / "catalogue").glob("*.parquet"), key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:100])
    result = run("pool", "repair", "--store", pool, "--json")
    done = json.loads(result.stdout)
    assert result.exit_code == 1
    assert list(done["damaged"]) == [newest.name] and (done["num_adapters"], done["generation"]) == (1, 3)
    assert len(done["lost"]) == 1 and done["lost"][0].startswith(f"the change of generation 2: {newest.name}")
    again = json.loads(run("pool", "repair", "--store", pool, "--json").stdout)
    assert again == {"damaged": {}, "restored": [], "lost": []}
    nowhere = run("pool", "repair", "--store", tmp_path / "nowhere")
    assert nowhere.exit_code == 1 and words(nowhere.output).strip().endswith("there is no pool")
    assert not (tmp_path / "nowhere").exists()


TEXTS = topic_texts(3, seed=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


def record_of(encoder: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((encoder / "training.json").read_text())
    return record


def test_an_encoder_is_trained_on_a_file(tiny: Path, tmp_path: Path) -> None:
    target, samples = tmp_path / "out", tmp_path / "samples.jsonl"
    samples.write_text(lines(*({"task": topic, "text": text} for topic, own in TEXTS.items() for text in own)))
    options = ("--encoder", tiny, "--epochs", 1, "--share", 0.5, "--seed", 4)
    result = run("pool", "train", target, "--samples", samples, *options)
    assert result.exit_code == 0, result.stderr
    assert "on 2 tasks in" in words(result.stdout)
    record = record_of(target)
    assert record["num_texts_of_task"] == {"cake": 3, "goat": 3}
    assert (record["share"], record["seed"], record["num_epochs"]) == (0.5, 4, 1)
    assert Encoder(target).identity != Encoder(tiny).identity
    for given, says in (
        ((), "either --store or --samples"),
        (("--samples", samples, "--encoder", tmp_path), "neither modules.json nor config.json"),
    ):
        assert says in words(run("pool", "train", tmp_path / "another", *given).stderr)


def test_an_encoder_is_trained_on_the_adapters_that_a_tenant_sees(tiny: Path, tmp_path: Path) -> None:
    options = ("--store", store_of(tmp_path, TEXTS), "--encoder", tiny, "--epochs", 1)
    printed = json.loads(run("pool", "train", tmp_path / "local", *options, "--json").stdout)
    assert (printed["encoder"], printed["tasks"]) == (str(tmp_path / "local"), ["cake", "debt", "goat"])
    assert record_of(tmp_path / "local")["num_texts_of_task"] == {"cake": 3, "debt": 3, "goat": 3}
    assert run("pool", "train", tmp_path / "other", *options, "--tenant", "other").exit_code == 0
    names = ("boat", "local/cake", "local/debt", "local/goat")
    assert record_of(tmp_path / "other")["num_texts_of_task"] == dict.fromkeys(names, 3)
