from __future__ import annotations

import pytest

from tests.deployments.scripted import run_with

ROW = {"id": "ab-cd", "input": "Rhyme\non \x1b[31mrain.", "key_id": "team"}
CHANGED = {
    "name": "poet",
    "action": "accept",
    "digest": "d" * 64,
    "generation": 9,
    "left_out": ["Rhyme\n\x1b[2Jon rain!"],
}


def test_proposed_prompts_are_listed_on_one_line_each() -> None:
    said = run_with({"proposed": [ROW]}, "samples", "list", "acme/poet")
    assert (said.code, said.asked) == (0, [("GET", "/v1/loras/acme%2Fpoet?proposed=true")])
    assert said.stdout.strip() == "ab-cd  team: Rhyme on [31mrain."
    assert "no prompt is proposed for poet" in run_with({"proposed": []}, "samples", "list", "poet").out


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
    said = run_with((201, answer), "samples", *words)
    assert (said.code, said.asked, said.sent) == (0, [("POST", "/v1/loras/poet/samples")], [body])
    if words[0] == "reject":
        assert "1 prompt rejected" in said.out
    else:
        assert "poet is live as dddddddddddd since generation 9" in said.out
        assert "left out, as blank, a near-copy, or beyond the number that is kept: Rhyme [2Jon rain!" in said.out
        assert "\x1b" not in said.stdout
