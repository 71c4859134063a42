"""Read the YAML files of people: settings, keys, policies and lists of adapters."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
_MERGED = "tag:yaml.org,2002:merge"  # the tag of a `<<` key


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice, and adds the line to errors about values that PyYAML cannot build."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if isinstance(key, yaml.ScalarNode) and name in lines and key.tag != _MERGED:
                problem = f"{key.value!r} is given in line {lines[name]} already: remove one of the two"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[name] = key.start_mark.line + 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as exc:  # 2026-02-30, `!!bool x`
            problem = f"a value cannot be read ({exc}): correct it, or put it in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from exc


class _LoaderWithoutAliases(_Loader):
    """Also refuses aliases, which can make a small file large."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a YAML alias (*name) is not allowed: write the value out")
        return super().compose_node(parent, index)


def load_yaml(text: str, *, with_aliases: bool = True) -> Any:
    """Return what a YAML text says. Raises: YAMLError, whatever is wrong with the text."""
    try:
        return yaml.load(text, _Loader if with_aliases else _LoaderWithoutAliases)  # a SafeLoader
    except RecursionError as exc:
        raise yaml.YAMLError("it nests too deep") from exc


def find_empty_names(text: str) -> list[str]:
    """Return the names of a YAML mapping with nothing behind their colons, which YAML reads as null."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else ()
    return [
        name.value
        for name, value in pairs
        if isinstance(value, yaml.ScalarNode) and (value.value, value.style) == ("", None)
    ]


def require_json(value: T) -> T:
    """Return `value` if JSON can represent it. Raises: ValueError for dates, .nan and other values that it cannot."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as exc:
        raise ValueError("has text that is not Unicode, such as \\ud800: remove it") from exc
    except (TypeError, ValueError) as exc:
        raise ValueError(f"has a value that JSON does not have ({exc}): put it in quotes") from exc
    return value
