"""The sample of mutations and the verdict on one, in a small tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks.mutations import Mutation, choose, find_mutations, find_tests, judge

SOURCE = '''"""A module."""

LIMIT = 3


def describe(size: int) -> str:
    """Describe a size."""
    if size > LIMIT and size != 7:
        return f"large: {size + 1}"
    return "small"
'''
TEST = """from lora_store.sizes import describe

def test_sizes():
    assert describe(3) == "small" and describe(4).startswith("large")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "lora_store").mkdir()
    (tmp_path / "tests" / "lora_store").mkdir(parents=True)
    (tmp_path / "lora_store" / "sizes.py").write_text(SOURCE)
    (tmp_path / "tests" / "lora_store" / "test_sizes.py").write_text(TEST)
    return tmp_path


def test_each_statement_gets_one_change_that_still_parses() -> None:
    found = [mutation for seed in range(20) for mutation in find_mutations("sizes.py", SOURCE, seed)]
    assert {mutation.line for mutation in found} == {3, 8, 9, 10}
    for mutation in found:
        changed = SOURCE[: mutation.start] + mutation.after + SOURCE[mutation.end :]
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
    assert {mutation.kind for mutation in found} == {"constant", "condition", "comparison", "and/or", "return dropped"}


def test_a_moved_file_keeps_its_mutations() -> None:
    before = find_mutations("a.py", SOURCE, 1)
    after = find_mutations("b/c.py", f"import os\n\n{SOURCE}", 1)
    assert [mutation.rank for mutation in before] == [mutation.rank for mutation in after]


def test_an_aspect_belongs_to_the_longest_name(tree: Path) -> None:
    for name in ("sizes_of", "sizes_of_rows"):
        (tree / "lora_store" / f"{name}.py").touch()
    for name in ("test_sizes_empty.py", "test_sizes_of_rows_empty.py"):
        (tree / "tests" / "lora_store" / name).touch()
    found = find_tests(tree, "lora_store/sizes.py")
    assert found == ("tests/lora_store/test_sizes.py", "tests/lora_store/test_sizes_empty.py")
    assert find_tests(tree, "lora_store/sizes_of_rows.py") == ("tests/lora_store/test_sizes_of_rows_empty.py",)


def test_a_mutation_is_killed_survives_or_has_no_test(tree: Path) -> None:
    sample = [mutation for seed in range(20) for mutation in choose(tree, 10, seed)]
    turned = next(mutation for mutation in sample if mutation.after == "(size <= LIMIT)")
    unseen = next(mutation for mutation in sample if mutation.before == "7")
    assert [judge(tree, mutation, 60.0, {}) for mutation in (turned, unseen)] == ["killed", "survived"]
    assert (tree / "lora_store" / "sizes.py").read_text() == SOURCE, "the copy is as it was"
    nowhere = Mutation("lora_store/other.py", 1, "flag", 0, 1, "1", "0", "")
    assert judge(tree, nowhere, 60.0, {}) == "no test"
