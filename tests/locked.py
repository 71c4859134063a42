"""A folder that this process may not enter, also where tests run as root."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make calls of the operating system fail for everything below `folder`, and for its list of files."""

    def guard(call: Callable[..., Any], below: Path) -> Callable[..., Any]:
        def guarded(path: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, (str, Path)) and Path(path).is_relative_to(folder) and Path(path) != below:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **kwargs)

        return guarded

    for name, below in {"stat": folder, "lstat": folder, "open": folder, "scandir": Path()}.items():
        monkeypatch.setattr(os, name, guard(getattr(os, name), below))
