"""What an engine holds at a moment."""

from __future__ import annotations

from dataclasses import dataclass, field

from gpu_worker.engine.counters import Counters


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """All of it returns to where it was once requests have ended and what they used is forgotten."""

    resident: frozenset[str]  # weights digests in the bank
    occupied_rows: int  # bank rows that hold them
    active_rows: int  # bank rows that running requests read
    num_running: int
    num_waiting: int
    free_kv_rows: int
    free_kv_tokens: int
    kv_tokens: int  # whose keys and values running requests hold
    host_cache_bytes: int
    num_forgetting: int  # weights that go when the last request that uses them ends
    waiting_tokens: int = 0  # prompts of the requests that wait, and the most that they may generate
    disk_cache_bytes: int = 0  # of the whole machine: its workers share one
    counters: Counters = field(default_factory=Counters, compare=False)  # these alone do not return
