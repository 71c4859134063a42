from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.cli import routing
from deployments.cli.routing import auroc, read_labelled
from tests.deployments.scripted import lines, refusal, run, run_with, words


def plan(*names: str, abstained: bool = False, confidence: float = 0.5) -> dict[str, Any]:
    candidates = [{"name": name, "score": 0.5, "threshold": 0.4, "confidence": confidence} for name in names]
    return {"candidates": candidates, "abstained": abstained}


def file_of(folder: Path, *rows: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text(lines(*rows))
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
    answers = [pool("poet", "bard"), (200, {"data": plans}), (200, {"data": wide})]
    said = run_with(answers, "route", "--file", file_of(tmp_path, *rows))
    assert said.code == 0 and "4 prompts" in said.out
    assert said.asked == [("GET", "/v1/loras?after="), *[("POST", "/v1/route")] * 2]
    assert said.sent[1:] == [{"prompt": ["a", "b", "c", "d"], "lora": options} for options in ({}, {"k": 8})]
    hits = {"hit@1": "25.0%", "hit@3": "50.0%", "hit@5": "50.0%", "hit@8": "75.0%"}
    assert shares(said.stdout) == hits | {"answered by adapters": "75.0%"}


def test_prompts_without_an_adapter_should_reach_the_base_model(tmp_path: Path) -> None:
    rows = [{"input": text, "adapter": name} for text, name in zip("abcd", ("poet", "poet", None, None), strict=True)]
    plans = [
        plan("poet", confidence=0.9),
        plan("poet", abstained=True, confidence=0.02),
        plan("poet", abstained=True, confidence=0.001),
        plan("poet", confidence=0.1),
    ]
    said = run_with([pool("poet"), (200, {"data": plans})], "route", "--file", file_of(tmp_path, *rows))
    assert "2 prompts of adapters, 2 others" in said.out
    found = shares(said.stdout)
    assert (found["answered by adapters"], found["others answered by the base model"]) == ("50.0%", "50.0%")
    assert "0.750" in said.stdout  # AUROC: 0.9 is above both, 0.02 above one
    cells = [[cell.strip() for cell in line.split("│")] for line in said.stdout.splitlines() if "│" in line]
    assert [row[1:4] for row in cells if row[1] == "3.0%"] == [["3.0%", "50.0%", "50.0%"]]
    bars = [row[4] for row in cells if len(row) > 4 and row[4]]
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
    said = run_with([pool("poet"), *answers], "route", "--file", file_of(tmp_path, *rows))
    assert [len(body["prompt"]) for body in said.sent[1:]] == [32, 32, 1, 1]
    assert shares(said.stdout)["hit@1"] == "100.0%"


def test_prompts_that_are_too_many_for_the_key_are_sent_in_halves(tmp_path: Path) -> None:
    rows = [{"input": str(number), "adapter": "poet" if number % 2 else "bard"} for number in range(7)]

    def plans(sent: dict[str, Any]) -> dict[str, Any]:
        return {"data": [plan("poet" if int(text) % 2 else "bard") for text in sent["prompt"]]}

    many = 400, {"error": {"message": "prompt: the request has 7 rows", "param": "prompt"}}
    halves = [many, (200, plans), many, (200, plans), (200, plans)]  # of 7: 3 and 4, and of 4: 2 and 2
    said = run_with([pool("poet", "bard"), *halves, *halves], "route", "--file", file_of(tmp_path, *rows))
    assert said.code == 0, said.err
    assert [len(body["prompt"]) for body in said.sent[1:]] == [7, 3, 4, 2, 2] * 2
    assert shares(said.stdout)["hit@1"] == "100.0%"


@pytest.mark.parametrize(("param", "num_rows"), [("prompt", 1), ("lora", 2), (None, 2)])
def test_another_wrong_request_is_not_sent_in_halves(tmp_path: Path, param: str | None, num_rows: int) -> None:
    file = file_of(tmp_path, *[{"input": "a", "adapter": "poet"}] * num_rows)
    error = {"message": "it is wrong"} | ({} if param is None else {"param": param})
    said = run_with([pool("poet"), (400, {"error": error})], "route", "--file", file)
    assert (said.code, said.err, len(said.asked)) == (1, "it is wrong", 2)


def test_a_limit_of_the_key_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(routing, "time", SimpleNamespace(sleep=waits.append))
    file = file_of(tmp_path, {"input": "a", "adapter": "poet"})
    limited = 429, refusal("the key's limit is exceeded")
    routed = 200, {"data": [plan("poet")]}
    answers = [pool("poet"), routed, (*limited, {"Retry-After": "20"}), limited, routed]
    said = run_with(answers, "route", "--file", file)
    assert (said.code, waits, shares(said.stdout)["hit@1"]) == (0, [20.0, 1.0], "100.0%")
    waits.clear()
    spent = run_with([pool("poet"), limited], "route", "--file", file)
    assert (spent.code, spent.err, len(waits)) == (1, "the key's limit is exceeded", 30)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "prompts.jsonl:1: invalid JSON"),
        ("[" * 100_000, "prompts.jsonl:1: invalid JSON"),
        ('{"input": "a", "adapter": "poet"}\n{"input": "a"}', "prompts.jsonl:2: must be"),
        ('{"adapter": "poet"}', "prompts.jsonl:1: must be"),
        ('{"input": "", "adapter": "poet"}', "prompts.jsonl:1: must be"),
        ('{"prompt": 3, "adapter": "poet"}', "prompts.jsonl:1: must be"),
        ('{"input": "a", "adapter": []}', "prompts.jsonl:1: must be"),
        ("[]", "prompts.jsonl:1: must be"),
        ("", "contains no prompts"),
        (None, "prompts.jsonl: no such file"),
    ],
)
def test_an_invalid_line_or_file_is_named(text: str | None, says: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "prompts.jsonl").write_text(text)
    said = run_with((500, {}), "route", "--file", tmp_path / "prompts.jsonl")
    assert (said.code, said.asked) == (1, []) and says in said.err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_line_ends_at_a_newline_only_and_a_file_may_have_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four"
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(
        f'{{"input": "{text}", "adapter": null}}\r\n{{"input": "b", "adapter": null}}\r\n'.encode(encoding)
    )
    assert [(row.prompt, row.line) for row in read_labelled(file)] == [(text, 1), ("b", 2)]


def test_a_line_with_an_unknown_adapter_is_named_and_nothing_is_measured(tmp_path: Path) -> None:
    rows = [{"input": "a", "adapter": "poet"}, {"input": "b", "adapter": None}, {"input": "c", "adapter": ["poett"]}]
    said = run_with([pool("poet")], "route", "--file", file_of(tmp_path, *rows))
    assert (said.code, said.stdout, len(said.asked)) == (1, "", 1)
    assert "line 3: no adapter 'poett' in the pool; did you mean 'poet'?" in said.err
    rows = [{"input": "a", "adapter": f"nosuch-{number}"} for number in range(13)]
    many = run_with([pool("poet")], "route", "--file", file_of(tmp_path, *rows))
    assert many.code == 1 and many.err.count("no adapter") == 10 and "and 3 more" in many.err


def test_a_refused_route_ends_the_evaluation(tmp_path: Path) -> None:
    file = file_of(tmp_path, {"input": "a", "adapter": "poet"})
    said = run_with([pool("poet"), (503, refusal("a part of the server is not available"))], "route", "--file", file)
    assert said.code == 1 and "not available" in said.err


@pytest.mark.parametrize("options", [("Hi",), ("--k", 2), ("--tag", "fun")])
def test_a_file_is_measured_with_the_servers_defaults_only(tmp_path: Path, options: tuple[object, ...]) -> None:
    result = run("route", "--file", tmp_path / "prompts.jsonl", *options)
    assert result.exit_code == 2 and "measures with the server's defaults" in words(result.stderr)
