"""The documentation site, built and looked at in a real Chromium."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import pytest
from playwright.async_api import expect

from tests.browsing import Browsing

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
DEEP = ("how-to/monitor.html", "reference/settings.html", "benchmarks/index.html")  # far down in the navigation
WIDTHS = (1400, 390)
WITH_NAMES = ("settings", "errors", "metrics", "cli", "http-api", "lora-options")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the site, and return its address: from a folder its search does not start in Chromium."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=170)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_sites_name_and_its_search_are_in_view_on_every_page(browsing: Browsing, site: str) -> None:
    bottom = "(node) => node.getBoundingClientRect().bottom"
    top = "(node) => node.getBoundingClientRect().top"

    async def visit() -> None:
        async with browsing.page(f"{site}/index.html") as page:
            for width, name in product(WIDTHS, ("index.html", *DEEP)):
                await page.set_viewport_size({"width": width, "height": 844})
                await page.goto(f"{site}/{name}")
                side = page.locator(".wy-side-scroll")
                if width < 768:
                    await page.locator("[data-toggle=wy-nav-top]").first.click()
                await expect(side.get_by_label("Search docs", exact=True)).to_be_in_viewport(ratio=1)
                await expect(side.get_by_role("link", name="LoraRetriever")).to_be_in_viewport(ratio=1)
                current = side.locator("a.current").last
                await expect(current).to_be_in_viewport(ratio=1)  # the theme has scrolled to it
                await expect(side.get_by_label("Search docs", exact=True)).to_be_in_viewport(ratio=1)
                assert await side.locator(".wy-side-nav-search").evaluate(bottom) <= await current.evaluate(top)

    browsing.run(visit())


def test_names_in_tables_are_not_broken_inside_words(browsing: Browsing, site: str) -> None:
    lines = "(nodes) => nodes.map((node) => [node.textContent, node.getClientRects().length])"

    async def visit() -> None:
        num_names = 0
        async with browsing.page(f"{site}/index.html") as page:
            for name in WITH_NAMES:
                await page.goto(f"{site}/reference/{name}.html")
                for width in WIDTHS:
                    await page.set_viewport_size({"width": width, "height": 844})
                    found = await page.locator("td:first-child code").evaluate_all(lines)
                    assert [one for one in found if one[1] != 1] == [], (name, width)
                    inside, outside = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
                    assert inside <= outside, (name, width)
                num_names += len(found)
        assert num_names > 200

    browsing.run(visit())
