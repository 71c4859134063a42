from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_store import Catalogue, Location, Publish
from retriever_svc import Encoder
from tests.deployments.sample_stores import store_of
from tests.deployments.scripted import lines, refusal, run, scripted, words
from tests.lora_store.builders import MakeRecord
from tests.lora_store.conftest import make_record  # noqa: F401  a fixture
from tests.tiny_encoder import save_tiny_encoder, topic_texts


def test_verify_prints_the_number_of_intact_blobs() -> None:
    body = lines({"done": 1, "total": 2}, {"done": 2, "total": 2}, {"result": {"num_blobs": 2, "problems": []}})
    with scripted((200, body)) as server:
        result = run("pool", "verify", "--url", server.url)
    assert (result.exit_code, server.asked, server.sent) == (0, [("POST", "/v1/pool/verify")], [{}])
    assert "2 blobs, 0 bad" in words(result.stdout)


def test_verify_fails_and_names_bad_blobs() -> None:
    problem = {"adapter": "local/poet@dddddddddddd", "digest": "f" * 64, "problem": "is missing"}
    body = lines({"done": 1, "total": 1, "problem": problem}, {"result": {"num_blobs": 1, "problems": [problem]}})
    with scripted((200, body)) as server:
        result = run("pool", "verify", "--url", server.url)
    assert result.exit_code == 1
    assert "local/poet@dddddddddddd: is missing" in words(result.stderr)


@pytest.mark.parametrize(("options", "seconds"), [((), 86_400), (("--retention", "0"), 0)])
def test_gc_prints_the_removed_blobs(options: tuple[str, ...], seconds: float) -> None:
    with scripted((200, {"num_blobs": 3, "num_bytes": 12, "num_projections": 1})) as server:
        result = run("pool", "gc", *options, "--url", server.url)
    assert (server.asked, server.sent) == ([("POST", "/v1/pool/gc")], [{"retention_s": seconds}])
    assert "removed 3 blobs and 1 projection, 12 bytes" in words(result.stdout)


@pytest.mark.parametrize(("behind", "note"), [(0, ""), (2, " (2 replicas are not up to date yet)")])
def test_reindex_prints_since_when_the_pool_uses_the_encoder(behind: int, note: str) -> None:
    result_line = {"result": {"encoder": "other", "generation": 9, "replicas": {"ready": 1, "behind": behind}}}
    with scripted((200, lines({"done": 2, "total": 2}, result_line))) as server:
        result = run("pool", "reindex", "--encoder", "other", "--url", server.url)
    assert (server.asked, server.sent) == ([("POST", "/v1/pool/reindex")], [{"encoder": "other", "projection": "auto"}])
    assert words(result.stdout) == f"the pool uses other since generation 9{note}"


@pytest.mark.parametrize("command", [("verify",), ("reindex", "--encoder", "other"), ("doctor",), ("evaluate",)])
@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (503, refusal("the store is down"), "the store is down"),
        (200, lines({"done": 1, "total": 2}, refusal("it went down")), "it went down"),
        (200, lines({"done": 1, "total": 2}), "closed the connection"),
    ],
)
def test_a_failing_job_prints_the_reason(command: tuple[str, ...], status: int, body: Any, said: str) -> None:
    with scripted((status, body)) as server:
        result = run("pool", *command, "--url", server.url)
    assert result.exit_code == 1
    assert said in words(result.stderr)


RANKING = {
    "region": "poet",
    "adapters": [
        {"name": "bard", "score": 0.9, "num_examples": 20, "is_beaten": False},
        {"name": "poet", "score": 0.25, "num_examples": 20, "is_beaten": True},
    ],
}


def test_an_evaluation_prints_its_rankings() -> None:
    result = {"num_regions": 3, "rankings": [RANKING], "generation": 9, "replicas": {"ready": 1, "behind": 0}}
    with scripted((200, lines({"done": 3, "total": 3}, {"result": result}))) as server:
        ran = run("pool", "evaluate", "--url", server.url)
    assert (ran.exit_code, server.asked, server.sent) == (0, [("POST", "/v1/pool/evaluate")], [{}])
    assert "1 of 3 adapters with sample outputs have similar ones to compare with" in words(ran.stdout)
    assert "right answers to the samples of poet: bard 90% of 20, poet 25% of 20 (beaten)" in words(ran.stdout)
    assert "none is clearly beaten" not in ran.stdout


def test_an_evaluation_says_that_it_changes_nothing() -> None:
    own = RANKING | {"adapters": RANKING["adapters"][:1]}
    result = {"num_regions": 3, "rankings": [own], "generation": 9, "replicas": {"ready": 1, "behind": 0}}
    with scripted((200, lines({"result": result}))) as server:
        ran = run("pool", "evaluate", "--url", server.url)
    assert "none is clearly beaten by a similar one, so `auto` chooses as before" in words(ran.stdout)


def test_the_doctor_names_adapters_that_are_hard_to_find() -> None:
    report = {
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
    with scripted((200, lines({"done": 4, "total": 4}, {"result": report}))) as server:
        result = run("pool", "doctor", "--url", server.url)
    assert (result.exit_code, server.asked, server.sent) == (0, [("POST", "/v1/pool/doctor")], [{}])
    said = words(result.stdout)
    for part in (
        "4 adapters, 80 samples: own adapter first 75.0%, among the best 3 90.0%",
        "each left out of its adapter: lenient 1.2%, balanced 3.0%, strict 8.0%",
        "collision: poet and bard, cosine 0.970, 4 and 1 samples swapped",
        "bard is never chosen first: poet always scores higher",
        "never chosen: mute",
        "unreadable samples: torn",
        "advice: Reindex with [refit].",
        "right answers to the samples of poet: bard 90% of 20, poet 25% of 20 (beaten)",
    ):
        assert part in said


@pytest.mark.parametrize("command", ["doctor", "evaluate", "verify"])
def test_a_report_is_printed_as_json(command: str) -> None:
    result = {"rankings": [RANKING], "problems": []}
    with scripted((200, lines({"done": 1, "total": 1}, {"result": result}))) as server:
        ran = run("pool", command, "--json", "--url", server.url)
    assert (ran.exit_code, json.loads(ran.stdout)) == (0, result)


REPORT = {
    "k": 3,
    "num_adapters": 0,
    "num_samples": 0,
    "first_share": 0.0,
    "found_share": 0.0,
    "turned_away_share": {},
    **{key: [] for key in ("collisions", "never_chosen", "always_shadowed", "unreadable", "rankings", "advice")},
}
ASKED = {
    "num": 10,
    "num_right": 6,
    "num_other": 1,
    "num_base": 3,
    "adapters": [
        {"name": None, "num": 2, "num_right": 2, "num_other": 0, "num_base": 0, "others": []},
        {
            "name": "poet",
            "num": 8,
            "num_right": 4,
            "num_other": 1,
            "num_base": 3,
            "others": [{"name": "coder", "num": 1}],
        },
    ],
    "unlabelled": [{"name": None, "num": 1}, {"name": "coder", "num": 2}],
}


def test_the_doctor_takes_real_prompts(tmp_path: Path) -> None:
    rows = [
        {"input": "a verse", "adapter": "poet"},
        {"prompt": "hello", "adapter": None},
        {"prompt": "an ode", "adapter": ["coder", "poet"]},
        {"prompt": "and this"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    listed = {"generation": 4, "data": [{"id": "poet"}, {"id": "coder"}], "last_id": "", "has_more": False}
    with scripted(
        (200, listed), (200, lines({"done": 4, "total": 4}, {"result": REPORT | {"prompts": ASKED}}))
    ) as server:
        result = run("pool", "doctor", "--prompts", file, "--url", server.url)
    assert result.exit_code == 0, result.output
    assert server.sent[-1] == {
        "prompts": [
            {"prompt": "a verse", "adapters": ["poet"]},
            {"prompt": "hello", "adapters": []},
            {"prompt": "an ode", "adapters": ["coder", "poet"]},
            {"prompt": "and this"},
        ]
    }
    said = words(result.stdout)
    assert "poet │ 8 │ 50.0% │ 12.5% │ 37.5% │ coder 1" in said
    assert "the base model │ 2 │ 100.0% │ 0.0% │ 0.0%" in said
    assert "all │ 10 │ 60.0% │ 10.0% │ 30.0%" in said
    assert "the base model answers 1 other prompt coder answers 2 other prompts" in said


@pytest.mark.parametrize("row", [{"prompt": 3}, {"prompt": "x", "adapter": []}, {"adapter": "poet"}])
def test_an_invalid_prompt_for_the_doctor_is_named_by_its_line(row: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row))
    with scripted() as server:
        result = run("pool", "doctor", "--prompts", file, "--url", server.url)
    assert (result.exit_code, server.asked) == (1, [])
    assert "prompts.jsonl:1: must be" in words(result.stderr)


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


TEXTS = topic_texts(3, seed=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    file = tmp_path / "samples.jsonl"
    lines = [json.dumps({"task": topic, "text": text}) for topic, own in TEXTS.items() for text in own]
    file.write_text("\n".join(lines) + "\n")
    return file


def record_of(encoder: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((encoder / "training.json").read_text())
    return record


def test_an_encoder_is_trained_on_a_file(samples: Path, tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    options = ("--samples", samples, "--encoder", tiny, "--epochs", 1, "--share", 0.5, "--seed", 4)
    result = run("pool", "train", target, *options)
    assert result.exit_code == 0, result.stderr
    assert "on 2 tasks in" in words(result.stdout)
    record = record_of(target)
    assert record["num_texts_of_task"] == {"cake": 3, "goat": 3}
    assert (record["share"], record["seed"], record["num_epochs"]) == (0.5, 4, 1)
    assert Encoder(target).identity != Encoder(tiny).identity


def test_an_encoder_is_trained_on_the_adapters_that_a_tenant_sees(tiny: Path, tmp_path: Path) -> None:
    store = store_of(tmp_path, TEXTS)
    options = ("--store", store, "--encoder", tiny, "--epochs", 1)
    printed = json.loads(run("pool", "train", tmp_path / "local", *options, "--json").stdout)
    assert (printed["encoder"], printed["tasks"]) == (str(tmp_path / "local"), ["cake", "debt", "goat"])
    assert record_of(tmp_path / "local")["num_texts_of_task"] == {"cake": 3, "debt": 3, "goat": 3}
    assert run("pool", "train", tmp_path / "other", *options, "--tenant", "other").exit_code == 0
    assert record_of(tmp_path / "other")["num_texts_of_task"] == {
        "boat": 3,
        "local/cake": 3,
        "local/debt": 3,
        "local/goat": 3,
    }


def test_a_missing_file_an_empty_store_and_no_source_are_reported(tmp_path: Path, samples: Path) -> None:
    out = tmp_path / "out"
    assert "no such file" in words(run("pool", "train", out, "--samples", tmp_path / "none").stderr)
    assert "no samples to train on" in words(run("pool", "train", out, "--store", tmp_path / "none").stderr)
    assert "either --store or --samples" in words(run("pool", "train", out).stderr)
    assert "neither modules.json nor config.json" in words(
        run("pool", "train", out, "--samples", samples, "--encoder", tmp_path).stderr
    )
