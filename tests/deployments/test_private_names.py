"""The table of private names: what the installed libraries have, what is reported, and that it is complete."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path

import pytest

from deployments.private_names import FUNCTIONS, SOURCES, Function, Source, check_libraries

ROOT = Path(__file__).parent.parent.parent
PRODUCT = ("lora_store", "retriever_svc", "gpu_worker", "deployments")
FILES = [path for package in PRODUCT for path in (ROOT / package).rglob("*.py") if path.parent.name != "vllm"]
PUBLIC = {"_exit", "_replace"}  # of `os` and of named tuples
# These are operators of torch. A build without them is noticed before they are used.
UNCHECKED = {"_is_mkldnn_bf16_supported", "_linear_pointwise", "_reorder_linear_weight"}


def test_the_installed_libraries_have_every_name() -> None:
    assert (len(FUNCTIONS), len(SOURCES)) == (18, 29)
    check_libraries()


@pytest.mark.parametrize("of_engine", [False, True])
def test_the_libraries_of_the_engine_are_checked_apart_from_the_others(of_engine: bool) -> None:
    gone: list[Function] = [("torch.cpu", "gone", ()), ("transformers", "gone", ()), ("uvicorn", "gone", ())]
    missing: list[Source] = [("torch", "lost", ()), ("deltalake", "lost", ())]
    with pytest.raises(ImportError) as refused:
        check_libraries(gone, missing, of_engine=of_engine)
    named = {
        name for name in ("torch", "transformers", "uvicorn", "deltalake") if f"has no {name}." in str(refused.value)
    }
    assert named == ({"torch", "transformers"} if of_engine else {"uvicorn", "deltalake"})


@pytest.mark.parametrize("row", FUNCTIONS, ids=lambda row: row[1])
def test_a_function_that_is_gone_is_named_with_the_remedy(row: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, parameters = row
    with pytest.raises(ImportError, match=rf"{name} of \S+ \S+ takes .*instead of {', '.join((*parameters, 'more'))}"):
        check_libraries([(module, name, (*parameters, "more"))], [])
    monkeypatch.setitem(sys.modules, module, None)  # as if the library had no such module
    with pytest.raises(ImportError, match=rf" has no {module}.{name}\. Install the versions that pyproject"):
        check_libraries([row], [])


@pytest.mark.parametrize("row", SOURCES, ids=lambda row: f"{row[0]}.{row[1]}")
def test_an_attribute_that_is_gone_is_named(row: Source) -> None:
    module, name, texts = row
    owner = importlib.import_module(module)
    assert name == "" or attrgetter(name)(owner) is not None
    for text in texts:
        with pytest.raises(ImportError, match=r"has no .*_gone"):
            check_libraries([], [(module, name, (text + "_gone",))])
    with pytest.raises(ImportError, match=rf"has no {module}.*gone"):
        check_libraries([], [(module, f"{name}.gone".lstrip("."), ())])


def test_the_application_is_refused_by_one_sentence_where_its_import_would_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`H11Protocol` is the base of a class, so the import of that class's module fails without it."""
    monkeypatch.delattr("uvicorn.protocols.http.h11_impl.H11Protocol")
    for name in [name for name in sys.modules if name.partition(".")[0] == "deployments"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"^the installed packages do not fit this server: uvicorn ") as refused:
        importlib.import_module("deployments.app")
    said = str(refused.value)
    assert "has no uvicorn.protocols.http.h11_impl.H11Protocol.connection_made" in said and "pyproject.toml" in said


def test_every_private_name_of_a_library_is_in_the_table() -> None:
    assert len(FILES) > 200
    files = [list(ast.walk(ast.parse(path.read_text()))) for path in FILES]
    own = {name for nodes in files for name in _defined(nodes)}
    table = " ".join([*(f"{module}.{name}" for module, name, _ in FUNCTIONS), *map(_text, SOURCES)])
    used = {name for nodes in files for name in _used(nodes)} - own - PUBLIC - UNCHECKED
    assert {"_attn_implementation", "_by_reference", "_node_ip_address", "ray._raylet", "_init_amx"} <= used
    assert {name for name in used if name not in table} == set()


def _text(row: Source) -> str:
    module, name, texts = row
    return " ".join([f"{module}.{name}", *texts])


def _used(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Yield the private names that are attributes or options of a call, and imports from private modules."""
    imported = []
    for node in nodes:
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg is not None and _is_private(node.arg):
            yield node.arg
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            imported += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
    for name in imported:
        package, *parts = name.split(".")
        if package not in PRODUCT and any(_is_private(part) for part in parts):
            yield name


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Yield the names of functions, classes, parameters and variables, also those of objects."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
