from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.house.recorder import Recorder, walk_of

_SOURCES = {
    "first.py": "from walked import second\n"
    "def start(): return [second.help(n) for n in range(3)] + [finish()]\n"
    "def finish(): return second.late()\n",
    "second.py": "def help(n): return n\ndef late(): return 0\n",
    "unused.py": "def never(): return 0\n",
}


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = tmp_path / "walked"
    folder.mkdir()
    for name, text in _SOURCES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("walked.first")
    for name in [name for name in sys.modules if name.split(".")[0] == "walked"]:
        del sys.modules[name]


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    profile = sys.getprofile()
    recorder = Recorder(tmp_path / "walked")
    yield recorder
    recorder.close()
    sys.setprofile(profile)


def test_a_function_counts_once_where_it_is_entered_first(recorder: Recorder, first: ModuleType) -> None:
    with recorder.recording():
        first.start()
    assert recorder.walk.stays == ("first.py", "second.py", "first.py", "second.py")
    assert (recorder.walk.num_files, recorder.walk.num_returns) == (2, 2)


def test_calls_on_other_threads_are_part_of_the_walk(recorder: Recorder, first: ModuleType) -> None:
    thread = threading.Thread(target=first.second.late)
    with recorder.recording():
        thread.start()
        thread.join()
    assert recorder.walk.stays == ("second.py",)


def test_only_functions_called_while_recording_are_in_the_walk(recorder: Recorder, first: ModuleType) -> None:
    with recorder.recording():
        first.finish()
    first.start()
    assert recorder.walk.stays == ("first.py", "second.py")
    with recorder.recording():
        first.second.help(1)
    assert recorder.walk.stays == ("second.py",)


@pytest.mark.parametrize(
    ("files", "num_stays", "num_files", "num_returns"),
    [("", 0, 0, 0), ("a", 1, 1, 0), ("aab", 2, 2, 0), ("abab", 4, 2, 2), ("abcba", 5, 3, 2)],
)
def test_returns_are_stays_in_files_that_were_left(
    files: str, num_stays: int, num_files: int, num_returns: int
) -> None:
    walk = walk_of(list(files))
    assert (len(walk.stays), walk.num_files, walk.num_returns) == (num_stays, num_files, num_returns)
