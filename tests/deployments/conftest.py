"""Fixtures of the deployments' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deployments import retriever_factory
from tests.shared_encoders import shared_encoder


@pytest.fixture(scope="session", autouse=True)
def shared_networks() -> Iterator[None]:
    """Let all replicas of a test process share the networks of their encoders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retriever_factory, "Encoder", shared_encoder)
        yield
