"""The grammar of a request: sizes, choices, and what does not go with it."""

from __future__ import annotations

import pytest

from gpu_worker.errors import GrammarInvalid, SamplingInvalid
from gpu_worker.front.request.grammar import MAX_CHOICES, MAX_GRAMMAR_CHARS, Grammar
from gpu_worker.front.request.request import SamplingParams


def test_a_grammar_is_bounded_and_its_error_names_the_field() -> None:
    assert len(Grammar("regex", "a" * MAX_GRAMMAR_CHARS).text) == MAX_GRAMMAR_CHARS
    with pytest.raises(GrammarInvalid, match=f"structured_outputs.regex cannot be compiled: .* {MAX_GRAMMAR_CHARS}"):
        Grammar("regex", "a" * (MAX_GRAMMAR_CHARS + 1), "structured_outputs.regex")


@pytest.mark.parametrize("choices", [[], [""], ["a", ""], ["a"] * (MAX_CHOICES + 1)], ids=len)
def test_choices_are_a_few_texts_that_are_not_empty(choices: list[str]) -> None:
    with pytest.raises(GrammarInvalid, match="1 to 1000 texts"):
        Grammar.of_choices(choices, "structured_outputs.choice")


def test_grammars_are_equal_by_kind_and_text() -> None:
    assert Grammar("regex", "a", "one") == Grammar("regex", "a", "two") != Grammar("grammar", "a", "one")


@pytest.mark.parametrize("changes", [{"min_tokens": 2}, {"ignore_eos": True}])
def test_the_grammar_alone_ends_the_answer(changes: dict[str, int]) -> None:
    [name] = changes
    with pytest.raises(SamplingInvalid, match=f"{name} must be absent with structured output"):
        SamplingParams(grammar=Grammar("regex", "a"), **changes)  # type: ignore[arg-type]
