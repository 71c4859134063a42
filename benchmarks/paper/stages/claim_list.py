"""The paper's claims: which difference shows each, and why it came out as it did."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.markdown import percent
from benchmarks.paper.retrieval.ranking import COSINE
from benchmarks.paper.stages import gate, layer_routers
from benchmarks.paper.stages.answer_tables import BASELINES, ROUTED, ROWS
from benchmarks.paper.stages.claims import Claim, Pair, Results

_TRAINED = "40 %"
_NAMES = {
    "moe_top1": "MoE with the best expert",
    "moe_top3": "MoE with the best three",
    "moe_soft": "MoE with all experts weighed",
    "smear": "SMEAR",
}
_LAYERS = "is better than experts with a router in every layer, as in the papers, where the task's adapter is one that"
_MAIN = (ROWS, BASELINES)


def of_main(one: str, other: str) -> Pair:
    return Pair(_MAIN, one, other)


def of_file(name: str, one: str, other: str) -> Pair:
    return Pair((name,), one, other)


def _kept_by_selection(results: Results) -> Interval:
    scores = results.main.scores("selection_iid") - 0.9 * results.main.scores("perfect")
    return bootstrap(scores.to_numpy()[np.newaxis], resamples_tasks=True)


def _against_layer_routers(run: str, *, with_expert: bool) -> Callable[[Results], Interval]:
    return lambda results: results.of_tasks(run, ROUTED, (layer_routers.ROWS,), with_expert=with_expert)


def _of_layer_routers(results: Results) -> str:
    answers = results.answers(layer_routers.ROWS)
    tasks = [task for task in answers.scores("selection_iid").index if task in results.experts]
    means = {run: float(answers.scores(run).loc[tasks].to_numpy().mean()) for run in ROUTED}
    best = max(means, key=means.__getitem__)
    return f"{len(tasks)} tasks. Against the best of four routers, {_NAMES[best]} with {percent(means[best])} %."


def _of_the_gate(results: Results) -> str:
    weight = gate.own_weight(results.table(gate.ROWS))
    if weight is None:
        return "150 steps on 720 questions; whether it converged was not measured."
    return f"Trained until its loss stopped falling. It gives {weight.in_percent()} % of the weight to own adapters."


def _by_training(results: Results) -> Interval:
    found = results.rankings.gain(results.rankings.groups()[_TRAINED], COSINE, 1)
    assert found is not None
    return found


PAPERS = (
    Claim(
        "Selection by retrieval keeps at least nine tenths of the own adapter's score (selection − 0.9 × own).",
        "54.1 of 58.1; 61.8 of 66.1",
        "main_table",
        _MAIN,
        "above",
        _kept_by_selection,
        "The lost answers are in clusters with several tasks of similar inputs.",
    ),
    Claim(
        "In distribution the mixture is as good as selection.",
        "52.4 and 54.1; 61.5 and 61.8",
        "main_table",
        _MAIN,
        "equal",
        of_main("mixture_iid", "selection_iid"),
        "Two companions with another function have two thirds of the weight (section 4).",
    ),
    Claim(
        "Out of distribution the mixture is better than selection.",
        "47.3 and 44.4; 54.8 and 49.2",
        "main_table",
        _MAIN,
        "above",
        of_main("mixture_ood", "selection_ood"),
        "The lead comes from the three ambiguous bbq tasks; on the other 43 tasks there is none.",
    ),
    Claim(
        "In distribution the mixture is better than fusion.",
        "52.4 and 44.0; 61.5 and 53.9",
        "main_table",
        _MAIN,
        "above",
        of_main("mixture_iid", "fusion_iid"),
        "Both lose most of the own adapter's answers, so little is left to differ.",
    ),
    Claim(
        "Out of distribution the mixture is better than fusion.",
        "47.3 and 41.7; 54.8 and 50.0",
        "main_table",
        _MAIN,
        "above",
        of_main("mixture_ood", "fusion_ood"),
        "As for selection: the bbq tasks.",
    ),
    Claim(
        "Selection is better than the trained mixtures of experts, where they have the task's adapter.",
        "54.1 and 42.9; 61.8 and 52.2, of all tasks",
        "baselines",
        _MAIN,
        "above",
        lambda results: results.of_tasks("selection_iid", ROUTED, with_expert=True),
        "11 tasks. The router chooses among 11 adapters, retrieval among 46.",
    ),
    Claim(
        "The mixture is better than the trained mixtures of experts, where they have the task's adapter.",
        "52.4 and 42.9; 61.5 and 52.2, of all tasks",
        "baselines",
        _MAIN,
        "above",
        lambda results: results.of_tasks("mixture_iid", ROUTED, with_expert=True),
        "11 tasks. A router that is sure of the own adapter gives it nearly all of the weight.",
    ),
    Claim(
        "The mixture is better than the trained mixtures of experts on tasks without an adapter in either.",
        "47.3 and 42.9; 54.8 and 52.2, of all tasks",
        "baselines",
        _MAIN,
        "above",
        lambda results: results.of_tasks("mixture_ood", ROUTED, with_expert=False),
        "35 tasks. One router that reads the prompt once.",
    ),
    *[
        Claim(
            f"{text}.",
            "as above",
            "layer_routers",
            (layer_routers.ROWS,),
            "above",
            _against_layer_routers(run, with_expert=with_expert),
            why,
        )
        for text, run, with_expert, why in (
            (f"Selection {_LAYERS} they have", "selection_iid", True, _of_layer_routers),
            (
                f"The mixture {_LAYERS} they have",
                "mixture_iid",
                True,
                "The other three kinds have lower scores than the mixture, one with its whole interval.",
            ),
            (f"The mixture {_LAYERS} neither has", "mixture_ood", False, "35 tasks."),
        )
    ],
    Claim(
        "Out of distribution the mixture is better than AdapterSoup.",
        "47.3 and 30.8; 54.8 and 33.0",
        "main_table",
        _MAIN,
        "above",
        of_main("mixture_ood", "adaptersoup"),
        "One set of three adapters serves the whole stream; it fits one cluster.",
    ),
    Claim(
        "Out of distribution the mixture is better than LoRAHub.",
        "47.3 and 10.9; 54.8 and 16.8",
        "baselines",
        _MAIN,
        "above",
        of_main("mixture_ood", "lorahub"),
        "One set of weights for twenty adapters and all prompts, searched from zeros with 40 attempts.",
    ),
    Claim(
        "Three adapters in a mixture are at least as good as one, in distribution.",
        "63.2 and 61.3 (RAMoLE, plot 7a)",
        "ablations",
        ("ablations.parquet",),
        "at least",
        of_file("ablations.parquet", "mixture_k3_iid", "mixture_k1_iid"),
        "As for the mixture against selection.",
    ),
    Claim(
        "Three adapters in a mixture are better than one, out of distribution.",
        "57.7 and 52.0 (RAMoLE, plot 7a)",
        "ablations",
        ("ablations.parquet",),
        "above",
        of_file("ablations.parquet", "mixture_k3_ood", "mixture_k1_ood"),
        "The bbq tasks again.",
    ),
    Claim(
        "With fifteen adapters fusion is worse than the mixture, in distribution.",
        "17.5 and 52.6 (RAMoLE, plot 7a)",
        "ablations",
        ("ablations.parquet",),
        "above",
        of_file("ablations.parquet", "mixture_k15_iid", "fusion_k15_iid"),
        "The mixture falls as far as fusion does.",
    ),
    Claim(
        "An encoder trained on 40 % of the tasks finds adapters of unseen tasks better (top-1).",
        "63.2 and 60.8, of all tasks",
        "retrieval",
        ("retrieval_ranks.parquet", "retrieval_draws.parquet"),
        "above",
        _by_training,
        "A closed form without training gains about as much: see the projection below.",
    ),
    Claim(
        "The trained encoder gives better answers: selection, in distribution.",
        "62.4 and 58.0",
        "shares",
        ("shares.parquet",),
        "above",
        of_file("shares.parquet", "40% selection_iid", "nothing selection_iid"),
        "One encoder for each share.",
    ),
    Claim(
        "The trained encoder gives better answers: mixture, in distribution.",
        "63.5 and 62.2",
        "shares",
        ("shares.parquet",),
        "above",
        of_file("shares.parquet", "40% mixture_iid", "nothing mixture_iid"),
        "Two thirds of the weight are on companions.",
    ),
    Claim(
        "RAMoLE's learned gate is better than equal weights, in distribution.",
        "51.8 and 49.8; 59.6 and 58.8",
        "gate",
        ("gate.parquet",),
        "above",
        of_file("gate.parquet", "gate_iid", "uniform_iid"),
        _of_the_gate,
    ),
    Claim(
        "RAMoLE's learned gate is better than equal weights, out of distribution.",
        "47.7 and 45.6; 53.7 and 53.5",
        "gate",
        ("gate.parquet",),
        "above",
        of_file("gate.parquet", "gate_ood", "uniform_ood"),
        "As above.",
    ),
)
