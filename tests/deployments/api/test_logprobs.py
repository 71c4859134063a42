from __future__ import annotations

from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.completion_choice import Logprobs

from deployments.api.logprobs import chat_logprobs, prompt_logprobs, text_logprobs
from gpu_worker.front.request.request import PromptToken, TokenLogprob

HALF = TokenLogprob(b"\xc3", -0.5, ((b"\xc3", -0.5), (b"\xe2", -1.5)), 0)
REST = TokenLogprob(b"\xa9", -0.25, ((b" a", -0.125),), 0)


def test_chat_logprobs_are_objects_with_the_exact_bytes() -> None:
    reported = chat_logprobs((HALF, REST))
    assert reported["content"] == [
        {
            "token": "\ufffd",
            "logprob": -0.5,
            "bytes": [0xC3],
            "top_logprobs": [
                {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3]},
                {"token": "\ufffd", "logprob": -1.5, "bytes": [0xE2]},
            ],
        },
        {
            "token": "\ufffd",
            "logprob": -0.25,
            "bytes": [0xA9],
            "top_logprobs": [{"token": " a", "logprob": -0.125, "bytes": [32, 97]}],
        },
    ]
    ChoiceLogprobs.model_validate(reported)


def test_text_logprobs_are_parallel_lists_with_the_token_in_its_own_alternatives() -> None:
    plain = TokenLogprob(b"b", -2.0, (), 1)
    reported = text_logprobs((HALF, REST, plain))
    assert reported == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", "b"],
        "token_logprobs": [-0.5, -0.25, -2.0],
        "top_logprobs": [{"bytes:\\xc3": -0.5, "bytes:\\xe2": -1.5}, {" a": -0.125, "bytes:\\xa9": -0.25}, {"b": -2.0}],
        "text_offset": [0, 0, 1],
    }
    Logprobs.model_validate(reported)


def test_the_id_that_ends_an_answer_is_a_token_of_completions_and_not_of_chats() -> None:
    end = TokenLogprob(b"<eos>", -0.125, (), 1, is_end=True)
    assert chat_logprobs((end,)) == {"content": [], "refusal": None}
    reported = text_logprobs((TokenLogprob(b"b", -2.0, (), 0), end))
    assert (reported["tokens"], reported["token_logprobs"], reported["text_offset"]) == (
        ["b", "<eos>"],
        [-2, -0.125],
        [0, 1],
    )


def test_a_scored_prompt_has_the_ranks_of_its_tokens() -> None:
    prompt = (PromptToken(7, b"a", 0), PromptToken(8, b"bc", 1, -1.5, 2, ((9, b"x", -0.5), (8, b"bc", -1.5))))
    assert prompt_logprobs(prompt, 1) == [
        None,
        {
            "8": {"logprob": -1.5, "rank": 2, "decoded_token": "bc"},
            "9": {"logprob": -0.5, "rank": 1, "decoded_token": "x"},
        },
    ]
