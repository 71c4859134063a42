"""Read untrusted files: never follow a link, never read more bytes than a limit, reject ambiguous JSON."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, BinaryIO, ClassVar

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from lora_store.errors import FileRefused
from lora_store.safetensors_layout import PREFIX_BYTES, StoredTensor, tensors_in

ALLOWED_DTYPES = ("F64", "F32", "F16", "BF16")  # F64 is rounded to F32 when it is read
AtLeastOne = Annotated[int, Ge(1)]
_WEIGHTS_REMEDY = " (admission.max_weights_bytes). float32 weights take half as much when saved as bfloat16"
_MAPPED_BYTES = 16 << 20  # larger data are mapped from a file, so that they need not stay in memory
_COPIED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits on an adapter's folder. Each bounds what a check costs."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"use_attribute_docstrings": True}  # for the table in the docs

    max_files: AtLeastOne = 1000
    """files in the folder"""
    max_config_bytes: AtLeastOne = 1 << 20
    """bytes of `adapter_config.json`"""
    max_weights_bytes: AtLeastOne = 1 << 30
    """bytes of `adapter_model.safetensors`"""
    max_header_bytes: AtLeastOne = 1 << 22
    """bytes of the weights file's header"""
    max_tensors: AtLeastOne = 20_000
    """tensors in the weights file"""
    max_template_bytes: AtLeastOne = 1 << 18
    """bytes of `chat_template.jinja`"""
    max_samples: AtLeastOne = 200
    """lines of `lora_samples.jsonl` that are read, spread evenly over more"""
    max_sample_bytes: AtLeastOne = 8192
    """bytes of one sample's input, which is cut there, of its output, and of `description.txt`"""
    max_rank: AtLeastOne = 256
    """rank of a module; it must also fit `worker.bank_rank_rows`"""
    max_patterns: AtLeastOne = 1024
    """entries of `rank_pattern` and of `alpha_pattern`"""
    max_reasons: AtLeastOne = 50
    """reasons that one refusal names"""


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the file's content.

    Raises: FileRefused when the file is missing, a link, not a regular file, or larger than `max_bytes`.
    """
    with _open_regular(path, max_bytes) as file:
        return file.read(max_bytes)


def parse_json_object(data: bytes | str) -> dict[str, Any]:
    """Parse a JSON object. Raises: ValueError when it is not an object, nests too deep, or repeats a key."""
    try:
        value = json.loads(data, object_pairs_hook=_unique_pairs)
    except RecursionError as exc:
        raise ValueError("it nests too deep") from exc
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, got {type(value).__name__}")
    return value


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """Return the file's JSON object. Raises: FileRefused."""
    try:
        return parse_json_object(read_bytes(path, max_bytes))
    except ValueError as exc:
        raise FileRefused(path.name, [f"is not valid JSON: {exc}"]) from exc


def read_tensors(path: Path, limits: Limits, *, is_private: bool = False) -> dict[str, StoredTensor]:
    """Return every tensor of a safetensors file by its key. Check the header before reading the data.

    The tensors share one buffer, except float64, which is rounded to float32. Large data are mapped: from the file
    itself if `is_private`, as no other process can change it meanwhile, otherwise from an unnamed temporary copy that
    is freed with the tensors.
    Raises: FileRefused, which lists every tensor whose dtype is not allowed.
    """
    with _open_regular(path, limits.max_weights_bytes, _WEIGHTS_REMEDY) as file:
        prefix = file.read(PREFIX_BYTES)
        header_len = int.from_bytes(prefix, "little")
        if len(prefix) < PREFIX_BYTES or header_len > limits.max_header_bytes:
            raise FileRefused(path.name, [f"has a header of {header_len} bytes, at most {limits.max_header_bytes}"])
        header = file.read(header_len)
        problems = _header_problems(header, limits)
        if problems:
            raise FileRefused(path.name, problems)
        data = _read_rest(file, limits.max_weights_bytes, is_private=is_private)
    entries = {key: entry for key, entry in parse_json_object(header).items() if key != "__metadata__"}
    try:
        return {key: tensor.without_float64() for key, tensor in tensors_in(entries, data).items()}
    except ValueError as exc:
        raise FileRefused(path.name, [f"is not a valid safetensors file, so copy or save it again: {exc}"]) from exc


def _read_rest(file: BinaryIO, max_bytes: int, *, is_private: bool) -> NDArray[np.uint8]:
    """Return the rest of the file as an (N,) uint8 array."""
    start = file.tell()
    num_bytes = max(min(os.fstat(file.fileno()).st_size - start, max_bytes), 0)
    if num_bytes < _MAPPED_BYTES:
        return _read_bytes(file, num_bytes)
    if is_private and start % PREFIX_BYTES == 0:  # tensors must be aligned
        return _mapped(file, start, num_bytes)
    with tempfile.TemporaryFile() as copy:
        while num_bytes and (part := file.read(min(_COPIED_AT_ONCE, num_bytes))):
            copy.write(part)
            num_bytes -= len(part)
        copy.flush()
        return _mapped(copy, 0, copy.tell())


def _mapped(file: IO[bytes], start: int, num_bytes: int) -> NDArray[np.uint8]:
    """Return these bytes of the file as an array over it. Changes of the array do not reach the file."""
    if not num_bytes:
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(file, np.uint8, "c", offset=start, shape=(num_bytes,)))


def _read_bytes(file: BinaryIO, num_bytes: int) -> NDArray[np.uint8]:
    """Read the next bytes of the file into a new (N,) uint8 array, without a second copy."""
    data = np.empty(num_bytes, np.uint8)
    view = data.data
    filled = 0
    while filled < len(view) and (count := file.readinto(view[filled:])):  # type: ignore[attr-defined]
        filled += count
    return data[:filled]


def _header_problems(header: bytes, limits: Limits) -> list[str]:
    try:
        entries = parse_json_object(header)
    except ValueError as exc:
        return [f"has a broken header: {exc}"]
    entries.pop("__metadata__", None)
    if len(entries) > limits.max_tensors:
        return [f"has {len(entries)} tensors, at most {limits.max_tensors}"]
    dtypes = {}
    for key, entry in entries.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        dtypes[key] = dtype if isinstance(dtype, str) else "none"
    return group_problems(
        "tensor",
        (
            (key, f"has dtype {dtype[:20]}, must be one of {', '.join(ALLOWED_DTYPES)}")
            for key, dtype in dtypes.items()
            if dtype not in ALLOWED_DTYPES
        ),
    )


def group_problems(kind: str, found: Iterable[tuple[str, str]]) -> list[str]:
    """Return one sentence for each problem, with the first name that has it and how many more have it.

    `kind`: what the names are of. `found`: names with their problems.
    """
    names: dict[str, list[str]] = {}
    for name, problem in found:
        names.setdefault(problem, []).append(name)
    return [
        f"{kind} {first[:200]!r} {problem}" + (f" (and {len(others)} more)" if others else "")
        for problem, (first, *others) in names.items()
    ]


@contextmanager
def _open_regular(path: Path, max_bytes: int, remedy: str = "") -> Iterator[BinaryIO]:
    """Open a regular file of at most `max_bytes`. `remedy` is appended to the message about a larger one."""
    try:
        # Non-blocking: opening a named pipe would wait for a writer; it is refused below instead.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        raise FileRefused(path.name, ["is missing"]) from exc
    except OSError as exc:
        problem = "is a symbolic link" if os.path.islink(path) else f"cannot be read: {exc.strerror}"
        raise FileRefused(path.name, [problem]) from exc
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileRefused(path.name, ["is not a regular file"])
        if status.st_size > max_bytes:
            problem = f"has {status.st_size:,} bytes; this server takes {max_bytes:,} bytes{remedy}"
            raise FileRefused(path.name, [problem])
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = [key[:100] for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"it repeats the keys {twice[:3]}")
    return found
