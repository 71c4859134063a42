"""Measure the tests: change one place of the product at a time and see whether the tests of that file's name fail.

A run copies the tracked files to a temporary folder and changes them there, never in the checkout. The sample is
seeded, and a place is known by its function and its text, so a file that moves keeps its mutations:

    python -m benchmarks.mutations --count 200
    python -m benchmarks.mutations --count 40 --part 1/3 --under gpu_worker/model

A mutation is `killed` if a test of the file fails or takes longer than the limit, and `survived` if all pass. `no test`
means that no test file has the source's name, `unusable` that these tests fail or exceed the limit without a change.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[1]
PRODUCT = ("lora_store", "retriever_svc", "gpu_worker", "deployments")
NEEDS_VLLM = "gpu_worker/vllm"
LOGGERS = ("log", "_log", "logger", "_logger", "logging", "warnings")
OPPOSITES: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Lt: (ast.GtE, ast.LtE),
    ast.LtE: (ast.Gt, ast.Lt),
    ast.Gt: (ast.LtE, ast.GtE),
    ast.GtE: (ast.Lt, ast.Gt),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
OTHER_SIGNS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
}


@dataclass(frozen=True)
class Mutation:
    """One change of one expression or statement, whose place counts characters of the file."""

    path: str
    line: int
    kind: str
    start: int
    end: int
    before: str
    after: str
    rank: str  # a hash of the seed, the function and the text: the sample is the lowest of these

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.kind}: `{_shorten(self.before)}` -> `{_shorten(self.after)}`"


def _shorten(text: str) -> str:
    return " ".join(text.split())[:70]


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield (kind, changed node, new text) for each change of this node, without those of its children."""
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            for other in OPPOSITES[type(operator)]:
                yield "comparison", node, f"({ast.unparse(ast.Compare(left, [other()], [right]))})"
        case ast.BoolOp(op=operator, values=values):
            other_op = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield "and/or", node, f"({ast.unparse(ast.BoolOp(other_op, values))})"
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OTHER_SIGNS and _is_number(node):
            yield "sign", node, f"({ast.unparse(ast.BinOp(left, OTHER_SIGNS[type(operator)](), right))})"
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield "condition", test, f"(not ({ast.unparse(test)}))"
        case ast.Constant(value=bool() as value):
            yield "flag", node, str(not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", node, repr(value + 1)
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield "return dropped", node, "return None"
        case ast.Raise() | ast.AugAssign():
            yield "statement deleted", node, "pass"
        case ast.Expr(value=ast.Call(func=called)) if ast.unparse(called).split(".")[0] not in LOGGERS:
            yield "statement deleted", node, "pass"
        case ast.Expr(value=ast.Await()):
            yield "statement deleted", node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement deleted", node, "pass"


def _is_number(node: ast.BinOp) -> bool:
    """Tell whether neither side is plainly a text or a list, for which other signs mean nothing."""
    return not any(
        isinstance(side, (ast.JoinedStr, ast.List, ast.ListComp, ast.Tuple, ast.Dict))
        or (isinstance(side, ast.Constant) and isinstance(side.value, (str, bytes)))
        for side in ast.walk(node)
    )


def find_mutations(path: str, source: str, seed: int) -> list[Mutation]:
    """Return one mutation for each statement of the file that has any."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = source.splitlines()

    def offset(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    found: list[Mutation] = []
    for function, statement in _statements(ast.parse(source), ""):
        text = ast.unparse(statement) if not _body(statement) else ast.unparse(statement).split("\n")[0]
        options = []
        for number, node in enumerate(_own_nodes(statement)):
            for kind, changed, after in changes(node):
                start = offset(changed.lineno, changed.col_offset)
                end = offset(changed.end_lineno, changed.end_col_offset)
                key = f"{seed}|{function}|{text}|{number}|{kind}|{after}"
                rank = hashlib.sha256(key.encode()).hexdigest()
                options.append(Mutation(path, changed.lineno, kind, start, end, source[start:end], after, rank))
        if options:
            found.append(min(options, key=lambda option: option.rank))
    return found


def _body(statement: ast.AST) -> list[ast.stmt]:
    fields = ("body", "orelse", "finalbody", "handlers", "cases")
    return [
        child for field in fields for child in (getattr(statement, field, None) or []) if isinstance(child, ast.AST)
    ]


def _statements(node: ast.AST, function: str) -> Iterator[tuple[str, ast.stmt]]:
    """Yield every statement with the name of the function that it is in."""
    for child in _body(node):
        inside = f"{function}.{child.name}" if isinstance(child, _NAMED) else function
        if isinstance(child, ast.stmt):
            yield inside, child
        if not isinstance(child, ast.expr):
            yield from _statements(child, inside)


_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _own_nodes(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yield the statement and its expressions, without annotations, decorators, f-strings and statements inside it."""
    stack: list[ast.AST] = [statement]
    inner = set(map(id, _body(statement)))
    while stack:
        node = stack.pop()
        yield node
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "format_spec"):
                continue
            children = value if isinstance(value, list) else [value]
            stack.extend(
                child
                for child in children
                if isinstance(child, ast.AST) and id(child) not in inner and not isinstance(child, ast.JoinedStr)
            )


def choose(root: Path, count: int, seed: int, under: str = "") -> list[Mutation]:
    """Return the sample: `count` mutations of the product's files below `under`."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    found: list[Mutation] = []
    for package in PRODUCT:
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if name.startswith(under) and (has_vllm or not name.startswith(NEEDS_VLLM)):
                found += find_mutations(name, path.read_text(encoding="utf-8"), seed)
    return sorted(found, key=lambda mutation: mutation.rank)[:count]


def find_tests(root: Path, path: str) -> tuple[str, ...]:
    """Return the test files of a source: `a/b/c.py` has `tests/a/b/test_c.py` and `tests/a/b/test_c_<aspect>.py`.

    An aspect's file belongs to the source with the longest name that fits.
    """
    source = Path(path)
    folder = root / "tests" / source.parent
    stems = {file.stem for file in (root / source.parent).glob("*.py")}

    def owner(test: Path) -> str:
        name = test.stem.removeprefix("test_")
        fitting = [stem for stem in stems if name == stem or name.startswith(f"{stem}_")]
        return max(fitting, key=len, default="")

    tests = [test for test in sorted(folder.glob("test_*.py")) if owner(test) == source.stem]
    return tuple(test.relative_to(root).as_posix() for test in tests)


def passes(root: Path, tests: Sequence[str], limit_s: float) -> bool | None:
    """Run the tests in a tree. Return None if they did not end within the limit."""
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not e2e", *tests]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(limit_s) == 0
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that the tests started
        process.wait()


def copy_tree(target: Path) -> None:
    """Copy the tracked files of the checkout as they are, without the results of measurements."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith("benchmarks/results/") and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def judge(root: Path, mutation: Mutation, limit_s: float, usable: dict[tuple[str, ...], bool]) -> str:
    """Return the outcome of one mutation in a copy of the tree, which is afterwards as it was before."""
    tests = find_tests(root, mutation.path)
    if not tests:
        return "no test"
    if tests not in usable:
        usable[tests] = passes(root, tests, limit_s) is True
    if not usable[tests]:
        return "unusable"
    file = root / mutation.path
    source = file.read_text(encoding="utf-8")
    file.write_text(source[: mutation.start] + mutation.after + source[mutation.end :], encoding="utf-8")
    try:
        return "survived" if passes(root, tests, limit_s) else "killed"
    finally:
        file.write_text(source, encoding="utf-8")


cli = typer.Typer(add_completion=False, help=__doc__)


@cli.command()
def main(
    count: Annotated[int, typer.Option(help="mutations of the sample")] = 40,
    seed: int = 1,
    under: Annotated[str, typer.Option(help="only files whose path begins with this, such as lora_store/")] = "",
    part: Annotated[str, typer.Option(help="2/3 runs the second third of the sample")] = "1/1",
    limit_s: Annotated[float, typer.Option(help="seconds for the tests of one file")] = 180.0,
    only_list: Annotated[bool, typer.Option("--list", help="print the sample and run nothing")] = False,
) -> None:
    number, num_parts = map(int, part.split("/"))
    sample = choose(ROOT, count, seed, under)
    # Neighbours in this order share the run without a change.
    mine = sorted(sample, key=lambda mutation: (mutation.path, mutation.line))[number - 1 :: num_parts]
    if only_list:
        print(*mine, sep="\n")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        usable: dict[tuple[str, ...], bool] = {}
        for mutation in mine:
            outcome = judge(Path(folder), mutation, limit_s, usable)
            outcomes[outcome] += 1
            print(f"{outcome}: {mutation}", flush=True)
    print(", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items())))


if __name__ == "__main__":
    cli()
