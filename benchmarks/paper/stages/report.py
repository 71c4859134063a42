"""Write REPORT.md: `reading.md` with its placeholders filled from the rows. The stages' sections are its appendices."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template

import pandas as pd
import typer

from benchmarks.paper.common.intervals import Interval
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.workspace import PAPER_RESULTS
from benchmarks.paper.stages import (
    companions,
    competence,
    ensemble,
    errors,
    flan_pool,
    gate,
    mixed_kinds,
    natural,
    recipes,
    rerank,
    rerank_flan,
    second_base,
    sizes,
    stream,
)
from benchmarks.paper.stages.answer_tables import ROUTED, Answers
from benchmarks.paper.stages.claim_list import PAPERS, of_file
from benchmarks.paper.stages.claims import Claim, Results, claims_table
from benchmarks.paper.stages.claims_beyond import BEYOND

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
_LATER = (
    "auto",
    "companions",
    "competence",
    "ensemble",
    "flan_pool",
    "gate",
    "layer_routers",
    "mixed_kinds",
    "natural",
    "recipes",
    "rerank",
    "rerank_flan",
    "second_base",
    "sizes",
    "stream",
)
_SENTIMENT = "senti_"
_NOT_MEASURED = "not measured yet"
_LINKS_PER_LINE = 3


@dataclass(frozen=True, slots=True)
class Better:
    """A method besides the paper's. `file`: its only file. `rows`: the file that `gain` reads."""

    name: str
    source: str
    file: str
    compared: str
    rows: str
    gain: Callable[[Results], Interval]
    per_request: str
    per_publish: str


def _beyond(*words: str) -> Claim:
    """Return the only claim beyond the paper that has these words."""
    [found] = [claim for claim in BEYOND if all(word in claim.text for word in words)]
    return found


def _reranked(run: str) -> tuple[str, Callable[[Results], Interval]]:
    return rerank.ROWS, of_file(rerank.ROWS, f"{run}_iid", "first_iid")


BETTER = (
    Better(
        "projection (whitening)",
        "within-class covariance, as in linear discriminant analysis",
        "retriever_svc/whitening.py",
        "top-1, refit − none",
        _beyond("A projection").rows[0],
        _beyond("A projection").difference,
        "one product of 384 × 384",
        "a refit after many publishes",
    ),
    Better(
        "hard negatives count more in training",
        "LLaVE (arXiv 2503.04812)",
        "retriever_svc/training.py",
        "top-1, hard − plain",
        _beyond("hard negatives").rows[0],
        _beyond("hard negatives").difference,
        "none",
        "none; a training of minutes",
    ),
    Better(
        "softmax weights",
        "this server",
        "retriever_svc/planning.py",
        "right answers iid, softmax − equal",
        _beyond("Softmax").rows[0],
        _beyond("Softmax").difference,
        "none",
        "none",
    ),
    Better(
        "companions limited to a third of the lead",
        "this server; section 4",
        "retriever_svc/evidence_weights.py",
        "right answers iid, `auto` − equal",
        _beyond("`auto` is better").rows[0],
        _beyond("`auto` is better").difference,
        "none",
        "outputs of the samples, embedded",
    ),
    Better(
        "averaged log probabilities of the three",
        "ensembles of language models",
        "benchmarks/paper/stages/ensemble.py",
        "right answers iid, averaged − equal",
        ensemble.ROWS,
        of_file(ensemble.ROWS, "ensemble_iid", "mixture_iid"),
        "three times the work",
        "none",
    ),
    Better(
        "abstention by a confidence for each adapter",
        "calibrated fit",
        "retriever_svc/calibration.py",
        "right answers ood, `auto` − selection",
        _beyond("The server's default", "out of").rows[0],
        _beyond("The server's default", "out of").difference,
        "one comparison",
        "scores of the own samples",
    ),
    Better(
        "competence by successive halving",
        "LORAUTER (arXiv 2601.21795)",
        "retriever_svc/competence.py",
        "right answers among flipped copies, measured − not",
        _beyond("Evaluation").rows[0],
        _beyond("Evaluation").difference,
        "none",
        "some answers to samples of near adapters",
    ),
    Better(
        "the model's log probability of the answer",
        "reranking",
        "benchmarks/paper/answering/likelihood.py",
        "right answers iid, reranked − first",
        *_reranked("likelihood"),
        "three answers in place of one",
        "none",
    ),
    Better(
        "the same, calibrated for each adapter",
        "reranking",
        "benchmarks/paper/answering/likelihood.py",
        "right answers iid, reranked − first",
        *_reranked("likelihood_calibrated"),
        "three answers in place of one",
        "answers to a few prompts of others",
    ),
    Better(
        "Arrow, then SpectR (LAG)",
        "arXiv 2405.11157, 2504.03454",
        "benchmarks/paper/answering/spectral.py",
        "right answers iid, reranked − first",
        *_reranked("spectr_calibrated"),
        "one more pass over the prompt",
        "a QR and an SVD of rank 6 for each layer",
    ),
    Better(
        "norm at the last token (LoGo)",
        "arXiv 2511.07129",
        "benchmarks/paper/answering/spectral.py",
        "right answers iid, reranked − first",
        *_reranked("norm_calibrated"),
        "one more pass over the prompt",
        "as above",
    ),
)


def report_of(folder: Path, reading: str) -> str:
    """Return the reading with every placeholder filled. Rows that do not exist are named as not measured yet."""
    results = Results(folder)
    filled = Template(reading).substitute(values_of(folder, results))
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
        "flan_summary": flan_pool.summary(folder),
        "ensemble": ensemble.sentence(folder),
        "copies": competence.sentence(folder),
        "quarter": _points(_beyond("A quarter", "exchanged"), results),
        "second_base": second_base.sentence(folder),
        "mixed_kinds": mixed_kinds.sentence(folder),
        "gate": gate.sentence(folder),
        "recipes": recipes.sentence(folder),
        "rerank": rerank.sentence(folder),
        "both_pools": rerank_flan.both_pools(folder),
        "sizes": sizes.sentence(folder),
        "stream": stream.sentence(folder),
        "lorahub": _of_lorahub(results),
        "later": later_stages(folder),
        "missing": f"Stages without results: {', '.join(missing)}." if missing else "Every stage has results.",
        "appendices": appendices_of(folder),
    }


def _points(claim: Claim, results: Results) -> str:
    return claim.difference(results).in_percent() if results.has(claim.rows) else _NOT_MEASURED


def _ablation(results: Results, run: str) -> str:
    if not results.has(["ablations.parquet"]):
        return _NOT_MEASURED
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


def methods_table(results: Results) -> str:
    """Return a row per better method: its gain and its costs."""
    rows = []
    for method in BETTER:
        gain = method.gain(results).in_percent() if results.has([method.rows]) else _NOT_MEASURED
        file = f"`{method.file}`"
        rows.append([method.name, method.source, file, f"{method.compared}: {gain}", method.per_request])
        rows[-1].append(method.per_publish)
    return table(["method", "source", "file", "points", "cost per request", "cost per publish"], rows)


def later_stages(folder: Path) -> str:
    """Return the stages that used adapters which were trained again, with tasks × questions of each.

    The gate belongs to them once its rows have the weight of own adapters.
    """
    found = {stage: folder / f"{stage}.parquet" for stage in _LATER}
    rows = {stage: pd.read_parquet(path) for stage, path in found.items() if path.exists()}
    if "gate" in rows and gate.own_weight(rows["gate"]) is None:
        del rows["gate"]
    words = [
        f"`{stage}`" + (f" ({own['task'].nunique()} × {own['number'].nunique()})" if "number" in own else "")
        for stage, own in rows.items()
    ]
    return ", ".join(words) or "none"


def appendices_of(folder: Path) -> str:
    """Return links to the sections that exist, by their titles, a few on each line."""
    links = []
    for path in (folder / name for name in SECTIONS):
        if path.exists():
            title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            links.append(f"[{title}]({os.path.relpath(path, REPORT.parent)})")
    return " ·\n".join(" · ".join(links[at : at + _LINKS_PER_LINE]) for at in range(0, len(links), _LINKS_PER_LINE))


def main() -> None:
    """Write the report."""
    REPORT.write_text(report_of(PAPER_RESULTS, READING.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
