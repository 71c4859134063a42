"""Leave out the tests that import vLLM where it is not installed."""

from __future__ import annotations

import importlib.util

collect_ignore = (
    [] if importlib.util.find_spec("vllm") else ["test_engine_args.py", "test_plan_layers.py", "test_sampling.py"]
)
