"""Log probabilities in the two shapes the OpenAI API has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_worker.request.request import TokenLogprob


def chat_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Of chat completions: one object a token. The text of a part of a character is U+FFFD; its bytes are exact."""
    content = [
        _entry(entry.token, entry.logprob) | {"top_logprobs": [_entry(*alternative) for alternative in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def text_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Of text completions: parallel lists. The token itself is in its own `top_logprobs`, as one more if need be."""
    return {
        "tokens": [_name(entry.token) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            {_name(token): logprob for token, logprob in (*entry.top, (entry.token, entry.logprob))}
            for entry in entries
        ],
        "text_offset": [entry.text_offset for entry in entries],
    }


def _entry(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}


def _name(token: bytes) -> str:
    """The token as text, or `bytes:\\xe4` for a part of a character: these are keys, and must differ."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
