"""Deltas of answers that call functions, merged at random places as intervals of a stream merge them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

from gpu_worker.front.delta_stream import joined
from gpu_worker.front.request.request import Delta, TokenLogprob
from gpu_worker.front.request.tool_parser import ToolCallParser
from gpu_worker.front.request.tools import HERMES

_OBJECTS = ('{"name": "f", "arguments": {"city": "Rome"}}', '{"name": "g", "arguments": {}}')


def random_calls(seed: int) -> list[Delta]:
    """Return the deltas of texts and calls in turn, each with the log probabilities of its tokens."""
    chance = random.Random(seed)
    answer = chance.choice(["", "Well. "])
    for _ in range(chance.randrange(1, 4)):
        answer += f"<tool_call>\n{chance.choice(_OBJECTS)}\n</tool_call>" + chance.choice(["", "\nI am looking. "])
    ids = (f"call_{number}" for number in itertools.count())
    parser = ToolCallParser(HERMES, {"f", "g"}, is_constrained=chance.random() < 0.7, new_id=lambda: next(ids))
    deltas: list[Delta] = []
    at, logprobs = 0, list[TokenLogprob]()
    while at < len(answer):
        piece = answer[at : at + chance.randrange(1, 9)]
        logprobs.append(TokenLogprob(piece.encode(), -0.5, (), at))
        at += len(piece)
        text, calls, reason = parser.read(piece, "stop" if at == len(answer) else None)
        if not (text or calls or reason):
            continue
        scores = tuple(replace(entry, is_call=not text) for entry in logprobs)
        delta = Delta(text, 7, at, reason, logprobs=scores, tool_calls=calls)
        logprobs = []
        if len(deltas) > 1 and chance.random() < 0.6:
            deltas[-1] = joined(deltas[-1], delta)
        else:
            deltas.append(delta)
    return deltas
