"""The text that the model continues."""

from __future__ import annotations

import pytest

from gpu_worker.errors import PromptInvalid
from gpu_worker.front.request.prompts import (
    ALPACA_PREAMBLE,
    ALPACA_STOPS,
    Message,
    alpaca_prompt,
    make_turn,
    render,
    render_alpaca,
    template_stops,
)
from gpu_worker.front.request.tools import ToolCall
from tests.tiny import byte_tokenizer

CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye")]


def test_one_instruction_is_the_alpaca_prompt() -> None:
    expected = f"{ALPACA_PREAMBLE}\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    assert alpaca_prompt("Add 1 and 2.") == expected
    assert render([Message("user", "Add 1 and 2.")], "alpaca", byte_tokenizer()) == expected


def test_alpaca_turns_follow_the_system_text_and_end_where_the_answer_begins() -> None:
    assert render_alpaca(TURNS) == "\n\n".join(
        [
            ALPACA_PREAMBLE,
            "Be brief.",
            "### Instruction:\nHi",
            "### Response:\nHello",
            "### Instruction:\nBye",
            "### Response:\n",
        ]
    )


def test_alpaca_has_no_paragraph_for_an_empty_system_text() -> None:
    assert render_alpaca([Message("system", ""), *TURNS[1:]]) == render_alpaca(TURNS[1:])


def test_chat_is_the_tokenizers_own_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    assert render(TURNS, "chat", tokenizer) == "<bos>[system]Be brief.[user]Hi[assistant]Hello[user]Bye[assistant]"


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "rendered"),
    [(CHAT, "<bos>[user]One[user]Two[user]Three"), (ALTERNATING, "[user]One\n\nTwo\n\nThree")],
    ids=["any order", "alternating"],
)
def test_messages_of_the_user_in_a_row_are_one_where_roles_must_alternate(template: str, rendered: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    turns = [Message("user", text) for text in ("One", "Two", "Three")]
    assert render(turns, "chat", tokenizer).removesuffix("[assistant]") == rendered
    tokenizer.chat_template = ALTERNATING
    with pytest.raises(PromptInvalid, match="roles must alternate"):
        render([Message("assistant", "Hi"), *turns], "chat", tokenizer)


@pytest.mark.parametrize(("names", "kept"), [(("Ada", "Ada"), "Ada"), (("Ada", "Bob"), ""), (("Ada", ""), "")])
def test_joined_messages_have_a_name_only_if_one_participant_wrote_them(names: tuple[str, str], kept: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ALTERNATING.replace("{{ m.role }}", "{{ m.name }}")
    turns = [Message("user", text, name=name) for text, name in zip(("One", "Two"), names, strict=True)]
    assert render(turns, "chat", tokenizer) == f"[{kept}]One\n\nTwo"


@pytest.mark.parametrize(
    ("name", "template", "reason"),
    [
        *[(name, None, "'auto', 'alpaca' or 'chat'") for name in ("", "Alpaca", "{{ 1 }}")],
        ("chat", None, "needs a chat template"),
        ("chat", "{{ messages.append(1) }}", "append"),  # it runs in a sandbox
    ],
)
def test_a_template_that_cannot_render_is_refused(name: str, template: str | None, reason: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(PromptInvalid, match=reason):
        render(TURNS, name, tokenizer)


def test_alpaca_stops_at_the_next_instruction_and_at_another_response() -> None:
    tokenizer = byte_tokenizer()
    assert template_stops("alpaca", tokenizer) == ALPACA_STOPS == ("### Instruction:", "### Response:")
    assert template_stops("chat", tokenizer) == ()


def test_auto_is_the_tokenizers_chat_template_or_alpaca() -> None:
    tokenizer = byte_tokenizer()
    assert render(TURNS, "auto", tokenizer) == render_alpaca(TURNS)
    assert template_stops("auto", tokenizer) == ALPACA_STOPS
    tokenizer.chat_template = CHAT
    assert render(TURNS, "auto", tokenizer) == render(TURNS, "chat", tokenizer) != render_alpaca(TURNS)
    assert template_stops("auto", tokenizer) == ()


def test_templates_get_calls_as_objects_and_ids_of_nine_characters() -> None:
    call, broken = ToolCall("call_0123456789", "f", '{"a": [1]}'), ToolCall("abcdefgh9", "g", "{no json")
    turn = make_turn(Message("assistant", "Hm", (call, broken)))
    first, second = turn["tool_calls"]
    assert first["function"] == {"name": "f", "arguments": {"a": [1]}}
    assert second == {"id": "abcdefgh9", "type": "function", "function": {"name": "g", "arguments": "{no json"}}
    result = make_turn(Message("tool", "Rain", (), "call_0123456789", "f"))
    assert result == {"role": "tool", "content": "Rain", "tool_call_id": first["id"], "name": "f"}
    assert len(first["id"]) == 9 and first["id"].isalnum()
    assert make_turn(Message("user", "Hi")) == {"role": "user", "content": "Hi"}
    assert make_turn(Message("user", "Hi", name="Ada")) == {"role": "user", "content": "Hi", "name": "Ada"}


def test_the_size_of_a_message_counts_its_calls() -> None:
    assert Message("assistant", "Hm", (ToolCall("c1", "f", "{}"),)).num_chars == len("Hm" + "c1" + "f" + "{}")
