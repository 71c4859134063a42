"""Leave out the tests whose first line says that they need vLLM, or Triton, which vLLM brings, where it is missing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_NEED_VLLM = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if re.match('""".*Needs (vLLM|Triton)\\."""$', path.read_text().split("\n", 1)[0])
]
collect_ignore = [] if importlib.util.find_spec("vllm") else _NEED_VLLM
