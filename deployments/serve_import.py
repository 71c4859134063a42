"""Import Ray Serve and pyarrow as where pandas is not installed: it takes 40 MB of each process, and none needs it.

Ray's worker processes import this module as they start, before one becomes a replica. A later import of pandas works.
"""

import importlib
import sys
from contextlib import suppress


class _WithoutPandas:
    """A finder of modules that says that pandas cannot be imported."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "pandas":
            raise ImportError(name)


if "pandas" not in sys.modules:
    sys.meta_path.insert(0, _WithoutPandas)
    try:
        with suppress(ImportError):  # `check_libraries` says what is missing
            importlib.import_module("ray.serve")
            importlib.import_module("pyarrow").array([])  # the first array looks for pandas
    finally:
        sys.meta_path.remove(_WithoutPandas)
