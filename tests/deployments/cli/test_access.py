from __future__ import annotations

import pytest

from tests.deployments.scripted import run, scripted, words


@pytest.mark.parametrize("wanted", ["public", "private"])
def test_an_adapter_is_made_public_or_private(wanted: str) -> None:
    with scripted((200, {"name": "poet", "visibility": wanted, "generation": 7})) as server:
        result = run("access", wanted, "acme/poet", "--url", server.url)
    assert (server.asked, server.sent) == ([("PATCH", "/v1/loras/acme%2Fpoet")], [{"visibility": wanted}])
    assert f"poet is {wanted} at generation 7" in words(result.stdout)
