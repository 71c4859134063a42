"""The cache of compiled grammars: shared by concurrent requests, per tenant, bounded, and cancelled when all leave."""

from __future__ import annotations

import asyncio
import random
import resource
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llguidance import LLTokenizer

from gpu_worker.errors import EngineFull, GrammarInvalid
from gpu_worker.front.grammar import compiler as compiler_module
from gpu_worker.front.grammar import library
from gpu_worker.front.grammar import state as state_module
from gpu_worker.front.grammar.compiler import CheckProcess, GrammarCompiler
from gpu_worker.front.grammar.state import GrammarState
from gpu_worker.front.request.grammar import Grammar
from tests.gpu_worker.front.grammar.small_vocabulary import END, MANY_STATES, TOKENS, compiled, ids_of, vocabulary_of

GOOD = Grammar("regex", "ab")
DIGITS = "01234567890123456789"
Make = Callable[..., GrammarCompiler]  # the fixture `make`


class FakeCheck(CheckProcess):
    """A check that ends when it is released, and refuses grammars with "bad" in their text."""

    def __init__(self, released: threading.Event, checked: list[str]) -> None:
        super().__init__()
        self._released, self._checked = released, checked
        self.killed = threading.Event()

    def run(self, grammar: Grammar) -> None:
        self._checked.append(grammar.text)
        while not self._released.wait(0.005):
            if self.killed.is_set():
                raise GrammarInvalid("killed")
        if "bad" in grammar.text:
            raise GrammarInvalid("no", "/properties/bad")

    def kill(self) -> None:
        self.killed.set()


class Checks:
    """Makes the checks of a compiler and remembers them."""

    def __init__(self) -> None:
        self.released, self.checked, self.made = threading.Event(), list[str](), list[FakeCheck]()
        self.num_vocabularies = 0

    def __call__(self) -> FakeCheck:
        self.made.append(FakeCheck(self.released, self.checked))
        return self.made[-1]

    def vocabulary(self) -> LLTokenizer:
        self.num_vocabularies += 1
        return vocabulary_of(TOKENS)


@pytest.fixture
def checks() -> Checks:
    return Checks()


@pytest.fixture
def make(checks: Checks) -> Iterator[Callable[..., GrammarCompiler]]:
    made: list[GrammarCompiler] = []

    def build(**changes: Any) -> GrammarCompiler:
        made.append(GrammarCompiler(checks.vocabulary, **{"new_check": checks, **changes}))
        return made[-1]

    yield build
    checks.released.set()
    for compiler in made:
        compiler.close()


def use(compiler: GrammarCompiler, grammar: Grammar = GOOD, tenant: str = "a") -> list[int]:
    state = compiler.state(grammar, tenant, [], 0, len(TOKENS))
    state.update()
    return ids_of(state)


def test_a_grammar_is_compiled_once_for_each_tenant(make: Make, checks: Checks) -> None:
    compiler = make()
    checks.released.set()
    for tenant in "aab":
        assert use(compiler, tenant=tenant) == [ord("a")]
    assert checks.checked == ["ab", "ab"] and compiler.num_grammars == 2
    assert checks.num_vocabularies == 1
    ahead = compiler.state(GOOD, "a", [ord("a")], 0, len(TOKENS))
    ahead.update()
    assert ids_of(ahead) == [ord("b")] and use(compiler) == [ord("a")], "each row has a state of its own"


async def test_requests_that_wait_together_share_a_compilation(make: Make, checks: Checks) -> None:
    compiler = make()
    waiting = [asyncio.ensure_future(compiler.compile(GOOD, "a")) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    assert not checks.made[0].killed.is_set(), "two others wait"
    checks.released.set()
    await asyncio.gather(*waiting[1:])
    assert checks.checked == ["ab"]


async def test_the_check_is_killed_when_the_last_request_leaves(make: Make, checks: Checks) -> None:
    compiler = make()
    waiting = [asyncio.ensure_future(compiler.compile(GOOD, "a")) for _ in range(2)]
    await asyncio.sleep(0)
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert checks.made[0].killed.is_set() and compiler.num_grammars == 0
    checks.released.set()
    assert use(compiler) == [ord("a")], "a later request compiles it again"


def test_a_refusal_is_remembered_and_names_the_field_of_each_request(make: Make, checks: Checks) -> None:
    compiler = make()
    checks.released.set()
    for param in ("response_format", "structured_outputs.regex"):
        with pytest.raises(GrammarInvalid) as refused:
            use(compiler, Grammar("regex", "bad", param))
        assert (refused.value.param, refused.value.pointer) == (param, "/properties/bad")
        assert str(refused.value) == f"{param} at /properties/bad cannot be compiled: no"
    assert checks.checked == ["bad"]


def test_many_refusals_are_remembered_apart_from_compiled_grammars(make: Make, checks: Checks) -> None:
    compiler = make(max_grammars=1, max_refused=2)
    checks.released.set()
    for text in ("bad 1", "bad 2", "a", "b", "bad 1", "bad 3", "bad 1", "bad 2"):
        try:
            use(compiler, Grammar("regex", text))
        except GrammarInvalid as refused:
            assert text.startswith("bad") and refused.pointer == "/properties/bad"
    assert checks.checked == ["bad 1", "bad 2", "a", "b", "bad 3", "bad 2"], "the second was forgotten for the third"


def test_a_grammar_that_is_given_up_while_the_machine_stands_still_is_not_refused(make: Make, checks: Checks) -> None:
    compiler = make()
    checks.released.set()
    compiler.state(GOOD, "a", [], 0, len(TOKENS)).give_up("it took more than 2 s")
    assert use(compiler) == [ord("a")]


def test_a_slow_grammar_is_refused_for_a_while(make: Make, checks: Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    compiler = make(clock=lambda: now[0])
    checks.released.set()
    state = compiler.state(GOOD, "a", [], 0, len(TOKENS))
    monkeypatch.setattr(state_module, "_FREE_S", -1.0)
    state.give_up("it took more than 2 s")
    monkeypatch.undo()
    with pytest.raises(
        GrammarInvalid, match=r"grammar cannot be compiled: an earlier answer failed .* make it simpler"
    ):
        use(compiler)
    assert use(compiler, tenant="b") == [ord("a")], "other tenants know nothing of it"
    now[0] += 600
    assert use(compiler) == [ord("a")] and checks.checked == ["ab", "ab", "ab"]


def test_a_grammar_whose_masks_need_too_much_is_refused_before_or_after_its_first_step(
    make: Make, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step it would delay all rows, and again for each request with it."""
    lexemes = "".join(f"T{place}: /[a-z]*{chr(97 + place)}q[a-z]*/\n" for place in range(26))
    union = "(" + " | ".join(f"T{place}" for place in range(26)) + ")*"
    monkeypatch.setattr(library, "_STEP_FUEL", 200)
    compiler = make()
    checks.released.set()
    at_once, later = (Grammar("grammar", f"start: {start}\n{lexemes}") for start in (union, f'"{DIGITS}" {union}'))
    for _ in range(2):
        with pytest.raises(GrammarInvalid, match="it needs too much time or memory; make it simpler"):
            compiler.state(at_once, "a", [], 0, len(TOKENS))
    assert checks.checked == [at_once.text]
    state = compiler.state(later, "a", tokens := list[int](), 0, len(TOKENS))
    while state.error is None:
        state.update()
        tokens.append(ord(DIGITS[len(tokens)]))
    assert state.error == "it allows no further token, or it is too complex" and len(tokens) > 1
    with pytest.raises(GrammarInvalid, match=r"an earlier answer failed .* make it simpler"):
        compiler.state(later, "a", [], 0, len(TOKENS))


def walk_together(states: list[GrammarState], alone: list[GrammarState], answers: list[list[int]]) -> None:
    """Choose the answers' tokens in turn until all may end, and compare each mask with that of a state on its own."""
    chance, running = random.Random(0), list(range(len(states)))
    while running:
        for place in [*running]:
            states[place].update()
            alone[place].update()
            assert states[place].error is None and ids_of(states[place]) == ids_of(alone[place])
            allowed = {*ids_of(alone[place])}
            if END in allowed:
                running.remove(place)
            answers[place].append(chance.choice(sorted(allowed & {*b"abcdxy "})))


def test_answers_go_on_where_others_have_used_up_the_states_of_their_lexer(
    make: Make, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library adds up the states of all answers with one compiled grammar. None of these needs too many."""
    num_compiled = [0]

    def compile_matcher(kind: str, text: str, vocabulary: LLTokenizer) -> Any:
        num_compiled[0] += 1
        return library.compile_matcher(kind, text, vocabulary)

    monkeypatch.setattr(compiler_module, "compile_matcher", compile_matcher)
    monkeypatch.setattr(library, "_MAX_LEXER_STATES", 1500)
    compiler = make()
    checks.released.set()
    for _ in range(3):
        answers = [list[int]() for _ in range(4)]
        states = [compiler.state(MANY_STATES, "a", tokens, 0, len(TOKENS)) for tokens in answers]
        alone = [GrammarState(compiled(MANY_STATES), tokens, 0, len(TOKENS)) for tokens in answers]
        walk_together(states, alone, answers)
        assert compiler.num_grammars == 0, "later answers share another compiled grammar"
    assert num_compiled[0] > 2 * 3, "for the answers of each round together, and then for several of them alone"
    assert checks.checked == [MANY_STATES.text]


def test_a_failure_of_the_machine_is_not_remembered(make: Make, checks: Checks) -> None:
    compiler, limits = make(new_check=CheckProcess), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # a process needs pipes
    try:
        with pytest.raises(EngineFull, match="Too many open files"):
            use(compiler)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert compiler.num_grammars == 0
    assert use(compiler) == [ord("a")]


def test_a_check_that_the_machine_gives_no_time_is_not_remembered(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = make(new_check=CheckProcess)
    monkeypatch.setattr(compiler_module, "_LONGEST_CHECK_S", 0.0)
    with pytest.raises(EngineFull, match="too busy to check the grammar; retry later"):
        use(compiler)
    monkeypatch.undo()
    assert use(compiler) == [ord("a")]


def test_the_oldest_unused_grammars_are_dropped(make: Make, checks: Checks) -> None:
    compiler = make(max_grammars=3)
    checks.released.set()
    for text in ("a", "b", "c", "a", "d"):
        use(compiler, Grammar("regex", text))
    assert compiler.num_grammars == 3
    use(compiler, Grammar("regex", "a"))
    assert checks.checked == ["a", "b", "c", "d"], "a was used after b"
    assert compiler.num_grammars == 3


def test_a_grammar_that_passed_is_compiled_again_without_a_check(
    make: Make, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_matcher(kind: str, text: str, vocabulary: LLTokenizer) -> Any:
        compiled.append(text)
        return library.compile_matcher(kind, text, vocabulary)

    monkeypatch.setattr(compiler_module, "compile_matcher", compile_matcher)
    monkeypatch.setattr(compiler_module, "MAX_PASSED", 2)
    compiler = make(max_grammars=1)
    checks.released.set()
    for text in "abab":
        assert use(compiler, Grammar("regex", text)) == [ord(text)]
    assert (compiled, checks.checked) == (["a", "b", "a", "b"], ["a", "b"]), "an entry is dropped, not what is known"
    for text in "cba":
        use(compiler, Grammar("regex", text))
    assert checks.checked == ["a", "b", "c", "a"], "a bounded number is known, those that were used last"
    use(compiler, Grammar("regex", "b"), tenant="b")
    assert checks.checked[4:] == ["b"], "other tenants know nothing of it"


async def test_a_lone_tenant_may_use_every_place_and_makes_room_for_another(make: Make, checks: Checks) -> None:
    compiler = make(max_pending=8)
    texts = [str(number) for number in range(9)]
    waiting = [asyncio.ensure_future(compiler.compile(Grammar("regex", text), "a")) for text in texts]
    await asyncio.sleep(0)
    with pytest.raises(EngineFull, match="8 grammars"):
        await waiting.pop()
    other = asyncio.ensure_future(compiler.compile(Grammar("regex", "b"), "b"))
    with pytest.raises(EngineFull, match="8 grammars"):
        await waiting.pop()
    checks.released.set()
    await asyncio.gather(other, *waiting)
    assert checks.checked.index("b") < 4, "two were being compiled, and the tenants take turns"
    assert compiler.num_grammars == 8 and "7" not in checks.checked
    assert use(compiler, Grammar("regex", "7")) == [ord("7")], "what made room is compiled when it comes again"
