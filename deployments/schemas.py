"""HTTP request and response models, in the shape of the OpenAI API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gpu_worker.prompts import Message
from gpu_worker.request import DEFAULT_MAX_TOKENS, SamplingParams

_CHARS_PER_TOKEN = 4  # of English, about: real usage settles what a request is charged


class ApiRequest(BaseModel):
    """Unknown keys are refused. A key that is null counts as unset, as clients send what they dump."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class AdapterChoice(ApiRequest):
    """An adapter the client names itself: `name`, `owner/name`, or with `@digest` one exact version."""

    name: str = Field(min_length=1, max_length=256)
    weight: float = Field(default=1.0, ge=-4, le=4)


class LoraFilter(ApiRequest):
    """Which adapters retrieval may choose: those that carry all of `tags`."""

    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(min_length=1, max_length=32)


class LoraOptions(ApiRequest):
    """What a request may say about adapters; unset fields take the server's defaults."""

    strategy: Literal["selection", "mixture", "fusion"] | None = None
    k: int | None = Field(default=None, ge=1, le=16)
    adapters: list[AdapterChoice] | None = Field(default=None, min_length=1, max_length=16)
    weights: Literal["uniform", "softmax"] | None = None
    min_score: float | None = Field(default=None, ge=-1, le=1)
    fallback: Literal["base", "error"] | None = None
    filter: LoraFilter | None = None
    min_generation: int = Field(default=0, ge=0, lt=2**63)
    explain: bool = False

    @property
    def of_retrieval(self) -> list[str]:
        """The fields that were set and mean nothing where adapters are named."""
        fields = ("k", "weights", "min_score", "fallback", "filter")
        return [field for field in fields if getattr(self, field) is not None]


class StreamOptions(ApiRequest):
    include_usage: bool = False


class GenerationRequest(ApiRequest):
    """What chat and text completions have in common."""

    model: str = Field(default="auto", min_length=1, max_length=256)
    lora: LoraOptions = LoraOptions()
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=64)
    ignore_eos: bool = False
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> SamplingParams:
        """Raises: SamplingInvalid."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=self.token_limit,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),  # vLLM's clients say -1 for all ids
            seed=self.seed,
            stop=tuple(stops),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    def most_tokens_after(self, prompt_chars: int) -> int:
        """What a request with such a prompt may use, as far as is known before it is tokenized."""
        new_tokens = DEFAULT_MAX_TOKENS if self.token_limit is None else self.token_limit
        return prompt_chars // _CHARS_PER_TOKEN + 1 + self.n * new_tokens


class TextPart(ApiRequest):
    type: Literal["text"]
    text: str


class ChatMessage(ApiRequest):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatCompletionRequest(GenerationRequest):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def prompt_for_worker(self) -> tuple[Message, ...]:
        return tuple(message.message() for message in self.messages)

    @property
    def retrieval_text(self) -> str:
        """The last user message: what adapters are found by."""
        turns = self.prompt_for_worker
        return next((turn.content for turn in reversed(turns) if turn.role == "user"), turns[-1].content)

    @property
    def most_tokens(self) -> int:
        return self.most_tokens_after(sum(len(turn.content) for turn in self.prompt_for_worker))


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`"""

    prompt: str = Field(min_length=1)

    @property
    def most_tokens(self) -> int:
        return self.most_tokens_after(len(self.prompt))

    @property
    def prompt_for_worker(self) -> str:
        return self.prompt

    @property
    def retrieval_text(self) -> str:
        return self.prompt


class RouteQuery(ApiRequest):
    """`POST /v1/route`: which adapters would answer these prompts. Nothing is generated."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=256)]
    lora: LoraOptions = LoraOptions()
