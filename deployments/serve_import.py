"""Import Ray Serve as where pandas is not installed: it takes 40 MB of each process, and none of the server's needs it.

Ray's worker processes import this module as they start, before one becomes a replica.
"""

import importlib
import sys
from contextlib import suppress

if "pandas" not in sys.modules:
    sys.modules["pandas"] = None  # type: ignore[assignment]  # Python then raises ImportError
    try:
        with suppress(ImportError):  # `check_libraries` says what is missing
            importlib.import_module("ray.serve")
    finally:
        del sys.modules["pandas"]
