"""Write every generated block of the documentation, or with `--check` say which pages are out of date."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from docs.generate.blocks import BLOCKS
from docs.generate.markdown import filled, pages_with_blocks
from docs.generate.settings_files import CHART_VALUES, chart_schema, example, schema

DOCS = Path(__file__).parent.parent
FILES: Mapping[Path, Callable[[], str]] = {
    DOCS.parent / "examples" / "settings.example.yaml": example,
    DOCS / "reference" / "settings.schema.json": schema,
    CHART_VALUES.with_name("values.schema.json"): chart_schema,
}


def stale_pages(*, write: bool) -> list[Path]:
    """Return the generated files, and the pages whose generated blocks differ from the code. `write`: update them."""
    stale = []
    for path in [*pages_with_blocks(DOCS), *FILES]:
        page = path.read_text(encoding="utf-8") if path.exists() else ""
        wanted = FILES[path]() if path in FILES else filled(page, BLOCKS)
        if wanted != page:
            stale.append(path)
            if write:
                path.write_text(wanted, encoding="utf-8")
    return stale


def main(arguments: list[str]) -> int:
    """Write the blocks. With `--check` return 1 if a page is out of date."""
    check = arguments == ["--check"]
    stale = stale_pages(write=not check)
    for path in stale:
        print(f"{path.relative_to(DOCS.parent)}: {'out of date: run python -m docs.generate' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
