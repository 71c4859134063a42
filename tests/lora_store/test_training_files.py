from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_store import Limits, Sample
from lora_store.errors import FileRefused
from lora_store.training_files import training_samples

ALPACA = [
    {"instruction": "Name the capital.", "input": "France", "output": "Paris"},
    {"instruction": "Name a colour.", "input": "", "output": "red"},
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hello?"},
            {"from": "gpt", "value": "Hi."},
            {"from": "human", "value": "More?"},
        ]
    },
    {"conversations": [{"from": "human", "value": "No answer follows"}]},
]
MESSAGES = [
    {"messages": [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}]},
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Two"}, {"type": "text", "text": "parts"}]},
        ]
    },
    {"prompt": [{"role": "user", "content": "Ask."}], "completion": [{"role": "assistant", "content": "Answer."}]},
]
EXPECTED = {
    "alpaca": (Sample("Name the capital.\n\nFrance", "Paris"), Sample("Name a colour.", "red")),
    "sharegpt": (Sample("Hello?", "Hi."), Sample("No answer follows")),
    "messages": (Sample("Sing.", "La."), Sample("Two\nparts"), Sample("Ask.", "Answer.")),
    "fields": (Sample("a", "b"), Sample("c", "d")),
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": ALPACA,
    "sharegpt": SHAREGPT,
    "messages": MESSAGES,
    "fields": [{"question": "a", "answer": "b"}, {"prompt": "c", "completion": "d"}],
}


def written(file: Path, rows: list[Any], *, as_list: bool = False) -> Path:
    file.write_text(json.dumps(rows, indent=1) if as_list else "\n\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("as_list", [False, True])
def test_each_form_is_read_from_lines_and_from_a_list(tmp_path: Path, form: str, as_list: bool) -> None:
    file = written(tmp_path / "train.json", ROWS[form], as_list=as_list)
    assert training_samples(file, Limits()) == EXPECTED[form]


def test_samples_are_spread_over_a_long_file_and_differ(tmp_path: Path) -> None:
    file = written(tmp_path / "train.jsonl", [{"input": f"{number // 2}"} for number in range(1000)])
    found = training_samples(file, Limits(max_samples=10))
    assert [int(sample.input) for sample in found] == [0, 50, 100, 150, 200, 250, 300, 350, 400, 450]
    assert len(training_samples(file, Limits(max_samples=1000))) == 500


def test_long_texts_are_cut_and_rows_without_a_user_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"input": "é" * 9, "output": "x" * 11},
        {"input": " "},
        7,
        {"messages": []},
        {"input": "a\ud800b", "output": ""},
        {"input": " \ud800 "},
    ]
    file = written(tmp_path / "train.jsonl", rows)
    assert training_samples(file, Limits(max_sample_bytes=9)) == (Sample("é" * 4), Sample("ab"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "known forms are Alpaca"),
        ('{"label": 1}', "known forms are Alpaca"),
        ('{"input": "a"}\n{broken', "neither JSON lines nor a JSON list"),
        ("[1, 2", "neither JSON lines nor a JSON list"),
        ("[" * 100_000, "neither JSON lines nor a JSON list"),
        ('{"messages":' + "[" * 100_000, "neither JSON lines nor a JSON list"),
    ],
)
def test_a_file_without_samples_is_refused_with_the_known_forms(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(content)
    with pytest.raises(FileRefused, match=said):
        training_samples(file, Limits())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match=r"nowhere\.jsonl") as caught:
        training_samples(tmp_path / "nowhere.jsonl", Limits())
    assert caught.value.problems == ("cannot be read: No such file or directory",)
