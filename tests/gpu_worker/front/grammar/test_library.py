"""The vocabulary that grammars are compiled against, and the white space of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from llguidance import LLMatcher

from gpu_worker.front.grammar.library import compile_matcher, make_vocabulary, with_json_options
from gpu_worker.front.grammar.state import GrammarState
from gpu_worker.front.request.grammar import ANY_OBJECT, Grammar
from tests.gpu_worker.front.grammar.small_vocabulary import END, SPECIAL, TOKENS, compiled, ids_of, vocabulary_of


def test_a_forced_text_has_the_tokens_of_the_tokenizer_where_their_bytes_are_right() -> None:
    def first_of(tokenize: Callable[[str], list[int]] | None) -> list[int]:
        vocabulary = make_vocabulary(TOKENS.__getitem__, len(TOKENS), [END], [SPECIAL], tokenize)
        state = GrammarState(compile_matcher("regex", "red", vocabulary), [], 0, len(TOKENS))
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
        ('{ "a" : [ 1 , 2 ] }', True),
        ('{\n  "a": 1\n}', False),
        ('{"a":\t1}', False),
        (' {"a": 1}', False),
        ('{"a":  1}', False),
    ],
)
def test_json_has_at_most_one_space_between_two_tokens(text: str, is_complete: bool) -> None:
    inside = LLMatcher.grammar_from_json_schema(with_json_options(ANY_OBJECT), defaults={"whitespace_flexible": True})
    tokens = list(text.encode())
    for matcher in (compiled(Grammar("json_schema", ANY_OBJECT)), LLMatcher(vocabulary_of(TOKENS), inside)):
        assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) == is_complete


def test_an_enum_fits_thirty_tokens_where_the_model_prefers_white_space() -> None:
    schema = {"type": "object", "properties": {"label": {"enum": ["a", "b"]}}, "required": ["label"]}
    answer: list[int] = []
    grammar = Grammar("json_schema", json.dumps(schema | {"additionalProperties": False}))
    state = GrammarState(compiled(grammar), answer, 0, len(TOKENS))
    state.update()
    while END not in (allowed := ids_of(state)) and len(answer) < 31:
        answer.append(min(allowed, key=lambda token: (not TOKENS[token].isspace(), len(TOKENS[token]))))
        state.update()
    assert len(answer) <= 30 and b"".join(TOKENS[token] for token in answer) == b'{ "label" : "a" }'


def test_the_options_of_a_schema_are_replaced() -> None:
    own = '{"type": "object", "x-guidance": {"whitespace_flexible": false}}'
    assert with_json_options(own) == with_json_options(ANY_OBJECT)
    assert json.loads(with_json_options("true"))["allOf"] == [True]
