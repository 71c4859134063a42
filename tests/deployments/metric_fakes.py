"""Metrics that store their values, instead of Ray's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

Labels = tuple[str, ...]


@dataclass
class FakeMetric:
    """One metric's values by its labels, in the order of `keys`: a sum, the last value, or all values."""

    name: str
    kind: str
    keys: Labels
    counts: dict[Labels, float] = field(default_factory=lambda: defaultdict(float))
    last: dict[Labels, float] = field(default_factory=dict)
    seen: dict[Labels, list[float]] = field(default_factory=lambda: defaultdict(list))

    def inc(self, value: float = 1, tags: Mapping[str, str] | None = None) -> None:
        assert self.kind == "counter" and value > 0
        self.counts[self._labels(tags)] += value

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        assert self.kind == "gauge"
        self.last[self._labels(tags)] = value

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        assert self.kind == "histogram"
        self.seen[self._labels(tags)].append(value)

    def _labels(self, tags: Mapping[str, str] | None) -> Labels:
        tags = tags or {}
        assert set(tags) == set(self.keys)
        return tuple(tags[key] for key in self.keys)


class FakeMetrics:
    """Counter, Gauge and Histogram, like those of Serve's module."""

    def __init__(self) -> None:
        self.metrics: dict[str, FakeMetric] = {}

    def Counter(self, name: str, text: str, keys: Labels = ()) -> FakeMetric:
        return self._add(name, "counter", text, keys)

    def Gauge(self, name: str, text: str, keys: Labels = ()) -> FakeMetric:
        return self._add(name, "gauge", text, keys)

    def Histogram(self, name: str, text: str, bounds: tuple[float, ...], keys: Labels = ()) -> FakeMetric:
        assert list(bounds) == sorted(bounds) and bounds[0] > 0
        return self._add(name, "histogram", text, keys)

    def __getitem__(self, name: str) -> FakeMetric:
        return self.metrics[f"loraretriever_{name}"]

    def _add(self, name: str, kind: str, text: str, keys: Labels) -> FakeMetric:
        assert text and name not in self.metrics
        self.metrics[name] = FakeMetric(name, kind, keys)
        return self.metrics[name]
