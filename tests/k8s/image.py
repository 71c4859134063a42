"""Read the Dockerfile as far as that is possible without Docker."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
IMAGE = ROOT / "k8s" / "image"
BAKED_MODEL = PurePosixPath("/opt/loraretriever/models/gemma-3-270m")


class Instruction(NamedTuple):
    keyword: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """Return the instructions of a Dockerfile, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def bases(text: str) -> list[str]:
    """Return the base images of the stages, with the defaults of build arguments filled in."""
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    named = [i.rest.split()[0] for i in instructions(text) if i.keyword == "FROM"]
    return [re.sub(r"\$\{(\w+)\}", lambda found: defaults[found[1]], name) for name in named]


def copied(text: str) -> list[str]:
    """Return the paths that the Dockerfile copies from the build context."""
    copies = [instruction.rest.split() for instruction in instructions(text) if instruction.keyword == "COPY"]
    return [source for parts in copies if not parts[0].startswith("--from") for source in parts[:-1]]


def is_ignored(path: str, patterns: str) -> bool:
    """Return whether a .dockerignore excludes `path`: the last pattern that matches it or a folder above decides."""
    ignored = False
    for line in patterns.splitlines():
        if line.strip() and not line.startswith("#"):
            pattern = line.strip().removeprefix("!")
            if _fits(path, pattern):
                ignored = not line.startswith("!")
    return ignored


def _fits(path: str, pattern: str) -> bool:
    parts = PurePosixPath(path).parts
    if pattern.startswith("**/"):
        return any(fnmatchcase(part, pattern.removeprefix("**/")) for part in parts)
    return any(fnmatchcase("/".join(parts[: end + 1]), pattern) for end in range(len(parts)))
