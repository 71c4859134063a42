"""Texts in the encoder's queue, with an encoder that works when the test permits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from deployments.encoder_queue import BATCH_TOKENS, TURN_TOKENS, EncoderLoad, EncoderQueue
from deployments.errors import EncoderBusy
from retriever_svc.encoder import tokens_read

LONG = "x" * 16_000  # as long as the encoder reads


class Encoder:
    """Answers each batch when permitted; `batches` are the (tenant, text) pairs that it received."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, str]]] = []
        self.fails_on: str | None = None  # a part of a text
        self.goes_on = asyncio.Semaphore(0)

    async def __call__(self, texts: Sequence[tuple[str, str]]) -> list[str]:
        self.batches.append(list(texts))
        await self.goes_on.acquire()
        if self.fails_on is not None and any(self.fails_on in text for _, text in texts):
            raise ValueError(f"{self.fails_on} cannot be encoded")
        return [f"{tenant}: {text[:8]}" for tenant, text in texts]

    async def run(self, num_batches: int = 1) -> None:
        """Let this many batches be answered, and the waiting callers continue."""
        for _ in range(num_batches):
            self.goes_on.release()
            await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


def queue_of(encoder: Encoder, batch_size: int = 32, max_waiting: int = 4096) -> EncoderQueue[str]:
    return EncoderQueue(encoder, batch_size=batch_size, max_waiting=max_waiting)


def asking(queue: EncoderQueue[str], tenant: str, texts: Sequence[str]) -> asyncio.Task[list[str]]:
    return asyncio.create_task(queue.encoded(tenant, texts))


async def queued(queue: EncoderQueue[str], tenant: str, texts: Sequence[str]) -> asyncio.Task[list[str]]:
    """Ask, and let the queue take the call."""
    asked = asking(queue, tenant, texts)
    await settle()
    return asked


async def test_answers_have_the_order_of_the_texts_over_several_batches(encoder: Encoder) -> None:
    queue = queue_of(encoder, batch_size=2)
    asked = asking(queue, "a", ["1", "2", "3", "4", "5"])
    await encoder.run(4)
    assert await asked == ["a: 1", "a: 2", "a: 3", "a: 4", "a: 5"]
    assert [len(batch) for batch in encoder.batches] == [2, 2, 1]
    assert await queue.encoded("a", []) == []


async def test_a_tenant_waits_for_the_current_batch_and_not_for_anothers_queue(encoder: Encoder) -> None:
    queue = queue_of(encoder)
    flood = [asking(queue, "flood", [LONG] * 60) for _ in range(60)]
    await settle()
    small = asking(queue, "small", ["Hi"])
    await encoder.run(2)
    assert await small == ["small: Hi"]
    assert len(encoder.batches) <= 3
    for task in flood:
        task.cancel()


async def test_the_requests_of_one_tenant_take_turns_too(encoder: Encoder) -> None:
    queue = queue_of(encoder)
    large = await queued(queue, "a", [LONG] * 256)
    small = asking(queue, "a", ["Hi"])
    await encoder.run(2)
    assert await small == ["a: Hi"]
    large.cancel()


async def test_each_tenant_has_a_part_of_every_batch(encoder: Encoder) -> None:
    queue = queue_of(encoder, batch_size=12)
    tasks = [asking(queue, tenant, [f"{LONG}{n}" for n in range(100)]) for tenant in "abc"]
    await encoder.run(5)
    for batch in encoder.batches[1:]:
        counts = [sum(tenant == name for tenant, _ in batch) for name in "abc"]
        assert max(counts) - min(counts) <= 1, counts
    for task in tasks:
        task.cancel()


async def test_a_batch_of_long_texts_is_short_and_one_of_short_texts_is_full(encoder: Encoder) -> None:
    queue = queue_of(encoder, batch_size=32)
    tasks = [asking(queue, "a", [LONG] * 100), asking(queue, "b", ["Hi"] * 200)]
    await encoder.run(1)
    tasks[0].cancel()
    await encoder.run(1)
    first, _, last = encoder.batches
    assert sum(text == LONG for _, text in first) <= BATCH_TOKENS // TURN_TOKENS
    assert len(last) == 32
    tasks[1].cancel()


@pytest.mark.parametrize(
    ("text", "num_tokens"),
    [("", 1), ("abc", 1), ("abcd", 2), ("語" * 255, 255), ("語" * 256, 256), (LONG, 256), ("\ud800", 1)],
)
def test_a_text_counts_with_the_tokens_that_the_encoder_reads(text: str, num_tokens: int) -> None:
    assert tokens_read(text) == num_tokens


async def test_a_turn_has_one_full_text_in_any_script(encoder: Encoder) -> None:
    queue = queue_of(encoder, batch_size=32)
    task = asking(queue, "a", ["語" * 256] * 100)
    await encoder.run(1)
    assert len(encoder.batches[0]) == BATCH_TOKENS // TURN_TOKENS
    task.cancel()


async def test_five_large_requests_leave_room_for_other_tenants(encoder: Encoder) -> None:
    queue = queue_of(encoder, max_waiting=1024)
    large = [asking(queue, "flood", [LONG] * 256) for _ in range(5)]
    await settle()
    assert [task.done() for task in large] == [False] * 4 + [True]  # the fifth finds no place left for its tenant
    with pytest.raises(EncoderBusy):
        await large[4]
    small = [asking(queue, f"tenant {number}", ["Hi"]) for number in range(20)]
    await encoder.run(6)
    assert [await task for task in small] == [[f"tenant {number}: Hi"] for number in range(20)]
    for task in large[:4]:
        task.cancel()


async def test_the_newest_request_of_the_tenant_with_most_texts_makes_room(encoder: Encoder) -> None:
    queue = queue_of(encoder, batch_size=1, max_waiting=10)
    running = await queued(queue, "x", ["running"])
    old, middle, new = asking(queue, "a", ["1"] * 3), asking(queue, "b", ["2"] * 3), asking(queue, "a", ["3"] * 4)
    await settle()
    assert queue.num_waiting == 10
    comer = await queued(queue, "c", ["4"] * 2)
    assert new.done() and isinstance(refused := new.exception(), EncoderBusy) and not refused.has_read
    assert not any(task.done() for task in (running, old, middle, comer))
    assert queue.num_waiting == 8
    late = await queued(queue, "c", ["5"] * 3)  # c itself would then have most
    assert isinstance(late.exception(), EncoderBusy)
    await encoder.run(9)
    assert [len(await task) for task in (running, old, middle, comer)] == [1, 3, 3, 2]
    assert queue.num_waiting == 0


async def test_a_call_that_makes_room_says_whether_some_of_its_texts_were_read(encoder: Encoder) -> None:
    queue = queue_of(encoder, batch_size=1, max_waiting=4)
    begun = await queued(queue, "a", ["1"] * 4)
    await queued(queue, "b", ["2"] * 2)
    assert isinstance(refused := begun.exception(), EncoderBusy) and refused.has_read
    await encoder.run(3)


async def test_a_call_that_is_refused_displaces_no_other(encoder: Encoder) -> None:
    queue = queue_of(encoder, batch_size=1, max_waiting=10)
    await queued(queue, "x", ["running"])
    waiting = [asking(queue, tenant, texts) for tenant, texts in (("a", ["1"] * 3), ("a", ["2"] * 3), ("b", ["3"] * 4))]
    await settle()
    with pytest.raises(EncoderBusy, match="10 prompts already wait"):
        await queue.encoded("c", ["4"] * 5)  # more than a's newest call leaves, and b would keep fewer than c
    assert queue.num_waiting == 10 and not any(task.done() for task in waiting)
    await encoder.run(11)
    assert [len(await task) for task in waiting] == [3, 3, 4]


async def test_a_single_tenant_may_use_every_place_and_no_more(encoder: Encoder) -> None:
    queue = queue_of(encoder, batch_size=1, max_waiting=4)
    await queued(queue, "a", ["1"])
    full = await queued(queue, "a", ["2"] * 4)
    with pytest.raises(EncoderBusy, match="4 prompts already wait"):
        await queue.encoded("a", ["3"])
    await encoder.run(5)
    assert len(await full) == 4


async def test_texts_of_a_caller_that_left_are_not_encoded(encoder: Encoder) -> None:
    queue = queue_of(encoder, batch_size=1)
    await queued(queue, "a", ["1"])
    leaves, stays = asking(queue, "a", ["2", "3"]), asking(queue, "a", ["4"])
    await settle()
    leaves.cancel()
    await encoder.run(3)
    assert await stays == ["a: 4"]
    assert [text for batch in encoder.batches for _, text in batch] == ["1", "4"]
    assert queue.num_waiting == 0
    encoder = Encoder()
    encoder.fails_on = "bad"
    queue = queue_of(encoder)
    leaves, stays = asking(queue, "a", ["1", "bad"]), asking(queue, "b", ["2"])
    await settle()
    leaves.cancel()
    await encoder.run(9)
    assert await stays == ["b: 2"]
    assert encoder.batches[1:] == [[("b", "2")]], "nor encoded again after a failure"


async def test_a_text_that_fails_fails_its_own_call_and_no_other_of_its_batch(encoder: Encoder) -> None:
    encoder.fails_on = "bad"
    queue = queue_of(encoder)
    broken = asking(queue, "a", ["1", "bad", "2", "3"])
    own, others = asking(queue, "a", ["4", "5"]), [asking(queue, tenant, [tenant, "6"]) for tenant in "bc"]
    await encoder.run(20)
    assert len(encoder.batches[0]) == 10  # all texts together
    with pytest.raises(ValueError, match="bad"):
        await broken
    assert await own == ["a: 4", "a: 5"]
    assert [await task for task in others] == [["b: b", "b: 6"], ["c: c", "c: 6"]]
    after = [text for batch in encoder.batches[1:] for _, text in batch]
    assert after.count("6") == 2 and after.count("2") == 1  # texts of other tenants once; none of a failed call
    assert queue.num_waiting == 0


async def test_a_broken_encoder_gets_one_text_of_each_call_and_is_used_again(encoder: Encoder) -> None:
    encoder.fails_on = ""
    queue = queue_of(encoder)
    broken = [asking(queue, tenant, ["x"] * 10) for tenant in "aab"]
    await encoder.run(20)
    assert [type(task.exception()) for task in broken] == [ValueError] * 3
    assert len(encoder.batches) == 1 + 2 + 3
    encoder.fails_on = None
    asked = asking(queue, "a", ["y"])
    await encoder.run()
    assert await asked == ["a: y"]


@pytest.mark.parametrize("change", [-1, 1])
async def test_a_wrong_number_of_rows_fails_the_call_without_a_hang(encoder: Encoder, change: int) -> None:
    async def wrong(texts: Sequence[tuple[str, str]]) -> list[str]:
        return ["row"] * (len(texts) + change)

    queue = EncoderQueue[str](wrong, batch_size=32, max_waiting=4096)
    async with asyncio.timeout(120):
        found = await asyncio.gather(*(queue.encoded(name, ["1", "2"]) for name in "ab"), return_exceptions=True)
    assert [type(answer) for answer in found] == [ValueError] * 2
    assert queue.num_waiting == 0


def test_the_load_of_an_encoder_is_its_busy_time_and_the_cost_of_waiting_texts() -> None:
    now_s = 100.0
    load = EncoderLoad(lambda: now_s)
    assert load.read(9) == {"busy": 0, "waiting_s": 0}
    with load.encoding(4):
        now_s += 2
        assert load.read(0) == {"busy": 1, "waiting_s": 0}  # a batch that lasts longer than a period
        now_s += 1
    now_s += 3
    assert load.read(8) == {"busy": 0.25, "waiting_s": 6}
    with pytest.raises(ValueError, match="bad text"), load.encoding(2):
        now_s += 3
        raise ValueError("bad text")
    assert load.read(10) == {"busy": 1, "waiting_s": 10}
