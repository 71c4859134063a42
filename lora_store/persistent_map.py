"""An immutable mapping. Changed copies share most of its memory."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from itertools import chain
from math import isqrt
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")

_GONE: Any = object()
_MIN_LAYER = 64


class PersistentMap(Mapping[K, V]):
    """A mapping that never changes and iterates in insertion order, as a dict does.

    `edit` makes a changed copy. The copy shares one large dict with the original and stores the differences in two
    small ones. When these have more than 2 · √n keys, all three are merged into a new large dict. Changing one key of a
    map of n keys therefore costs O(√n) on average.
    """

    __slots__ = ("_added", "_base", "_changed", "_len")

    def __init__(self, items: Mapping[K, V] | None = None) -> None:
        self._set({} if items is None else dict(items), {}, {})

    @classmethod
    def _of(cls, base: dict[K, V], changed: dict[K, V], added: dict[K, V]) -> PersistentMap[K, V]:
        new = cls.__new__(cls)
        new._set(base, changed, added)
        return new

    def _set(self, base: dict[K, V], changed: dict[K, V], added: dict[K, V]) -> None:
        self._base = base
        self._changed = changed  # keys of `_base` with a new value, or with _GONE if they were removed
        self._added = added  # keys inserted since; they come last
        self._len = len(base) + len(added) - sum(value is _GONE for value in changed.values())

    def __getitem__(self, key: K) -> V:
        value = self._get(key)
        if value is _GONE:
            raise KeyError(key)
        found: V = value
        return found

    def get(self, key: K, default: Any = None) -> Any:
        """Return the value of `key`, or `default`."""
        value = self._get(key)
        return default if value is _GONE else value

    def __contains__(self, key: object) -> bool:
        return self._get(key) is not _GONE

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[K]:
        if not self._changed:
            return chain(self._base, self._added)
        changed = self._changed
        return chain((key for key in self._base if changed.get(key) is not _GONE), self._added)

    def __repr__(self) -> str:
        return f"PersistentMap({dict(self)!r})"

    def __reduce__(self) -> tuple[type[PersistentMap[K, V]], tuple[dict[K, V]]]:
        return type(self), (dict(self.items()),)

    def items(self) -> ItemsView[K, V]:
        """Return a view of the (key, value) pairs in order."""
        return _Items(self)

    def values(self) -> ValuesView[V]:
        """Return a view of the values in order."""
        return _Values(self)

    def edit(self) -> MapEditor[K, V]:
        """Return an editor for a changed copy of this map."""
        return MapEditor(self._base, dict(self._changed), dict(self._added))

    def changed_since(self, older: PersistentMap[K, V]) -> list[K] | None:
        """Return a superset of the keys whose value differs from `older`, or None if that takes a full comparison."""
        if self._base is not older._base:
            return None
        return list(dict.fromkeys(chain(older._changed, older._added, self._changed, self._added)))

    def _get(self, key: Any) -> Any:
        if key in self._added:
            return self._added[key]
        if key in self._changed:
            return self._changed[key]
        return self._base.get(key, _GONE)

    def _iter_items(self) -> Iterator[tuple[K, V]]:
        if not self._changed:
            return chain(self._base.items(), self._added.items())
        changed = self._changed.get
        present = ((k, now) for k, v in self._base.items() if (now := changed(k, v)) is not _GONE)
        return chain(present, self._added.items())

    def _iter_values(self) -> Iterator[V]:
        if not self._changed:
            return chain(self._base.values(), self._added.values())
        newest = map(self._changed.get, self._base, self._base.values())
        return chain((value for value in newest if value is not _GONE), self._added.values())


class _Items(ItemsView[K, V]):
    def __init__(self, items: PersistentMap[K, V]) -> None:
        super().__init__(items)
        self._items = items

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return self._items._iter_items()


class _Values(ValuesView[V]):
    def __init__(self, items: PersistentMap[Any, V]) -> None:
        super().__init__(items)
        self._items = items

    def __iter__(self) -> Iterator[V]:
        return self._items._iter_values()


class MapEditor(Mapping[K, V]):
    """Builds a changed copy of a PersistentMap. Do not use it after `freeze`."""

    __slots__ = ("_added", "_base", "_changed")

    def __init__(self, base: dict[K, V], changed: dict[K, V], added: dict[K, V]) -> None:
        self._base, self._changed, self._added = base, changed, added

    def __getitem__(self, key: K) -> V:
        value = self.get(key, _GONE)
        if value is _GONE:
            raise KeyError(key)
        found: V = value
        return found

    def get(self, key: K, default: Any = None) -> Any:
        """Return the value of `key`, or `default`."""
        if key in self._added:
            return self._added[key]
        value = self._changed[key] if key in self._changed else self._base.get(key, _GONE)
        return default if value is _GONE else value

    def __contains__(self, key: object) -> bool:
        return self.get(key, _GONE) is not _GONE  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[K]:
        return iter(PersistentMap._of(self._base, self._changed, self._added))

    def __len__(self) -> int:
        return len(PersistentMap._of(self._base, self._changed, self._added))

    def __setitem__(self, key: K, value: V) -> None:
        is_in_place = key not in self._added and key in self._base and self._changed.get(key) is not _GONE
        (self._changed if is_in_place else self._added)[key] = value

    def pop(self, key: K, default: Any = None) -> Any:
        """Remove `key` and return its value, or return `default` if it is absent."""
        if key in self._added:
            return self._added.pop(key)
        value = self.get(key, _GONE)
        if value is _GONE:
            return default
        self._changed[key] = _GONE
        return value

    def freeze(self) -> PersistentMap[K, V]:
        """Return the map with all changes so far."""
        num_differing = len(self._changed) + len(self._added)
        if num_differing <= max(_MIN_LAYER, 2 * isqrt(len(self._base))):
            return PersistentMap._of(self._base, self._changed, self._added)
        if not self._base:
            return PersistentMap._of(self._added, {}, {})
        merged = dict(self._base)
        for key, value in self._changed.items():
            if value is _GONE:
                del merged[key]
            else:
                merged[key] = value
        merged.update(self._added)
        return PersistentMap._of(merged, {}, {})
