"""Fixtures of the deployments' tests."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator

import pytest

from deployments import retriever_factory
from tests.browsing import Browsing
from tests.shared_encoders import shared_encoder

TEST_TIMEOUT_S = 300.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine function in an event loop of its own, or in the browser's if it has one."""
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(test).parameters}
    browsing = pyfuncitem.funcargs.get("browsing")
    if isinstance(browsing, Browsing):
        browsing.run(test(**arguments))
    else:
        asyncio.run(asyncio.wait_for(test(**arguments), TEST_TIMEOUT_S))
    return True


@pytest.fixture(scope="session", autouse=True)
def shared_networks() -> Iterator[None]:
    """Let all replicas of a test process share the networks of their encoders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retriever_factory, "Encoder", shared_encoder)
        yield
