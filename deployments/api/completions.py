"""The requests of `/v1/chat/completions`, `/v1/completions` and `/v1/route`."""

from __future__ import annotations

import reprlib
from abc import abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from deployments.api import error_table
from deployments.api.base import (
    MAX_TEXT_CHARS,
    NOT_SERVED_IN_CHAT,
    NOT_SERVED_IN_COMPLETIONS,
    TOOLS_AND_CHOICES,
    AdapterName,
    ApiRequest,
    Label,
    LoraOptions,
    MergedAdapters,
    Passing,
    Text,
    TolerantRequest,
    at_most,
    options_of_path,
    problem,
)
from deployments.api.messages import (
    MAX_TOOLS,
    ChatMessage,
    Tool,
    ToolChoice,
    check_results,
    check_tools,
    make_tools,
    make_turns,
    word_or,
)
from deployments.api.structured import ResponseFormat, StructuredOutputs, TextFormat
from deployments.errors import RequestInvalid
from deployments.json_types import JsonMapping
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import (
    MAX_BIASED_IDS,
    MAX_LOGPROBS,
    MAX_STOP_CHARS,
    MAX_STOPS,
    SAMPLING_DEFAULTS,
    SamplingParams,
    TokenIds,
)
from gpu_worker.front.request.request import Prompt as AnyPrompt
from gpu_worker.front.request.tools import Tools
from lora_store import Plan

MAX_CHOICES = 16
MAX_PROMPTS = 128
MAX_ROWS = 128  # answers to one request: prompts × n
MAX_ANSWER_LOGPROBS = 2**18  # 64 rows of 2048 tokens with one alternative each; about 200 MB while it is built
MAX_MESSAGES = 1024
MAX_QUERIES = 256  # prompts of one /v1/route
MAX_METADATA = 16
MAX_TOKEN_IDS = 16_384  # of one prompt
LEAST_TOP_P = 1e-6  # below the largest probability of any vocabulary, so that one id remains
_ANY_SEED = -1  # of clients of other servers


def _drop_nulls(value: object) -> object:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopList = Annotated[list[StopString], Field(max_length=MAX_STOPS)]
Paths = Annotated[list[AdapterName | None], Field(fail_fast=True, max_length=MAX_PROMPTS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
IdGiven = Annotated[int, Field(ge=0, lt=2**31)]
LogitBias = Annotated[dict[IdGiven, Bias], Field(max_length=MAX_BIASED_IDS), BeforeValidator(at_most(MAX_BIASED_IDS))]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=MAX_METADATA),
    BeforeValidator(_drop_nulls),
    BeforeValidator(at_most(MAX_METADATA)),
]
Prompt = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)]
Prompts = Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_TOKEN_IDS)]
IdsOfPrompts = Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
TextOrIds = Annotated[
    Annotated[Prompt, Tag("str")] | Annotated[Ids, Tag("int")],  # tags that paths of errors leave out
    Discriminator(lambda value: "int" if isinstance(value, list) else "str"),
]
Queries = Annotated[list[Text], Field(min_length=1, max_length=MAX_QUERIES)]


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt of a request with its options for adapters.

    `text`: the text that retrieves them; None for token ids, whose text is known after a Worker has decoded them.
    `alias`: the field of another server's API that named adapters; with it `model` may be the base model.
    `tools`: the functions that its answer may call.
    `plan`: the plan of the adapter that `model` names, if the look-up of the name found one.
    `plan_s`: how long that look-up took.
    """

    prompt: AnyPrompt
    text: str | None
    model: str
    lora: LoraOptions
    alias: str | None = None
    tools: Tools | None = None
    plan: Plan | None = None
    plan_s: float = 0.0


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: object) -> object:
    """Return a list of prompts for one text, or for the token ids of one prompt."""
    return [value] if isinstance(value, list) and value and isinstance(value[0], int) else _as_list(value)


StopStrings = Annotated[
    list[StopString],
    Field(fail_fast=True, max_length=MAX_STOPS),
    BeforeValidator(_as_list, json_schema_input_type=StopString | StopList),
]


class StreamOptions(TolerantRequest):
    include_usage: bool = False


class ModelFields(ApiRequest):
    """The fields of a request that choose its model and its adapters."""

    model: str = Field(default="auto", min_length=1, max_length=256)
    """`auto`, the base model's name, an adapter's name, `owner/name` of another tenant, `name@digest`, or
    `base:adapter` and `base:auto`; in a request also a model name, see model names."""
    lora: LoraOptions = LoraOptions()
    """Options for retrieval and composition, see lora options."""


class PolicyFields(ModelFields):
    """The fields of a request that the policy of a model name may set too."""

    max_tokens: int | None = Field(default=None, ge=1)
    """The most new tokens. Without it an answer may fill the context, within the setting `max_new_tokens`. In
    completions 0 goes with `echo` or `prompt_logprobs`."""
    min_tokens: int = Field(default=0, ge=0)
    """The end token and stop strings count only after this many new tokens."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 is greedy. Unset: the server's default, as for `top_p`, `top_k`, `min_p`, `repetition_penalty` and
    `max_repeats`."""
    top_p: float = Field(default=1.0, ge=0, le=1)
    """Sample from the smallest set of tokens with this probability. 0 leaves the most probable token."""
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    """Sample from the k most probable tokens. 0 and -1 mean all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drop tokens below this share of the most probable token's probability."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted once from each token that the answer contains."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted for each time the answer contains the token."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Divides the logits of tokens in the prompt and the answer."""
    max_repeats: int = Field(default=0, ge=0, lt=2**31)
    """End the answer once it repeats a passage of up to 64 tokens more than this many times in a row, within at least
    24 tokens. 0: do not look."""
    logit_bias: LogitBias = Field(default={})
    """Token id to a number that is added to its logit."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """Makes sampling repeatable. -1 counts as unset. In bfloat16 a repetition may still differ, since other requests in
    the batch and a cached prefix change which kernels run, and with them the last bits of the logits."""
    stop: StopStrings = Field(default=[])
    """One string or a list. The answer ends before the first of them."""
    stop_token_ids: Annotated[list[IdGiven], Field(fail_fast=True, max_length=64)] | None = None
    """Token ids that end the answer."""
    ignore_eos: bool = False
    """Continue past the end token."""
    response_format: ResponseFormat | None = None
    """`{"type": "json_object"}`, with a `schema` or without, or `json_schema` with a schema that the answer follows,
    see structured output."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's spelling: one of `json`, `regex`, `choice`, `grammar` and `json_object`, see structured output."""

    @model_validator(mode="after")
    def _one_grammar(self) -> Self:
        is_formatted = self.response_format is not None and self.response_format.type != "text"
        if is_formatted and self.structured_outputs is not None:
            raise problem("structured_outputs", "response_format gives the format of the answer too; keep one of them")
        return self


class PromptRequest(TolerantRequest, ModelFields):
    """A request with prompts, which may name their adapters in the fields of other servers too."""

    model_config = ConfigDict(extra="allow")

    merged_adapters: MergedAdapters | None = None
    """LoRAX's spelling. `linear` is `fusion` with each adapter's own scaling; other strategies are refused."""
    lora_path: AdapterName | Paths | None = None
    """SGLang's spelling: one adapter's name, or a list with one for each prompt, where null is the base model."""

    @model_validator(mode="after")
    def _one_way_to_name_adapters(self) -> Self:
        aliases = [name for name in ("merged_adapters", "lora_path") if getattr(self, name) is not None]
        if not aliases:
            return self
        ways = [*aliases, *([f"lora.{self.lora.names_adapters}"] if self.lora.names_adapters else [])]
        if len(ways) > 1:
            raise problem(ways[0], f"cannot be set together with {ways[1]}, which also names adapters")
        if self.lora.strategy is not None:
            raise problem(
                "lora.strategy", f"cannot be set together with {aliases[0]}, which always uses its own strategy"
            )
        if isinstance(self.lora_path, list) and len(self.lora_path) != self._num_prompts:
            raise problem("lora_path", f"holds {len(self.lora_path)} names for {self._num_prompts} prompts")
        return self

    @property
    def _num_prompts(self) -> int:
        return 1

    def _ask(self, turns: tuple[Message, ...], tools: Tools | None = None) -> Question:
        """Return a conversation as a question. Its text is the last user message, or the last one without any."""
        options, alias = self._options(0)
        text = next((turn.content for turn in reversed(turns) if turn.role == "user"), turns[-1].content)
        return Question(turns, text, self.model, options, alias, tools)

    def _options(self, place: int) -> tuple[LoraOptions, str | None]:
        """Return the options of the prompt at `place`, and the field of another API that they come from."""
        if self.merged_adapters is not None:
            return self.merged_adapters.options(self.lora), "merged_adapters"
        if self.lora_path is not None:
            path = self.lora_path if isinstance(self.lora_path, str) else self.lora_path[place]
            return options_of_path(path, self.lora), "lora_path"
        return self.lora, None


class GenerationRequest(PromptRequest, PolicyFields):
    """Shared fields of chat and text completions."""

    model_config = ConfigDict(extra="allow")
    always_shows_usage: ClassVar[bool] = False
    """Whether every stream ends with the usage, without `stream_options`."""
    format_field: ClassVar[str] = ""
    """The field in which another API gives the format of the answer."""

    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Report log probabilities of the prompt's tokens with this many alternatives, see tokens of a prompt."""
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    """Answers for each prompt. The first equals the one that `n: 1` gives with the same seed."""
    stream: bool = False
    """Send server-sent events."""
    stream_options: StreamOptions | None = None
    """`{"include_usage": true}` adds usage to the last event. Needs `stream`."""
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds from arrival, at most the setting `max_request_s`. Then the answer is 504, or the stream ends with an
    error event."""
    user: Label | None = None
    """Accepted without effect."""
    metadata: Metadata | None = None
    """Accepted without effect."""
    safety_identifier: Label | None = None
    """Accepted without effect."""
    prompt_cache_key: Label | None = None
    """Accepted without effect."""

    @model_validator(mode="after")
    def _whole_answers_alone(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise problem("prompt_logprobs", "cannot be streamed; set stream: false, or leave them out")
        return self

    @model_validator(mode="after")
    def _one_format(self) -> Self:
        is_given = self.structured_outputs is not None or self.response_format is not None
        if is_given and self._format is not None and self._format.type != "text":
            raise problem(self.format_field, "the request gives the format of the answer twice; keep one of them")
        return self

    @property
    def _format(self) -> TextFormat | None:
        """The format of the answer in `format_field`."""
        return None

    @property
    def set_fields(self) -> Set[str]:
        """The fields that the request sets; those that another API calls otherwise by their names here."""
        return self.model_fields_set | ({"response_format"} if self._format is not None else set())

    def sampling(self) -> SamplingParams:
        """Return the sampling parameters. Raises: SamplingInvalid, GrammarInvalid."""
        return SamplingParams(
            max_tokens=self.token_limit,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p or LEAST_TOP_P,
            top_k=max(self.top_k, 0),  # vLLM's clients send -1 for all ids
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            max_repeats=self.max_repeats,
            logit_bias=tuple(sorted(self.logit_bias.items())),
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            seed=None if self.seed in (None, _ANY_SEED) else self.seed % 2**63,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            grammar=self._grammar(),
            unset=frozenset(SAMPLING_DEFAULTS) - self.model_fields_set,
        )

    def _grammar(self) -> Grammar | None:
        if self._format is not None and self._format.type != "text":
            return self._format.grammar(self.format_field)
        if self.structured_outputs is not None:
            return self.structured_outputs.as_grammar()
        return None if self.response_format is None else self.response_format.grammar()

    @property
    def limit_field(self) -> str:
        """The name of the field that limits the new tokens."""
        return "max_tokens"

    @property
    def token_limit(self) -> int | None:
        limit: int | None = getattr(self, self.limit_field)
        return limit

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """The number of alternatives whose log-probabilities each token reports, None without any."""

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The number of alternatives for each token of the prompt, None without log-probabilities."""
        return self.prompt_logprobs

    def used_tools(self) -> Tools | None:
        """Return the functions that the answer may call, None without any. Raises: GrammarInvalid."""
        return None

    @abstractmethod
    def questions(self) -> list[Question]:
        """Return one question per prompt, in order."""


class ChatCompletionRequest(GenerationRequest):
    """`POST /v1/chat/completions`"""

    not_served: ClassVar[Passing] = NOT_SERVED_IN_CHAT
    declines: ClassVar[Mapping[str, str]] = TOOLS_AND_CHOICES

    messages: Annotated[
        list[ChatMessage],
        Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES),
        AfterValidator(check_results),
    ]
    """Roles `system`, `developer` (as `system`), `user`, `assistant` and `tool`; content is text or a list of text
    parts. An assistant's message may have `tool_calls`, and a tool's message names its call in `tool_call_id`. The chat
    template gets `name` and may show it. Adapters are found by the user's turns, see conversations."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Takes precedence over `max_tokens`."""
    logprobs: bool = False
    """Report log probabilities of the text's tokens, before temperature and penalties. Those of calls are left out."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Alternatives for each token. Needs `logprobs: true`."""
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    """Functions that the answer may call, each with a name, a description, `parameters` (a JSON schema) and `strict`,
    see how to use tools."""
    tool_choice: Annotated[ToolChoice, word_or(ToolChoice)] | None = None
    """`auto`, `none`, `required`, or `{"type": "function", "function": {"name": "f"}}`. Default with tools: `auto`."""
    parallel_tool_calls: bool | None = None
    """`false`: at most one call. Default: several, if the chat template of the base model writes several."""

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise problem("top_logprobs", "goes with logprobs: true only")
        if self.tools is not None or self.tool_choice is not None:
            check_tools([tool.function.name for tool in self.tools or ()], self.tool_choice)
        return self

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def used_tools(self) -> Tools | None:
        if not self.tools:
            return None
        functions = [tool.function.function(f"tools.{n}.function.parameters") for n, tool in enumerate(self.tools)]
        return make_tools(functions, self.tool_choice, self.parallel_tool_calls)

    def questions(self) -> list[Question]:
        """Return the conversation as one question."""
        return [self._ask(make_turns(self.messages), self.used_tools())]


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`"""

    not_served: ClassVar[Passing] = NOT_SERVED_IN_COMPLETIONS

    prompt: Annotated[
        list[TextOrIds],
        Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(_as_prompts, json_schema_input_type=Prompt | Prompts | Ids | IdsOfPrompts),
    ]
    """One text, the token ids of one prompt, or a list of these. Each prompt has its own plan. It is used as it is: no
    prompt template is applied, and token ids get no further token. `auto` finds adapters by the text of token ids."""
    max_tokens: int | None = Field(default=None, ge=0)
    """The most new tokens. Without it an answer may fill the context, within the setting `max_new_tokens`. In
    completions 0 goes with `echo` or `prompt_logprobs`."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Report log probabilities with this many alternatives. With `echo` also those of the prompt's tokens."""
    echo: bool = False
    """Begin each answer with its prompt."""

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise problem("max_tokens", "must be at least 1; 0 goes with echo or prompt_logprobs, got 0")
        rows = len(self.prompt) * self.n
        if rows > MAX_ROWS:
            raise problem("n", f"with {len(self.prompt)} prompts makes {rows} answers, at most {MAX_ROWS} are given")
        return self

    @property
    def _num_prompts(self) -> int:
        return len(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        return self.prompt_logprobs if echoed is None else max(echoed, self.prompt_logprobs or 0)

    def questions(self) -> list[Question]:
        questions = []
        for place, prompt in enumerate(self.prompt):
            options, alias = self._options(place)
            if isinstance(prompt, str):
                questions.append(Question(prompt, prompt, self.model, options, alias))
            else:
                questions.append(Question(TokenIds(tuple(prompt)), None, self.model, options, alias))
        return questions


class RouteQuery(ApiRequest):
    """`POST /v1/route`: the plans for these prompts, without generating."""

    prompt: Annotated[
        list[Text],
        Field(fail_fast=True, min_length=1, max_length=MAX_QUERIES),
        BeforeValidator(_as_list, json_schema_input_type=Text | Queries),
    ]
    """One text or a list."""
    model: str = Field(default="auto", min_length=1, max_length=256)
    """As in a request: `base:auto` searches the adapters of one base model, and a model name shows its policy's
    plan."""
    lora: LoraOptions = LoraOptions()
    """Options for retrieval and composition, see lora options."""


TextRequest = ChatCompletionRequest | CompletionRequest


def parse(request: TextRequest | JsonMapping) -> TextRequest:
    """Parse and validate the body of a request. Raises: RequestInvalid, Unsupported."""
    if isinstance(request, TextRequest):
        return request
    if not isinstance(request, Mapping):  # a caller of a Ray handle may send anything
        raise RequestInvalid(f"the request must be an object with named fields, got {reprlib.repr(request)}")
    kind = ChatCompletionRequest if "messages" in request else CompletionRequest
    try:
        return kind.model_validate(request)
    except ValidationError as exc:
        raise error_table.validation_error(exc) from exc
