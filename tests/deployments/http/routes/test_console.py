from __future__ import annotations

import re
from pathlib import Path

import pytest

from deployments.http.routes.console import console_files
from tests.deployments.asking import error_of, get, request

CONSOLE = Path(__file__).parents[4] / "deployments" / "console"
HTML = ("index.html", "docs.html")
PAGES = ("/", "/docs", *(f"/console/{name}" for name in sorted(console_files())))


def text_of(name: str) -> str:
    return console_files()[name].content.decode()


@pytest.mark.parametrize("path", PAGES)
def test_every_file_is_served_with_its_type_and_a_strict_policy(path: str) -> None:
    response = get(path)
    assert response.status_code == 200 and response.content
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    kind = kinds[path.rpartition(".")[2]] if "." in path else "text/html"
    assert response.headers["content-type"] == f"{kind}; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"


def test_a_cached_file_is_304_until_it_changes() -> None:
    first = get("/console/main.js")
    known = request("GET", "/console/main.js", sent={"headers": {"If-None-Match": first.headers["etag"]}})
    assert (known.status_code, known.content) == (304, b"")
    assert known.headers["etag"] == first.headers["etag"]
    other = request("GET", "/console/main.js", sent={"headers": {"If-None-Match": '"another"'}})
    assert (other.status_code, other.content) == (200, first.content)


def test_a_head_request_has_only_headers() -> None:
    response = request("HEAD", "/")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["etag"] == get("/").headers["etag"]


@pytest.mark.parametrize("name", ["nothing.js", "..%2fingress.py", "%2e%2e%2fapp.py", "index.html%00"])
def test_only_the_console_s_files_are_served(name: str) -> None:
    response = get(f"/console/{name}")
    assert response.status_code == 404
    assert error_of(response)["type"] == "not_found_error"


def test_every_file_is_referenced_and_nothing_is_inline_or_external() -> None:
    pages = "".join(map(text_of, HTML))
    named = {*HTML, *re.findall(r'(?:href|src)="console/([^"]+)"', pages)}
    assert 'href="docs"' in text_of("index.html")
    for name in console_files():
        named |= set(re.findall(r'from "\./([^"]+)"', text_of(name)))
        outside = re.findall(r"https?://[^\s\"'<>]+", text_of(name))
        assert set(outside) <= {"http://www.w3.org/2000/svg"}, "a namespace, which is not fetched"
    assert named == set(console_files()) == {path.name for path in CONSOLE.iterdir()}
    assert not re.search(r"<style|<script(?![^>]*\ssrc=)|\sstyle=|\son[a-z]+=", pages)


def test_no_script_turns_text_into_markup() -> None:
    for name in console_files():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|DOMParser", text_of(name))


def test_every_element_used_by_a_script_is_on_the_page() -> None:
    ids: set[str] = set()
    for page in HTML:
        found = re.findall(r'\bid="([^"]+)"', text_of(page))
        assert len(found) == len(set(found))
        ids |= set(found)
    scripts = [text_of(name) for name in console_files() if name.endswith(".js")]
    asked = {
        found for script in scripts for found in re.findall(r'(?:byId|say|sayOrHide|sayPart|fill)\("([^"]+)"', script)
    }
    assert asked <= ids


def test_the_api_description_uses_no_other_site_and_not_the_frameworks_page() -> None:
    page = get("/docs")
    assert page.content == console_files()["docs.html"].content
    assert page.headers["content-security-policy"] == get("/").headers["content-security-policy"]
    assert page.headers["x-frame-options"] == "DENY"
    assert get("/docs/oauth2-redirect").status_code == get("/redoc").status_code == 404


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("front", "back", "at_least"),
    [
        ("text", "page", 7),
        ("text", "panel", 7),
        ("text", "soft", 7),
        ("text", "notice", 7),
        ("muted", "page", 4.5),
        ("muted", "panel", 4.5),
        ("muted", "field", 4.5),
        ("on-accent", "accent", 4.5),
        ("bad", "bad-soft", 4.5),
        ("bad", "page", 4.5),
        ("bad", "panel", 4.5),
        ("panel", "rank-0", 4.5),
        ("panel", "rank-1", 4.5),
        ("panel", "rank-2", 4.5),
        ("panel", "rank-3", 4.5),
        ("accent", "panel", 3),
        ("star", "field", 3),
    ],
)
def test_texts_have_enough_contrast(scheme: int, front: str, back: str, at_least: float) -> None:
    """The contrasts of WCAG 2.1, success criteria 1.4.3 and 1.4.11."""
    css = text_of("console.css")
    root = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+)", root))
    lighter, darker = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= at_least


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
