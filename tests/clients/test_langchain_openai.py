"""langchain-openai"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed: the extra `clients` has it")
langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage  # noqa: E402
from langchain_tests.integration_tests import ChatModelIntegrationTests  # noqa: E402
from pydantic import BaseModel  # noqa: E402

# One event loop for all tests, because the model keeps its connections. Most tests are no coroutines.
pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore:.*is marked with '@pytest.mark.asyncio'"),
]


def params(server_url: str) -> dict[str, Any]:
    return {"model": "auto", "base_url": server_url, "api_key": "none", "max_retries": 0, "timeout": 30}


class Order(BaseModel):
    """Order something"""

    number: int
    what: str


class TestStandardTests(ChatModelIntegrationTests):
    """the standard tests of `langchain-tests` for chat models, cached tokens included, but none of media and files"""

    url = ""

    @pytest.fixture(autouse=True)
    def _use_server(self, server_url: str) -> None:
        type(self).url = server_url

    @property
    def chat_model_class(self) -> Any:
        return langchain_openai.ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return params(self.url) | {"stream_usage": True}

    @property
    def model_override_value(self) -> str:
        return "coder"

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> Any:
        model = self.chat_model_class(**self.chat_model_params)
        return sum(model.stream("Hi"), AIMessageChunk("")) if stream else model.invoke("Hi")


class TestResponses(TestStandardTests):
    """the same tests with `use_responses_api`"""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return super().chat_model_params | {"use_responses_api": True}


@pytest.mark.parametrize(
    ("method", "order"),
    [("function_calling", Order(number=4, what="tea")), ("json_schema", Order(number=1, what="text"))],
)
def test_structured_output(server_url: str, method: str, order: Order) -> None:
    """`with_structured_output` by `function_calling` and by `json_schema`"""
    model = langchain_openai.ChatOpenAI(**params(server_url)).with_structured_output(Order, method=method)
    assert model.invoke("4 of 'tea'") == order


def test_an_agent_calls_tools_and_reads_their_results(server_url: str) -> None:
    """`bind_tools`, strict ones included, and the loop of an agent"""
    for strict in (None, True):
        model = langchain_openai.ChatOpenAI(**params(server_url)).bind_tools([Order], strict=strict)
        asked = HumanMessage("4 of 'tea'")
        call = model.invoke([asked])
        assert [(found["name"], found["args"]) for found in call.tool_calls] == [
            ("Order", {"number": 4, "what": "tea"})
        ]
        assert call.response_metadata["finish_reason"] == "tool_calls"
        result = ToolMessage("done", tool_call_id=call.tool_calls[0]["id"])
        assert model.invoke([asked, call, result]).content == "Hello"


def test_the_adapters_are_in_the_headers(server_url: str) -> None:
    """adapters by `extra_body`, and their names by `include_response_headers`"""
    body = {"lora": {"adapters": [{"name": "poet"}]}}
    model = langchain_openai.ChatOpenAI(**params(server_url), include_response_headers=True, extra_body=body)
    answer = model.invoke("Hi")
    assert answer.content == "Hello"
    assert answer.response_metadata["headers"]["x-lora-adapters"].startswith("poet@")


def test_model_names(server_url: str, model_name: str) -> None:
    """model names and their policies"""
    asked = params(server_url) | {"model": model_name, "include_response_headers": True}
    answer = langchain_openai.ChatOpenAI(**asked).invoke("Hi")
    headers = answer.response_metadata["headers"]
    assert headers["x-lora-policy"].startswith(model_name) and headers["x-lora-adapters"].startswith("coder@")


def test_embeddings(server_url: str) -> None:
    """embeddings with `check_embedding_ctx_length=False`"""
    model = langchain_openai.OpenAIEmbeddings(
        model="multilingual-e5-small-tasks",
        base_url=server_url,
        api_key="none",
        check_embedding_ctx_length=False,
        chunk_size=256,
    )
    assert model.embed_documents(["a", "bcd"]) == [[1.0, 0.5], [3.0, 0.5]]
    assert len(model.embed_documents(["a"] * 300)) == 300, "the server takes 256 in a request"
