"""Shared parts of all uses of the grammar library: limits, JSON options, and the vocabulary.

The library is loaded with the first grammar: most workers never need it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from gpu_worker.front.grammar.schema import parse_schema, prepared

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Between JSON tokens, at most one space: `{"a":1}` and `{"a": 1}`, which models write by habit, are both possible. An
# indented line would let a model that samples spend max_tokens on spaces.
_WHITE_SPACE = " "
_MAX_LEXER_STATES = 20_000  # of a compiled grammar, in all its copies together; each takes up to 2 kB
_STEP_FUEL = 75_000  # limits the library's lexer for one mask; an enum with 2,500 values needs 70,000
# They override a schema's `x-guidance`.
_JSON_OPTIONS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": _WHITE_SPACE,
    "coerce_one_of": False,
    "lenient": False,
    "json_allowed_escapes": '"\\nrbtf',  # without \\uXXXX each name has one spelling, so none escapes its schema
}


def limits() -> LLParserLimits:
    """Return the bounds of compiling and of one step. Messages name no internal state."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, step_lexer_fuel=_STEP_FUEL, verbose_errors=False)


def compile_matcher(kind: str, text: str, vocabulary: LLTokenizer) -> LLMatcher:
    """Compile a grammar. An error is in the matcher. Raises: ValueError if the text has not the form of its kind."""
    from llguidance import LLMatcher, grammar_from

    if kind == "json_schema":
        source = LLMatcher.grammar_from_json_schema(json.dumps(parse_schema(text)), overrides=_JSON_OPTIONS)
    elif kind == "tool_calls":
        source = LLMatcher.grammar_from_lark(lark_of_calls(text))
    else:
        source = grammar_from(kind, text)
    return LLMatcher(vocabulary, source, limits=limits(), log_level=0)


def finds_first_mask(matcher: LLMatcher) -> bool:
    """Return whether the library finds what may begin an answer.

    It does not after the matcher's lexer has reached a limit. Copies of a matcher share its lexer.
    """
    if matcher.is_error():
        return False
    answer = matcher.deep_copy()
    answer.compute_bitmask()
    return not answer.is_error()


def lark_of_calls(text: str) -> str:
    """Return the rules of a grammar of calls with its schemas, each with the same options as a schema alone."""
    parts: dict[str, Any] = json.loads(text)
    rules: str = parts["rules"]
    schemas = [json.dumps({**prepared(schema), "x-guidance": _JSON_OPTIONS}) for schema in parts["schemas"].values()]
    return rules + "".join(f"schema_{place}: %json {schema}\n" for place, schema in enumerate(schemas))


def with_json_options(schema: str) -> str:
    """Return the JSON schema with the options of this project inside, for a program that gives the library none."""
    root = parse_schema(schema)
    fields = root if isinstance(root, dict) else {"allOf": [root]}
    return json.dumps(fields | {"x-guidance": _JSON_OPTIONS})


def make_vocabulary(
    token_bytes: Callable[[int], bytes],
    size: int,
    end_ids: Collection[int],
    special_ids: Collection[int] = (),
    tokenize: Callable[[str], list[int]] | None = None,
) -> LLTokenizer:
    """Return a vocabulary of `size` ids. Grammars end with one of `end_ids` and never use `special_ids` as text.

    `tokenize`: how the model's tokenizer divides a text. Where a grammar leaves one text only, its mask allows only the
    token that this text begins with, so that the model sees the tokens it was trained with.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = sorted(token_id for token_id in end_ids if token_id < size)
    special = sorted({*ends, *(token_id for token_id in special_ids if token_id < size)})
    tokens = _Tokens([token_bytes(token_id) for token_id in range(size)], ends[0], special, tokenize)
    vocabulary = LLTokenizer(TokenizerWrapper(tokens), eos_token=ends)
    tokens.longest = vocabulary.greedy_tokenize
    return vocabulary


class _Tokens:
    """The tokens as the library asks for them.

    It requires tokens with exactly the bytes of a text. Some tokenizers add a space or normalise; then the longest
    tokens are taken.
    """

    bos_token_id = None
    longest: Callable[[str], list[int]] | None = None  # the library makes a first call before there is a vocabulary

    def __init__(
        self,
        tokens: Sequence[bytes],
        end_id: int,
        special_ids: Sequence[int],
        tokenize: Callable[[str], list[int]] | None,
    ) -> None:
        self.tokens, self.eos_token_id, self.special_token_ids = tokens, end_id, special_ids
        self._tokenize = tokenize

    def __call__(self, text: bytes | str) -> list[int]:
        if self.longest is None:
            return []
        data, text = (text.encode(), text) if isinstance(text, str) else (text, text.decode())
        found = self._tokenize(text) if self._tokenize is not None else []
        is_exact = all(i < len(self.tokens) for i in found) and b"".join(self.tokens[i] for i in found) == data
        return found if is_exact else self.longest(text)
