"""What an approval would let an adapter answer, in JSON and in words."""

from __future__ import annotations

from typing_extensions import TypedDict

from lora_store import AdapterRef
from retriever_svc import Drawn, Draws

_NUM_NAMED = 3  # adapters in the text; `adapters` has all of them


class DrawnShare(TypedDict):
    """The share of some prompts that the version would answer first, and that all adapters of its owner would."""

    share: float
    owner_share: float


class DrawnAdapter(DrawnShare):
    """Of the samples of another owner's adapter."""

    name: str


class DrawsObject(TypedDict):
    """What the version would draw of the requests of tenants that own neither."""

    ordinary_prompts: DrawnShare
    adapters: list[DrawnAdapter]
    needs_confirmation: bool
    text: str


def draws_object(draws: Draws, ref: AdapterRef, tenant: str) -> DrawsObject:
    """Return what the version `ref` would draw, for an approver of `tenant`."""
    adapters: list[DrawnAdapter] = [
        {"name": other.name_for(tenant), **_shares_of(drawn)} for other, drawn in draws.adapters
    ]
    return {
        "ordinary_prompts": _shares_of(draws.ordinary),
        "adapters": adapters,
        "needs_confirmation": draws.must_be_confirmed,
        "text": _text_of(_shares_of(draws.ordinary), adapters, ref),
    }


def _shares_of(drawn: Drawn) -> DrawnShare:
    num = max(1, drawn.num)
    return {"share": drawn.by_version / num, "owner_share": drawn.by_owner / num}


def _text_of(ordinary: DrawnShare, adapters: list[DrawnAdapter], ref: AdapterRef) -> str:
    parts = [f"{_percents(ordinary, ref)} of ordinary prompts"]
    parts += [f"{_percents(adapter, ref)} of the samples of {adapter['name']}" for adapter in adapters[:_NUM_NAMED]]
    rest = len(adapters) - _NUM_NAMED
    more = f", and samples of {rest} more adapters" if rest > 0 else ""
    return f"Requests of other tenants: {ref.name} would answer {', '.join(parts)}{more}."


def _percents(drawn: DrawnShare, ref: AdapterRef) -> str:
    all_adapters = f" (all adapters of {ref.tenant} {drawn['owner_share']:.1%})"
    return f"{drawn['share']:.1%}" + (all_adapters if drawn["owner_share"] > drawn["share"] else "")
