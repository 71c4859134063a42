"""A vocabulary of all bytes and a few longer tokens, and grammars compiled for it."""

from __future__ import annotations

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from gpu_worker.front.grammar.library import compile_matcher, make_vocabulary
from gpu_worker.front.grammar.state import GrammarState
from gpu_worker.front.request.grammar import Grammar

END, OTHER_END, SPECIAL, EMPTY = 256, 257, 258, 259
PIECES = [
    b'{"',
    b'"}',
    b'":',
    b', "',
    b"  ",
    b"\n ",
    b"12",
    b"true}",
    b"re",
    b"ed",
    b"\xc3\xbc",
    b"gr\xc3",
    b"}\n",
    b"-0.",
]
MANY_STATES = Grammar("regex", "(.{1,40}x.{1,40}y){3}")  # an answer of 50 bytes needs about 500 states of the lexer
TOKENS = [*(bytes([byte]) for byte in range(256)), b"<end>", b"<other>", b"<start>", b"", *PIECES]


BYTES = make_vocabulary(lambda token_id: bytes([token_id]) if token_id < END else b"", END + 1, [END])


def allows(grammar: Grammar, text: str) -> bool:
    """Tell whether the text is a whole answer of the grammar, byte by byte."""
    matcher = compile_matcher(grammar.kind, grammar.text, BYTES)
    return bool(matcher.consume_tokens(list(text.encode()))) and bool(matcher.is_accepting())


def vocabulary_of(tokens: list[bytes]) -> LLTokenizer:
    return make_vocabulary(tokens.__getitem__, len(tokens), [END, OTHER_END], [SPECIAL])


def compiled(grammar: Grammar, tokens: list[bytes] = TOKENS) -> LLMatcher:
    matcher = compile_matcher(grammar.kind, grammar.text, vocabulary_of(tokens))
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def state_of(grammar: Grammar, tokens: list[int], num_prompt: int = 0) -> GrammarState:
    return GrammarState(compiled(grammar), tokens, num_prompt, len(TOKENS))


def ids_of(state: GrammarState) -> list[int]:
    return np.flatnonzero(np.unpackbits(state.allowed.view(np.uint8), bitorder="little")).tolist()
