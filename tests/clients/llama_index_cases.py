"""Cases of LlamaIndex. They run in its own environment, as it needs a transformers below 5."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses

OPTIONS: dict[str, Any] = {"model": "auto", "api_base": sys.argv[1], "api_key": "none", "max_retries": 0}
MESSAGES = [ChatMessage(role="system", content="Be brief"), ChatMessage(role="user", content="Hi")]


def joined(pieces: Any) -> str:
    return "".join(piece.delta or "" for piece in pieces)


def texts(llm: Any) -> dict[str, str]:
    return {
        "complete": llm.complete("Hi").text,
        "stream_complete": joined(llm.stream_complete("Hi")),
        "chat": llm.chat(MESSAGES).message.content,
        "stream_chat": joined(llm.stream_chat(MESSAGES)),
    }


CASES: dict[str, Callable[[], Any]] = {
    "default": lambda: texts(OpenAILike(**OPTIONS)),
    "chat": lambda: texts(OpenAILike(**OPTIONS, is_chat_model=True)),
    "responses": lambda: texts(OpenAILikeResponses(**OPTIONS)),
    "adapters": lambda: (
        OpenAILike(**OPTIONS, is_chat_model=True, additional_kwargs={"extra_body": {"lora": {"explain": True}}})
        .complete("Hi")
        .raw.lora
    ),
}


if __name__ == "__main__":
    json.dump({name: case() for name, case in CASES.items()}, sys.stdout)
