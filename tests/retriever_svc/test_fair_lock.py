from __future__ import annotations

import threading

from retriever_svc.fair_lock import FairLock


def test_one_that_takes_it_again_and_again_comes_after_those_who_wait() -> None:
    lock, order = FairLock(), []

    def wait_for_it(name: str) -> None:
        with lock:
            order.append(name)

    with lock:
        waiting = [threading.Thread(target=wait_for_it, args=(name,)) for name in "abc"]
        for number, thread in enumerate(waiting, start=1):
            thread.start()
            while len(lock._turns) < number:  # until it stands in line
                threading.Event().wait(0.001)
    with lock:
        order.append("again")
    for thread in waiting:
        thread.join()
    assert order == ["a", "b", "c", "again"]


def test_only_one_holds_it() -> None:
    lock, held, most = FairLock(), 0, 0

    def work() -> None:
        nonlocal held, most
        for _ in range(200):
            with lock:
                held += 1
                most = max(most, held)
                held -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (held, most) == (0, 1)
    with lock:
        held += 1
    assert held == 1
