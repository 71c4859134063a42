"""Samples from the file that an adapter was trained on, as JSON lines or one JSON list.

Rows in three forms are read: Alpaca (`instruction`, `input`, `output`), ShareGPT (`conversations` of `from` and
`value`) and messages (`messages` of `role` and `content`). A sample is the first user turn with its answer, because
`auto` compares prompts with what users write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_store.adapter import Sample
from lora_store.bounded_files import Limits
from lora_store.errors import FileRefused
from lora_store.sample_files import INPUT_KEYS

_OUTPUT_KEYS = ("output", "response", "completion", "answer")
_TURN_LISTS = ("messages", "conversations", "prompt")
_USER, _ASSISTANT = ("user", "human"), ("assistant", "gpt", "model", "chatgpt")
_FORMS = "Alpaca (instruction, input, output), ShareGPT (conversations) or messages"
_Turn = tuple[str, str]  # role and text


def training_samples(file: Path, limits: Limits) -> tuple[Sample, ...]:
    """Return at most `max_samples` different samples from rows spread evenly over the file.

    Rows without a user's text are left out, and outputs above `max_sample_bytes`. Raises: FileRefused.
    """
    try:
        num_rows = sum(1 for _ in _rows(file))
        count = min(num_rows, limits.max_samples)
        chosen = {place * num_rows // count for place in range(count)}
        rows = [row for place, row in enumerate(_rows(file)) if place in chosen]
    except OSError as exc:
        raise FileRefused(file.name, [f"cannot be read: {exc.strerror}"]) from exc
    except (RecursionError, ValueError) as exc:  # JSON or UTF-8
        raise FileRefused(file.name, [f"is neither JSON lines nor a JSON list: {exc}"]) from exc
    samples = dict.fromkeys(sample for row in rows if (sample := sample_of_row(row, limits.max_sample_bytes)))
    if not samples:
        raise FileRefused(file.name, [f"has no row with a user's text; known forms are {_FORMS}"])
    return tuple(samples)


def sample_of_row(row: object, max_bytes: int) -> Sample | None:
    """Return the sample of one training row, None without a user's text."""
    if not isinstance(row, Mapping):
        return None
    text, output = _of_turns(list(_read_turns(row))) or _of_fields(row)
    text = _without_surrogates(text).strip()
    if not text:
        return None
    answer = _without_surrogates(output or "")
    kept = answer if answer and len(answer.encode()) <= max_bytes else None
    return Sample(text.encode()[:max_bytes].decode(errors="ignore"), kept)


def _rows(file: Path) -> Iterator[Any]:
    """Yield the rows. A list is parsed at once, lines one by one."""
    with file.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
        lines.seek(0)
        if first.lstrip().startswith(b"["):
            yield from json.load(lines)
        else:
            yield from (json.loads(line) for line in lines if line.strip())


def _of_fields(row: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return (input, output) of a row with one field each, or of Alpaca's three fields."""
    instruction, given = _text(row.get("instruction")), _text(row.get("input"))
    output = next((text for key in _OUTPUT_KEYS if (text := _text(row.get(key)))), None)
    if instruction:
        return "\n\n".join(filter(None, (instruction, given))), output
    return next((text for key in INPUT_KEYS if (text := _text(row.get(key)))), ""), output


def _of_turns(turns: list[_Turn]) -> tuple[str, str | None] | None:
    """Return (the first user turn, the answer that follows it), None without a user turn."""
    for place, (role, text) in enumerate(turns):
        if role in _USER and text.strip():
            following = turns[place + 1] if place + 1 < len(turns) else ("", "")
            return text, following[1] if following[0] in _ASSISTANT else None
    return None


def _read_turns(row: Mapping[str, Any]) -> Iterator[_Turn]:
    given: Iterable[object] = next((row[key] for key in _TURN_LISTS if isinstance(row.get(key), list)), ())
    completion = row.get("completion")
    for turn in (*given, *(completion if isinstance(completion, list) else ())):
        if isinstance(turn, Mapping):
            role = turn.get("role", turn.get("from"))
            yield str(role).lower(), _text(turn.get("content", turn.get("value")))


def _text(value: object) -> str:
    """Return a text, or the text parts of a message's content joined; "" for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return ""
    parts = [part.get("text") for part in value if isinstance(part, Mapping)]
    return "\n".join(part for part in parts if isinstance(part, str))


def _without_surrogates(text: str) -> str:
    """Return the text without halves of surrogate pairs, which some data sets have."""
    return text.encode(errors="ignore").decode()
