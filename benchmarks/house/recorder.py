"""Record which functions of a package run, in the order in which each is entered for the first time."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType

_PARTS_OF_A_FUNCTION = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}


@dataclass(frozen=True, slots=True)
class Walk:
    """The files visited by one run. A stay is a group of consecutive functions of one file."""

    stays: tuple[str, ...]

    @property
    def num_files(self) -> int:
        return len(set(self.stays))

    @property
    def num_returns(self) -> int:
        """Count the stays in a file that was left before."""
        return len(self.stays) - self.num_files


def walk_of(files: Sequence[str]) -> Walk:
    """Return the walk through the files of these functions, in their order."""
    return Walk(tuple(file for file, _ in groupby(files)))


class Recorder:
    """Records all threads that start while it exists, but only inside `recording`."""

    def __init__(self, package: Path) -> None:
        self._prefix = f"{package.resolve()}/"
        self._seen: dict[CodeType, str] = {}
        self._is_on = False
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forget the last walk and record the next one."""
        self._seen.clear()
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    @property
    def walk(self) -> Walk:
        return walk_of(list(self._seen.values()))

    def close(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if not self._is_on or event != "call" or code in self._seen:
            return
        is_function = code.co_flags & inspect.CO_OPTIMIZED and code.co_name not in _PARTS_OF_A_FUNCTION
        if is_function and code.co_filename.startswith(self._prefix):
            self._seen[code] = code.co_filename.removeprefix(self._prefix)
