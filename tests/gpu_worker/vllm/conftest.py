"""Leave out the tests that import vLLM where it is not installed."""

from __future__ import annotations

import importlib.util

_NEED_VLLM = ["test_engine_args.py", "test_plan_layers.py", "test_sampling.py", "test_settings.py"]
_NEED_VLLM += ["test_tiled_plans.py"]  # Triton comes with vLLM
collect_ignore = [] if importlib.util.find_spec("vllm") else _NEED_VLLM
