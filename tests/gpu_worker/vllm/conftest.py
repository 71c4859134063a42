"""Leave out the tests that import vLLM where it is not installed."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("vllm") else ["test_sampling.py"]
