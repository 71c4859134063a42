"""The file in an adapter's folder that says how the adapter wants to be asked. Its reader is the caller's."""

from __future__ import annotations

from collections.abc import Callable
from os.path import lexists  # sees dangling links too, which are refused when read
from pathlib import Path

from lora_store.bounded_files import read_bytes

CONTRACT_FILE = "adapter_io.yaml"
INTRINSIC_FILE = "io.yaml"  # that of IBM's intrinsics, which is read where there is no CONTRACT_FILE
MAX_CONTRACT_BYTES = 16_384
_MAX_FILE_BYTES = 4 * MAX_CONTRACT_BYTES  # with comments and indentation
GIVEN = "contract"  # the name of a contract that was given instead of a file
ReadContract = Callable[[str, bytes], tuple[str, tuple[str, ...]]]
"""Return the contract in a file of this name, as JSON, and what its publisher should know. Raises: FileRefused."""


def read_contract_file(folder: Path, read: ReadContract) -> tuple[str | None, tuple[str, ...]]:
    """Return the folder's contract as `read` returns it, None if there is none. Raises: FileRefused."""
    name = next((name for name in (CONTRACT_FILE, INTRINSIC_FILE) if lexists(folder / name)), None)
    return (None, ()) if name is None else read(name, read_bytes(folder / name, _MAX_FILE_BYTES))
