"""Measures of the source files, from their syntax trees. Any checkout can be measured: nothing is imported."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("lora_store", "retriever_svc", "gpu_worker", "deployments")
SMALL_LINES = 50
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 40
RUNNING = ("e2e", "cluster")  # folders of tests of the running application
WHOLE = "whole"  # folders of tests of a package as a whole, named after a claim and not after a source file
SUITE = "conformance"  # folders with one suite for all implementations of an interface
NEEDS_VLLM = "gpu_worker/vllm"  # runs inside vLLM, which the project does not install: the suite tests it where it is


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 90th percentile and maximum."""

    median: int
    p90: int
    largest: int

    def __str__(self) -> str:
        return f"{self.median} / {self.p90} / {self.largest}"


@dataclass(frozen=True, slots=True)
class SourceMeasures:
    """The measures of one checkout, from its syntax trees."""

    folders: dict[str, int]  # of deployments: number of modules directly inside
    largest_importer: str
    largest_imports: int
    num_any: int
    num_small_files: int
    long_files: tuple[str, ...]  # of the four packages, examples, benchmarks and tests
    long_functions: tuple[str, ...]  # of the four packages
    functions: Spread
    tests_without_source: tuple[str, ...]
    sources_without_test: tuple[str, ...]
    num_sources: int


def measure(root: Path) -> SourceMeasures:
    """Measure the checkout at `root`. Raises: ValueError for a folder that is not one."""
    deployments = _modules(root, ("deployments",))
    trees = {path: ast.parse(path.read_text()) for path in _modules(root, PACKAGES)}
    if not trees:
        raise ValueError(f"{root}: no source files of this project")
    imports = {path: len(_imported_modules(root, trees[path], "deployments")) for path in deployments}
    busiest = max(imports, key=lambda path: imports[path])
    return SourceMeasures(
        folders=dict(sorted(Counter(str(path.parent.relative_to(root)) for path in deployments).items())),
        largest_importer=str(busiest.relative_to(root)),
        largest_imports=imports[busiest],
        num_any=sum(_num_any(trees[path]) for path in deployments),
        long_files=tuple(_long_files(root)),
        long_functions=tuple(_long_functions(root, trees)),
        num_small_files=sum(len(path.read_text().splitlines()) < SMALL_LINES for path in deployments),
        functions=_spread([size for tree in trees.values() for _, size in _functions(tree)]),
        tests_without_source=tuple(_tests_without_source(root)),
        sources_without_test=tuple(_sources_without_test(root)),
        num_sources=len(trees),
    )


def _modules(root: Path, packages: Sequence[str]) -> list[Path]:
    """Return every module of the packages, without `__init__.py`."""
    paths = (path for package in packages for path in (root / package).rglob("*.py"))
    return sorted(path for path in paths if path.name != "__init__.py")


def _imported_modules(root: Path, tree: ast.Module, package: str) -> set[str]:
    """Return the modules of `package` that the tree imports, `from package.room import module` among them."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    own = {name for name in names if name.split(".")[0] == package}
    return {name for name in own if (root / Path(*name.split("."))).with_suffix(".py").is_file()}


def _num_any(tree: ast.Module) -> int:
    """Count the uses of `Any`, including its imports."""
    nodes = list(ast.walk(tree))
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes) + sum(
        isinstance(node, ast.alias) and node.name == "Any" for node in nodes
    )


def _functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Yield each function with its number of lines, without its decorators."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node, node.end_lineno - node.lineno + 1


def _long_files(root: Path) -> Iterator[str]:
    for path in _modules(root, (*PACKAGES, "examples", "benchmarks", "tests", "docs")):
        if len(path.read_text().splitlines()) > MAX_FILE_LINES:
            yield str(path.relative_to(root))


def _long_functions(root: Path, trees: Mapping[Path, ast.Module]) -> Iterator[str]:
    for path, tree in trees.items():
        for node, size in _functions(tree):
            is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if size > MAX_FUNCTION_LINES and not is_kernel:  # a kernel of a GPU is one function
                yield f"{path.relative_to(root)}:{node.lineno} {node.name}"


def _spread(sizes: Sequence[int]) -> Spread:
    ordered = sorted(sizes)
    return Spread(ordered[len(ordered) // 2], ordered[len(ordered) * 9 // 10], ordered[-1])


def _name_of(test: Path) -> str:
    return test.stem.removeprefix("test_")


def _tests_beside(root: Path, source: Path) -> set[str]:
    """Return the names of the tests in the folder of `tests` that mirrors the source's, and in those above it."""
    folder, names = root / "tests" / source.parent.relative_to(root), set[str]()
    while folder != root / "tests":
        names.update(map(_name_of, folder.glob("test_*.py")))
        folder = folder.parent
    return names


def _tests_of_running(root: Path) -> set[str]:
    return {_name_of(path) for folder in RUNNING for path in (root / "tests" / folder).rglob("test_*.py")}


def _in_suites(root: Path) -> set[str]:
    """Return the modules that the suites of the packages import."""
    suites = {package: (root / "tests" / package / SUITE).glob("*.py") for package in PACKAGES}
    return {
        name
        for package, paths in suites.items()
        for path in paths
        for name in _imported_modules(root, ast.parse(path.read_text()), package)
    }


def _covers(test: str, source: str) -> bool:
    """Return whether a test of this name belongs to the source: the same name, or followed by an aspect."""
    return test == source or test.startswith(f"{source}_")


def _sources_without_test(root: Path) -> Iterator[str]:
    """Yield the modules that define a function and that no test is named after.

    Tests of the running application count with the others: some modules can do nothing without a cluster. A suite tests
    the modules that it imports.
    """
    running, suites = _tests_of_running(root), _in_suites(root)
    for path in _modules(root, PACKAGES):
        is_in_suite = ".".join(path.relative_to(root).with_suffix("").parts) in suites
        if is_in_suite or path.is_relative_to(root / NEEDS_VLLM):
            continue
        names = {path.stem, f"{path.parent.name}_{path.stem}"}
        tests = running | _tests_beside(root, path)
        if not any(_covers(test, name) for test in tests for name in names) and _has_code(path):
            yield str(path.relative_to(root))


def _has_code(path: Path) -> bool:
    nodes = ast.walk(ast.parse(path.read_text()))
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in nodes)


def _tests_without_source(root: Path) -> Iterator[str]:
    """Yield the tests that are named after no module of their package, except those in folders `WHOLE` and `SUITE`."""
    for package in PACKAGES:
        sources = {path.stem for path in _modules(root, (package,))}
        for path in sorted((root / "tests" / package).rglob("test_*.py")):
            if path.parent.name not in (WHOLE, SUITE) and not any(
                _covers(_name_of(path), source) for source in sources
            ):
                yield str(path.relative_to(root))
