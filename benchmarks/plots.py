"""Draw plots of the results. Without the optional extra `bench` nothing is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results_file import RESULTS

try:
    from matplotlib import pyplot
except ImportError:  # the optional extra `bench` is not installed
    pyplot = None


def bars(name: str, values: Mapping[str, float], label: str) -> None:
    """Draw a bar for each value, the first one on top, into `results/<name>.svg`."""
    if pyplot is None:
        _warn(name)
        return
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.35 * len(values)), layout="constrained")
    drawn = axes.barh(list(values), list(values.values()))
    axes.bar_label(drawn, fmt="{:.3g}", padding=3)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    _save(figure, name)


def lines(
    name: str, curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, *, log_x: bool = True
) -> None:
    """Draw each curve through its points (x, y) into `results/<name>.svg`; the measured x are the ticks."""
    if pyplot is None:
        _warn(name)
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, points in curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], "-o", label=label)
    if log_x:
        axes.set_xscale("log", base=2)
    ticks = sorted({x for points in curves.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    _save(figure, name)


def _warn(name: str) -> None:
    print(f"results/{name}.svg was not drawn and may be of an earlier run: pip install -e '.[bench]'")


def _save(figure: Any, name: str) -> None:
    path = RESULTS / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
