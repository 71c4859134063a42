"""Claims on the paper's open questions: conflicting adapters, other bases and kinds of adapters, growing pools."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.markdown import percent
from benchmarks.paper.stages import competence, conflicts, mixed_kinds, natural, second_base, sizes, stream
from benchmarks.paper.stages.claim_list import of_file
from benchmarks.paper.stages.claims import Claim, Results
from benchmarks.training.lora_training import Kind


def _of_copies(one: str, other: str) -> Callable[[Results], Interval]:
    """Return a difference among flipped copies, by the stage that measured it on more tasks."""
    return lambda results: results.answers(_copies_file(results, one)).difference(one, other)


def _copies_file(results: Results, run: str) -> str:
    return competence.ROWS if run in results.answers(competence.ROWS).runs else conflicts.ROWS


def _tasks_of_copies(run: str, words: str) -> Callable[[Results], str]:
    def why(results: Results) -> str:
        tasks, questions = results.answers(_copies_file(results, run)).scores(run).shape
        return f"{tasks} tasks of {questions} questions. {words}"

    return why


def _kept_on_second(results: Results) -> Interval:
    answers = results.answers(second_base.ROWS)
    scores = answers.scores("selection_second") - 0.9 * answers.scores("perfect_second")
    return bootstrap(scores.to_numpy()[np.newaxis], resamples_tasks=True)


def _on_first(results: Results) -> str:
    points = results.answers(second_base.ROWS).difference("mixture_first", "selection_first").in_percent()
    return f"12 tasks, four of each of three clusters. On the first base: {points}."


def _losing_tasks(results: Results) -> str:
    answers = results.answers(natural.ROWS)
    changes = (answers.scores("own_0.75") - answers.scores("own")).mean(axis=1)
    tenth = answers.difference("own_0.9", "own").in_percent()
    return (
        f"{(changes < 0).sum()} of the {len(changes)} tasks lose answers. With nine tenths on the own adapter the mean"
        f" changes by {tenth}."
    )


def _changed_requests(results: Results) -> str:
    changed = stream.changed_requests(results.table(stream.ROWS))
    count, tasks = len(changed) // 2, changed["task"].nunique()
    return f"`auto`, right after the change that brought them: {count} requests for {tasks} tasks."


def _alone(kind: Kind) -> Callable[[Results], str]:
    def why(results: Results) -> str:
        answers = results.answers(mixed_kinds.ROWS)
        own, lora = (answers.interval(f"{one}_alone").mean for one in (kind, "lora"))
        weaker = "; a weaker adapter has less to lose" if own < lora else ""
        tasks = len(answers.scores("lora_alone"))
        return f"{tasks} tasks, in torch. Alone it has {percent(own)} %, LoRA {percent(lora)} %{weaker}."

    return why


def _lost_by(kind: Kind) -> Callable[[Results], Interval]:
    return lambda results: mixed_kinds.more_lost(results.answers(mixed_kinds.ROWS), kind, "equal")


_COPIES = (competence.ROWS, conflicts.ROWS)
_SECOND, _KINDS = (second_base.ROWS,), (mixed_kinds.ROWS,)
QUESTIONS = (
    Claim(
        "A quarter of the weight on a copy that was trained on exchanged answers does no harm.",
        "–",
        "competence",
        _COPIES,
        "at least",
        _of_copies("own_flipped_0.25", "own"),
        _tasks_of_copies(
            "own_flipped_0.25", "At half of the weight the score is midway between the adapter's and the copy's."
        ),
    ),
    Claim(
        "A copy that was trained on exchanged answers does not harm selection.",
        "–",
        "competence",
        _COPIES,
        "at least",
        _of_copies("flipped_selection", "plain_selection"),
        _tasks_of_copies(
            "flipped_selection", "Both have samples of the same kind, so retrieval cannot distinguish them."
        ),
    ),
    Claim(
        "After the server's evaluation, selection takes the original in place of such a copy more often.",
        "–",
        "competence",
        (competence.ROWS,),
        "above",
        of_file(competence.ROWS, "measured_selection", "flipped_selection"),
        _tasks_of_copies("measured_selection", "Samples with answers show which of the two is right."),
    ),
    Claim(
        "Two halves of a task's examples mix as well as the whole.",
        "–",
        "conflicts",
        ("conflicts.parquet",),
        "at least",
        of_file("conflicts.parquet", "halves_mixture", "own"),
        "12 tasks of 50 questions. Each half alone does about as well as their mixture.",
    ),
    Claim(
        "A mixture of different ranks, modules and scalings is at least as good as one of equal adapters.",
        "–",
        "mixed_pool",
        ("mixed_pool.parquet",),
        "at least",
        of_file("mixed_pool.parquet", "mixed_mixture_iid", "uniform_mixture_iid"),
        "12 tasks. Rank and modules differ together with the task.",
    ),
    Claim(
        "Half of the weight on an adapter of a related task does no harm.",
        "–",
        "natural",
        (natural.ROWS,),
        "at least",
        of_file(natural.ROWS, "own_0.5", "own"),
        "12 tasks in pairs of similar inputs and different functions. Most of the wrong answers are the rival's own.",
    ),
    Claim(
        "A quarter of the weight on an adapter of a related task does no harm.",
        "–",
        "natural",
        (natural.ROWS,),
        "at least",
        of_file(natural.ROWS, "own_0.75", "own"),
        _losing_tasks,
    ),
    Claim(
        "An index that follows the catalogue is better than a frozen one, on requests for new adapters and versions.",
        "–",
        "stream",
        (stream.ROWS,),
        "above",
        lambda results: stream.following(results.table(stream.ROWS)),
        _changed_requests,
    ),
    Claim(
        "A pool of 46 adapters answers as well as one of 10: `auto`, in distribution.",
        "–",
        "sizes",
        (sizes.ROWS,),
        "at least",
        of_file(sizes.ROWS, "46_auto_iid", "10_auto_iid"),
        "The same questions over both pools; siblings are found in place of the own adapter.",
    ),
    Claim(
        "On a second base model, selection keeps at least nine tenths of the own adapter's score (as in section 1).",
        "54.1 of 58.1; 61.8 of 66.1",
        "second_base",
        _SECOND,
        "above",
        _kept_on_second,
        "12 tasks; a pruned and distilled base, with adapters of its own in an index of both bases.",
    ),
    Claim(
        "On a second base model, the mixture is as good as selection in distribution.",
        "52.4 and 54.1; 61.5 and 61.8",
        "second_base",
        _SECOND,
        "equal",
        of_file(second_base.ROWS, "mixture_second", "selection_second"),
        _on_first,
    ),
    Claim(
        "Adapters of a second base in the index do not harm retrieval.",
        "–",
        "second_base",
        (second_base.FOUND,),
        "at least",
        lambda results: second_base.nearer(results.table(second_base.FOUND)),
        "Top-1 by task over 24 adapters, against the first base's 12. A hit is an adapter of the task for either base,"
        " so a request has to name its base.",
    ),
    Claim(
        "Averaging the log probabilities of two bases is better than the first alone.",
        "–",
        "second_base",
        _SECOND,
        "above",
        of_file(second_base.ROWS, "averaged_found", "found_first"),
        "Both bases use their adapter for the task of the nearest adapter. It costs both bases' work.",
    ),
    Claim(
        "A vote of two bases is better than the first alone.",
        "–",
        "second_base",
        _SECOND,
        "above",
        of_file(second_base.ROWS, "voted_found", "found_first"),
        "Of different answers the one with the higher mean log probability counts.",
    ),
    Claim(
        "With two LoRA companions of equal weight a DoRA adapter loses no more than a LoRA adapter (above 0: less).",
        "–",
        "mixed_kinds",
        _KINDS,
        "at least",
        _lost_by("dora"),
        _alone("dora"),
    ),
    Claim(
        "With two LoRA companions of equal weight an IA³ adapter loses no more than a LoRA adapter (above 0: less).",
        "–",
        "mixed_kinds",
        _KINDS,
        "at least",
        _lost_by("ia3"),
        _alone("ia3"),
    ),
    Claim(
        "The LoRA, DoRA and IA³ adapters of one task mix as well as its LoRA adapter alone.",
        "–",
        "mixed_kinds",
        _KINDS,
        "at least",
        of_file(mixed_kinds.ROWS, mixed_kinds.TOGETHER, "lora_alone"),
        "A third of the weight on each.",
    ),
)
