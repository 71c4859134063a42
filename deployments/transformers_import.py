"""Import transformers as if scipy were not installed, which saves 0.4 s and 30 MB. The native engine needs no scipy.

transformers uses it for the losses of object detection. A later import of scipy works.
"""

import importlib
import sys

if "transformers" not in sys.modules and "scipy" not in sys.modules:
    sys.modules["scipy"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("transformers.utils")  # it remembers which packages it found
    finally:
        del sys.modules["scipy"]
