"""Read the contract that an adapter's folder brings, in our form, in IBM's, or as llama.cpp lists it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from string import Formatter
from typing import Any

import yaml
from pydantic import ValidationError

from deployments.api import error_table
from deployments.api.contract import INPUT, Contract
from deployments.errors import RequestInvalid
from deployments.yaml_files import load_yaml, require_json
from gpu_worker.errors import GrammarInvalid
from gpu_worker.front.grammar.compiler import CheckProcess
from lora_store import FileRefused
from lora_store.bounded_files import parse_json_object
from lora_store.contract_files import GIVEN, INTRINSIC_FILE, MAX_CONTRACT_BYTES

_LISTED = {"id", "path", "scale", "task_name", "prompt_prefix"}  # what llama.cpp says of an adapter
_MARKUP = re.compile(
    r"<\|[^|>]*\|>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</?s>|### ?(?:Instruction|Response|Input)"
)
_WITHOUT_EFFECT = {"model", "logprobs_workaround", "docs_as_message"}  # requests here bring no documents
_LAST_MESSAGE = "last_message"  # IBM's name for the input
_REMEDY = "write adapter_io.yaml instead, or publish without a contract (--no-contract)"
_CHARS_PER_TOKEN = 4  # estimate for English
_SPELLINGS = {"max_completion_tokens": "max_tokens"}
_TRANSFORMED = (
    f"{INTRINSIC_FILE}: transformations are steps of IBM's client: answers here are what the model writes, and only a"
    " client that takes these steps gets their result"
)


def read_contract(name: str, data: bytes, context: int | None = None) -> tuple[str, tuple[str, ...]]:
    """Return the contract in a file of this name, as JSON, and what its publisher should know. "" is an empty one.

    `context`: the tokens of its base model's context, about half of which are for what users write.
    Raises: FileRefused, which names the field; EngineFull if its schema cannot be checked now.
    """
    notes: tuple[str, ...] = ()
    try:
        value = parse_json_object(data) if name == GIVEN else _parse(data)
        if name == INTRINSIC_FILE:
            notes = (_TRANSFORMED,) if value.get("transformations") else ()
            value = dict(_of_intrinsic(value))
        elif "prompt_prefix" in value:
            value = _of_prefix(value)
        contract = Contract.model_validate(value)
        text = contract.to_json()
        if len(text.encode()) > MAX_CONTRACT_BYTES:
            raise ValueError(f"has {len(text.encode())} bytes as JSON, at most {MAX_CONTRACT_BYTES} are allowed")
        length = len(contract.instruction or "")
        if context is not None and length > (most := _CHARS_PER_TOKEN * context // 2):
            raise ValueError(
                f"instruction: has {length} characters, at most {most} leave half of the base model's context of "
                f"{context} tokens to the user's text"
            )
        if (grammar := contract.grammar()) is not None:
            CheckProcess().run(grammar)
    except ValidationError as exc:
        raise FileRefused(name, [str(error_table.validation_error(exc))]) from exc
    except GrammarInvalid as exc:
        raise FileRefused(name, [f"output_schema{exc.pointer}: {exc.message}"]) from exc
    except (ValueError, RequestInvalid) as exc:
        raise FileRefused(name, [str(exc).removeprefix("contract: ")]) from exc
    return text, notes


def _parse(data: bytes) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file. Raises: ValueError."""
    try:
        value = load_yaml(data.decode(), with_aliases=False)
        if isinstance(value, list) and len(value) == 1:
            [value] = value  # llama.cpp's list of one adapter
        require_json(value)
    except yaml.YAMLError as exc:
        raise ValueError(f"is not valid YAML: {' '.join(str(exc).split())}") from exc
    except UnicodeDecodeError as exc:
        raise ValueError("is not UTF-8") from exc
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("must be a mapping of fields, such as `instruction: ...`")
    return value


def _of_prefix(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an adapter of llama.cpp's `/lora-adapters` as a contract: its prefix comes before the input."""
    prefix = value["prompt_prefix"]
    if others := sorted(name for name in value.keys() - _LISTED if value[name]):
        raise ValueError(f"prompt_prefix: cannot be read together with {others[0]!r}; write `instruction` instead")
    if not isinstance(prefix, str) or INPUT in prefix:
        raise ValueError(f"prompt_prefix: must be text without {INPUT}; write `instruction` instead")
    if found := _MARKUP.search(prefix):
        raise ValueError(
            f"prompt_prefix: has {found[0]!r}, which belongs to a prompt template: write `instruction` without it, and"
            " publish with the template"
        )
    return {"instruction": prefix + INPUT} if prefix else {}


def _of_intrinsic(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of the contract in IBM's `io.yaml`. Raises: ValueError for what cannot be done here."""
    schema = value.get("response_format")
    yield from _own_parameters(value.get("parameters"))
    for name, given in value.items():
        if name in _WITHOUT_EFFECT or given is None:
            continue
        if name == "instruction":
            yield "instruction", _converted(given)
            yield "as_message", True
        elif name not in ("response_format", "parameters", "transformations"):
            raise ValueError(f"{name}: cannot be done by this server; {_REMEDY}")
    if schema is not None:
        yield "output_schema", _schema("response_format", schema)


def _schema(field: str, value: Any) -> Any:
    """Return a schema that may be JSON text. Raises: ValueError."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except RecursionError as exc:
        raise ValueError(f"{field}: is nested too deeply") from exc
    except ValueError as exc:
        raise ValueError(f"{field}: is not valid JSON: {exc}") from exc


def _own_parameters(parameters: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of the contract among IBM's parameters of a request. Raises: ValueError."""
    own = _mapping("parameters", parameters)
    extra = _mapping("parameters.extra_body", own.get("extra_body"))
    given = {_SPELLINGS.get(name, name): value for name, value in (own | extra).items()}
    structured = _mapping("structured_outputs", given.pop("structured_outputs", None))
    schema = given.pop("guided_json", structured.get("json"))
    given.pop("extra_body", None)
    if "stop" in given:
        yield "stop", given.pop("stop")
    if schema is not None:
        yield "output_schema", _schema("parameters.extra_body.guided_json", schema)
    if given:
        yield "sampling", given


def _mapping(field: str, value: Any) -> dict[Any, Any]:
    """Return a mapping that may be left out. Raises: ValueError."""
    found = value or {}
    if not isinstance(found, dict):
        raise ValueError(f"{field}: must be a mapping; {_REMEDY}")
    return found


def _converted(instruction: Any) -> str:
    """Return IBM's instruction, which Python's `format` fills, with our input. Raises: ValueError."""
    try:
        pieces = list(Formatter().parse(str(instruction)))
    except ValueError as exc:
        raise ValueError(f"instruction: {exc}; write a brace that is text twice") from exc
    if "\0" in str(instruction):
        raise ValueError(f"instruction: has the character NUL; {_REMEDY}")
    fields = {field for _, field, *_ in pieces} - {None, _LAST_MESSAGE}
    text = "".join(literal + ("" if field is None else "\0") for literal, field, *_ in pieces)
    if fields or INPUT in text:
        what = f"{{{min(map(str, fields))}}}" if fields else INPUT
        raise ValueError(f"instruction: has {what}, and only {{{_LAST_MESSAGE}}} can be filled; {_REMEDY}")
    return text.replace("\0", INPUT)
