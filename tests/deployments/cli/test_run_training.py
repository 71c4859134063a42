"""The sources of a training's texts, and reasons to refuse them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import typer

from deployments.cli.run_training import TrainingJob, read_texts, run_training, stored_texts
from tests.deployments.sample_stores import store_of
from tests.deployments.scripted import words
from tests.tiny_encoder import topic_texts

TEXTS = topic_texts(3, seed=1)


def job_of(target: Path, samples: Path) -> TrainingJob:
    return TrainingJob(target, None, "local", samples, share=1.0, seed=0, encoder=None, epochs=1)


def test_texts_of_a_task_are_read_in_order_and_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four"
    file = tmp_path / "samples.jsonl"
    rows = (f'"b", "text": "{text}"', '"a", "text": "x"', '"b", "text": "two"')
    file.write_bytes("\r\n\n".join(f'{{"task": {row}}}' for row in rows).encode())
    assert read_texts(file) == {"b": [text, "two"], "a": ["x"]}


def test_a_tenant_trains_on_visible_adapters_under_its_names_for_them(tmp_path: Path) -> None:
    """The first topic belongs to another tenant; an adapter without samples has no texts."""
    store = store_of(tmp_path, TEXTS)
    first, *others = TEXTS
    assert stored_texts(store, "local") == {name: TEXTS[name] for name in others}
    assert stored_texts(store, "other") == {first: TEXTS[first], **{f"local/{name}": TEXTS[name] for name in others}}


def test_an_adapter_with_a_description_only_is_left_out_of_a_pools_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *others, last = TEXTS
    store = store_of(tmp_path, {**TEXTS, last: TEXTS[last][:1]})
    assert stored_texts(store, "local") == {name: TEXTS[name] for name in others[1:]}
    assert "left out 1 adapter with fewer than 2 different samples" in words(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("", "has no samples to train on"),
        ('{"task": "a", "text": "x"}\n', "each task needs at least 2 distinct texts; too few for: a"),
        ('{"task": "a", "text": "x"}\n[]\n', ':2: must be {"task": name, "text": text}'),
        ('{"task": "a", "text": " "}\n', ":1: must be"),
        ("no json\n", ":1: invalid JSON"),
        ("[" * 100_000, ":1: invalid JSON"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(
    lines: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(lines)
    with pytest.raises(typer.Exit):
        run_training(job_of(tmp_path / "out", file))
    assert complaint in words(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_or_store_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of(tmp_path / "out", tmp_path / "nofile")
    for wrong, says in (
        (job, f"{tmp_path / 'nofile'}: no such file"),
        (replace(job, samples=None, store=str(tmp_path / "nowhere")), "no samples to train on"),
    ):
        with pytest.raises(typer.Exit):
            run_training(wrong)
        assert says in words(capsys.readouterr().err)
