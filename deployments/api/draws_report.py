"""The prompts that an adapter would draw if it were approved, in JSON and in words."""

from __future__ import annotations

from typing_extensions import TypedDict

from lora_store import AdapterRef
from retriever_svc import Drawn, Draws
from retriever_svc.draws import MOST_ALIKE

_NUM_NAMED = 3  # adapters in the text; `adapters` has all of them


class DrawnShare(TypedDict):
    """The share of some prompts that the version would answer first, and that all adapters of its owner would."""

    share: float
    owner_share: float


class DrawnAdapterRow(TypedDict):
    """Of the samples of another owner's adapter, and of these without the wording that they share.

    `similarity`: the cosine of both adapters; 0.7 or more is that of two adapters for one task.
    """

    name: str
    samples: DrawnShare
    contents: DrawnShare
    similarity: float


class DrawsObject(TypedDict):
    """The shares that the version would draw of the requests of tenants that own neither adapter."""

    ordinary_prompts: DrawnShare
    adapters: list[DrawnAdapterRow]
    needs_confirmation: bool
    text: str


def draws_object(draws: Draws, ref: AdapterRef, tenant: str) -> DrawsObject:
    """Return what the version `ref` would draw, for an approver of `tenant`."""
    adapters: list[DrawnAdapterRow] = [
        {
            "name": adapter.ref.name_for(tenant),
            "samples": _show_shares(adapter.samples),
            "contents": _show_shares(adapter.contents),
            "similarity": round(adapter.similarity, 3),
        }
        for adapter in draws.adapters
    ]
    return {
        "ordinary_prompts": _show_shares(draws.ordinary),
        "adapters": adapters,
        "needs_confirmation": draws.must_be_confirmed,
        "text": _format_text(_show_shares(draws.ordinary), adapters, ref),
    }


def _show_shares(drawn: Drawn) -> DrawnShare:
    num = max(1, drawn.num)
    return {"share": drawn.by_version / num, "owner_share": drawn.by_owner / num}


def _format_text(ordinary: DrawnShare, adapters: list[DrawnAdapterRow], ref: AdapterRef) -> str:
    parts = [f"{_percents(ordinary, ref)} of ordinary prompts"]
    for adapter in adapters[:_NUM_NAMED]:
        contents = f"{_percents(adapter['contents'], ref)} when their shared wording is left out"
        parts.append(f"{_percents(adapter['samples'], ref)} of the samples of {adapter['name']} and {contents}")
    alike = [f"{row['name']} ({row['similarity']:.2f})" for row in adapters if row["similarity"] >= MOST_ALIKE]
    same = f" It seems to be for the task of {', '.join(alike[:_NUM_NAMED])}." if alike else ""
    rest = len(adapters) - _NUM_NAMED
    more = f", and samples of {rest} more adapters" if rest > 0 else ""
    return f"Requests of other tenants: {ref.name} would answer {', '.join(parts)}{more}.{same}"


def _percents(drawn: DrawnShare, ref: AdapterRef) -> str:
    all_adapters = f" (all adapters of {ref.tenant} {drawn['owner_share']:.1%})"
    return f"{drawn['share']:.1%}" + (all_adapters if drawn["owner_share"] > drawn["share"] else "")
