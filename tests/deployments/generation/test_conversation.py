from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.generation.conversation import (
    MAX_JOINED,
    MAX_SYSTEM_CHARS,
    RoutingTexts,
    choose_texts,
    is_elliptic,
    is_housekeeping,
    is_short,
)
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.tools import ToolCall
from retriever_svc.views import LONG_CHARS, split_views

TASK = "Negate the statement: the chemists have loved shopping"
OTHER = "Turn this statement into a question: the florists learn maths"


def said(*turns: str) -> list[Message]:
    """User turns with an answer after each but the last."""
    messages = [message for turn in turns for message in (Message("user", turn), Message("assistant", "Done."))]
    return messages[:-1]


LONG = "And the king said to his people that the war was over and that they could all go home now"


@pytest.mark.parametrize(
    ("turns", "texts", "previous"),
    [
        ([OTHER], [OTHER], []),
        ([TASK, OTHER], [OTHER], [TASK]),
        ([TASK, LONG], [LONG], [TASK]),
        ([OTHER, TASK, "and for coffee?"], [f"{TASK}\nand for coffee?"], [TASK, OTHER]),
        ([TASK, "Now the same with dogs"], [f"{TASK}\nNow the same with dogs"], [TASK]),
        ([TASK, "What about the dogs?"], [f"{TASK}\nWhat about the dogs?"], [TASK]),
        ([TASK, "again"], [f"{TASK}\nagain"], [TASK]),
        ([TASK, "the dogs bark"], ["the dogs bark", f"{TASK}\nthe dogs bark"], [TASK]),
        (["the dogs bark"], ["the dogs bark"], []),
        ([OTHER, TASK, "and tea?", "and milk?"], [f"{TASK}\nand tea?\nand milk?"], [f"{TASK}\nand tea?", TASK, OTHER]),
        ([TASK, "the dogs bark", OTHER], [OTHER], [("the dogs bark", f"{TASK}\nthe dogs bark"), TASK]),
    ],
)
def test_a_turn_is_read_alone_if_it_is_complete_and_with_earlier_ones_otherwise(
    turns: list[str], texts: list[str], previous: list[str | tuple[str, ...]]
) -> None:
    """An elliptic turn is joined back to a complete one, and a short turn is tried alone first."""
    earlier = tuple((text,) if isinstance(text, str) else text for text in previous)
    assert choose_texts(said(*turns)) == RoutingTexts(tuple(texts), previous=earlier)


@pytest.mark.parametrize("num_chars", [LONG_CHARS, 1_700, 20_000])
def test_a_follow_up_after_a_long_turn_is_a_view_of_its_own(num_chars: int) -> None:
    """The encoder reads the beginning of a text, so it would not reach the end of one long paragraph."""
    passage = ("The river rises in the hills and flows past three old mills. " * 400)[:num_chars].strip()
    for follow_up in ("Now translate this into German, please", "the long night"):
        text = choose_texts(said(passage, follow_up)).texts[-1]
        assert text == f"{passage}\n\n{follow_up}"
        assert split_views(text)[1:] == [follow_up, passage]


def test_a_blank_line_joins_turns_only_where_views_are_made_of_them() -> None:
    follow_up = "Now translate this into German, please"
    room = LONG_CHARS - len(follow_up)
    for num_chars, between in ((room - 3, "\n"), (room - 2, "\n\n")):
        [text] = choose_texts(said("x" * num_chars, follow_up)).texts
        assert text == "x" * num_chars + between + follow_up
        assert len(split_views(text)) == (1 if between == "\n" else 3)


def test_no_more_than_the_bound_is_joined() -> None:
    turns = [f"and {number}?" for number in range(20)]
    [text] = choose_texts(said(TASK, *turns)).texts
    assert text.split("\n") == turns[-MAX_JOINED:]


def test_earlier_turns_are_kept_newest_first_up_to_the_bound() -> None:
    turns = [f"{TASK} number {number}" for number in range(9)]
    assert choose_texts(said(*turns, OTHER)).previous == tuple(zip(turns[: -MAX_JOINED - 1 : -1]))
    assert choose_texts(said(*turns[:MAX_JOINED], OTHER)).previous == tuple(zip(turns[:MAX_JOINED][::-1]))


ORDER = "Negate each statement. Act as an AI that is brief."
LONG_ORDER = "Negate each statement. " + "x" * MAX_SYSTEM_CHARS


@pytest.mark.parametrize(
    ("system", "read"),
    [
        ("You are a helpful assistant.", None),
        ("You are ChatX, a large language model.", None),
        ("", None),
        ("Negate each statement.", "Negate each statement."),
        (f"You are a helpful assistant. {ORDER}", ORDER),
        ("\n" * 5_000 + "You are a helpful assistant.\n\nNegate each statement.", "Negate each statement."),
        (LONG_ORDER, LONG_ORDER[:MAX_SYSTEM_CHARS]),
    ],
)
def test_an_instruction_in_the_system_text_is_tried_last(system: str, read: str | None) -> None:
    """A first sentence that describes the assistant is left out, and so is what exceeds the bound."""
    expected = (TASK,) if read is None else (TASK, f"{read}\n{TASK}")
    assert choose_texts([Message("system", system), *said(TASK)]).texts == expected


@pytest.mark.parametrize("repeated", [" ", "\n", "i am "])
def test_no_system_text_takes_long_to_read(repeated: str) -> None:
    system = "Negate each statement." + repeated * (8_000 // len(repeated)) + "x"
    began = time.thread_time()
    choose_texts([Message("system", system), *said(TASK)])
    assert time.thread_time() - began < 0.2


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_without_a_user_turn_the_last_message_is_read(role: str) -> None:
    assert choose_texts([Message(role, TASK)]) == RoutingTexts((TASK,))


@pytest.mark.parametrize(
    "text",
    [
        "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n<chat_history>\nHi",
        "### Task:\nGenerate 1-3 broad tags categorizing the main themes of the chat history, along with 1-3 subtopics",
        "### Task:\nSuggest 3-5 relevant follow-up questions that the user might ask next, from the chat history",
        "### Task:\nYou are an autocompletion system. Continue the text in `<text>`.",
        "Provide a concise, 5-word-or-less title for the conversation, using title case conventions.",
        "Please generate a four to five word title summarizing our conversation without any lead-in or punctuation.",
        "Based on the text above, give this conversation a name.",
        "Summarize the discussion briefly in 200 words or less to use as a prompt for future context.",
        "Based on the chat history, give this conversation a name.\nKeep it short. Here it is:\n```\nUser: hi\n```",
        "Given the conversation above, generate a title that describes it in 3.5 words or less.",
        "Generate a title for this conversation:\n",
        "Write a short title (max. 5 words) for this conversation",
        "Write a short title for this chat:\nUser: hi\nAssistant: hello",
        "Suggest 3-5 relevant follow-up questions that the user might naturally ask next in this conversation.",
        "User: hi\nAI: hello\n" * 400 + "Reply with a title for the chat that is 3-4 words in length.",
    ],
)
def test_a_clients_housekeeping_finds_no_adapter(text: str) -> None:
    assert is_housekeeping(text)
    assert choose_texts(said(TASK, text)).is_housekeeping
    assert choose_texts([Message("system", text), *said("User: hi")]).is_housekeeping


PRODUCTS = (
    "You are a product writer. Write a title for each product that the user describes. "
    "Keep to the products of this conversation."
)


@pytest.mark.parametrize(
    "text",
    [
        "Write a title for this essay about chat bots",
        "Summarize the following conversation: A: Hello. B: Hi, is this the shop?",
        "Generate three tags for this photo of a dog",
        "What is the title of the book that they mention in this conversation?",
        "### Task:\nRespond to the user query using the provided context, with citations.\n<context>Dogs</context>",
        "Create a search query language in Python",
        "Write a title for this dialogue:\nAnna: Are you coming?\nBen: Yes, at 8.",
        "Write a title for this conversation:\nAnna: Are you coming?\nBen: Yes, at 8.",
        "Generate a follow-up question for the conversation below.\nQ: Who are you?\nA: The cook.",
        "Suggest a title for my blog post about the discussion culture in Germany.",
        "Suggest a title for my blog post on the conversation.",
        "Suggest tags for my article about the discussion on climate policy.",
        "Write a title for the discussion section of my thesis",
        "Write a title for each product. The customer is a friend of the conversation.",
        PRODUCTS,
        TASK,
    ],
)
def test_a_prompt_of_a_task_is_not_housekeeping(text: str) -> None:
    assert not is_housekeeping(text)
    assert not choose_texts(said(text)).is_housekeeping
    assert not choose_texts([Message("system", text), *said("wool socks, grey")]).is_housekeeping


def test_a_system_text_is_housekeeping_only_with_one_turn_or_behind_all_turns() -> None:
    system, turns = Message("system", "Generate a concise title for this chat"), said(TASK, OTHER)
    assert choose_texts([system, *said(TASK)]).is_housekeeping
    assert not choose_texts([system, *turns]).is_housekeeping
    assert choose_texts([*turns, Message("assistant", "Done."), system]).is_housekeeping


def test_an_earlier_turn_is_housekeeping_only_directly_before_the_last_one() -> None:
    order, answer = Message("user", "Generate a title for this conversation:\n"), Message("assistant", "Cats")
    assert choose_texts([order, *said(TASK)]).is_housekeeping
    assert choose_texts([Message("system", "You name chats."), order, *said(TASK)]).is_housekeeping
    assert not choose_texts([order, answer, *said(TASK)]).is_housekeeping


@pytest.mark.parametrize("repeated", ["write title ", "write ", "title ", "title for the chat on ", " ", "\n", "a. "])
def test_no_text_takes_long_to_be_found_no_housekeeping(repeated: str) -> None:
    text = "write " + repeated * (1_000_000 // len(repeated)) + "x"
    began = time.thread_time()
    assert not is_housekeeping(text)
    assert time.thread_time() - began < 0.2


@pytest.mark.parametrize("text", ["android", "notable", "oranges", "butterfly", "", "c a t"])
def test_a_word_that_begins_like_an_opener_is_not_elliptic(text: str) -> None:
    assert not is_elliptic(text)
    assert is_short(text)


ROLES = st.sampled_from(["system", "user", "assistant"])
TEXTS = st.one_of(st.text(max_size=40), st.sampled_from([TASK, OTHER, "and tea?", "again", "the dogs bark"]))


@given(st.lists(st.builds(Message, ROLES, TEXTS), min_size=1, max_size=12))
def test_every_text_ends_with_the_last_turn_and_adds_only_what_was_said(messages: list[Message]) -> None:
    reading = choose_texts(messages)
    users = [message.content for message in messages if message.role == "user"]
    last = users[-1] if users else messages[-1].content
    assert 1 <= len(reading.texts) <= 3
    assert all(text.endswith(last) for text in reading.texts)
    lines = {line for message in messages for line in message.content.split("\n")}
    assert all(any(line in said for said in lines) for text in reading.texts for line in text.split("\n"))
    num_earlier = 0 if reading.is_housekeeping else min(MAX_JOINED, max(0, len(users) - 1))
    assert len(reading.previous) == num_earlier


def test_calls_and_their_results_are_not_turns_of_the_user() -> None:
    call = Message("assistant", "I look.", (ToolCall("c1", "get_weather", "{}"),))
    result = Message("tool", "Generate a concise title for this chat", (), "c1", "get_weather")
    asked = said(TASK, OTHER)
    assert choose_texts([*asked, call, result]) == choose_texts([*asked, call, result, result]) == choose_texts(asked)
