"""The log of a Delta table, read file by file: which files are damaged, and what the whole ones say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lora_store.errors import StoreDamaged
from lora_store.files import Files, open_for_arrow, short_cause

LOG = "_delta_log"
LAST_CHECKPOINT = f"{LOG}/_last_checkpoint"
MISSING, EMPTY = "is missing", "is empty"
_COMMIT = re.compile(rf"{LOG}/(\d{{20}})\.json")
_CHECKPOINT = re.compile(rf"{LOG}/(\d{{20}})\.checkpoint\.parquet")

Action = dict[str, Any]  # one line of a commit: {"add": {...}}, {"remove": {...}}, {"metaData": {...}}, ...


def commit_name(version: int) -> str:
    """Return the name of the commit of this version, below the table's location."""
    return f"{LOG}/{version:020}.json"


def checkpoint_name(version: int) -> str:
    """Return the name of the checkpoint of this version, below the table's location."""
    return f"{LOG}/{version:020}.checkpoint.parquet"


@dataclass
class TableLog:
    """The log from its newest whole checkpoint on.

    `damaged`: the problem of each damaged file, by its name. `actions`: those of each version, and those of the
    checkpoint under its version; of a damaged commit, the lines that are whole.
    """

    damaged: dict[str, str] = field(default_factory=dict)
    actions: dict[int, Sequence[Action]] = field(default_factory=dict)
    newest: int = -1  # the newest version of which there is a file, damaged or not

    def all_actions(self, kind: str) -> Iterator[tuple[int, Any]]:
        """Yield (version, action) of every action of a kind, such as "add", oldest first."""
        for version in sorted(self.actions):
            for action in self.actions[version]:
                if action.get(kind) is not None:
                    yield version, action[kind]


def read_log(files: Files) -> TableLog:
    """Read the log of the table in this location. Raises: StoreUnavailable."""
    log = TableLog()
    names = [file.name for file in files.entries()]
    commits = {int(match[1]) for name in names if (match := _COMMIT.fullmatch(name))}
    checkpoints = {int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))}
    log.newest = max(commits | checkpoints, default=-1)
    first = 0
    for version in sorted(checkpoints, reverse=True):
        found = _read(log, files, checkpoint_name(version), _checkpoint_actions)
        if found is not None:
            log.actions[version] = found
            first = version + 1
            break
    for version in range(first, log.newest + 1):
        log.actions[version] = _read(log, files, commit_name(version), partial(_commit_actions, log)) or []
    hint = _named_checkpoint(files.read(LAST_CHECKPOINT))
    if hint is not None and hint not in checkpoints:
        log.damaged[LAST_CHECKPOINT] = f"names {checkpoint_name(hint)}, which is missing"
    if not log.actions and log.newest < 0:
        log.damaged[LOG] = MISSING
    return log


def newest_checkpoint(names: Iterable[str]) -> int:
    """Return the version of the newest checkpoint among these files, -1 if there is none."""
    return max((int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))), default=-1)


def check_sizes(files: Files, location: str) -> None:
    """Check that no commit since the newest checkpoint is empty: `deltalake` would ignore it without a word.

    Raises: StoreDamaged.
    """
    found = {file.name: file.num_bytes for file in files.entries(LOG)}
    checkpoint = newest_checkpoint(found)
    for name, num_bytes in sorted(found.items()):
        match = _COMMIT.fullmatch(name)
        if match and not num_bytes and int(match[1]) > checkpoint:
            raise StoreDamaged(f"{location}/{name}", EMPTY)


def _named_checkpoint(data: bytes | None) -> int | None:
    """Return the version of the checkpoint that the hint for readers names; None without a hint that they can use."""
    try:
        return int(json.loads(data or b"")["version"])
    except (ValueError, KeyError, TypeError):
        return None


def _read(
    log: TableLog, files: Files, name: str, parse: Callable[[str, bytes], Sequence[Action]]
) -> Sequence[Action] | None:
    """Return the actions in a file of the log. Note a damaged file; return what is whole in it, or None."""
    data = files.read(name)
    if data is None:
        log.damaged[name] = MISSING
        return None
    if not data:
        log.damaged[name] = EMPTY
        return None
    try:
        return parse(name, data)
    except (pa.ArrowException, OSError) as exc:
        log.damaged[name] = f"cannot be read: {short_cause(exc)}"
        return None


def _commit_actions(log: TableLog, name: str, data: bytes) -> Sequence[Action]:
    actions: list[Action] = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            action = json.loads(line)
        except ValueError:
            log.damaged[name] = f"is cut or overwritten in line {number}"
            break
        if isinstance(action, dict):
            actions.append(action)
    return actions


def _checkpoint_actions(_: str, data: bytes) -> Sequence[Action]:
    rows: list[Action] = pq.read_table(open_for_arrow(data)).to_pylist()
    for row in rows:
        if row.get("metaData"):  # maps are read as lists of pairs
            table = row["metaData"]
            table["configuration"] = dict(table["configuration"] or ())
            table["format"]["options"] = dict(table["format"].get("options") or ())
    return rows
