from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
from ray import cloudpickle
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID

from deployments.scaling import adapter_affinity_router
from deployments.scaling.adapter_affinity_router import AdapterAffinityRouter
from deployments.scaling.residency import HEARD, HeardReports, ResidencyReport, short_digest
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Job
from lora_store import AdapterRef, Plan, PlannedAdapter
from tests.deployments.adapter_records import digest_of

DEPLOYMENT = DeploymentID("Worker", "app")
RUNNER = asyncio.Runner()  # a router stays on one event loop


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    with RUNNER:
        yield


def digests(names: str) -> list[bytes]:
    return [short_digest(digest_of(name)) for name in names]


@dataclass
class FakeReplica:
    """A replica as the router sees it: its id, its reported adapters, and the length of its queue."""

    name: str
    queue_len: int = 0
    holds: str = ""  # one adapter per letter
    max_ongoing_requests: int = 100
    replica_id: ReplicaID = field(init=False)

    def __post_init__(self) -> None:
        self.replica_id = ReplicaID(self.name, DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.queue_len


class Routing:
    """The router over fake replicas, and its clock."""

    def __init__(self, *replicas: FakeReplica) -> None:
        self.now_s, self.replicas, self.heard = 100.0, replicas, HeardReports()
        self._numbers = itertools.count()
        self.router = RUNNER.run(self._start())
        self.router.initialize_state(self.heard)
        self.update(*replicas)

    async def _start(self) -> AdapterAffinityRouter:
        return AdapterAffinityRouter(
            DEPLOYMENT,
            DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
            get_curr_time_s=lambda: self.now_s,
        )

    def update(self, *replicas: FakeReplica) -> None:
        async def tell() -> None:
            self.router.update_replicas(replicas)
            for replica in replicas:
                self.router.on_new_queue_len_info(replica.replica_id, replica.queue_len)

        self.replicas = replicas
        RUNNER.run(tell())
        for replica in replicas:
            held = b"".join(digests(replica.holds))
            self.heard.hear(ResidencyReport(replica.name, next(self._numbers), held))

    def ordered(self, request: PendingRequest) -> list[list[FakeReplica]]:
        ranks: list[list[FakeReplica]] = RUNNER.run(self.router.choose_replicas(self.replicas, request))
        return ranks

    def ranks(self, *args: object) -> list[set[str]]:
        """Return the names in each rank, without empty ranks."""
        return [{replica.name for replica in rank} for rank in self.ordered(request_of(*args)) if rank]

    def chosen(self, *args: object) -> str:
        """Return the replica that Ray's own choice among the ranks gives a request."""
        return self.given(request_of(*args))[0]

    def given(self, *requests: PendingRequest) -> list[str]:
        async def choose() -> list[str]:
            asked = asyncio.gather(*[self.router._choose_replica_for_request(request) for request in requests])
            return [replica.name for replica in await asyncio.wait_for(asked, 120)]

        return RUNNER.run(choose())

    def sent(self, job: Job, name: str) -> None:
        [replica] = [replica for replica in self.replicas if replica.name == name]
        self.router.on_request_routed(request_of(job), replica.replica_id, None)


def request_of(*args: object) -> PendingRequest:
    number = str(object.__hash__(object()))
    return PendingRequest(args=list(args), kwargs={}, metadata=RequestMetadata(number, number))


def job(adapters: str) -> Job:
    """Return a mixture of adapters, one per letter, best first."""
    rows = tuple(PlannedAdapter(AdapterRef("t", name, digest_of(name)), digest_of(name), 1.0) for name in adapters)
    return Job("x", "prompt", Plan("mixture" if rows else "base", rows))


def test_all_resident_before_most_before_rest() -> None:
    routing = Routing(FakeReplica("all", 1, "abcz"), FakeReplica("most", 1, "abz"), FakeReplica("one", 1, "c"))
    assert routing.ranks(job("abc")) == [{"all"}, {"most"}, {"one"}]
    assert routing.ranks(job("cz")) == [{"all"}, {"most", "one"}]


def test_all_calls_of_one_http_request_are_sent() -> None:
    calls = [PendingRequest([job(name)], {}, RequestMetadata("http-1", "http-1")) for name in "abc"]
    assert Routing(FakeReplica("only")).given(*calls) == ["only"] * 3


def test_a_full_replica_is_passed_over_for_the_next_rank_and_waiting_for_it_has_pauses() -> None:
    full = FakeReplica("full", 3, "a", max_ongoing_requests=3)
    assert Routing(full, FakeReplica("free", 3)).chosen(job("a")) == "free"
    request = request_of(job("a"))
    Routing(full).ordered(request)
    assert request.routing_context.should_backoff


def test_the_shortest_queue_wins_within_a_rank() -> None:
    routing = Routing(FakeReplica("long", 6, "a"), FakeReplica("short", 5, "a"), FakeReplica("none", 4))
    assert routing.chosen(job("a")) == "short"


@pytest.mark.parametrize(("queue_len", "is_taken"), [(25, True), (30, True), (31, False), (99, False)])
def test_a_replica_with_a_much_longer_queue_ranks_last(queue_len: int, is_taken: bool) -> None:
    # mean (q + 3 · 20) / 4, longest 1.25 · mean + 2: at 30 it is 30.1, at 31 it is 30.4
    others = [FakeReplica(name, 20, "b" if name == "x" else "") for name in "xyz"]
    routing = Routing(FakeReplica("busy", queue_len, "ab"), *others)
    assert ((routing.ranks(job("ab")))[0] == {"busy"}) is is_taken
    assert ((routing.ranks(job("ab")))[-1] == {"busy"}) is not is_taken
    assert routing.chosen(job("ab")) == ("busy" if is_taken else "x")


def test_lost_late_and_false_reports_never_hide_a_replica() -> None:
    routing = Routing(*[FakeReplica(name, 3, "ab") for name in "wxyz"])
    routing.heard.hear(ResidencyReport("w", 0, b""))  # late: it is older than the one in force
    assert routing.ranks(job("ab")) == [set("wxyz")]
    routing.heard.hear(ResidencyReport("x", 99, b"".join(digests("ac"))))
    routing.heard.hear(ResidencyReport("gone", 99, b"".join(digests("abc"))))
    assert routing.ranks(job("ab")) == [set("wyz"), {"x"}]
    assert routing.ranks(job("c"))[0] == {"x"}, "a changed report is used"
    for wanted in ("", "abc", "q"):
        assert set().union(*routing.ranks(job(wanted))) == set("wxyz")


def test_the_router_that_serve_unpickles_reads_what_this_process_hears() -> None:
    cloudpickle.register_pickle_by_value(adapter_affinity_router)  # as Serve does
    try:
        initialize = cloudpickle.loads(cloudpickle.dumps(AdapterAffinityRouter.initialize_state))
    finally:
        cloudpickle.unregister_pickle_by_value(adapter_affinity_router)
    routing = Routing(*[FakeReplica(f"{name}-of-this-test") for name in "wxyz"])
    initialize(routing.router)
    HEARD.hear(ResidencyReport("y-of-this-test", 0, b"".join(digests("a"))))
    assert routing.ranks(job("a"))[0] == {"y-of-this-test"}


def test_sent_adapters_count_until_the_replica_can_have_reported_them() -> None:
    routing = Routing(*[FakeReplica(name) for name in "wxyz"])
    for name in "zyxw":
        routing.sent(job("ab"), name)
        routing.now_s += 0.5
    assert routing.ranks(job("ab")) == [set("wxyz")]
    routing.now_s += 1.5
    assert routing.ranks(job("a")) == [set("wx"), set("yz")]
    routing.sent(job("c"), "w")
    routing.now_s += 1.4
    assert set(routing.ranks(job("a"))[0]) != {"w"}
    assert routing.ranks(job("c"))[0] == {"w"}
    routing.sent(job("d"), "z")
    routing.now_s += 2
    routing.sent(job("e"), "z")
    routing.sent(job("d"), "z")  # it counts from the last time
    routing.now_s += 2
    assert routing.ranks(job("d"))[0] == routing.ranks(job("e"))[0] == {"z"}


def test_expired_entries_are_dropped() -> None:
    routing = Routing(FakeReplica("x"))
    for name in "abac":
        routing.sent(job(name), "x")
        routing.now_s += 1.5
    [kept] = routing.router._expected.values()
    assert set(kept) == set(digests("ac"))  # the first a and b have expired, the second a has not


def test_entries_of_a_removed_replica_are_dropped() -> None:
    first, second = FakeReplica("x"), FakeReplica("y")
    routing = Routing(first, second)
    routing.sent(job("a"), "x")
    routing.update(second)
    routing.update(first, second)
    assert routing.ranks(job("a")) == [{"x", "y"}]


def test_an_adapter_that_no_replica_holds_has_two_homes_for_every_router() -> None:
    replicas = [FakeReplica(name) for name in "uvwxyz"]
    one, other = Routing(*replicas), Routing(*reversed(replicas))
    homes = {name: frozenset((one.ranks(job(name)))[0]) for name in "abcdefghijklmnopqrst"}
    assert all(len(home) == 2 for home in homes.values()) and len(set(homes.values())) > 5
    assert set().union(*homes.values()) == set("uvwxyz")
    for name, home in homes.items():
        assert (other.ranks(job(name)))[0] == (other.ranks(job(name + "xyz")))[0] == home
    fewer = Routing(*replicas[1:])
    for name, home in homes.items():
        assert home - {"u"} <= (fewer.ranks(job(name)))[0]  # only adapters of u have a new home


@pytest.mark.parametrize("args", [(), ("digest",), (job(""),)])
def test_calls_without_adapters_go_to_the_shortest_queue(args: Sequence[object]) -> None:
    routing = Routing(FakeReplica("x", 9, "a"), FakeReplica("y", 1), FakeReplica("z", 2, "b"))
    assert routing.ranks(*args) == [{"x", "y", "z"}]
    assert routing.chosen(*args) == "y"


def test_equal_replicas_are_chosen_randomly() -> None:
    routing = Routing(*[FakeReplica(name) for name in "wxyz"])
    orders = [routing.ordered(request_of(job("")))[0] for _ in range(200)]
    assert {order[0].name for order in orders} == set("wxyz")


def chat(*texts: str, adapters: str = "", tenant: str = "t") -> Job:
    """Return a chat whose user and assistant take turns."""
    turns = [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]
    return replace(job(adapters), prompt=tuple(turns), tenant=tenant)


@pytest.mark.parametrize("adapters", ["", "ab"])
def test_a_later_turn_goes_to_the_replica_that_got_the_one_before(adapters: str) -> None:
    names = [f"r{number}" for number in range(8)]
    routing = Routing(*[FakeReplica(name, 3, adapters) for name in names])
    for name in names:
        routing.sent(chat(f"I ask {name}", adapters=adapters), name)
        assert routing.chosen(chat(f"I ask {name}", "Yes?", "This", adapters=adapters)) == name
        routing.sent(chat(f"I ask {name}", "Yes?", "This", adapters=adapters), "r0")  # it had to move
        assert (routing.chosen(chat(f"I ask {name}", "Yes?", "This", "Ah", "So", adapters=adapters))) == "r0"


def test_a_turn_stays_only_where_the_adapters_are_and_the_queue_is_short() -> None:
    routing = Routing(FakeReplica("most", 3, "a"), FakeReplica("all", 3, "ab"), FakeReplica("busy", 90, "ab"))
    for name in ("most", "busy"):
        routing.sent(chat(name, adapters="ab"), name)
        routing.now_s += 10  # the router does not expect its adapters there any more
        assert routing.chosen(chat(name, "Yes?", "This", adapters="ab")) == "all"
    routing.sent(chat("most", adapters="a"), "most")
    assert (routing.ranks(chat("most", "Yes?", "This", adapters="a"))) == [{"most"}, {"all"}, {"busy"}]


def test_a_turn_that_routing_found_again_is_of_the_same_conversation() -> None:
    routing = Routing(*[FakeReplica(f"r{number}", 3, "ab") for number in range(8)])
    routing.sent(chat("I ask", adapters="ab"), "r5")
    again = chat("I ask", "Yes?", "This", adapters="ab")
    rows = [replace(row, score=0.1) for row in again.plan.adapters]
    for adapters in (tuple(rows), tuple(reversed(rows))):
        plan = replace(again.plan, adapters=adapters, generation=8)
        assert routing.chosen(replace(again, plan=plan)) == "r5"


def test_turns_of_another_tenant_or_plan_or_beginning_are_others() -> None:
    names = [f"r{number}" for number in range(40)]
    routing = Routing(*[FakeReplica(name, 3, "ab") for name in names])
    turns = [chat("I ask", "Yes?", "This", adapters="ab", tenant=tenant) for tenant in ("t", "u")]
    turns += [chat("I ask", "Yes?", "This", adapters="a"), chat("He asks", "Yes?", "This", adapters="ab")]
    homes = [routing.chosen(turn) for turn in turns]
    away = next(name for name in names if name not in homes)
    routing.sent(chat("I ask", adapters="ab"), away)
    assert [routing.chosen(turn) for turn in turns] == [away, *homes[1:]]


def test_routers_that_did_not_send_the_turn_before_agree_on_a_home_for_first_and_later_turns() -> None:
    replicas = [FakeReplica(f"r{number}", 3) for number in range(8)]
    first, second = Routing(*replicas), Routing(*reversed(replicas))
    homes = set()
    for number in range(40):
        asked = [chat(str(number), *["Yes?", "This"] * count) for count in (1, 2, 3)]
        chosen = {routing.chosen(turn) for routing in (first, second) for turn in asked}
        assert len(chosen) == 1
        homes |= chosen
    assert len(homes) > 4, "conversations are spread"


def test_first_turns_leave_a_home_whose_queue_is_much_longer() -> None:
    names = [f"r{number}" for number in range(8)]
    routing = Routing(*[FakeReplica(name, 3) for name in names])
    for number in range(20):
        home = routing.chosen(chat(str(number)))
        busy = Routing(*[FakeReplica(name, 9 if name == home else 3) for name in names])
        assert busy.chosen(chat(str(number))) != home


def test_the_oldest_turns_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterAffinityRouter, "max_turns", 3)

    routing = Routing(*[FakeReplica(f"r{number}") for number in range(4)])
    asked = [chat(str(number), "Yes?", "This") for number in range(6)]
    homes = [routing.chosen(turn) for turn in asked]
    away = [next(name for name in ("r0", "r1") if name != home) for home in homes]
    for number, name in enumerate(away):
        routing.sent(chat(str(number)), name)
    assert [routing.chosen(turn) for turn in asked] == homes[:3] + away[3:]
