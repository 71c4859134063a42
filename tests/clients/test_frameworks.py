"""pydantic-ai, OpenAI Agents, instructor, DSPy"""

from __future__ import annotations

import pytest

from tests.clients.processes import run_in_environment
from tests.docs.pages import ROOT

PRINTED = {
    "pydantic-ai": "queue='billing'\n",
    "OpenAI Agents": "Hello\n",
    "instructor": "queue='billing'\n",
    "DSPy": "['Hello']\n",
}


@pytest.fixture(scope="module")
def found(server_url: str) -> dict[str, str]:
    page = str(ROOT / "docs" / "how-to" / "connect-clients.md")
    return run_in_environment("frameworks", "frameworks_cases.py", server_url, page, *PRINTED)


@pytest.mark.parametrize("client", PRINTED)
def test_recipe(found: dict[str, str], client: str) -> None:
    """the recipe in [connect clients](../how-to/connect-clients.md)"""
    assert found[client] == PRINTED[client]
