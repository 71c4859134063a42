"""Claims that go beyond the paper: which difference shows each, and why it came out as it did."""

from __future__ import annotations

from benchmarks.paper.common.intervals import Interval, bootstrap, contrast
from benchmarks.paper.common.markdown import percent
from benchmarks.paper.retrieval import hardness
from benchmarks.paper.retrieval.ranking import COSINE, PRODUCT
from benchmarks.paper.retrieval.study import UNTRAINED
from benchmarks.paper.stages import companions, flan_pool, recipes, rerank, shares
from benchmarks.paper.stages.answer_tables import BASELINES, ROWS
from benchmarks.paper.stages.claim_list import of_file, of_main
from benchmarks.paper.stages.claims import Claim, Results
from benchmarks.paper.stages.claims_open import QUESTIONS


def _by_projection(results: Results) -> Interval:
    hits = [results.projections.hits([UNTRAINED], projection) for projection in ("refit", "none")]
    return bootstrap(hits[0] - hits[1], resamples_tasks=True)


def _by_cosine(results: Results) -> Interval:
    hits = [results.rankings.hits([UNTRAINED], score, 1) for score in (COSINE, PRODUCT)]
    return bootstrap(hits[0] - hits[1], resamples_tasks=True)


def _by_hardness(results: Results) -> Interval:
    return hardness.gain(results.table(_HARDNESS))


def _training_against_projection(results: Results) -> Interval:
    return results.unseen_gains["none", "refit"]


def _training_with_projection(results: Results) -> Interval:
    return results.unseen_gains["refit", "refit"]


def _answers_by_training(results: Results) -> Interval:
    return shares.gain_over_projection(results.answers(shares.ROWS), "selection", seen=False)


def _answers_by_training_on_all(results: Results) -> str:
    answers = results.answers(shares.ROWS)
    every = answers.difference("40% selection_iid", f"{shares.PROJECTED} selection_iid")
    return f"In distribution. Over all tasks, with those of its training, it leads by {every.in_percent()} points."


def _costs_of_companions(results: Results) -> str:
    answers = results.answers(companions.ROWS)
    near, random = (percent(-answers.difference(run, "own").mean) for run in ("nearest_1", "random_1"))
    return (
        f"Against the own adapter alone the nearest cost {near} points, random ones {random}; the interval is too wide"
        " to distinguish them."
    )


def _costs_of_the_farthest(results: Results) -> str:
    answers = results.answers(companions.ROWS)
    far, near = (answers.difference(run, "own_third").in_percent() for run in ("farthest_1", "nearest_1"))
    return f"Against a third of the own adapter alone they change right answers by {far} points, the nearest by {near}."


def _by_labels(results: Results) -> Interval:
    """The mixture minus selection where all tasks share their labels, minus the same on the study's pool."""
    flan = results.answers(flan_pool.ROWS)
    pools = [(flan, "mixture_iid", "selection_iid"), (results.main, "mixture_iid", "selection_iid")]
    return contrast(*[(answers.scores(one) - answers.scores(other)).to_numpy() for answers, one, other in pools])


def _room_to_lose(results: Results) -> str:
    pools = results.answers(flan_pool.ROWS), results.main
    flan, main = (answers.difference("perfect", "majority").in_percent() for answers in pools)
    return (
        "The pools differ. Where labels are shared there is less to lose: own adapters have"
        f" {flan} points more than guessing, on the study's pool {main}."
    )


def _by_sentiment(results: Results) -> Interval:
    """Compare the mixture's lead on the five sentiment tasks with its lead on the others."""
    more = results.main.scores("mixture_iid") - results.main.scores("selection_iid")
    is_sentiment = more.index.str.startswith("senti_")
    return contrast(more[is_sentiment].to_numpy(), more[~is_sentiment].to_numpy())


def _lead_over_guessing(results: Results) -> str:
    points = results.answers(flan_pool.ROWS).difference("mixture_ood", "majority").in_percent()
    return f"The lead is of the paper's size. The mixture has {points} points more than guessing."


def _better_with_equal_weights(results: Results) -> str:
    answers = results.answers(flan_pool.ROWS)
    changes = (answers.scores("auto_ood") - answers.scores("mixture_ood")).mean(axis=1)
    return (
        "`auto` gives most of the weight to the nearest adapter, also where all have the same function. Equal weights"
        f" are better on {(changes < 0).sum()} of the {(changes != 0).sum()} tasks that differ."
    )


_HARDNESS = f"retrieval_{hardness.KIND}.parquet"
_SHARES = (shares.ROWS,)
_PROJECTIONS = ("retrieval_projections.parquet",)
_MAIN, _FLAN, _NEAR = (ROWS, BASELINES), (flan_pool.ROWS,), (companions.ROWS,)
BEYOND = (
    Claim(
        "Cosine finds the own adapter more often than the inner product with means that are not normalised.",
        "The text has cosine, the released code the inner product",
        "retrieval",
        ("retrieval_ranks.parquet", "retrieval_draws.parquet"),
        "above",
        _by_cosine,
        "Untrained encoder. Tasks with diverse samples have short means.",
    ),
    Claim(
        "A projection fitted to the pool's samples finds the own adapter more often.",
        "–",
        "retrieval",
        _PROJECTIONS,
        "above",
        _by_projection,
        "Whitening: no training, one product of 384 × 384 for each prompt.",
    ),
    Claim(
        "Softmax weights are better than equal ones, in distribution.",
        "–",
        "ablations",
        ("ablations.parquet",),
        "above",
        of_file("ablations.parquet", "softmax_iid", "mixture_k3_iid"),
        "The ratio of the own adapter's weight to the others' matters.",
    ),
    Claim(
        "The server's default `auto` is at least as good as selection, in distribution.",
        "–",
        "auto",
        ("auto.parquet",),
        "at least",
        of_file("auto.parquet", "auto_iid", "selection_iid"),
        "With abstention, as served.",
    ),
    Claim(
        "The server's default `auto` is at least as good as selection, out of distribution.",
        "–",
        "auto",
        ("auto.parquet",),
        "at least",
        of_file("auto.parquet", "auto_ood", "selection_ood"),
        "As above.",
    ),
    Claim(
        "`auto` is better than the paper's mixture, in distribution.",
        "–",
        "auto",
        ("auto.parquet",),
        "above",
        of_file("auto.parquet", "auto_iid_always", "uniform_iid_always"),
        "Both without abstention.",
    ),
    Claim(
        "`auto` is at least as good as the paper's mixture, out of distribution.",
        "–",
        "auto",
        ("auto.parquet",),
        "at least",
        of_file("auto.parquet", "auto_ood_always", "uniform_ood_always"),
        "Both without abstention.",
    ),
    Claim(
        "Out of distribution the mixture is better than guessing.",
        "–",
        "main_table",
        _MAIN,
        "above",
        of_main("mixture_ood", "majority"),
        "Where answers have a form of their own, no other adapter gives them.",
    ),
    Claim(
        "On tasks that an encoder has not seen, training on 40 % is better than the projection without training.",
        "–",
        "retrieval",
        _PROJECTIONS,
        "above",
        _training_against_projection,
        "The projection fitted to the pool needs no training and reads the same samples.",
    ),
    Claim(
        "Training on 40 % adds to the projection on tasks that the encoder has not seen.",
        "–",
        "retrieval",
        _PROJECTIONS,
        "above",
        _training_with_projection,
        "Both encoders have a projection fitted to the pool.",
    ),
    Claim(
        "The projection without training gives better answers: selection, in distribution.",
        "–",
        "shares",
        _SHARES,
        "above",
        of_file(shares.ROWS, f"{shares.PROJECTED} selection_iid", f"{shares.UNTRAINED_LABEL} selection_iid"),
        "Both with the untrained encoder.",
    ),
    Claim(
        "On the tasks that it was not trained on, the encoder gives better answers than the projection: selection.",
        "–",
        "shares",
        _SHARES,
        "above",
        _answers_by_training,
        _answers_by_training_on_all,
    ),
    Claim(
        "A training that weighs hard negatives more finds the own adapter more often than the plain one.",
        "–",
        "retrieval",
        (_HARDNESS,),
        "above",
        _by_hardness,
        "The strength is chosen on `choice`. Every batch has all training tasks, so near ones are negatives anyway.",
    ),
    Claim(
        "A third of the own adapter, alone, is at least as good as the whole.",
        "–",
        "companions",
        _NEAR,
        "at least",
        of_file(companions.ROWS, "own_third", "own"),
        "The smaller weight alone costs a small part of what the equal mixture costs; the companions cost the rest.",
    ),
    Claim(
        "Equal companions of the farthest tasks do no harm.",
        "–",
        "companions",
        _NEAR,
        "at least",
        of_file(companions.ROWS, "farthest_1", "own"),
        _costs_of_the_farthest,
    ),
    Claim(
        "Random companions are better than the nearest, at equal weights.",
        "–",
        "companions",
        _NEAR,
        "above",
        of_file(companions.ROWS, "random_1", "nearest_1"),
        _costs_of_companions,
    ),
    Claim(
        "Where all tasks share their labels, the mixture is as good as selection, in distribution.",
        "52.4 and 54.1; 61.5 and 61.8",
        "flan_pool",
        _FLAN,
        "equal",
        of_file(flan_pool.ROWS, "mixture_iid", "selection_iid"),
        "12 tasks with the same four labels, as in Flan's clusters. Equal weights lose nothing that is visible; the"
        " interval is too wide for a tie.",
    ),
    Claim(
        "Where all tasks share their labels, the mixture is better than selection, out of distribution.",
        "47.3 and 44.4; 54.8 and 49.2",
        "flan_pool",
        _FLAN,
        "above",
        of_file(flan_pool.ROWS, "mixture_ood", "selection_ood"),
        _lead_over_guessing,
    ),
    Claim(
        "Where all tasks share their labels, `auto` is at least as good as the paper's mixture, out of distribution.",
        "–",
        "flan_pool",
        _FLAN,
        "at least",
        of_file(flan_pool.ROWS, "auto_ood", "mixture_ood"),
        _better_with_equal_weights,
    ),
    Claim(
        "Where all tasks share their labels, the mixture loses less against selection than on the study's pool (iid).",
        "–",
        "flan_pool",
        (flan_pool.ROWS, *_MAIN),
        "above",
        _by_labels,
        _room_to_lose,
    ),
    Claim(
        "On the five tasks of sentiment, which share labels, the mixture loses less against selection than elsewhere.",
        "–",
        "main_table",
        _MAIN,
        "above",
        _by_sentiment,
        "One pool, one encoder, the same weights.",
    ),
    Claim(
        "Choosing among three answers by the model's log probability is better than the nearest adapter.",
        "–",
        "rerank",
        (rerank.ROWS,),
        "above",
        of_file(rerank.ROWS, "likelihood_iid", "first_iid"),
        "A wrong adapter's answer is often as likely as the right one's. Calibration does not help (section 5).",
    ),
    Claim(
        "With adapters that were trained at a third of the scale too, the mixture is as good as selection.",
        "–",
        "recipes",
        (recipes.ROWS,),
        "equal",
        of_file(recipes.ROWS, f"{recipes.SCALES}_mixture_iid", f"{recipes.SCALES}_selection_iid"),
        "12 tasks, in distribution.",
    ),
    *QUESTIONS,
)
