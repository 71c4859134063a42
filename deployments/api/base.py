"""Parts that the request models share: bounds, the options of `lora`, and fields that are refused or ignored.

- A field whose absence would change the answer is refused (`NOT_SERVED_*`), unless its value requests nothing.
- Any other unknown field is ignored. The header `x-ignored-fields` lists it, unless its value requests nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.errors import RequestInvalid
from deployments.field_problems import did_you_mean
from deployments.json_types import JsonMapping
from lora_store import MAX_PLAN_ADAPTERS, ROUTED_STRATEGIES, STRATEGIES, RoutedStrategy, Strategy
from retriever_svc import Abstain, PinnedAdapter, Weighting

MAX_TEXT_CHARS = 4 << 20  # characters of any text, prompts included; no body is larger
MAX_LABEL_CHARS = 1024  # characters of labels that a client sends for its own use
_MAX_SHOWN_CHARS = 200  # of an unknown field's name
UNSUPPORTED = "unsupported"  # the type of the pydantic error, and the code of the response
ROLES = ("function",)
ITEMS = ("item_reference",)
INPUT_PARTS = ("input_image", "input_audio", "input_file", "refusal")
PARTS = ("image_url", "image", "input_audio", "audio", "file", "document", "video_url", "refusal")
MAX_ADAPTERS = MAX_PLAN_ADAPTERS
_MAX_STRATEGY_OPTIONS = 16
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
Label = Annotated[str, Field(max_length=MAX_LABEL_CHARS)]
Weight = Annotated[float, Field(ge=-4, le=4)]
Tag = Annotated[str, Field(min_length=1, max_length=64)]
AdapterName = Annotated[str, Field(min_length=1, max_length=256)]
Passing = dict[str, tuple[object, ...]]
"""Each field with the values that ask for nothing."""
NOT_SERVED: Passing = {
    "store": (False,),  # answers are never stored
    "use_beam_search": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "regex": ("",),
    "ebnf": ("",),
    "grammar": ("",),
    "json_schema": ("",),
    "include_stop_str_in_output": (False,),
    "detokenize": (True,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "truncate_prompt_tokens": (-1,),
}
NOT_SERVED_IN_CHAT: Passing = NOT_SERVED | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
}
NOT_SERVED_IN_RESPONSES: Passing = {name: values for name, values in NOT_SERVED.items() if name != "store"} | {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "prompt": (),
    "prompt_logprobs": (),
    "truncation": ("disabled",),
}
NOT_SERVED_IN_ANTHROPIC: Passing = NOT_SERVED | {
    "container": (),
    "context_management": ({},),
    "mcp_servers": ([],),
    "output_format": (),
    "prompt_logprobs": (),
}
NOT_SERVED_IN_COMPLETIONS: Passing = NOT_SERVED | {"suffix": ("",), "best_of": (1,)}
NOT_SERVED_IN_MESSAGES: Passing = {
    "function_call": (),
    "audio": (),
    "refusal": (),
    "annotations": ([],),
}
NOT_SERVED_IN_STRUCTURED: Passing = {
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
}
# Fields that are ignored. With one of these values they request nothing, so they are not reported.
HARMLESS: Passing = {
    "cache_salt": (),
    "chat_template_kwargs": ({},),
    "enable_thinking": (False,),
    "include_reasoning": (True, False),
    "keep_alive": (),
    "max_tool_calls": (),
    "length_penalty": (1, 1.0),
    "options": ({},),
    "prediction": (),
    "priority": (0,),
    "prompt_cache_retention": (),
    "provider": ({},),
    "reasoning": ({},),
    "reasoning_effort": ("none",),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),  # of responses, which say that they are not stored
    "think": (False,),
    "typical_p": (1, 1.0),
    "verbosity": ("medium",),
}
TOOLS_AND_CHOICES = {"tools": "tool_choice", "functions": "function_call"}
_WHAT = {
    "functions": "functions: use tools",
    "function_call": "function_call: use tools and tool_choice, and tool_calls in messages",
    "guided_json": "guided_json: use structured_outputs.json",
    "guided_regex": "guided_regex: use structured_outputs.regex",
    "guided_choice": "guided_choice: use structured_outputs.choice",
    "guided_grammar": "guided_grammar: use structured_outputs.grammar",
    "regex": "regex: use structured_outputs.regex",
    "ebnf": "ebnf: use structured_outputs.grammar",
    "grammar": "grammar: use structured_outputs.grammar",
    "json_schema": "json_schema outside response_format: use response_format or structured_outputs.json",
    "chat_template": "templates of clients",
    "suffix": "text after the answer",
    "output_format": "output_format: use output_config.format",
    "mcp_servers": "tools that a server runs",
    "store": "stored answers",
    "background": "answers in the background: leave it out, and set stream: true for long answers",
    "conversation": "stored conversations: send the whole conversation in input",
    "prompt": "stored prompts: send the text in input",
    "prompt_logprobs": "prompt_logprobs here: use /v1/chat/completions",
    "truncation": "shortened conversations: leave it out, and shorten input to the context of the model",
    "best_of": "a choice among answers",
}
_MAX_IGNORED = 32  # names recorded per object
_MAX_NAME_CHARS = 64
_INDEX = re.compile(r"\.\d+(?=\.)")


class ApiRequest(BaseModel):
    """Refuse unknown keys. A null key counts as unset, because clients send all fields of their objects.

    Every list, mapping and text of a request is bounded, and lists are read up to the first bad item (`fail_fast`),
    since each bad item would become an error object of a kilobyte on the event loop. A test checks all fields.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _within_bounds(cls, data: object) -> object:
        """Drop the keys that are null, and refuse the first unknown one by name."""
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        known = cls.keys()
        for key in given:
            if key not in known:
                raise _unknown(str(key), known)
        return given

    @classmethod
    def keys(cls) -> set[str]:
        """Return the names of the fields in JSON."""
        return {field.alias or name for name, field in cls.model_fields.items()}


def _unknown(name: str, known: Iterable[str]) -> PydanticCustomError:
    shown = name[:_MAX_SHOWN_CHARS]
    context = {"param": shown, "hint": did_you_mean(shown, known)}
    return PydanticCustomError("unknown_field", "unknown field{hint}", context)


def at_most(max_items: int) -> Callable[[object], object]:
    """Return a before-validator that refuses larger lists and mappings before their items are read."""

    def bounded(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > max_items:
            raise PydanticCustomError(
                "too_many",
                "holds {given} items, at most {allowed} are allowed",
                {"given": len(value), "allowed": max_items},
            )
        return value

    return bounded


def problem(param: str, message: str) -> PydanticCustomError:
    """Return the error for a validator of a whole model. `param`: the wrong field."""
    return PydanticCustomError("invalid", "{reason}", {"param": param, "reason": message})


def check_goes_with(param: str, is_given: bool, kind: str, owner: str) -> None:
    """Refuse a missing field of the type `owner`, and one beside another type. Raises: PydanticCustomError."""
    if kind == owner and not is_given:
        raise problem(param, f"is missing; type {owner!r} needs it")
    if kind != owner and is_given:
        raise problem(param, f"goes with type {owner!r} only; type is {kind!r}")


def unsupported(name: str, what: str = "it") -> PydanticCustomError:
    """Return the error for an unsupported field. `name`: the field below the current path, or "" for that path."""
    return PydanticCustomError(UNSUPPORTED, "this server does not support {what}", {"param": name, "what": what})


class AdapterChoice(ApiRequest):
    """An adapter that the client names: `name` or `owner/name`, with `@digest` for one exact version."""

    name: AdapterName
    weight: Weight = 1.0


class LoraFilter(ApiRequest):
    """The adapters that retrieval may choose: those that have all of `tags`."""

    tags: Annotated[list[Tag], Field(fail_fast=True, min_length=1, max_length=32)]


class PlanRow(ApiRequest):
    """One adapter of a plan that is sent back, as reported by an answer."""

    name: AdapterName
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    weight: Weight
    score: float | None = Field(default=None, ge=-2, le=2)

    def pinned(self) -> PinnedAdapter:
        return PinnedAdapter(self.name, self.digest, self.weight, self.score)


class PlanGiven(ApiRequest):
    """A plan that is sent back: `lora` of an answer or of `/v1/route`.

    Its `candidates`, `why`, `policy` and `contract` are not read.
    """

    strategy: Strategy
    adapters: list[PlanRow] = Field(fail_fast=True, default=[], max_length=MAX_ADAPTERS)
    generation: int = Field(default=0, ge=0, lt=2**63)
    base_model: str | None = Field(default=None, max_length=MAX_LABEL_CHARS)
    abstained: bool = False
    candidates: list[Any] = Field(default=[], max_length=64, exclude=True)  # may hold what cannot be serialized
    reason: str | None = Field(default=None, max_length=64)
    why: str | None = Field(default=None, max_length=MAX_TEXT_CHARS, exclude=True)  # the server's may have any length
    policy: str | None = Field(default=None, max_length=MAX_LABEL_CHARS)
    contract: dict[str, Any] | None = Field(default=None, max_length=2, exclude=True)


OptionValues = Annotated[
    dict[Tag, float], Field(max_length=_MAX_STRATEGY_OPTIONS), BeforeValidator(at_most(_MAX_STRATEGY_OPTIONS))
]
_OPTIONS = "Values for options of the strategy, by name. Default: `retrieval.strategy_options`." + "".join(
    f" `{option.name}` of `{strategy.name}`, above {option.above:g} and at most {option.highest:g}, by default"
    f" {option.default:g}: {option.meaning}"
    for strategy in STRATEGIES.values()
    for option in strategy.options
)


class LoraOptions(ApiRequest):
    """The options of a request about adapters. Unset fields use the server's defaults."""

    strategy: RoutedStrategy | None = Field(
        default=None,
        description=" ".join(f"`{name}`: {STRATEGIES[name].summary}." for name in ROUTED_STRATEGIES)
        + " See strategies. Default: the setting `retrieval.strategy`.",
    )
    strategy_options: OptionValues | None = Field(default=None, description=_OPTIONS)
    k: int | None = Field(default=None, ge=1, le=MAX_ADAPTERS)
    """How many adapters are retrieved. Default: `retrieval.k`."""
    adapters: Annotated[list[AdapterChoice], Field(fail_fast=True, min_length=1, max_length=MAX_ADAPTERS)] | None = None
    """`[{"name": "a", "weight": 0.5}]`: use these adapters and retrieve nothing. `name@digest` pins a version. Weights
    are from -4 to 4, by default 1."""
    weights: Weighting | None = None
    """How scores become weights: see strategies. Default: `retrieval.weights`."""
    abstain: Abstain | None = None
    """How readily the base model answers instead of adapters: `never`, `lenient`, `balanced` or `strict`, see when
    `auto` abstains. Default: `retrieval.abstain`."""
    min_score: float | None = Field(default=None, ge=-1, le=1)
    """Not together with `abstain`. Adapters that score below this cosine are not used. Default: each adapter has a
    threshold of its own."""
    fallback: str | None = Field(default=None, min_length=1, max_length=64)
    """Where no adapter reaches its threshold: `base` lets the base model answer, `error` answers 422. With several base
    models, `base` means the first one. To let another one answer, give its name. Default: `retrieval.fallback`."""
    filter: LoraFilter | None = None
    """`{"tags": ["a", "b"]}`: retrieve only adapters that carry all of these tags."""
    query: str | None = Field(default=None, min_length=1, max_length=65_536)
    """Retrieve by this text instead of the prompt."""
    plan: PlanGiven | None = None
    """A plan that an answer or `/v1/route` returned. It is replayed exactly and nothing is retrieved."""
    min_generation: int = Field(default=0, ge=0, lt=2**63)
    """Plan from this generation of the pool or a later one, else 503."""
    contract: bool = True
    """`false`: ask without the instruction, schema, stop strings and sampling of the adapter that leads the plan, see
    contracts."""
    explain: bool = False
    """Return candidates, scores, the reason and the generation with the answer, and the samples that the prompt is
    nearest to. Only samples of your own tenant's adapters are shown."""

    @model_validator(mode="after")
    def _one_kind_of_threshold(self) -> Self:
        if self.abstain is not None and self.min_score is not None:
            raise problem("abstain", "abstain and min_score cannot be combined; set one of them")
        return self

    @property
    def of_retrieval(self) -> list[str]:
        """The set fields that have no effect if adapters are named."""
        fields = ("k", "weights", "abstain", "min_score", "fallback", "filter", "query", "strategy_options")
        return [field for field in fields if getattr(self, field) is not None]

    @property
    def names_adapters(self) -> str | None:
        """The field that names the adapters, or None."""
        return next((field for field in ("plan", "adapters") if getattr(self, field) is not None), None)


def _linear(value: object) -> object:
    if isinstance(value, str) and value != "linear":
        raise unsupported("", "merge strategies other than 'linear'")
    return value


class MergedAdapters(ApiRequest):
    """LoRAX's `merged_adapters`. `linear` is fusion, with each adapter's own scaling here."""

    ids: Annotated[list[AdapterName], Field(fail_fast=True, min_length=1, max_length=MAX_ADAPTERS)]
    weights: Annotated[list[Weight], Field(fail_fast=True, max_length=MAX_ADAPTERS)] | None = None
    merge_strategy: Annotated[Literal["linear"], BeforeValidator(_linear)] = "linear"
    density: Literal[0] = 0  # for LoRAX's strategies that drop weights

    @model_validator(mode="after")
    def _as_many_weights(self) -> Self:
        if self.weights and len(self.weights) != len(self.ids):
            raise problem(
                "weights",
                f"weights has {len(self.weights)} items and ids has {len(self.ids)}; they must have the same length",
            )
        return self

    def options(self, asked: LoraOptions) -> LoraOptions:
        """Return these options in the terms of this API, combined with the other options of the request."""
        weights = self.weights or [1.0] * len(self.ids)
        choices = [AdapterChoice(name=name, weight=weight) for name, weight in zip(self.ids, weights, strict=True)]
        return asked.model_copy(update={"adapters": choices, "strategy": "fusion"})


def options_of_path(path: str | None, asked: LoraOptions) -> LoraOptions:
    """Return SGLang's `lora_path` of one prompt as options: only that adapter, or the base model for null."""
    if path is None:
        return asked.model_copy(update={"plan": PlanGiven(strategy="base")})
    return asked.model_copy(update={"adapters": [AdapterChoice(name=path)], "strategy": "selection"})


def without_declined(data: JsonMapping, choices: Mapping[str, str]) -> JsonMapping:
    """Return `data` without lists that are empty or declined: by `none` in the other field of `choices`.

    A choice is a word, or an object with the word in `type`.
    """

    def is_none(choice: object) -> bool:
        return (choice.get("type") if isinstance(choice, dict) else choice) == "none"

    declined = {name for name, choice in choices.items() if is_none(data.get(choice)) or data.get(name) == []}
    return {name: value for name, value in data.items() if name not in declined} if declined else data


def without_unserved(data: JsonMapping, known: Passing) -> JsonMapping:
    """Return `data` without the fields that request nothing.

    Raises: PydanticCustomError for the first field of `known` that requests more.
    """
    for name, nothing in known.items():
        if name in data and data[name] is not None and not _asks_nothing(data[name], nothing):
            raise unsupported(name, _WHAT.get(name, "it"))
    return {
        name: value
        for name, value in data.items()
        if name not in known and not (name in HARMLESS and _asks_nothing(value, HARMLESS[name]))
    }


def _asks_nothing(given: object, nothing: Sequence[object]) -> bool:
    """Return whether one of these is equal and of the same type: 0 is not False, and 1.0 is not 1."""
    return any(type(given) is type(value) and given == value for value in nothing)


class TolerantRequest(ApiRequest):
    """A request, or a part of one, that ignores unknown keys and remembers their names.

    Clients of the OpenAI API send fields of other servers and of their own. Values are dropped at once; of each object
    a bounded number of names is kept, and each is cut to a bounded length.
    `not_served`: fields that are refused; see `without_unserved`. `declines`: see `without_declined`.
    """

    model_config = ConfigDict(extra="allow")
    not_served: ClassVar[Passing | None] = None
    declines: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _within_bounds(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        data = without_declined(data, cls.declines)
        if cls.not_served is not None:
            data = without_unserved(data, cls.not_served)
        given = {key: value for key, value in data.items() if value is not None}
        keys = cls.keys()
        unknown = [_shown(key) for key in given if key not in keys]
        known = {key: value for key, value in given.items() if key in keys}
        return known | dict.fromkeys(unknown[:_MAX_IGNORED])


def _shown(key: object) -> str:
    """Return the key in bounded ASCII: it becomes part of a header."""
    return str(key)[:_MAX_NAME_CHARS].encode("ascii", "backslashreplace").decode()


def ignored_fields(request: TolerantRequest) -> tuple[str, ...]:
    """Return the paths of the fields that were ignored, as `messages[].cache_control`, each once."""
    return tuple(dict.fromkeys(_INDEX.sub("[]", path) for path, _ in _ignored(request, "")))


def refuse_ignored(request: TolerantRequest) -> None:
    """Refuse unknown fields, for the setting `strict_fields`. Raises: RequestInvalid, naming the first."""
    for path, model in _ignored(request, ""):
        hint = did_you_mean(path.rpartition(".")[2], model.model_fields)
        raise RequestInvalid(f"{path}: unknown field{hint}", path)


def _ignored(model: TolerantRequest, prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the path of each ignored field, and the model of the object that held it."""
    for name in model.model_extra or ():
        yield prefix + name, type(model)
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, TolerantRequest):
            yield from _ignored(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for place, item in enumerate(value):
                if isinstance(item, TolerantRequest):
                    yield from _ignored(item, f"{prefix}{name}.{place}.")
