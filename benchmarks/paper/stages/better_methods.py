"""The methods besides those of the paper, with their gains and costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.paper.common.intervals import Interval
from benchmarks.paper.common.markdown import table
from benchmarks.paper.stages import ensemble, rerank
from benchmarks.paper.stages.claim_list import of_file
from benchmarks.paper.stages.claims import Claim, Results
from benchmarks.paper.stages.claims_beyond import BEYOND

NOT_MEASURED = "not measured yet"


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


def beyond(*words: str) -> Claim:
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
        beyond("A projection").rows[0],
        beyond("A projection").difference,
        "one product of 384 × 384",
        "a refit after many publishes",
    ),
    Better(
        "hard negatives count more in training",
        "LLaVE (arXiv 2503.04812)",
        "retriever_svc/training.py",
        "top-1, hard − plain",
        beyond("hard negatives").rows[0],
        beyond("hard negatives").difference,
        "none",
        "none; a training of minutes",
    ),
    Better(
        "softmax weights",
        "this server",
        "retriever_svc/planning.py",
        "right answers iid, softmax − equal",
        beyond("Softmax").rows[0],
        beyond("Softmax").difference,
        "none",
        "none",
    ),
    Better(
        "companions limited to a third of the lead",
        "this server; section 4",
        "retriever_svc/evidence_weights.py",
        "right answers iid on `choice`, limited − softmax",
        "auto_sweep.parquet",
        of_file("auto_sweep.parquet", "evidence_0.05_iid", "softmax_0.05_iid"),
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
        "right answers iid, `auto` with − without",
        "auto.parquet",
        of_file("auto.parquet", "auto_iid", "auto_iid_always"),
        "one comparison",
        "scores of the own samples",
    ),
    Better(
        "competence by successive halving",
        "LORAUTER (arXiv 2601.21795)",
        "retriever_svc/competence.py",
        "right answers among flipped copies, measured − not",
        beyond("server's evaluation").rows[0],
        beyond("server's evaluation").difference,
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


def methods_table(results: Results) -> str:
    """Return a row per better method: its gain and its costs."""
    rows = []
    for method in BETTER:
        gain = method.gain(results).in_percent() if results.has([method.rows]) else NOT_MEASURED
        file = f"`{method.file}`"
        rows.append([method.name, method.source, file, f"{method.compared}: {gain}", method.per_request])
        rows[-1].append(method.per_publish)
    return table(["method", "source", "file", "points", "cost per request", "cost per publish"], rows)
