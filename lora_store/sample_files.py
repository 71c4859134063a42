"""The files that make an adapter retrievable: `lora_samples.jsonl`, or `description.txt`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from os.path import lexists  # sees dangling links too, which are refused when read
from pathlib import Path

from lora_store.adapter import Sample
from lora_store.bounded_files import Limits, parse_json_object, read_bytes
from lora_store.errors import FileRefused

SAMPLES_FILE = "lora_samples.jsonl"
DESCRIPTION_FILE = "description.txt"
_MAX_FILE_BYTES = 16 << 20
_MAX_LINES = 1 << 20  # blank ones too, each of which takes time
_MAX_LINE_BYTES = 1 << 20  # parsed, a line may take twenty times its bytes
_ACCEPTED = "accepted"  # in stored samples only: a publisher's own file cannot mark a line
INPUT_KEYS = ("input", "prompt", "instruction", "text", "question")  # the first one that a line has


def read_samples(folder: Path, limits: Limits) -> tuple[Sample, ...]:
    """Return the samples of the samples file, () if there is none. Raises: FileRefused, which lists every bad line.

    Blank lines are ignored. Of more than `max_samples` lines that many are read, spread evenly over the file.
    """
    if not lexists(folder / SAMPLES_FILE):
        return ()
    data = read_bytes(folder / SAMPLES_FILE, _MAX_FILE_BYTES)
    if data.count(b"\n") > _MAX_LINES:
        raise FileRefused(SAMPLES_FILE, [f"has more than {_MAX_LINES:,} lines: remove blank ones, or shorten it"])
    num_lines = count_samples(data)
    if not num_lines:
        raise FileRefused(SAMPLES_FILE, ["is empty: write one sample a line, or remove the file"])
    count = min(num_lines, limits.max_samples)
    chosen = {place * num_lines // count for place in range(count)}
    samples, problems = [], []
    for place, (number, line) in enumerate(_sample_lines(data)):
        if place not in chosen:
            continue
        try:
            samples.append(_parse_sample(line, limits.max_sample_bytes))
        except ValueError as exc:
            problems.append(f"line {number} {exc}")
    if problems:
        raise FileRefused(SAMPLES_FILE, problems)
    return tuple(samples)


def count_samples(data: bytes) -> int:
    """Return the number of lines that are not blank."""
    return sum(1 for _ in _sample_lines(data))


def _sample_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers from 1. A list of them could take much memory."""
    return ((number, line) for number, line in enumerate(io.BytesIO(data), start=1) if line.strip())


def read_description(folder: Path, limits: Limits) -> str | None:
    """Return the description without surrounding space, None if there is none. Raises: FileRefused."""
    if not lexists(folder / DESCRIPTION_FILE):
        return None
    try:
        text = read_bytes(folder / DESCRIPTION_FILE, limits.max_sample_bytes).decode().strip()
    except UnicodeDecodeError as exc:
        raise FileRefused(DESCRIPTION_FILE, ["is not UTF-8"]) from exc
    if not text:
        raise FileRefused(DESCRIPTION_FILE, ["is empty: write one sentence, or remove the file"])
    return text


def write_samples(samples: Sequence[Sample]) -> bytes:
    """Return the samples in the form that `read_samples` reads. Equal samples give equal bytes."""
    lines = [
        {"input": s.input}
        | ({} if s.output is None else {"output": s.output})
        | ({_ACCEPTED: True} if s.is_accepted else {})
        for s in samples
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def parse_samples(data: bytes) -> tuple[Sample, ...]:
    """Read the samples that `write_samples` wrote, without checking them again."""
    rows = map(parse_json_object, data.removesuffix(b"\n").split(b"\n"))
    return tuple(Sample(row["input"], row.get("output"), row.get(_ACCEPTED) is True) for row in rows)


def _parse_sample(line: bytes, max_bytes: int) -> Sample:
    """Return the sample of one line."""
    if len(line) > _MAX_LINE_BYTES:
        raise ValueError(f"has more than {_MAX_LINE_BYTES:,} bytes: shorten it")
    try:
        raw = parse_json_object(line)
    except ValueError as exc:
        raise ValueError(f"is not valid JSON: {exc}") from exc
    key = next((key for key in INPUT_KEYS if key in raw), "input")
    text, output = raw.get(key), raw.get("output")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'needs a text "{key}" that is not blank')
    if not isinstance(output, str | None):
        raise ValueError('has an "output" that is not a string')
    return checked_sample(text, output, max_bytes)


def checked_sample(text: str, output: str | None, max_bytes: int) -> Sample:
    """Return the sample. A longer input is cut, because the encoder reads only its beginning. Raises: ValueError."""
    try:
        data = text.encode()
        num_output_bytes = len((output or "").encode())
    except UnicodeEncodeError as exc:
        raise ValueError("contains half of a surrogate pair, which is not valid Unicode") from exc
    if len(data) > max_bytes:
        text = text.lstrip().encode()[:max_bytes].decode(errors="ignore")
    if not text.strip():
        raise ValueError('needs an "input" that is not blank')
    if num_output_bytes > max_bytes:
        raise ValueError(f'has an "output" of more than {max_bytes} bytes: shorten it')
    return Sample(text, output)
