from __future__ import annotations

from pathlib import Path

import pytest

from lora_store import Limits, Sample
from lora_store.errors import FileRefused
from lora_store.sample_files import SAMPLES_FILE, parse_samples, read_samples, write_samples


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    samples = (Sample("one"), Sample("two\nlines", "an answer"), Sample("é" * 100, ""))
    data = write_samples(samples)
    (tmp_path / SAMPLES_FILE).write_bytes(data)
    assert read_samples(tmp_path, Limits()) == parse_samples(data) == samples
    assert write_samples(parse_samples(data)) == data


@pytest.mark.parametrize("key", ["prompt", "instruction", "text", "question"])
def test_a_common_wrong_key_is_named_with_the_right_one(tmp_path: Path, key: str) -> None:
    (tmp_path / SAMPLES_FILE).write_text(f'{{"input": "fine"}}\n{{"{key}": "x"}}\n')
    with pytest.raises(FileRefused) as caught:
        read_samples(tmp_path, Limits())
    assert caught.value.problems == (f'line 2 has "{key}" but no "input": rename "{key}" to "input"',)


def test_every_bad_line_is_listed(tmp_path: Path) -> None:
    (tmp_path / SAMPLES_FILE).write_text('{"input": "fine"}\nno json\n{"input": ""}\n')
    with pytest.raises(FileRefused) as caught:
        read_samples(tmp_path, Limits())
    assert [problem[:6] for problem in caught.value.problems] == ["line 2", "line 3"]
