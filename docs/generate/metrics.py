"""The metrics, as the classes that report them register them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import deployments.observability
from docs.generate.markdown import code, table

_REPORTERS = {"request": "Ingress", "retriever": "Retriever", "worker": "Worker"}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its Prometheus name, kind, help text and labels."""

    name: str
    kind: str
    text: str
    labels: tuple[str, ...]


@dataclass(slots=True)
class Recorder:
    """Replaces Serve's metrics and remembers each registration."""

    found: list[Metric] = field(default_factory=list)

    def Counter(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self._add(name, "counter", text, labels)

    def Gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self._add(name, "gauge", text, labels)

    def Histogram(self, name: str, text: str, buckets: Sequence[float] = (), labels: Sequence[str] = ()) -> None:
        self._add(name, "histogram", text, labels)

    def _add(self, name: str, kind: str, text: str, labels: Sequence[str]) -> None:
        self.found.append(Metric(name, kind, text, tuple(labels)))


def metrics() -> str:
    """Return one table for each deployment that reports metrics."""
    parts = []
    for module, deployment in _REPORTERS.items():
        found = sorted(registered(f"{module}_metrics"), key=lambda metric: metric.name)
        rows = [(code("ray_" + m.name), m.kind, ", ".join(map(code, m.labels)), m.text) for m in found]
        parts.append(f"### {deployment}\n\n" + table(("metric", "kind", "labels", "meaning"), rows))
    return "\n".join(parts)


def registered(module: str) -> list[Metric]:
    """Return the metrics that the classes of one module of `deployments.observability` register."""
    found: list[Metric] = []
    for reporter, factory, others in _reporters(module):
        recorder = Recorder()
        reporter(**dict.fromkeys(others, 0), **{factory: recorder})
        found += recorder.found
    return found


def modules() -> list[str]:
    """Return the names of the modules in `deployments.observability` that register metrics."""
    names = [module.name for module in pkgutil.iter_modules(deployments.observability.__path__)]
    return [name for name in names if registered(name)]


def _reporters(module: str) -> Iterator[tuple[type, str, list[str]]]:
    """Yield (class, its parameter for the metrics, its other required parameters)."""
    loaded = importlib.import_module(f"deployments.observability.{module}")
    for _, kind in inspect.getmembers(loaded, inspect.isclass):
        if kind.__module__ != loaded.__name__:
            continue
        parameters = inspect.signature(kind).parameters.values()
        factory = next((p.name for p in parameters if "MetricFactory" in str(p.annotation)), None)
        if factory is not None:
            required = [p.name for p in parameters if p.default is p.empty and p.name != factory]
            yield kind, factory, required
