from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.cli.routing import auroc
from tests.deployments.scripted import lines, refusal, run, scripted, words


def plan(*names: str, abstained: bool = False, confidence: float = 0.5) -> dict[str, Any]:
    candidates = [{"name": name, "score": 0.5, "threshold": 0.4, "confidence": confidence} for name in names]
    return {"candidates": candidates, "abstained": abstained}


def file_of(folder: Path, *rows: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def pool(*names: str) -> tuple[int, Any]:
    """Return the answer to a list of a pool with these adapters."""
    return 200, {"generation": 4, "data": [{"id": name} for name in names], "last_id": "", "has_more": False}


def shares(text: str) -> dict[str, str]:
    rows = [line.split("│") for line in text.splitlines() if "%" in line]
    return {row[1].strip(): row[2].strip() for row in rows}


def test_hits_are_counted_up_to_each_rank_and_abstentions_separately(tmp_path: Path) -> None:
    rows = [
        {"input": "a", "adapter": "poet"},
        {"prompt": "b", "adapter": ["poet", "bard"]},
        {"input": "c", "adapter": "poet", "note": "kept by others"},
        {"input": "d", "adapter": "poet"},
    ]
    others = [f"x{number}" for number in range(8)]
    plans = [plan("poet"), plan("x"), plan("x"), plan("x", abstained=True)]
    wide = [plan("poet"), plan("x", "y", "bard", "poet"), plan(*others[:7], "poet"), plan(*others)]  # the last one fits
    with scripted(pool("poet", "bard"), (200, {"data": plans}), (200, {"data": wide})) as server:
        result = run("eval-routing", file_of(tmp_path, *rows), "--url", server.url)
    assert result.exit_code == 0
    assert server.asked == [("GET", "/v1/loras?after="), *[("POST", "/v1/route")] * 2]
    assert server.sent[1:] == [{"prompt": ["a", "b", "c", "d"], "lora": options} for options in ({}, {"k": 8})]
    assert "4 prompts" in result.stdout
    assert shares(result.stdout) == {
        "hit@1": "25.0%",
        "hit@3": "50.0%",
        "hit@5": "50.0%",
        "hit@8": "75.0%",
        "answered by adapters": "75.0%",
    }


def test_prompts_without_an_adapter_should_reach_the_base_model(tmp_path: Path) -> None:
    rows = [{"input": text, "adapter": name} for text, name in zip("abcd", ("poet", "poet", None, None), strict=True)]
    plans = [
        plan("poet", confidence=0.9),
        plan("poet", abstained=True, confidence=0.02),
        plan("poet", abstained=True, confidence=0.001),
        plan("poet", confidence=0.1),
    ]
    with scripted(pool("poet"), (200, {"data": plans}), (200, {"data": plans})) as server:
        result = run("eval-routing", file_of(tmp_path, *rows), "--url", server.url)
    assert "2 prompts of adapters, 2 others" in words(result.stdout)
    found = shares(result.stdout)
    assert (found["answered by adapters"], found["others answered by the base model"]) == ("50.0%", "50.0%")
    assert "0.750" in result.stdout  # AUROC: 0.9 is above both, 0.02 above one
    points = [row.split("│")[1:4] for row in result.stdout.splitlines() if row.startswith("│ 3.0%")]
    assert [[cell.strip() for cell in point] for point in points] == [["3.0%", "50.0%", "50.0%"]]
    rows_shown = [line.split("│") for line in result.stdout.splitlines() if "│" in line]
    bars = [row[4].strip() for row in rows_shown if len(row) > 4 and row[4].strip()]
    assert bars[:3] == ["░" * 10, "█" * 10, "░" * 10]  # at 1 %: none and half; at 3 %: half of both


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=9),
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=9),
)
def test_auroc_compares_every_pair(inside: list[float], outside: list[float]) -> None:
    pairs = [(a > b) + (a == b) / 2 for a in inside for b in outside]
    assert auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs))


def test_prompts_are_routed_in_batches(tmp_path: Path) -> None:
    rows = [{"input": str(number), "adapter": "poet"} for number in range(33)]
    answers = [(200, {"data": [plan("poet")] * count}) for count in (32, 32, 1, 1)]
    with scripted(pool("poet"), *answers) as server:
        result = run("eval-routing", file_of(tmp_path, *rows), "--url", server.url)
    assert [len(body["prompt"]) for body in server.sent[1:]] == [32, 32, 1, 1]
    assert shares(result.stdout)["hit@1"] == "100.0%"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["{"], "prompts.jsonl:1: invalid JSON"),
        ([{"input": "a", "adapter": "poet"}, {"input": "a"}], "prompts.jsonl:2: must be"),
        ([{"adapter": "poet"}], "prompts.jsonl:1: must be"),
        ([{"input": "", "adapter": "poet"}], "prompts.jsonl:1: must be"),
        ([{"input": "a", "adapter": []}], "prompts.jsonl:1: must be"),
        ([[]], "prompts.jsonl:1: must be"),
        ([], "contains no prompts"),
    ],
)
def test_an_invalid_line_is_named(rows: list[Any], said: str, tmp_path: Path) -> None:
    with scripted((500, {})) as server:
        result = run("eval-routing", file_of(tmp_path, *rows), "--url", server.url)
    assert (result.exit_code, server.asked) == (1, [])
    assert said in words(result.stderr)


def test_a_line_with_an_unknown_adapter_is_named_and_nothing_is_measured(tmp_path: Path) -> None:
    rows = [{"input": "a", "adapter": "poet"}, {"input": "b", "adapter": None}, {"input": "c", "adapter": ["poett"]}]
    with scripted(pool("poet")) as server:
        result = run("eval-routing", file_of(tmp_path, *rows), "--url", server.url)
    assert (result.exit_code, result.stdout, len(server.asked)) == (1, "", 1)
    assert "line 3: no adapter 'poett' in the pool; did you mean 'poet'?" in words(result.stderr)


def test_many_unknown_adapters_are_counted(tmp_path: Path) -> None:
    rows = [{"input": "a", "adapter": f"nosuch-{number}"} for number in range(13)]
    with scripted(pool("poet")) as server:
        result = run("eval-routing", file_of(tmp_path, *rows), "--url", server.url)
    assert result.exit_code == 1
    assert result.stderr.count("no adapter") == 10 and "and 3 more" in result.stderr


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    result = run("eval-routing", tmp_path / "nowhere.jsonl")
    assert result.exit_code == 1
    assert "nowhere.jsonl: no such file" in words(result.stderr)


def test_a_refused_route_ends_the_evaluation(tmp_path: Path) -> None:
    with scripted((503, refusal("a part of the server is not available"))) as server:
        result = run("eval-routing", file_of(tmp_path, {"input": "a", "adapter": "poet"}), "--url", server.url)
    assert result.exit_code == 1
    assert "not available" in words(result.stderr)


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
        ran = run("evaluate", "--url", server.url)
    assert (ran.exit_code, server.asked, server.sent) == (0, [("POST", "/v1/pool/evaluate")], [{}])
    assert "1 of 3 regions ranked" in words(ran.stdout)
    assert "region of poet: bard 0.90 of 20, poet 0.25 of 20 (beaten)" in words(ran.stdout)


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
        result = run("doctor", "--url", server.url)
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
        "region of poet: bard 0.90 of 20, poet 0.25 of 20 (beaten)",
    ):
        assert part in said


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
    with scripted(
        pool("poet", "coder"), (200, lines({"done": 4, "total": 4}, {"result": REPORT | {"prompts": ASKED}}))
    ) as server:
        result = run("doctor", "--prompts", file, "--url", server.url)
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
        result = run("doctor", "--prompts", file, "--url", server.url)
    assert (result.exit_code, server.asked) == (1, [])
    assert "prompts.jsonl:1: must be" in words(result.stderr)


@pytest.mark.parametrize("command", ["doctor", "evaluate", "verify"])
def test_a_report_is_printed_as_json(command: str) -> None:
    result = {"rankings": [RANKING], "problems": []}
    with scripted((200, lines({"done": 1, "total": 1}, {"result": result}))) as server:
        ran = run(command, "--json", "--url", server.url)
    assert (ran.exit_code, json.loads(ran.stdout)) == (0, result)
