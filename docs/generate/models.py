"""The model families that the engine was tried with."""

from __future__ import annotations

from docs.generate.markdown import code, table
from tests.gpu_worker.families import EQUAL, REFUSED


def equal_families() -> str:
    """Return the families whose logits equal those of transformers, in alphabetical order."""
    return ", ".join(code(name) for name in sorted(EQUAL)) + "\n"


def refused_families() -> str:
    """Return the families that are refused at the start, with the part of the message that says why."""
    return table(("family", "the message names"), [(code(name), REFUSED[name][1]) for name in sorted(REFUSED)])
