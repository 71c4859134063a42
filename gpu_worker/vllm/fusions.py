"""Fusions as adapters of their own: composed here from loaded adapters, and held by the workers in rows of their own.

The average of parameters is one adapter: with (sum_s m_s B_s) (sum_s m_s A_s), ranks padded with zeros, its A and B are
the two sums. So a token of a fusion costs one adapter of the widest rank, whatever the number of adapters in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial

import torch

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.bank.loader import AdapterLoader, Fetch
from lora_store.adapter import AdapterRef, AdapterWeights, ModuleWeights
from lora_store.plan import Plan, PlannedAdapter

_BEGIN, _END = "fusion(", ")"
Parts = tuple[tuple[str, float], ...]
"""The weights digests of a fusion's adapters with their weights, sorted."""


def with_fusion(plan: Plan) -> Plan:
    """Return the plan with a fusion replaced by the one adapter that it is. Equal fusions have one name."""
    if not plan.averages_parameters:
        return plan
    members = tuple(adapter for adapter in plan.adapters if adapter.weight != 0)
    if not members:
        return replace(plan, strategy="base", adapters=())
    if len(members) == 1 and members[0].weight == 1:
        return replace(plan, strategy="selection", adapters=members)
    name = _BEGIN + "+".join(sorted(f"{adapter.weights_digest}*{adapter.weight!r}" for adapter in members)) + _END
    return replace(plan, strategy="selection", adapters=(PlannedAdapter(AdapterRef("-", "-", name), name, 1.0),))


def split_name(digest: str) -> Parts | None:
    """Return the parts of a fusion's name; None for the weights digest of an adapter."""
    if not digest.startswith(_BEGIN):
        return None
    pairs = [part.split("*") for part in digest[len(_BEGIN) : -len(_END)].split("+")]
    return tuple((part, float(weight)) for part, weight in pairs)


def list_adapters(digests: Iterable[str]) -> Iterator[str]:
    """Yield the weights digests, with those of its adapters in place of each fusion."""
    for digest in digests:
        parts = split_name(digest)
        yield from [digest] if parts is None else [part for part, _ in parts]


def contains_any(digest: str, parts: Collection[str]) -> bool:
    """Return whether the digest is that of a fusion with one of these adapters."""
    return any(part in parts for part, _ in split_name(digest) or ())


def composed(name: str, parts: Sequence[tuple[DeviceAdapter, float]]) -> AdapterWeights:
    """Return the fusion of these adapters, computed in float32. A module that an adapter lacks counts as zero."""
    modules: dict[str, ModuleWeights] = {}
    held = [({**adapter.modules, **adapter.experts}, weight) for adapter, weight in parts]
    for module in dict.fromkeys(module for of_adapter, _ in held for module in of_adapter):
        found = [(of_adapter[module], weight) for of_adapter, weight in held if module in of_adapter]
        (*experts, _, num_in), num_out = found[0][0].a.shape, found[0][0].bt.shape[-1]
        rank = max(each.rank for each, _ in found)
        a, bt = torch.zeros(*experts, rank, num_in), torch.zeros(*experts, rank, num_out)
        for each, weight in found:
            a[..., : each.rank, :].add_(each.a, alpha=weight)
            bt[..., : each.rank, :].add_(each.bt, alpha=weight)
        modules[module] = ModuleWeights(a, bt.mT, scaling=1.0)
    return AdapterWeights(name, modules)


class FusionLoader(AdapterLoader):
    """An AdapterLoader that also loads fusions, by name: it loads their adapters and composes them on the executor."""

    def __init__(
        self,
        fetch: Fetch,
        *,
        to_device_layout: Callable[[AdapterWeights], DeviceAdapter],
        executor: Executor,
        budget_bytes: int,
        on_done: Callable[[], None],
    ) -> None:
        super().__init__(
            self._fetch_or_compose,
            to_device_layout=to_device_layout,
            executor=executor,
            budget_bytes=budget_bytes,
            on_done=on_done,
        )
        self._fetch_adapter = fetch
        self._composing: dict[str, tuple[Future[AdapterWeights], dict[str, Future[DeviceAdapter]]]] = {}

    def pending_parts(self, digest: str) -> dict[str, Future[DeviceAdapter]]:
        """Return the loads of a fusion's adapters until it is composed, by weights digest."""
        composing = self._composing.get(digest)
        return {} if composing is None else composing[1]

    def discard(self, digest: str) -> None:
        """Drop the cached weights and the fusions that contain them. A load in progress continues."""
        with self._lock:
            fusions = [cached for cached in self._bytes if contains_any(cached, (digest,))]
        for cached in (digest, *fusions):
            super().discard(cached)

    def _fetch_or_compose(self, digest: str) -> Future[AdapterWeights]:
        parts = split_name(digest)
        if parts is None:
            return self._fetch_adapter(digest)
        loads = {part: self.load(part) for part, _ in parts}
        fusion: Future[AdapterWeights] = Future()
        self._composing[digest] = fusion, loads
        # The loads keep this function, so it must not keep the fusion or the other loads.
        _call_after(list(loads.values()), partial(self._submit_composition, digest, parts))
        return fusion

    def _submit_composition(self, digest: str, parts: Parts) -> None:
        try:
            self._executor.submit(self._compose, digest, parts)
        except RuntimeError as exc:  # the executor has shut down
            self._composing.pop(digest)[0].set_exception(exc)

    def _compose(self, digest: str, parts: Parts) -> None:
        loads = self._composing[digest][1]
        try:
            weights = composed(digest, [(loads[part].result(), weight) for part, weight in parts])
        except Exception as exc:
            self._composing.pop(digest)[0].set_exception(exc)
        else:
            self._composing.pop(digest)[0].set_result(weights)


def _call_after(loads: Sequence[Future[DeviceAdapter]], call: Callable[[], None]) -> None:
    """Call once all loads have ended, on the thread that ends the last one."""
    num_left = itertools.count(len(loads) - 1, -1)  # `next` is atomic
    for load in loads:
        load.add_done_callback(lambda _: call() if next(num_left) == 0 else None)
