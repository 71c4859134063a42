"""The doctor's report as it is shown: names that the caller uses, and advice with the remedy."""

from __future__ import annotations

import pytest

from deployments.api.doctor_report import MAX_NAMED, MAX_PAIRS, doctor_object, give_advice
from lora_store import AdapterRef
from retriever_svc import Collision, DoctorReport
from retriever_svc.doctor import AdapterFinding
from retriever_svc.refit_gain import RefitGain
from tests.deployments.adapter_records import adapter
from tests.deployments.shown_plans import CODER, POET


def finding(name: str, num_samples: int = 20, num_below: int = 0, num_wordings: int = 4) -> AdapterFinding:
    below = (0, num_below, num_below)
    return AdapterFinding(adapter(name).ref, num_samples, num_samples, num_samples, None, below, num_wordings)


def advice(
    *findings: AdapterFinding, collisions: tuple[Collision, ...] = (), refit: RefitGain | None = None
) -> list[tuple[str, list[str], str]]:
    report = DoctorReport(7, 3, findings, collisions, (), (), (), refit)
    return [(item["problem"], item["adapters"], item["text"]) for item in give_advice(report, lambda ref: ref.name)]


def test_a_doctors_report_names_adapters() -> None:
    findings = (
        AdapterFinding(POET.ref, 20, 15, 20, None, turned_away=(0, 1, 4), num_wordings=3),
        AdapterFinding(CODER.ref, 20, 0, 10, POET.ref, turned_away=(1, 1, 2), num_wordings=3),
    )
    report = DoctorReport(7, 3, findings, (Collision(CODER.ref, POET.ref, 0.97, 4, 1),), (CODER.ref,), (POET.ref,))
    assert doctor_object(report, "local") == {
        "generation": 7,
        "k": 3,
        "num_adapters": 2,
        "num_samples": 40,
        "first_share": 0.375,
        "found_share": 0.75,
        "turned_away_share": {"lenient": 1 / 40, "balanced": 2 / 40, "strict": 6 / 40},
        "collisions": [{"adapters": ["coder", "poet"], "cosine": 0.97, "num_swapped": [4, 1]}],
        "never_chosen": ["coder"],
        "always_shadowed": [{"name": "coder", "by": "poet"}],
        "unreadable": ["poet"],
        "rankings": [],
        "advice": [],
    }


def test_adapters_that_are_not_served_come_first_in_the_advice() -> None:
    own = adapter("poet", tenant="us").ref
    report = DoctorReport(7, 3, (), (), (), (), unserved={"org/old": (own, POET.ref)})
    text = (
        "2 adapters were made for org/old and are not served: start the server with base_model: org/old, or add the"
        " name to accepts_base if it means the same weights."
    )
    advice = doctor_object(report, "us")["advice"]
    assert advice == [{"problem": "unserved", "adapters": ["poet", "local/poet"], "text": text}]


def test_adapters_of_another_tenant_have_their_unambiguous_names() -> None:
    own = adapter("poet", tenant="us").ref
    report = DoctorReport(
        7,
        3,
        (AdapterFinding(own, 4, 0, 2, POET.ref),),
        (Collision(own, POET.ref, 0.97, 4, 1, is_inseparable=True),),
        (POET.ref,),
        (POET.ref,),
    )
    reported = doctor_object(report, "us")
    assert reported["collisions"][0]["adapters"] == ["poet", "local/poet"]
    assert reported["always_shadowed"] == [{"name": "poet", "by": "local/poet"}]
    assert reported["never_chosen"] == reported["unreadable"] == ["local/poet"]
    assert [item["adapters"] for item in reported["advice"]] == [["poet", "local/poet"], ["poet"]]


def test_adapters_without_samples_are_named_with_the_remedy() -> None:
    report = DoctorReport(7, 3, (), (), (), (), by_name_only=(POET.ref, CODER.ref))
    [advised] = doctor_object(report, "local")["advice"]
    assert (advised["problem"], advised["adapters"]) == ("no_samples", ["poet", "coder"])
    assert advised["text"].startswith("poet and coder have no samples, so only their names find them.")
    assert "lora_samples.jsonl" in advised["text"]


def test_adapters_that_another_encoder_embedded_are_named_with_the_remedy() -> None:
    report = DoctorReport(7, 3, (), (), (), (), unembedded=(POET.ref,))
    [advised] = doctor_object(report, "local")["advice"]
    assert (advised["problem"], advised["adapters"]) == ("unembedded", ["poet"])
    assert advised["text"].endswith("so auto does not find them. Run `loraretriever pool reindex`.")


def test_a_healthy_pool_gets_no_advice() -> None:
    apart = Collision(POET.ref, CODER.ref, 0.3, 1, 1)
    assert advice(finding("a"), finding("b", num_below=4), collisions=(apart,), refit=RefitGain(100, 90, 1, 1)) == []


def test_few_samples_are_named_with_the_remedy() -> None:
    assert advice(finding("a", 9), finding("b", 10), finding("c", 1)) == [
        (
            "few_samples",
            ["a", "c"],
            "a and c have few samples, and prompts find an adapter better with more of them. Publish again with 20 "
            "samples of the kind that clients send.",
        )
    ]
    [(_, _, text)] = advice(finding("a", 3))
    assert text.startswith("a has few samples,")


def test_samples_that_are_unlike_each_other_are_named_with_the_remedy() -> None:
    [(problem, names, text)] = advice(finding("loose", num_below=5), finding("tight", num_below=4))
    assert (problem, names) == ("unlike_samples", ["loose"])
    assert text.startswith("loose has samples that are unlike each other")
    assert "publish it once for each of them" in text


def test_samples_that_repeat_one_instruction_are_named_with_the_remedy() -> None:
    some = finding("a", num_wordings=1), finding("b", num_wordings=2), finding("c", 12, num_wordings=1)
    [(problem, names, text)] = advice(*some)
    assert (problem, names) == ("one_wording", ["a", "c"])
    assert text.startswith(
        "a and c have samples of one wording: requests in other words get the right adapter in about"
    )
    assert "Give the samples three wordings or more, as clients write, and publish again." in text
    assert [problem for problem, _, _ in advice(finding("few", 4, num_wordings=1))] == ["few_samples"]


@pytest.mark.parametrize(("agree", "remedy"), [(True, "the same function: withdraw one"), (False, "tags to filter by")])
def test_two_adapters_that_prompts_cannot_separate_are_both_named(agree: bool, remedy: str) -> None:
    collision = Collision(POET.ref, CODER.ref, 0.971, 7, 9, is_inseparable=True, agree=agree)
    [(problem, names, text)] = advice(collisions=(collision,))
    assert (problem, names) == ("inseparable", ["poet", "coder"])
    assert "poet from coder (cosine 0.97; 7 samples of poet find coder first, and 9 the reverse)" in text
    assert remedy in text


def test_a_refit_is_advised_first_with_what_it_gains() -> None:
    [(problem, names, text), (second, *_)] = advice(finding("a", 3), refit=RefitGain(1000, 807, 70, 22))
    assert (problem, names, second) == ("refit", [], "few_samples")
    assert "85.5% of 1000 samples, instead of 80.7%" in text
    assert "--projection refit" in text


def test_advice_stays_short_for_a_large_pool() -> None:
    def ref(number: int) -> AdapterRef:
        return adapter(f"a{number}").ref

    pairs = [Collision(ref(n), ref(n + 1), 0.99, 1, 1, is_inseparable=True) for n in range(2 * MAX_PAIRS)]
    *separate, (problem, names, text) = advice(*[finding(f"a{n}", 2) for n in range(500)], collisions=tuple(pairs))
    assert (problem, len(names), len(separate)) == ("few_samples", 500, MAX_PAIRS)
    assert text.startswith(f"{', '.join(names[:MAX_NAMED])} and {500 - MAX_NAMED} more have few samples")
