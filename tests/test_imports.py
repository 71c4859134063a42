"""The import rule, checked over the syntax trees: lora_store <- retriever_svc, gpu_worker <- deployments.

Inside `deployments`, `gpu_worker` and `benchmarks.paper` rooms import rooms of lower floors only, so there is no ring.
No two modules of a package import each other, directly or through others, wherever they are.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"lora_store", "retriever_svc", "gpu_worker", "deployments"}
MAY_IMPORT = {
    "lora_store": {"lora_store"},
    "retriever_svc": {"retriever_svc", "lora_store"},
    "gpu_worker": {"gpu_worker", "lora_store"},
    "deployments": PACKAGES,
}
EDGE_ONLY = {"ray", "fastapi", "pydantic", "starlette"}
# A room is a folder, or a module next to the folders. A folder inside a room may have its own floor, as "room.folder".
# Rooms of one floor do not import each other.
FLOORS: dict[str, list[set[str]]] = {
    "deployments": [
        {"addresses", "background", "json_types", "private_names", "serve_import", "transformers_import"},
        {"errors", "field_problems", "yaml_files"},
        {"api", "byte_budget"},
        {"scaling"},
        {"calls"},
        {"config", "weights"},
        {"auth", "encoder_queue", "retriever_factory"},
        {"observability"},
        {"generation"},
        {"publishing"},
        {"http"},
        {"ingress", "retriever", "store", "worker", "batch"},
        {"app"},
        {"cli"},
    ],
    "gpu_worker": [
        {"errors"},
        {"config"},
        {"native.kernels"},  # both engines use compiled kernels
        {"bank"},
        {"front"},
        {"engine", "model"},
        {"native", "vllm"},
        {"start"},
    ],
    "benchmarks.paper": [{"common"}, {"answering", "training"}, {"pool"}, {"retrieval"}, {"stages"}, {"__main__"}],
}
NEVER = {"pickle", "dill", "shelve", "marshal", "tests", "benchmarks", "examples"}


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import; for `from a import b` both `a` and `a.b`, which may be a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}:{node.lineno} imports relatively"
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_import_in_one_direction_and_load_no_pickles(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 20
    for path in files:
        for line, module in imported_modules(path):
            imported = module.split(".")[0]
            place = f"{path.relative_to(ROOT)}:{line} imports {imported}"
            assert imported not in NEVER, place
            assert imported not in PACKAGES or imported in MAY_IMPORT[package], place
            assert imported not in EDGE_ONLY or package == "deployments", place
        assert "torch.load(" not in path.read_text(), f"{path} reads pickles"


def find_room(package: str, module: str) -> str:
    """Return the room that the module is in."""
    parts = module.removeprefix(f"{package}.").split(".")
    inner = ".".join(parts[:2])
    return inner if any(inner in rooms for rooms in FLOORS[package]) else parts[0]


def room_imports(package: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, room) of every import of the same package. Folders count by the modules taken from them."""
    for line, module in imported_modules(path):
        if module.startswith(f"{package}.") and not (ROOT / module.replace(".", "/")).is_dir():
            yield line, find_room(package, module)


@pytest.mark.parametrize("package", sorted(FLOORS))
def test_rooms_import_downwards_only(package: str) -> None:
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS[package]) for room in rooms}
    folder = ROOT / package.replace(".", "/")
    paths = [path for path in sorted(folder.rglob("*.py")) if path != folder / "__init__.py"]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    rooms = {path: find_room(package, name.removesuffix(".__init__")) for path, name in names.items()}
    assert set(rooms.values()) == set(floor_of), "every room has a floor"
    seen = set()
    for path, room in rooms.items():
        for line, imported in room_imports(package, path):
            seen.add((room, imported))
            is_below = imported == room or floor_of[imported] < floor_of[room]
            assert is_below, f"{path.relative_to(ROOT)}:{line} imports {imported}, which is not below {room}"
    assert len(seen) > len(floor_of)


@pytest.mark.parametrize("package", [*sorted(PACKAGES), "benchmarks"])
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    """Imports that only a type checker reads count too."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / package).rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = {module for _, module in imported_modules(path)} & modules.keys()
        # `from a import b` needs the folder `a` itself only if `b` is no module of it.
        graph[name] = {each for each in found if not any(other.startswith(f"{each}.") for other in found)}
    assert sum(map(len, graph.values())) > len(modules) > 20
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("each of these modules is imported by the next: " + " -> ".join(error.args[1]))


def test_benchmarks_import_no_examples_no_tests_and_no_command_of_another_package() -> None:
    paths = sorted((ROOT / "benchmarks").rglob("*.py"))
    assert len(paths) > 50
    for path in paths:
        for line, module in imported_modules(path):
            place = f"{path.relative_to(ROOT)}:{line} imports {module}"
            assert module.split(".")[0] not in ("examples", "tests"), place
            assert "__main__" not in module.split("."), place


def test_init_files_hold_exports_only() -> None:
    for package in PACKAGES:
        for node in ast.parse((ROOT / package / "__init__.py").read_text()).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert is_docstring or is_all or isinstance(node, ast.ImportFrom), ast.unparse(node)


def test_only_packages_that_run_models_import_model_libraries() -> None:
    """Importing them takes seconds and memory, in every new replica and in the process of the command."""
    code = """
import sys
from deployments.cli.main import _settings_of_server
_settings_of_server(None, {})  # as the command begins
import deployments.serve_import
import deployments.cli.run_server, deployments.app  # the latter imports every deployment's module
heavy = {"torch", "transformers", "sentence_transformers", "openvino", "peft", "sklearn", "pandas"}
assert "ray.serve" in sys.modules
import pyarrow
pyarrow.array(["x"])
print(sorted(heavy & set(sys.modules)))
import importlib.util
assert importlib.util.find_spec("pandas") is not None
import pandas  # what needs it can still import it
assert pyarrow.array(pandas.Series(["x", None], dtype="category")).to_pylist() == ["x", None]
assert pyarrow.table({"a": [1]}).to_pandas().equals(pandas.DataFrame({"a": [1]}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_worker_with_the_native_engine_does_without_scipy() -> None:
    code = """
import deployments.transformers_import, gpu_worker.start, sys
from transformers.utils import is_scipy_available
print([name for name in sys.modules if name.partition(".")[0] == "scipy"], is_scipy_available())
import scipy.optimize  # what needs it can still import it
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[] False"
