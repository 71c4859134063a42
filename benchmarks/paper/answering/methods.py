"""The paper's methods as plans of the server: each turns a question into a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.paper.answering.answers import Question
from lora_store import BASE_PLAN, LOCAL_TENANT, Plan, Sample
from retriever_svc import Retriever, Route, RouteRequest
from retriever_svc.index import Match
from retriever_svc.planning import routed_plan
from retriever_svc.route import RoutedStrategy, Weighting

TEMPERATURE = 0.05  # of the softmax weighting: the server's default
_NO_FLOOR = -1.0  # the paper never abstains


@dataclass(frozen=True, slots=True)
class Routed:
    """Retrieval and composition. `masks_own`: the paper's OOD, in which a question's own adapter cannot be chosen.

    `abstains`: the base model answers where no adapter fits, as in a server by default.
    """

    strategy: RoutedStrategy
    top_k: int = 3
    weighting: Weighting = "uniform"
    masks_own: bool = False
    abstains: bool = False

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        routes = retriever.route([self._request(question) for question in questions])
        return [self._plan(retriever, pair[0], pair[1]) for pair in zip(questions, routes, strict=True)]

    def _request(self, question: Question) -> RouteRequest:
        """Return the request. Ask for one more adapter if one may be masked, as the paper's released code does."""
        top_k = self.top_k + self.masks_own
        strategy: RoutedStrategy = "mixture" if self.masks_own else self.strategy
        least = None if self.abstains else _NO_FLOOR
        return RouteRequest(
            question.item.input, strategy=strategy, top_k=top_k, weighting=self.weighting, min_score=least
        )

    def _plan(self, retriever: Retriever, question: Question, route: object) -> Plan:
        assert isinstance(route, Route), route
        if not self.masks_own:
            return route.plan
        left = [candidate for candidate in route.candidates if candidate.ref.name != question.task][: self.top_k]
        matches = [Match(retriever.resolve(LOCAL_TENANT, c.ref.name), c.score, c.threshold, c.confidence) for c in left]
        request = RouteRequest(question.item.input, strategy=self.strategy, weighting=self.weighting)
        return routed_plan(request, matches, route.generation, TEMPERATURE)


@dataclass(frozen=True, slots=True)
class Nearest:
    """Uses the adapter at one place of the three nearest, from 0."""

    place: int

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        routes = retriever.route([RouteRequest(question.item.input, min_score=_NO_FLOOR) for question in questions])
        names = [route.candidates[self.place].ref.name for route in routes if isinstance(route, Route)]
        return [retriever.plan_named(LOCAL_TENANT, [(name, 1.0)], "selection") for name in names]


class Perfect:
    """Uses each question's own adapter."""

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        return [retriever.plan_named(LOCAL_TENANT, [(q.task, 1.0)], "selection") for q in questions]


class Base:
    """Uses no adapter."""

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        return [BASE_PLAN] * len(questions)


class AdapterSoup:
    """One set of adapters for the whole stream: the nearest to its mean, with averaged parameters.

    The stream is the argument of `plans`: the method sees inputs of the questions themselves, but no answers.
    Source: LoraRetriever (ACL Findings 2024), appendix F.
    """

    def __init__(self, top_k: int = 3) -> None:
        self._top_k = top_k

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        samples = [Sample(question.item.input) for question in questions]
        [embedding] = retriever.embed_groups([samples])
        assert embedding is not None, "there are questions"
        nearest = retriever.neighbours(embedding, self._top_k, LOCAL_TENANT)
        choices = [(candidate.ref.name, 1 / len(nearest)) for candidate in nearest]
        return [retriever.plan_named(LOCAL_TENANT, choices, "fusion")] * len(questions)


MAIN: dict[str, Perfect | Base | Routed | AdapterSoup] = {
    "perfect": Perfect(),
    "base": Base(),
    "selection_iid": Routed("selection", top_k=1),
    "mixture_iid": Routed("mixture"),
    "mixture_ood": Routed("mixture", masks_own=True),
    "selection_ood": Routed("selection", top_k=1, masks_own=True),
    "fusion_iid": Routed("fusion"),
    "fusion_ood": Routed("fusion", masks_own=True),
    "auto_iid": Routed("mixture", weighting="evidence"),
    "auto_ood": Routed("mixture", weighting="evidence", masks_own=True),
    "adaptersoup": AdapterSoup(),
}
