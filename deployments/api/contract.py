"""The contract of an adapter: how it wants to be asked. It applies where the adapter leads the plan."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticSerializationError

from deployments.api import error_table
from deployments.api.base import ApiRequest, problem
from deployments.api.completions import LEAST_TOP_P, PolicyFields, Question, StopStrings
from deployments.api.structured import Schema, of_schema
from deployments.errors import RequestInvalid
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import SAMPLING_DEFAULTS, Prompt, SamplingParams
from lora_store import AdapterRef, Plan
from lora_store.contract_files import MAX_CONTRACT_BYTES

INPUT = "{input}"
_SAMPLING = (*SAMPLING_DEFAULTS, "max_tokens")
_OWN_FORM = {"response_format", "structured_outputs", "min_tokens", "ignore_eos"}  # no output_schema goes with these
_FIELDS: dict[str, Any] = {
    name: (field.annotation, copy(field)) for name, field in PolicyFields.model_fields.items() if name in _SAMPLING
}
Sampling: type[BaseModel] = create_model("Sampling", __base__=ApiRequest, **_FIELDS)


class Contract(ApiRequest):
    """What an adapter was trained with, in plain text and JSON. An empty one is none."""

    instruction: str | None = Field(default=None, min_length=1, max_length=MAX_CONTRACT_BYTES)
    """The text around the user's own, which replaces `{input}`. Nothing else in it is read."""
    as_message: bool = False
    """Add the instruction as a user message of its own after the conversation, which stays as it is. `{input}` is then
    the text of the last message, and may be left out."""
    output_schema: Schema | None = None
    """The JSON schema that the answer follows."""
    stop: StopStrings = Field(default=[])
    """One string or a list. The answer ends before the first of them."""
    sampling: Sampling | None = None  # type: ignore[valid-type]
    """Defaults for `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`, `max_repeats` and `max_tokens`."""

    @model_validator(mode="after")
    def _has_one_input(self) -> Self:
        count = (self.instruction or "").count(INPUT)
        if self.as_message and self.instruction is None:
            raise problem("as_message", "needs an instruction")
        if count > 1 or (count == 0 and self.instruction is not None and not self.as_message):
            raise problem(
                "instruction", f"needs {INPUT} once, where the user's text belongs, and has it {count or 'not at all'}"
            )
        return self

    @property
    def parts(self) -> list[str]:
        """The names of what it sets."""
        names = [name for name in ("instruction", "output_schema", "stop") if getattr(self, name)]
        return names + [name for name in _SAMPLING if name in self.defaults]

    @property
    def defaults(self) -> dict[str, Any]:
        """The sampling defaults that it sets, by name."""
        return {} if self.sampling is None else self.sampling.model_dump(exclude_unset=True)

    def to_json(self) -> str:
        """Return the fields that are set, "" for none. Raises: RequestInvalid for what JSON cannot hold."""
        try:
            return self.model_dump_json(exclude_unset=True) if self.parts else ""
        except PydanticSerializationError as exc:
            message = (
                "contract: is nested too deeply, or has text that is not Unicode; flatten output_schema, or remove lone"
                " surrogates such as \\ud800"
            )
            raise RequestInvalid(message, "contract") from exc

    def grammar(self) -> Grammar | None:
        """Return the grammar of the answer. Raises: GrammarInvalid."""
        return None if self.output_schema is None else of_schema(self.output_schema, "lora.contract")


@dataclass(frozen=True, slots=True)
class AppliedContract:
    """The part of an adapter's contract that applies to one prompt. `parts`: the names of what it sets there."""

    adapter: AdapterRef
    contract: Contract
    parts: tuple[str, ...]

    def prompt(self, prompt: Prompt) -> Prompt:
        """Return the prompt with the instruction, as the model reads it."""
        instruction = self.contract.instruction
        if "instruction" not in self.parts or instruction is None:
            return prompt
        if isinstance(prompt, str):
            return instruction.replace(INPUT, prompt)
        assert isinstance(prompt, tuple), "token ids are read as they are"
        if self.contract.as_message:
            return (*prompt, Message("user", instruction.replace(INPUT, prompt[-1].content)))
        place = _last_user(prompt)
        asked = replace(prompt[place], content=instruction.replace(INPUT, prompt[place].content))
        return (*prompt[:place], asked, *prompt[place + 1 :])

    @property
    def defaults(self) -> dict[str, Any]:
        """The sampling defaults that apply, by name."""
        return {name: value for name, value in self.contract.defaults.items() if name in self.parts}

    def sampling(self, sampling: SamplingParams) -> SamplingParams:
        """Return the parameters with the contract's values. Raises: GrammarInvalid."""
        values = self.defaults
        if "top_k" in values:
            values["top_k"] = max(values["top_k"], 0)  # as a request's own values are read
        if "top_p" in values:
            values["top_p"] = values["top_p"] or LEAST_TOP_P
        if "max_tokens" in values:
            values["max_tokens_is_default"] = True
        if "output_schema" in self.parts:
            values["grammar"] = self.contract.grammar()
        if "stop" in self.parts:
            values["stop"] = tuple(self.contract.stop)
        return replace(sampling, **values, unset=sampling.unset - values.keys())


def _parse(text: str, name: str) -> Contract:
    """Return the stored contract of an adapter. Raises: RequestInvalid for one that only a newer release can read."""
    try:
        return Contract.model_validate_json(text)
    except ValidationError as exc:
        raise RequestInvalid(
            f"lora.contract: the contract of {name!r} is of a newer release ({error_table.validation_error(exc)});"
            " set lora.contract: false to ask without it",
            "lora.contract",
        ) from exc


UNSET = SamplingParams(unset=frozenset(SAMPLING_DEFAULTS))


def applied_contract(
    plan: Plan,
    question: Question,
    sampling: SamplingParams = UNSET,
    given: Collection[str] = (),
) -> AppliedContract | None:
    """Return what the contract of the plan's leading adapter sets that the request does not, None for nothing.

    `given`: the fields that the request sets. Raises: RequestInvalid.
    """
    if plan.contract is None or not question.lora.contract or (leader := plan.leader) is None:
        return None
    contract = _parse(plan.contract, leader.ref.name)
    left_out = {name for name in SAMPLING_DEFAULTS if name not in sampling.unset}
    left_out |= {*_SAMPLING, "stop"} & set(given)  # `given` has unknown fields too, perhaps one called `instruction`
    if not _takes_instruction(question.prompt, contract):
        left_out.add("instruction")
    if sampling.grammar is not None or question.tools is not None:
        left_out |= {"output_schema", "stop", "max_tokens"}  # which end an answer of the adapter's own form
    if _OWN_FORM & set(given):
        left_out.add("output_schema")
    if sampling.stop:
        left_out.add("stop")
    if sampling.max_tokens is not None or sampling.min_tokens > contract.defaults.get("max_tokens", 0):
        left_out.add("max_tokens")
    parts = tuple(name for name in contract.parts if name not in left_out)
    return AppliedContract(leader.ref, contract, parts) if parts else None


def _takes_instruction(prompt: Prompt, contract: Contract) -> bool:
    """Return whether the instruction has a place in the prompt: none in token ids, nor for a message in a text."""
    if isinstance(prompt, tuple):
        return contract.as_message or _last_user(prompt) >= 0
    return isinstance(prompt, str) and not contract.as_message


def _last_user(turns: tuple[Message, ...]) -> int:
    """Return the place of the user's last message, -1 if there is none."""
    return next((place for place in reversed(range(len(turns))) if turns[place].role == "user"), -1)
