"""Fixtures of the deployments' tests."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from deployments import retriever_factory
from tests.browsing import Browsing
from tests.shared_encoders import shared_encoder

TEST_TIMEOUT_S = 300.0


@pytest.fixture
def anyio_backend() -> str:
    """Return the event loop of asynchronous tests and fixtures."""
    return "asyncio"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an asynchronous test with a browser on the browser's loop, and let another one fail instead of hang."""
    test = pyfuncitem.obj

    async def limited(**arguments: Any) -> None:
        async with asyncio.timeout(TEST_TIMEOUT_S):
            await test(**arguments)

    if not inspect.iscoroutinefunction(test):
        return None
    browsing = pyfuncitem.funcargs.get("browsing")
    if isinstance(browsing, Browsing):
        browsing.run(test(**{name: pyfuncitem.funcargs[name] for name in inspect.signature(test).parameters}))
        return True
    pyfuncitem.obj = limited
    return None


@pytest.fixture(scope="session", autouse=True)
def shared_networks() -> Iterator[None]:
    """Let all replicas of a test process share the networks of their encoders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retriever_factory, "Encoder", shared_encoder)
        yield
