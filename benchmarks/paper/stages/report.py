"""Write REPORT.md: `reading.md` with its placeholders filled from the rows. The stages' sections are its appendices."""

from __future__ import annotations

import os
import re
from pathlib import Path
from string import Template

import typer

from benchmarks.paper.common.intervals import Interval
from benchmarks.paper.common.markdown import percent
from benchmarks.paper.common.workspace import PAPER_RESULTS
from benchmarks.paper.stages import (
    companions,
    competence,
    ensemble,
    errors,
    flan_bbq,
    flan_pool,
    gate,
    mixed_kinds,
    natural,
    recipes,
    rerank,
    rerank_flan,
    second_base,
    shares,
    sizes,
    stream,
)
from benchmarks.paper.stages.answer_tables import ROUTED, Answers
from benchmarks.paper.stages.better_methods import NOT_MEASURED, beyond, methods_table
from benchmarks.paper.stages.claim_list import PAPERS
from benchmarks.paper.stages.claims import Claim, Results, claims_table, judged_claims
from benchmarks.paper.stages.claims_beyond import BEYOND
from benchmarks.results_file import write_part

_PAPER = Path(__file__).parents[1]
REPORT = _PAPER / "REPORT.md"
READING = _PAPER / "reading.md"
SECTIONS = (
    "pool.md",
    "retrieval.md",
    "answers.md",
    "ablations.md",
    "shares.md",
    "errors.md",
    "companions.md",
    "speed.md",
    "auto.md",
    "rerank.md",
    "rerank_flan.md",
    "conflicts.md",
    "natural.md",
    "competence.md",
    "flan_pool.md",
    "flan_bbq.md",
    "recipes.md",
    "gate.md",
    "layer_routers.md",
    "ensemble.md",
    "kinds.md",
    "mixed_kinds.md",
    "second_base.md",
    "mixed_pool.md",
    "arrivals.md",
    "sizes.md",
    "stream.md",
    "served_study.md",
    "served_starter.md",
)
_SENTIMENT = "senti_"
_LINKS_PER_LINE = 3


_REPEATED = (
    ("auto.parquet", "uniform_iid_always", "selection_iid_always", "`auto`"),
    (sizes.ROWS, "46_mixture_iid", "46_selection_iid", "`sizes`"),
    (ensemble.ROWS, "mixture_iid", "selection_iid", "`ensemble`"),
    (rerank.ROWS, "mixture_iid", "first_iid", "`rerank`"),
    (recipes.ROWS, "seed1_mixture_iid", "seed1_selection_iid", "`recipes`, another seed"),
    (second_base.ROWS, "mixture_second", "selection_second", "`second_base`"),
)
"""File, mixture, selection, stage: other measurements of the main relation."""


def report_of(folder: Path, reading: str) -> str:
    """Return the reading with every placeholder filled. Rows that do not exist are named as not measured yet."""
    results = Results(folder)
    filled = re.sub("\n{3,}", "\n\n", Template(reading).substitute(values_of(folder, results)))
    return filled.replace(CONTENTS, contents_of(filled))


CONTENTS = "<!-- contents -->"


def contents_of(text: str) -> str:
    """Return a list of links to the headings of the second level, but for its own."""
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    return "\n".join(f"- [{heading}](#{_anchor(heading)})" for heading in headings if heading != "Contents")


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")


def values_of(folder: Path, results: Results) -> dict[str, str]:
    """Return the text of every placeholder."""
    missing = [name.removesuffix(".md") for name in SECTIONS if not (folder / name).exists()]
    scores = {run: percent(results.main.interval(run).mean) for run in results.main.runs}
    return {
        **scores,
        **_of_experts(results),
        "contents": CONTENTS,
        "claims": claims_table(PAPERS, results),
        "beyond": claims_table(BEYOND, results),
        "methods": methods_table(results),
        "few": _of_little_gain(results.main),
        "zeros": str(_num_zeros(results.main)),
        "sentiment": _on_sentiment(results.main).in_percent(),
        "mixture_k5": _ablation(results, "mixture_k5_iid"),
        "mixture_k15": _ablation(results, "mixture_k15_iid"),
        "errors": errors.sentence(folder),
        "company": errors.company_sentence(folder),
        "dots": errors.dots_sentence(folder),
        "companions": companions.sentence(folder),
        "natural": natural.sentence(folder),
        "flan": flan_pool.sentence(folder),
        "flan_bbq": flan_bbq.sentence(folder),
        "flan_summary": flan_pool.summary(folder),
        "ensemble": ensemble.sentence(folder),
        "copies": competence.sentence(folder),
        "quarter": _points(beyond("A quarter", "exchanged"), results),
        "second_base": second_base.sentence(folder),
        "mixed_kinds": mixed_kinds.sentence(folder),
        "gate": gate.sentence(folder),
        "recipes": recipes.sentence(folder),
        "repeated": repeated(results),
        "rerank": rerank.sentence(folder),
        "both_pools": rerank_flan.both_pools(folder),
        "shares": shares.sentence(folder),
        "sizes": sizes.sentence(folder),
        "stream": stream.sentence(folder),
        "lorahub": _of_lorahub(results),
        "missing": f"Stages without results: {', '.join(missing)}." if missing else "Every stage has results.",
        "appendices": appendices_of(folder),
    }


def _points(claim: Claim, results: Results) -> str:
    return claim.difference(results).in_percent() if results.has(claim.rows) else NOT_MEASURED


def _ablation(results: Results, run: str) -> str:
    if not results.has(["ablations.parquet"]):
        return NOT_MEASURED
    return percent(results.answers("ablations.parquet").interval(run).mean)


def _of_experts(results: Results) -> dict[str, str]:
    """Return the scores on the tasks with an expert of their own."""
    tasks = [task for task in results.main.scores("perfect").index if task in results.experts]
    means = {
        run: float(results.main.scores(run).loc[tasks].to_numpy().mean())
        for run in (*ROUTED, "selection_iid", "mixture_iid")
    }
    best = max(ROUTED, key=means.__getitem__)
    return {
        "best_router": best.replace("_", " "),
        "router_expert": percent(means[best]),
        "selection_expert": percent(means["selection_iid"]),
        "mixture_expert": percent(means["mixture_iid"]),
    }


def _on_sentiment(answers: Answers) -> Interval:
    return answers.difference_on("mixture_iid", "selection_iid", lambda task: task.startswith(_SENTIMENT))


def _of_little_gain(answers: Answers) -> str:
    """Return the tasks whose own adapter is not ahead of guessing with its whole interval."""
    tasks = answers.scores("perfect").index
    few = [f"`{task}`" for task in tasks if answers.of_task(task, "perfect", "majority").low <= 0]
    return f"{len(few)} of the {len(tasks)} adapters ({', '.join(few)})"


def _num_zeros(answers: Answers) -> int:
    """Return the number of tasks on which no retrieved composition is ever right out of distribution."""
    means = [answers.scores(f"{way}_ood").mean(axis=1) for way in ("selection", "mixture", "fusion")]
    return int((sum(means) == 0).sum())


def _of_lorahub(results: Results) -> str:
    found, runs = results.main, results.main.runs
    words = f"It has {found.interval('lorahub').in_percent()} %." if "lorahub" in runs else "That was not measured yet."
    if "lorahub_uniform_start" not in runs:
        return words
    score = percent(found.interval("lorahub_uniform_start").mean)
    return f"{words} An earlier search, from equal weights with 20 attempts on 192 samples, has {score} %."


def repeated(results: Results) -> str:
    """Return the mixture's loss against selection in every stage that measured it, each with answers of its own."""
    found = [
        f"{words} {results.answers(file).difference(mixture, selection).in_percent()}"
        for file, mixture, selection, words in _REPEATED
        if results.has([file]) and mixture in results.answers(file).runs
    ]
    return "; ".join(found) or NOT_MEASURED


def appendices_of(folder: Path) -> str:
    """Return links to the sections that exist, by their titles, a few on each line."""
    links = []
    for path in (folder / name for name in SECTIONS):
        if path.exists():
            title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            links.append(f"[{title}]({os.path.relpath(path, REPORT.parent)})")
    return " ·\n".join(" · ".join(links[at : at + _LINKS_PER_LINE]) for at in range(0, len(links), _LINKS_PER_LINE))


def main() -> None:
    """Write the report, and every claim's numbers to the results."""
    REPORT.write_text(report_of(PAPER_RESULTS, READING.read_text(encoding="utf-8")), encoding="utf-8")
    judged = judged_claims((*PAPERS, *BEYOND), Results(PAPER_RESULTS))
    write_part("paper", "claims", figures={}, table=f"{len(judged)} claims were judged.", runs=judged)


if __name__ == "__main__":
    typer.run(main)
