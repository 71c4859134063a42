from __future__ import annotations

import sys

import pytest
import yaml

from deployments.yaml_files import load_yaml


def test_yaml_is_read_with_its_dates() -> None:
    text = "a: [1, {b: 2026-02-28}]\nc: null\n"
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "value",
    ["2026-02-30", "!!int x", "!!bool x", "!!timestamp x", "9" * 5000, "1" + 200 * ":59" + ".5", "[1, {b: 0x_}]"],
)
def test_a_value_that_cannot_be_built_is_an_error_with_its_line(value: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError, match=r"a value cannot be read .*put it in quotes") as caught:
        load_yaml(f"first: 1\nsecond: {value}\n")
    assert caught.value.problem_mark is not None and caught.value.problem_mark.line == 1


def test_mappings_that_are_merged_may_share_names() -> None:
    text = "x: {y: &a {b: 1, c: 2}}\nd: &e {<<: *a, b: 3}\nf: {<<: [*a, *e], c: 4}\n1: a\n'1': b\n"
    assert load_yaml(text) == yaml.safe_load(text)


def test_deep_nesting_is_an_error_of_the_text() -> None:
    with pytest.raises(yaml.YAMLError, match="it nests too deep"):
        load_yaml("[" * sys.getrecursionlimit())
