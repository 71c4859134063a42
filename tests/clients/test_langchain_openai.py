"""langchain-openai"""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

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
    """the standard tests of `langchain-tests` for chat models, tools and structured output included, media apart"""

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


# Why each standard test that `langchain-tests` switches by a property is left out.
NOT_TESTED = {
    "enable_vcr_tests": "they replay recorded answers, and these tests have a server",
    "supports_audio_inputs": "audio is refused",
    "supports_image_inputs": "images are refused",
    "supports_image_tool_message": "images are refused",
    "supports_image_urls": "images are refused",
    "supports_pdf_inputs": "files are refused",
    "supports_pdf_tool_message": "files are refused",
    "supports_video_inputs": "video is refused",
}
USAGE_NOT_TESTED = {
    "audio_input": "audio is refused",
    "audio_output": "audio is refused",
    "reasoning_output": "reasoning is part of the answer's text",
    "cache_creation_input": "the usage counts no tokens that a request adds to the cache",
}


@pytest.mark.parametrize("kind", [TestStandardTests, TestResponses])
def test_every_standard_test_that_is_left_out_has_a_reason(kind: type) -> None:
    """the standard tests of images, audio, video and files are left out, as these are refused"""
    names = [name for name in dir(kind) if name.startswith(("has_", "supports_", "enable_", "returns_"))]
    assert len(names) > 12
    found = kind()
    switched_off = {name for name in names if not getattr(found, name)}
    assert switched_off <= NOT_TESTED.keys()
    assert found.has_tool_calling and found.has_structured_output


def test_every_part_of_the_usage_that_is_left_out_has_a_reason() -> None:
    """cached tokens of the prompt in the usage"""
    annotation = get_type_hints(ChatModelIntegrationTests.supported_usage_metadata_details.fget)["return"]
    [of_list] = get_args(get_args(annotation)[1])
    for tested in TestStandardTests().supported_usage_metadata_details.values():
        assert {*tested, *USAGE_NOT_TESTED} == set(get_args(of_list))


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
        model="multilingual-e5-small-tasks", base_url=server_url, api_key="none", check_embedding_ctx_length=False
    )
    assert model.embed_documents(["a", "bcd"]) == [[1.0, 0.5], [3.0, 0.5]]
