from __future__ import annotations

from pathlib import Path

import pytest

from lora_store import Limits, Sample
from lora_store.errors import FileRefused
from lora_store.sample_files import SAMPLES_FILE, checked_sample, parse_samples, read_samples, write_samples


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    samples = (Sample("one"), Sample("two\nlines", "an answer"), Sample("é" * 100, ""), Sample('says "accepted"'))
    data = write_samples(samples)
    (tmp_path / SAMPLES_FILE).write_bytes(data)
    assert read_samples(tmp_path, Limits()) == parse_samples(data) == samples
    assert write_samples(parse_samples(data)) == data
    marked = write_samples((Sample("one", is_accepted=True),))
    assert parse_samples(marked) == (Sample("one", is_accepted=True),)
    (tmp_path / SAMPLES_FILE).write_bytes(marked)
    assert read_samples(tmp_path, Limits()) == (Sample("one"),), "a publisher cannot mark a line"


def test_as_many_samples_as_are_allowed_may_all_have_the_largest_size(tmp_path: Path) -> None:
    largest = Limits().max_sample_bytes
    samples = [Sample(f"{number:0{largest}}", '"\n' * (largest // 2)) for number in range(Limits().max_samples)]
    (tmp_path / SAMPLES_FILE).write_bytes(write_samples(samples))
    assert read_samples(tmp_path, Limits()) == tuple(samples)


@pytest.mark.parametrize("key", ["prompt", "instruction", "text", "question"])
def test_other_common_keys_are_read_where_there_is_no_input(tmp_path: Path, key: str) -> None:
    (tmp_path / SAMPLES_FILE).write_text(f'{{"{key}": "a"}}\n{{"{key}": "not read", "input": "b"}}\n')
    assert read_samples(tmp_path, Limits()) == (Sample("a"), Sample("b"))


def test_blank_lines_are_ignored_but_counted_and_every_bad_line_is_listed(tmp_path: Path) -> None:
    (tmp_path / SAMPLES_FILE).write_text('\n{"input": "a"}\n \n\r\n{"input": "b"}\n\n')
    assert read_samples(tmp_path, Limits()) == (Sample("a"), Sample("b"))
    (tmp_path / SAMPLES_FILE).write_text('{"input": "a"}\n\n{}\nno json\n{"input": ""}\n')
    with pytest.raises(FileRefused) as caught:
        read_samples(tmp_path, Limits())
    assert [problem[:6] for problem in caught.value.problems] == ["line 3", "line 4", "line 5"]


def test_a_file_of_millions_of_blank_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / SAMPLES_FILE).write_text('{"input": "a"}' + "\n" * ((1 << 20) + 1))
    with pytest.raises(FileRefused, match="lines"):
        read_samples(tmp_path, Limits())


def test_a_share_of_too_many_samples_is_read_from_the_whole_file(tmp_path: Path) -> None:
    lines = [f'{{"input": "{number}"}}{" " * 9000}\n' for number in range(7)]
    (tmp_path / SAMPLES_FILE).write_text("".join(lines))
    assert [sample.input for sample in read_samples(tmp_path, Limits(max_samples=3))] == ["0", "2", "4"]
    assert len(read_samples(tmp_path, Limits(max_samples=7))) == 7


def test_a_long_input_is_cut_at_a_whole_character(tmp_path: Path) -> None:
    (tmp_path / SAMPLES_FILE).write_text('{"input": "éé\u00e9"}\n')
    assert read_samples(tmp_path, Limits(max_sample_bytes=5)) == (Sample("éé"),)


@pytest.mark.parametrize("text", ["x", " x", " " * 9 + "x", "\n\u3000\n\u3000é", "x" + " " * 9, "é \u2028" * 5])
def test_an_input_that_begins_with_much_space_keeps_its_words_and_is_read_again(text: str) -> None:
    sample = checked_sample(text, None, max_bytes=8)
    assert sample.input.strip() and sample.input in text
    assert parse_samples(write_samples([sample])) == (sample,)


def test_a_stored_sample_is_read_although_it_would_be_refused_today() -> None:
    stored = (Sample(" " * 9), Sample("long", "x" * 9, is_accepted=True))
    assert parse_samples(write_samples(stored)) == stored
