"""Fixtures of the deployments' tests."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator

import pytest

from deployments import retriever_factory
from tests.shared_encoders import shared_encoder


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine function in an event loop of its own, for five minutes at most."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), 300))
    return True


@pytest.fixture(scope="session", autouse=True)
def shared_networks() -> Iterator[None]:
    """Let all replicas of a test process share the networks of their encoders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retriever_factory, "Encoder", shared_encoder)
        yield
