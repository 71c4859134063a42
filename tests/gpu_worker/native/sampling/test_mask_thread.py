"""Masks from another thread: those of a whole step, and a grammar that never ends."""

from __future__ import annotations

import threading

import pytest

from gpu_worker.front.grammar.state import GrammarState
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.native.sampling.mask_thread import MaskThread
from tests.gpu_worker.front.grammar.small_vocabulary import TOKENS, compiled, ids_of, state_of


class StuckState(GrammarState):
    """A state whose update waits for `released`."""

    def __init__(self) -> None:
        super().__init__(compiled(Grammar("regex", "ab")), [], 0, len(TOKENS))
        self.released = threading.Event()

    def update(self) -> None:
        self.released.wait(120)


class BrokenState(GrammarState):
    """A state whose update raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(compiled(Grammar("regex", "ab")), [], 0, len(TOKENS), when_slow=self.refuse)
        self._exception, self.is_refused = error, False

    def refuse(self) -> None:
        self.is_refused = True

    def update(self) -> None:
        raise self._exception


def test_all_states_of_a_step_are_current_afterwards() -> None:
    masks = MaskThread()
    states = [state_of(Grammar("regex", f"{letter}b"), []) for letter in "acd"]
    masks.begin(states)
    masks.finish()
    assert [ids_of(state) for state in states] == [[ord("a")], [ord("c")], [ord("d")]]
    masks.begin([])
    masks.finish()
    masks.close()


def test_a_grammar_that_does_not_end_fails_alone() -> None:
    masks = MaskThread(longest_s=2)
    stuck = StuckState()
    states = [state_of(Grammar("regex", "ab"), []), stuck, state_of(Grammar("regex", "cd"), [])]
    masks.begin(states)
    masks.finish()
    assert [state.error is None for state in states] == [True, False, True]
    assert ids_of(states[2]) == [ord("c")]
    assert "2 s" in str(states[1].error)
    later = state_of(Grammar("regex", "ef"), [])
    masks.begin([later])
    masks.finish()
    assert ids_of(later) == [ord("e")]
    stuck.released.set()
    masks.close()


@pytest.mark.parametrize("error", [MemoryError(), BaseException("a panic")], ids=["error", "panic"])
def test_a_grammar_that_raises_fails_alone(error: BaseException) -> None:
    masks = MaskThread()
    broken, other = BrokenState(error), state_of(Grammar("regex", "cd"), [])
    masks.begin([broken, other])
    masks.finish()
    assert broken.error == "the grammar library failed" and not broken.is_refused
    assert other.error is None and ids_of(other) == [ord("c")]
    masks.close()
