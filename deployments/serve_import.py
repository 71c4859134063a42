"""Import Ray Serve and pyarrow as where pandas is not installed: it takes 40 MB of each process, and none needs it.

Ray's worker processes import this module as they start, before one becomes a replica. A later import of pandas works.
"""

import importlib
import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _Pandas:
    """A finder of modules that says at first that pandas is not installed."""

    is_hidden = True

    @classmethod
    def find_spec(cls, name: str, *_: object) -> ModuleSpec | None:
        if name != "pandas":
            return None
        if cls.is_hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        spec = PathFinder.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_tell(module: ModuleType) -> None:
                load(module)
                # pyarrow has looked for pandas already, and looks again only where it needs it, as here.
                with suppress(ImportError):  # of an older pandas than it needs
                    importlib.import_module("pyarrow").array([]).to_pandas()

            spec.loader.exec_module = load_and_tell  # type: ignore[method-assign]
        return spec


if "pandas" not in sys.modules:
    sys.meta_path.insert(0, _Pandas)
    try:
        with suppress(ImportError):  # `check_libraries` says what is missing
            importlib.import_module("ray.serve")
            importlib.import_module("pyarrow").array([])  # the first array looks for pandas
    finally:
        _Pandas.is_hidden = False
