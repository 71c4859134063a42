"""The server's `auto` as a method of the study, with its default settings or others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.paper.answering.answers import Question
from lora_store import BASE_PLAN, LOCAL_TENANT, Plan
from retriever_svc import Retriever, Route, RouteRequest
from retriever_svc.evidence_weights import CLOSE_SCORES, MIN_LEAD, limited_weights
from retriever_svc.index import Match
from retriever_svc.output_profile import functions_agree
from retriever_svc.planning import routed_plan
from retriever_svc.route import RoutedStrategy, Weighting

_NO_FLOOR = -1.0


@dataclass(frozen=True, slots=True)
class Auto:
    """Routes as `model: auto` does. `masks_own`: a question's own adapter cannot be chosen (out of distribution).

    `abstains`: at `abstain: balanced`; otherwise every question gets adapters. `min_lead` and `close_scores` are those
    of `evidence_weights`; `temperature` is the server's `softmax_temperature`.
    """

    strategy: RoutedStrategy = "mixture"
    weighting: Weighting = "evidence"
    top_k: int = 3
    temperature: float = 0.05
    min_lead: float = MIN_LEAD
    close_scores: float = CLOSE_SCORES
    abstains: bool = True
    masks_own: bool = False

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        floor = None if self.abstains else _NO_FLOOR
        top_k = self.top_k + self.masks_own
        requests = [RouteRequest(question.item.input, top_k=top_k, min_score=floor) for question in questions]
        routes = retriever.route(requests)
        return [self._plan(retriever, question, route) for question, route in zip(questions, routes, strict=True)]

    def _plan(self, retriever: Retriever, question: Question, route: object) -> Plan:
        assert isinstance(route, Route), route
        kept = [c for c in route.candidates if not (self.masks_own and c.ref.name == question.task)][: self.top_k]
        fitting = [
            Match(retriever.resolve(LOCAL_TENANT, c.ref.name), c.score, c.threshold, c.confidence)
            for c in kept
            if c.score >= c.threshold
        ]
        if not fitting:
            return BASE_PLAN
        request = RouteRequest(question.item.input, strategy=self.strategy, weighting=self._softmax_or_own)
        plan = routed_plan(request, fitting, route.generation, self.temperature)
        return self._limited(plan, fitting) if self.weighting == "evidence" else plan

    @property
    def _softmax_or_own(self) -> Weighting:
        return "softmax" if self.weighting == "evidence" else self.weighting

    def _limited(self, plan: Plan, matches: Sequence[Match]) -> Plan:
        """Return the plan with limited companions; with the default limits it is the server's."""
        planned = matches[: len(plan.adapters)]
        weights = limited_weights(
            [adapter.weight for adapter in plan.adapters],
            [self._shares_lead(match, planned[0]) for match in planned],
            self.min_lead,
        )
        adapters = tuple(replace(a, weight=w) for a, w in zip(plan.adapters, weights, strict=True))
        return replace(plan, adapters=adapters)

    def _shares_lead(self, match: Match, best: Match) -> bool:
        first, other = best.record.embedding, match.record.embedding
        if first is None or other is None or best.score - match.score > self.close_scores:
            return False
        return functions_agree(first.outputs, other.outputs)
