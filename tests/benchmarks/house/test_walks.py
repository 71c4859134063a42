"""Run the walks through the real deployments, which keeps the recording program in step with the code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SCRIPT = "import json\nfrom benchmarks.house.__main__ import traced_walks\nprint(json.dumps(traced_walks()))"


def test_every_walk_is_recorded_and_no_request_visits_half_of_the_files() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    walks = json.loads(done.stdout.splitlines()[-1])
    assert len(walks) == 6
    num_files = len([path for path in (ROOT / "deployments").rglob("*.py") if path.name != "__init__.py"])
    for name, walk in walks.items():
        assert walk["returns"] == walk["stays"] - walk["files"], name
        assert 4 <= walk["files"] < num_files / 2, name
