"""Import transformers as where scipy is not installed, which takes 0.4 s and 30 MB. The native engine needs no scipy.

transformers uses it for the losses of object detection. A later import of scipy works.
"""

import importlib
import sys

if "transformers" not in sys.modules and "scipy" not in sys.modules:
    sys.modules["scipy"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("transformers.utils")  # looks for packages once
    finally:
        del sys.modules["scipy"]
