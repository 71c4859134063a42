"""The vocabulary that grammars are compiled against, and the white space of JSON."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpu_worker.grammar.library import make_vocabulary, matcher_of
from gpu_worker.grammar.state import GrammarState
from gpu_worker.request.grammar import ANY_OBJECT, Grammar
from tests.gpu_worker.grammar.small_vocabulary import END, SPECIAL, TOKENS, compiled, ids_of


def test_a_forced_text_has_the_tokens_of_the_tokenizer_where_their_bytes_are_right() -> None:
    def first_of(tokenize: Callable[[str], list[int]] | None) -> list[int]:
        vocabulary = make_vocabulary(TOKENS.__getitem__, len(TOKENS), [END], [SPECIAL], tokenize)
        state = GrammarState(matcher_of(Grammar("regex", "red"), vocabulary), [], 0, len(TOKENS))
        state.update()
        return ids_of(state)

    longest = TOKENS.index(b"re")
    assert first_of(None) == [longest]
    assert first_of(lambda text: list(text.encode())) == [ord("r")]
    assert first_of(lambda text: [ord(" "), *text.encode()]) == [longest], "it adds a space"


@pytest.mark.parametrize(
    ("text", "is_complete"),
    [
        ('{"a":[1,2]}', True),
        ('{"a": [1, 2]}', True),
        ('{\n  "a": [\n    1\n  ]\n}', True),
        ('{\n\t"a": {}\n}', True),
        (' {"a": 1}', False),
        ('{"a":   1}', False),
        ('{"a":\n\n1}', False),
    ],
)
def test_json_has_the_white_space_of_one_line_or_of_indented_lines(text: str, is_complete: bool) -> None:
    matcher = compiled(Grammar("json_schema", ANY_OBJECT))
    tokens = list(text.encode())
    assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) == is_complete
