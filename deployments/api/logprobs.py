"""Log probabilities of tokens in the shapes of the OpenAI API and of vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import TypedDict

from gpu_worker.front.request.request import PromptToken, TokenLogprob


class Alternative(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(TypedDict):
    content: list[ChatToken]
    refusal: None


class TextLogprobs(TypedDict):
    """Parallel lists. The first token of an echoed prompt has None, because nothing is before it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    """vLLM's entry for one id. `rank`: its place among all ids, from 1."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt the entries of the most likely ids and of the token itself, by id; None for the first.
"""


def chat_logprobs(entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Return one object per token of the text, calls left out. A partial character is U+FFFD; its bytes are exact."""
    content: list[ChatToken] = [
        {**_entry(entry.token, entry.logprob), "top_logprobs": [_entry(*alternative) for alternative in entry.top]}
        for entry in entries
        if not entry.is_end and not entry.is_call
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    entries: Sequence[TokenLogprob], prompt: Sequence[PromptToken] = (), num_top: int = 0, num_chars: int = 0
) -> TextLogprobs:
    """Return parallel lists. A token is always in its own `top_logprobs`, as an additional one if necessary.

    The id that ended the answer is the last token, so that there are as many as the usage counts: programs that score
    a prompt drop the last one, which they asked for with `max_tokens: 1`.
    `prompt`: the tokens before the answer, each with `num_top` alternatives; their text has `num_chars` characters.
    """
    known: list[tuple[bytes, float | None, dict[str, float] | None, int]] = [
        (item.token, item.logprob, _alternatives(item, num_top), item.text_offset) for item in prompt
    ]
    for entry in entries:
        top = {_name(token): logprob for token, logprob in (*entry.top, (entry.token, entry.logprob))}
        known.append((entry.token, entry.logprob, top, num_chars + entry.text_offset))
    return {
        "tokens": [_name(token) for token, _, _, _ in known],
        "token_logprobs": [logprob for _, logprob, _, _ in known],
        "top_logprobs": [top for _, _, top, _ in known],
        "text_offset": [offset for _, _, _, offset in known],
    }


def _alternatives(item: PromptToken, num_top: int) -> dict[str, float] | None:
    if item.logprob is None:
        return None
    return {_name(token): logprob for _, token, logprob in item.top[:num_top]} | {_name(item.token): item.logprob}


def prompt_logprobs(prompt: Sequence[PromptToken], num_top: int) -> PromptLogprobs:
    """Return vLLM's form of the log probabilities of a prompt, with `num_top` alternatives for each token."""
    found: PromptLogprobs = []
    for item in prompt:
        if item.logprob is None or item.rank is None:
            found.append(None)
            continue
        ranked = [(token_id, token, logprob, place) for place, (token_id, token, logprob) in enumerate(item.top, 1)]
        entries = [(item.token_id, item.token, item.logprob, item.rank), *ranked[:num_top]]
        found.append(
            {
                str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": token.decode(errors="replace")}
                for token_id, token, logprob, rank in entries
            }
        )
    return found


def _entry(token: bytes, logprob: float) -> Alternative:
    return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}


def _name(token: bytes) -> str:
    """Return the token as text, or `bytes:\\xe4` for a partial character: these are keys and must differ."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
