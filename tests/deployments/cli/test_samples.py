from __future__ import annotations

import pytest

from tests.deployments.scripted import run, scripted

ROW = {"id": "ab-cd", "input": "Rhyme\non \x1b[31mrain.", "key_id": "team"}
CHANGED = {"name": "poet", "action": "accept", "digest": "d" * 64, "generation": 9, "left_out": ["Rhyme on rain!"]}


def test_proposed_prompts_are_listed_on_one_line_each() -> None:
    with scripted((200, {"proposed": [ROW]})) as server:
        result = run("samples", "list", "acme/poet", "--url", server.url)
    assert (result.exit_code, server.asked) == (0, [("GET", "/v1/loras/acme%2Fpoet?proposed=true")])
    assert result.stdout.strip() == "ab-cd  team: Rhyme on [31mrain."


def test_an_empty_list_says_so() -> None:
    with scripted((200, {"proposed": []})) as server:
        assert "no prompt is proposed for poet" in run("samples", "list", "poet", "--url", server.url).stdout


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (("accept", "poet"), {"action": "accept"}),
        (("accept", "poet", "a", "b"), {"action": "accept", "ids": ["a", "b"]}),
        (("reject", "poet", "a"), {"action": "reject", "ids": ["a"]}),
        (("undo", "poet"), {"action": "undo"}),
    ],
)
def test_a_decision_is_sent(words: tuple[str, ...], body: dict[str, object]) -> None:
    answer = {"name": "poet", "action": "reject", "num_rejected": 1} if words[0] == "reject" else CHANGED
    with scripted((201, answer)) as server:
        result = run("samples", *words, "--url", server.url)
    assert (result.exit_code, server.asked, server.sent) == (0, [("POST", "/v1/loras/poet/samples")], [body])
    if words[0] == "reject":
        assert "1 prompt rejected" in result.stdout
    else:
        assert "poet is live as dddddddddddd since generation 9" in result.stdout
        assert "left out, as a near-copy or beyond a quarter of the samples: Rhyme on rain!" in result.stdout


def test_a_refusal_is_shown() -> None:
    with scripted((400, {"error": {"message": "ids: no prompt is proposed for 'poet'"}})) as server:
        result = run("samples", "accept", "poet", "--url", server.url)
    assert result.exit_code == 1
    assert "IDS: no prompt is proposed for 'poet'" in result.output
