"""Write the retrieval part of the report, its plots and its headline numbers from the committed rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks import plots
from benchmarks.paper.common.markdown import plot
from benchmarks.paper.retrieval import projected, tables
from benchmarks.paper.retrieval.ranking import COSINE, PRODUCT, SCORES
from benchmarks.paper.retrieval.rankings import Rankings
from benchmarks.paper.retrieval.study import MAIN_SHARE, UNTRAINED, main_draws
from benchmarks.results_file import change_suffix, write_part

_MAIN = f"{100 * MAIN_SHARE:.0f} %"


def write_tables(folder: Path) -> None:
    """Write the section, plots and numbers from the rows in `folder`. Raises: TreeChanged, before any plot."""
    rankings = Rankings(folder)
    section = section_of(folder, rankings)
    figures = figures_of(rankings)
    if (rows := folder / f"retrieval_{projected.KIND}.parquet").exists():
        figures |= projected_figures(pd.read_parquet(rows), rankings)
    (folder / f"retrieval{change_suffix()}.md").write_text(section, encoding="utf-8")
    write_part("paper", "retrieval", figures=figures, table=section, runs=[])
    _plot(folder, rankings)


def figures_of(rankings: Rankings) -> dict[str, float]:
    """Return shares of 1, by cosine, each with the bounds of its interval."""
    trained = rankings.groups()[_MAIN]
    found = {
        "retrieval_top1_untrained": rankings.top([UNTRAINED], COSINE, 1),
        "retrieval_top1_40": rankings.top(trained, COSINE, 1),
        "retrieval_top3_40": rankings.top(trained, COSINE, 3),
        "unseen_top1_gain_40": rankings.gain(trained, COSINE, 1),
    }
    figures: dict[str, float] = {}
    for name, interval in found.items():
        assert interval is not None, name
        figures |= {name: interval.mean, f"{name}_lo": interval.low, f"{name}_hi": interval.high}
    return {name: round(value, 4) for name, value in figures.items()}


def projected_figures(rows: pd.DataFrame, rankings: Rankings) -> dict[str, float]:
    """Return the same of the projections, of the test part: with the packaged one untrained, refitted when trained."""
    found = projected.Projections(rows, "test")
    trained = [name for name in found.encoders if name != UNTRAINED]
    seen = {draw.name: set(draw.tasks) for draw in main_draws(rankings.tasks)}
    gain = projected.unseen_gains(rows, seen)["refit", "none"]
    intervals = {
        "projected_top1_packaged": found.top([UNTRAINED], "packaged"),
        "projected_top1_refit": found.top([UNTRAINED], "refit"),
        "projected_top1_40_refit": found.top(trained, "refit"),
        "projected_unseen_top1_gain_40": gain,
        "projected_top1_all_tasks_packaged": found.top([UNTRAINED], "packaged", 1, "wide"),
        "projected_top1_all_tasks_refit": found.top([UNTRAINED], "refit", 1, "wide"),
    }
    figures = {
        f"projected_{kind}_{name}_{projection}": measure([UNTRAINED], projection, kind)
        for projection in ("packaged", "refit")
        for kind in ("foreign", "everyday")
        for name, measure in (("auroc", found.auroc), ("turned_away", found.turned_away))
    }
    for name, (mean, low, high) in intervals.items():
        figures |= {name: mean, f"{name}_lo": low, f"{name}_hi": high}
    return {name: round(value, 4) for name, value in figures.items()}


def section_of(folder: Path, rankings: Rankings) -> str:
    """Return Markdown below a heading of the second level: the measured tables."""
    related = tables.correlations(rankings)
    words = [f"{name} {value:+.2f}" for name, value in related.items()]
    parts = [
        "## Retrieval\n",
        "[What the tables show, and measurements that are finished](retrieval_read.md).\n",
        plot("retrieval_shares", "own adapter found, by the share of tasks trained on"),
        "### Accuracy by cosine, percent\n",
        tables.accuracy(rankings, COSINE),
        "### Accuracy by the un-normalised inner product, percent\n",
        tables.accuracy(rankings, PRODUCT),
        "### Points over the untrained encoder on unseen tasks\n",
        tables.gains(rankings),
        "### Where it generalises\n",
        tables.boundary(rankings),
        f"Spearman's correlation of {'; '.join(words)}.\n",
        tables.draws(rankings),
    ]
    missing = rankings.missing()
    if (folder / f"retrieval_{projected.KIND}.parquet").exists():
        parts += ["### A projection, and thresholds for each adapter\n", projected.section(folder)]
    else:
        missing.append(projected.KIND)
    return "\n".join([*parts, *([f"Not measured yet: {', '.join(missing)}.\n"] if missing else [])])


def _plot(folder: Path, rankings: Rankings) -> None:
    drawn = [(label, names) for label, names in rankings.groups().items() if "clusters" not in label]
    shares = {label: 0.0 if label == UNTRAINED else float(label.removesuffix(" %")) for label, _ in drawn}
    curves = {
        f"top-{depth}, {score}": [
            (shares[label], 100 * rankings.hits(names, score, depth).mean()) for label, names in drawn
        ]
        for score in SCORES
        for depth in (1, 3)
    }
    plots.lines("paper/retrieval_shares", curves, "tasks trained on, %", "own adapter found, %", log_x=False)
