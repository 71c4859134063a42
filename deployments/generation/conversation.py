"""Choose the texts of a conversation by which its adapters are found.

The rule, in this order:

1. A client's housekeeping prompt, such as "Generate a concise title for this chat", finds no adapter: the base model
   answers. Adapters are trained on tasks, not on a client's chores. A system text is such a prompt only where there is
   one user turn, or as the last message, and an earlier user turn only directly before the last one.
2. The last user turn is the text.
3. An elliptic last turn, such as "and for coffee?", means nothing alone: earlier user turns are joined to it, back to
   the first one that is complete, at most `MAX_JOINED`.
4. A short last turn may be complete, such as one word to be inflected. It is tried alone, and then joined likewise.
5. A system text that gives an instruction is tried last, joined to the text. Sentences that only describe an assistant
   are left out, since they fit every conversation.
6. A last turn that finds no adapter and refers to an earlier turn, such as "a bit warmer, please", keeps the adapter of
   that turn, in any language.

The first text that finds an adapter decides. The conversation itself carries what it was about: the text of the
previous turn is searched again, and its adapter stays unless another is clearly better. Where several adapters may have
answered that turn, the turn before it decides in the same way, back to the first of at most `MAX_JOINED` earlier turns.
So the server keeps no state of a conversation, every replica decides alike, and no tenant can reach into another's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gpu_worker.front.request.prompts import Message
from retriever_svc.views import LONG_CHARS

MAX_JOINED = 4  # user turns, including the last
MAX_SYSTEM_CHARS = 500  # read of a system text
_MOST_SEARCHED_CHARS = 2000  # The pattern takes quadratic time on some texts.
_SHORT_WORDS, _SHORT_CHARS = 3, 24
_ELLIPTIC_WORDS = 12
_WINDOW = 700  # characters at either end in which a client's template says what it wants
_OPENERS = re.compile(
    r"(and|or|but|also|again|another|instead|then|next|ok|okay|yes|no|now|same|once more|one more|more"
    r"|what about|how about|what if|do (it|that|this|the same)|the other|the (first|second|third|last) one"
    r"|shorter|longer|in (that|this) case|try again)\b[\s,:.?!]*",
    re.IGNORECASE,
)
_ORDER = re.compile(
    r"\b(generate|create|write|provide|suggest|produce|(reply|respond) with|come up with)\b[^\n]{0,100}"
    r"\b(title|tags?|follow[- ]?up (questions?|prompts?)|search quer(y|ies))\b"
    r"|\bgive (this|the|our) (chat|conversation|discussion) a (name|title)\b"
    r"|\bsummari[sz]e (this|the|our) (chat|conversation|discussion)\b[^\n]{0,100}\bfuture context\b",
    re.IGNORECASE,
)
_ABOUT_CHAT = re.compile(  # but not about one that has a subject of its own, or follows in the prompt
    r"\b(for|from|of|given?|based on|next in|find|(summari[sz]|categori[sz]|describ|captur|reflect)(e|es|s|ing))"
    r" (this|the|our)( entire)? (chat|(conversation|discussion)(?!:\s*\n))\b"
    r"(?! (about|among|below|between|on|over|app|board|bot|culture|forum|group|paper|room|section)\b)"
    r"|\b(chat|conversation|dialog(ue)?)[ _]history\b",
    re.IGNORECASE,
)
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s(?![a-z\d])|(?<=\n)")  # not behind "max." or "e.g."
_AUTOCOMPLETION = re.compile(r"\s*#+ ?task:\s+you are an autocompletion system\b", re.IGNORECASE)
_DESCRIPTION = re.compile(  # with a bounded gap, as an unbounded one would be searched again from each "i am"
    r"(you are|you're|act as|i am|my name is)\b[^.\n]{0,200}\b(assistant|chatbot|ai|model)\b[^.\n]*[.\n]?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class RoutingTexts:
    """The texts of a conversation that are read. `texts` are tried in order; there is at least one.

    `previous`: the texts to try for each user turn before the last, the newest turn first, at most `MAX_JOINED` turns.
    With `is_housekeeping` the base model answers.
    """

    texts: tuple[str, ...]
    previous: tuple[tuple[str, ...], ...] = ()
    is_housekeeping: bool = False


def choose_texts(messages: Sequence[Message]) -> RoutingTexts:
    """Return the texts of a conversation of at least one message. Without a user turn, read the last message."""
    users = [message.content for message in messages if message.role == "user"] or [messages[-1].content]
    system = "\n".join(message.content for message in messages if message.role == "system")
    if any(map(is_housekeeping, [users[-1], *_orders(messages)])):
        return RoutingTexts((users[-1],), is_housekeeping=True)
    texts = _texts(users)
    order = _DESCRIPTION.sub("", system.strip()[:_MOST_SEARCHED_CHARS], count=1).strip()[:MAX_SYSTEM_CHARS]
    if order and len(users) < len(messages):
        texts.append(f"{order}\n{texts[0]}")
    earlier = range(len(users) - 1, max(0, len(users) - 1 - MAX_JOINED), -1)
    return RoutingTexts(tuple(texts), tuple(tuple(_texts(users[:place])) for place in earlier))


def _orders(messages: Sequence[Message]) -> list[str]:
    """Return the texts beside the last user turn that may order housekeeping.

    They are the system texts beside the only user turn, the last message, and a user turn directly before the last one:
    some clients send their order first and then the turn that it is about.
    """
    is_only_turn = sum(message.role == "user" for message in messages) == 1
    last = messages[-1:] if len(messages) < 2 or messages[-2].role != "user" else messages[-2:]
    systems = [message for message in messages if message.role == "system"] if is_only_turn else []
    return [message.content for message in (*systems, *last) if message.role in ("system", "user")]


def is_housekeeping(text: str) -> bool:
    """Return whether a client asks for its own use: a title, tags, follow-up questions or search queries of a chat.

    One sentence gives the order and names the chat. A task may speak of a conversation elsewhere.
    """
    if _AUTOCOMPLETION.match(text):
        return True
    windows = (text[:_WINDOW], text[-_WINDOW:])
    sentences = [sentence for window in windows for sentence in _SENTENCE_ENDS.split(window.strip())]
    return any(_ORDER.search(sentence) and _ABOUT_CHAT.search(sentence) for sentence in sentences)


def is_elliptic(text: str) -> bool:
    """Return whether a turn depends on the turns before it: it is not long and begins as a continuation."""
    return _OPENERS.match(text.strip()) is not None and _has_at_most(_ELLIPTIC_WORDS, text)


def is_short(text: str) -> bool:
    """Return whether a turn has so few words that it may depend on the turns before it."""
    return len(text.strip()) <= _SHORT_CHARS and _has_at_most(_SHORT_WORDS, text)


def _has_at_most(num_words: int, text: str) -> bool:
    return len(text.split(maxsplit=num_words)) <= num_words  # without reading the rest of a long text


def _texts(users: Sequence[str]) -> list[str]:
    """Return the texts to try for the last of these user turns."""
    last = users[-1]
    if len(users) > 1 and is_elliptic(last):
        return [_joined(users)]
    return [last, _joined(users)] if len(users) > 1 and is_short(last) else [last]


def _joined(users: Sequence[str]) -> str:
    """Join the last turn with those before it, back to the first complete one.

    Blank lines join what is long enough to have views, so that the last turn is one and is read behind any long turn.
    """
    start = len(users) - 1
    while start > 0 and len(users) - start < MAX_JOINED and (start == len(users) - 1 or _depends(users[start])):
        start -= 1
    joined = "\n\n".join(users[start:])
    return joined if len(joined) >= LONG_CHARS else "\n".join(users[start:])


def _depends(text: str) -> bool:
    return is_elliptic(text) or is_short(text)
