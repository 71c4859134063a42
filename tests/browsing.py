"""A real Chromium, headless, driven from an event loop of its own thread."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvicorn
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

from tests.deployments.app_fakes import Served, app_of

T = TypeVar("T")
_PACKAGE = "chromium"  # Debian's
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_TIMEOUT_S = 170.0
_EXPECT_MS = 60_000  # other tests may keep all cores busy


class LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self, name: str) -> None:
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

        async def live() -> None:
            ended = asyncio.Event()
            started.set_result((asyncio.get_running_loop(), ended))
            await ended.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(live()), name=name, daemon=True)
        self._thread.start()
        self._loop, self._ended = started.result(_TIMEOUT_S)

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and return its result."""
        return self.start(work).result(_TIMEOUT_S)

    def close(self) -> None:
        """Cancel the tasks that are left, such as those of an Ingress, wait for their end and close the loop."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(_TIMEOUT_S)


class Browsing:
    """One browser for a whole test run; each page has its own storage."""

    def __init__(self, executable: str) -> None:
        expect.set_options(timeout=_EXPECT_MS)
        self._loop = LoopThread("browsing")
        self._ended = asyncio.Event()
        started: Future[Browser] = Future()
        self._life = self._loop.start(self._live(executable, started))
        self._browser = started.result(_TIMEOUT_S)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the browser's loop and return its result."""
        return self._loop.run(work)

    @asynccontextmanager
    async def page(self, url: str, **context: Any) -> AsyncIterator[Page]:
        """Open the page at `url`. It must violate no policy, and no script of it may fail."""
        async with await self._browser.new_context(**context) as opened:
            opened.set_default_timeout(_EXPECT_MS)
            page = await opened.new_page()
            problems: list[str] = []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda message: problems.extend(_problems(message)))
            page.on("dialog", lambda dialog: problems.append(f"a dialog: {dialog.message}"))
            await page.goto(url)
            yield page
            assert problems == []

    def close(self) -> None:
        self._loop.run(self._end())
        self._life.result(_TIMEOUT_S)
        self._loop.close()

    async def _end(self) -> None:
        self._ended.set()

    async def _live(self, executable: str, started: Future[Browser]) -> None:
        async with async_playwright() as playwright:
            try:
                browser = await playwright.chromium.launch(executable_path=executable, args=_FLAGS)
            except Exception as exc:
                started.set_exception(exc)
                return
            started.set_result(browser)
            await self._ended.wait()
            await browser.close()


@pytest.fixture(scope="session")
def browsing() -> Iterator[Browsing]:
    """Return the system's Chromium. Without it skip the test, or fail if CI_REQUIRES_BROWSER is set."""
    executable = shutil.which("chromium")
    if executable is None:
        missing = f"there is no Chromium: install Debian's package {_PACKAGE}"
        if os.environ.get("CI_REQUIRES_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)
    browser = Browsing(executable)
    yield browser
    browser.close()


@asynccontextmanager
async def address_of(served: Served) -> AsyncIterator[str]:
    """Serve an Ingress over fakes on loopback, and yield its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # the client that has the address may connect at once; uvicorn answers when it is up
        server = uvicorn.Server(uvicorn.Config(app_of(served), log_level="warning", lifespan="off"))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            server.force_exit = True
            await serving
            await served.services.background.idle()


async def drop_folder(page: Page, folder: Path) -> None:
    """Drop a local folder on the page, as a file manager does: it tells again and again what is above the page."""
    session = await page.context.new_cdp_session(page)
    await page.evaluate(
        """() => {
          window.seen = [];
          for (const kind of ['dragover', 'drop']) document.addEventListener(kind, () => seen.push(kind));
        }"""
    )

    async def send(kind: str) -> None:
        data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
        await session.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})

    async def until(condition: str, within_s: float, during: Callable[[], Awaitable[None]] | None = None) -> bool:
        end = asyncio.get_running_loop().time() + within_s
        while not (is_so := await page.evaluate(condition)) and asyncio.get_running_loop().time() < end:
            await (asyncio.sleep(0.05) if during is None else during())
        return bool(is_so)

    for _ in range(5):  # a browser cancels a drop where the page has not yet accepted what is above it
        await send("dragEnter")
        assert await until("() => seen.filter((kind) => kind === 'dragover').length >= 2", 60, lambda: send("dragOver"))
        await expect(page.locator("#drop.over")).to_have_count(1)
        await send("drop")
        if await until("() => seen.includes('drop')", 10):
            break
        await page.evaluate("() => { seen.length = 0; }")
    else:
        pytest.fail("the browser cancelled each drop")
    await session.detach()


def _problems(message: ConsoleMessage) -> list[str]:
    """Return the problems of the page. Error responses are not the page's fault, because the page shows them."""
    is_answer = message.text.startswith("Failed to load resource")
    return [message.text] if message.type == "error" and not is_answer else []
