"""List words and openings that readers found hard to understand: `python -m docs.check_language [PATH …]`.

A hint for authors, not a rule: it reads the tracked files, or those given, and always exits with 0.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

INSTEAD = {
    r"\bsigns? of life\b": "heartbeat",
    r"\bmend(s|ed)?\b": "fix",
    r"\bnobody\b|\bwhoever\b|\bsomebody\b": "no client, anyone who, another tenant",
    r"\bamid\b|\banew\b|\bbeside\b": "during, again, next to",
    r"\blikeliest\b|\bcommonest\b": "most likely, most common",
    r"\bin place of\b": "instead of",
    r"\bso many\b": "this many",
    r"\bnot to be had\b": "not available",
    r"\b(lies|stands) (in|on|at|below|above|behind|around|where)\b": "is",
    r"\bstands? (in for|for|behind)\b": "replaces, means",
    r"\bfor ever\b": "without a bound",
    r'^\s*"""(What|Who|Whose|Those|The same) ': "a verb in the imperative, in a docstring",
    r"^\s*#\s*of\b|\s#\sof\b": "a whole sentence, or a better name",
    r"def test_(what|who|where|those)_": "a claim with a subject",
}
SUFFIXES = {".py", ".js", ".html", ".md", ".yaml", ".cpp", ".h"}


def list_files() -> list[Path]:
    """Return the tracked text files, without results and prompts of users."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout.split("\0")
    left_out = ("benchmarks/results/", "benchmarks/routing/pools/", "docs/check_language.py")
    return [Path(name) for name in listed if name and not name.startswith(left_out)]


def main() -> None:
    """Print `path:line: word: what to write`."""
    paths = [Path(name) for name in sys.argv[1:]] or list_files()
    for path in (path for path in paths if path.suffix in SUFFIXES and path.is_file()):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for pattern, better in INSTEAD.items():
                if found := re.search(pattern, line, re.IGNORECASE):
                    print(f"{path}:{number}: {found[0].strip()!r}: write {better}")


if __name__ == "__main__":
    main()
