"""Fixtures shared by all packages' tests."""

from __future__ import annotations

import gc

gc.disable()  # until tests are collected: half the time of that, and a third of the imports', went into it

import asyncio
import copy
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from gpu_worker.model.base_model import BaseModel, load_base_model
from tests.browsing import Browsing, browsing  # noqa: F401  a fixture
from tests.prometheus import promtool  # noqa: F401  a fixture
from tests.s3 import aws_credentials, s3_endpoint  # noqa: F401  fixtures
from tests.soak import (  # noqa: F401  pytest finds its hooks and fixtures by their names here
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    scale,
)
from tests.tiny import FAMILIES, byte_tokenizer, tiny_config

settings.register_profile("small", deadline=None, max_examples=40)  # a slow machine fails no test
settings.register_profile("full", deadline=None, max_examples=1000)
settings.load_profile("small")  # `make soak` loads the other one

torch.set_num_threads(1)  # tiny products are slower on two threads, which wait for each other busily
TEST_TIMEOUT_S = 300.0  # of an asynchronous test
ON_A_CLUSTER = ("cluster", "e2e", "servers")  # folders


def pytest_sessionstart(session: pytest.Session) -> None:
    """Give what tests and their processes leave in the temporary folder one that is removed at the end.

    Forget the server that the commands of this terminal use.
    """
    if hasattr(session.config, "workerinput"):
        return  # a process of pytest-xdist has the environment of the one that started it
    for name in ("LORARETRIEVER_URL", "LORARETRIEVER_KEY"):
        os.environ.pop(name, None)
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # of failed tests
    folder = tempfile.mkdtemp(prefix="lr-")  # short, for paths of sockets
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    # Later than multiprocessing removes its own folder there, as the process ends: it prints an error without it.
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=-200)


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.parent.name in ON_A_CLUSTER:
        item.add_marker(pytest.mark.e2e)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Collect garbage from here on, but for the millions of objects that stay."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


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
    browser = pyfuncitem.funcargs.get("browsing")
    if isinstance(browser, Browsing):
        browser.run(test(**{name: pyfuncitem.funcargs[name] for name in inspect.signature(test).parameters}))
        return True
    pyfuncitem.obj = limited
    return None


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """End the use of several threads with the test that needs them."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Replace `os.fsync`, a third of the time of a test that publishes. Power failure tests record its calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which fails for the same descriptors
        yield


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Save a random model of each family with a byte tokenizer, and return the folders."""
    folders = {}
    for seed, (family, build) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        folders[family] = tmp_path_factory.mktemp(family)
        build().save_pretrained(folders[family])
        byte_tokenizer().save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="session")
def loaded_bases() -> dict[tuple[str, str], BaseModel]:
    """Return the loaded tiny base models by family and dtype. A test gets a copy, in a fifth of the time of a load."""
    return {}


@pytest.fixture(scope="session")
def tiny_base(
    tiny_folders: Mapping[str, Path], loaded_bases: dict[tuple[str, str], BaseModel]
) -> Callable[..., BaseModel]:
    """Return a maker of fresh tiny base models of a family."""

    def make(family: str = "gemma3", dtype: str = "float32") -> BaseModel:
        if (family, dtype) not in loaded_bases:
            loaded_bases[family, dtype] = load_base_model(tiny_config(tiny_folders[family], dtype=dtype))
        return copy.deepcopy(loaded_bases[family, dtype])

    return make
