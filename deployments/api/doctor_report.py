"""The doctor's report in JSON, with advice in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from typing_extensions import TypedDict

from deployments.api.pool_responses import ranking_object, unserved_text
from deployments.json_types import JsonObject
from lora_store import AdapterRef
from retriever_svc import AskedReport, Collision, DoctorReport
from retriever_svc.shared_wording import wording_cost

MAX_NAMED = 10  # adapters in the text of one piece of advice; `adapters` has all of them
MAX_PAIRS = 20  # of adapters that are not separable; `collisions` has all of them
Name = Callable[[AdapterRef], str]
Problem = Literal[
    "no_samples", "few_samples", "unlike_samples", "one_wording", "inseparable", "refit", "unembedded", "unserved"
]


class Advice(TypedDict):
    """A problem of some adapters, or of the pool, with the remedy."""

    problem: Problem
    adapters: list[str]
    text: str


def doctor_object(report: DoctorReport, tenant: str) -> JsonObject:
    """Return how well an adapter's own samples retrieve it. The shares are better than those of unseen prompts."""

    def name(ref: AdapterRef) -> str:
        return ref.name_for(tenant)

    return {
        "generation": report.generation,
        "k": report.top_k,
        "num_adapters": len(report.adapters),
        "num_samples": sum(finding.num_samples for finding in report.adapters),
        "first_share": report.share_first,
        "found_share": report.share_found,
        "turned_away_share": report.turned_away,
        "collisions": [
            {
                "adapters": [name(collision.first), name(collision.second)],
                "cosine": collision.cosine,
                "num_swapped": [collision.num_of_first, collision.num_of_second],
            }
            for collision in report.collisions
        ],
        "rankings": [ranking_object(ranking, tenant) for ranking in report.rankings],
        "never_chosen": list(map(name, report.never_chosen)),
        "always_shadowed": [
            {"name": name(finding.ref), "by": name(finding.shadowed_by)}
            for finding in report.always_shadowed
            if finding.shadowed_by is not None
        ],
        "unreadable": list(map(name, report.unreadable)),
        **({} if report.asked is None else {"prompts": asked_object(report.asked, name)}),
        "advice": list(give_advice(report, name)),
    }


def asked_object(asked: AskedReport, name: Name) -> JsonObject:
    """Return which adapters answer real prompts. A row whose name is null is of prompts for the base model."""
    labelled = sorted(asked.labelled.items(), key=lambda item: "" if item[0] is None else name(item[0]))
    counted = [counts for _, counts in labelled]
    return {
        "num": sum(counts.num for counts in counted),
        "num_right": sum(counts.num_right for counts in counted),
        "num_other": sum(counts.num_other for counts in counted),
        "num_base": sum(counts.num_base for counts in counted),
        "adapters": [
            {
                "name": None if ref is None else name(ref),
                "num": counts.num,
                "num_right": counts.num_right,
                "num_other": counts.num_other,
                "num_base": counts.num_base,
                "others": [{"name": name(other), "num": num} for other, num in counts.others.most_common(MAX_NAMED)],
            }
            for ref, counts in labelled
        ],
        "unlabelled": [
            {"name": None if ref is None else name(ref), "num": num} for ref, num in asked.unlabelled.most_common()
        ],
    }


def give_advice(report: DoctorReport, name: Name) -> Iterator[Advice]:
    """Yield what to change, the pool's own problems first. `name`: the name that the caller uses for an adapter."""
    for base_model, refs in report.unserved.items():
        text = f"{unserved_text(base_model, len(refs))}."
        yield {"problem": "unserved", "adapters": list(map(name, refs)), "text": text}
    yield from _advise(
        "unembedded",
        map(name, report.unembedded),
        "samples that the encoder in service has not embedded, so auto does not find them. Run `loraretriever pool "
        "reindex`.",
    )
    if report.refit is not None and report.refit.pays:
        now, then, total = report.refit.num_first, report.refit.num_refitted, report.refit.num_samples
        text = (
            f"A projection fitted to this pool would find the own adapter first for {then / total:.1%} of {total} "
            f"samples, instead of {now / total:.1%}. Reindex with the same encoder and --projection refit."
        )
        yield {"problem": "refit", "adapters": [], "text": text}
    for collision in [item for item in report.collisions if item.is_inseparable][:MAX_PAIRS]:
        names = [name(collision.first), name(collision.second)]
        yield {"problem": "inseparable", "adapters": names, "text": _of_a_pair(collision, *names)}
    yield from _of_samples(report, name)


def _of_a_pair(collision: Collision, first: str, second: str) -> str:
    swapped = (
        f"{collision.num_of_first} samples of {first} find {second} first, and {collision.num_of_second} the reverse"
    )
    same = (
        "Their sample outputs show the same function: withdraw one of them, or let `loraretriever pool evaluate` "
        "measure which one answers better."
    )
    other = (
        "If they do the same, withdraw one of them, or give both samples with outputs and let `loraretriever pool"
        " evaluate` measure which one answers better. If not, give them samples that show the difference, or tags to"
        " filter by."
    )
    start = f"Prompts do not distinguish {first} from {second} (cosine {collision.cosine:.2f}; {swapped}). "
    return start + (same if collision.agree else other)


def _of_samples(report: DoctorReport, name: Name) -> Iterator[Advice]:
    yield from _advise(
        "no_samples",
        map(name, report.by_name_only),
        "no samples, so only their names find them. For auto, publish again with description.txt, lora_samples.jsonl "
        "or --samples.",
    )
    yield from _advise(
        "few_samples",
        (name(finding.ref) for finding in report.with_few_samples),
        "few samples, and prompts find an adapter better with more of them. Publish again with 20 samples of the kind "
        "that clients send.",
    )
    yield from _advise(
        "unlike_samples",
        (name(finding.ref) for finding in report.with_unlike_samples),
        "samples that are unlike each other: a quarter of them or more would go to the base model. Remove samples of "
        "other tasks. If the adapter has several tasks, publish it once for each of them, with the samples of that "
        "task.",
    )
    alike = f"samples of one wording: {wording_cost()}, and publish again."
    yield from _advise("one_wording", (name(finding.ref) for finding in report.with_one_wording), alike)


def _advise(problem: Problem, adapters: Iterable[str], what: str) -> Iterator[Advice]:
    """Yield that these adapters have `what`, if there are any."""
    if not (names := list(adapters)):
        return
    shown, rest = names[:MAX_NAMED], len(names) - MAX_NAMED
    last = f"{rest} more" if rest > 0 else shown.pop()
    listed = " and ".join(filter(None, (", ".join(shown), last)))
    yield {"problem": problem, "adapters": names, "text": f"{listed} {'has' if len(names) == 1 else 'have'} {what}"}
