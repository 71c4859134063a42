from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from deployments.publishing.contract_files import read_contract
from lora_store import FileRefused
from lora_store.contract_files import MAX_CONTRACT_BYTES

ENUM = {"type": "string", "enum": ["fish", "not fish"]}
INTRINSIC: dict[str, Any] = {"model": None, "response_format": None, "transformations": None}


def read(name: str, data: Any) -> tuple[Any, tuple[str, ...]]:
    text, notes = read_contract(name, data if isinstance(data, bytes) else yaml.safe_dump(data).encode())
    return json.loads(text or "null"), notes


def test_a_contract_in_yaml_is_kept_as_it_is_written() -> None:
    written = b"""
        instruction: |
            Classify: {input}
            Answer with {"label": ...}.
        output_schema: {type: object, properties: {z: {type: string}, a: {type: integer}}}
        stop: END  # a comment
        sampling: {temperature: 0, max_tokens: 20}
    """
    found, notes = read("adapter_io.yaml", written)
    assert found["instruction"] == 'Classify: {input}\nAnswer with {"label": ...}.\n'
    assert list(found["output_schema"]["properties"]) == ["z", "a"]
    assert (found["stop"], found["sampling"], notes) == (["END"], {"temperature": 0, "max_tokens": 20}, ())
    assert read("contract", json.dumps(found).encode())[0] == found
    assert read("adapter_io.yaml", b"{}")[0] is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"instruction: Be brief.", r"instruction: needs \{input\} once, .* has it not at all"),
        (b"instruction: '{input} {input}'", "instruction: needs .* has it 2"),
        (b"as_message: true", "as_message: needs an instruction"),
        (b"sampling: {temperature: 3}", r"sampling\.temperature: must be at most 2, got 3"),
        (b"sampling: {seed: 3}", r"sampling\.seed: unknown field"),
        (b"instructions: hm", "instructions: unknown field; did you mean 'instruction'"),
        (b"stop: ['']", r"stop\.0: must have at least 1"),
        (b"output_schema: {properties: {a: {type: objec}}}", "output_schema/properties/a: .*objec"),
        (b"output_schema: {const: .nan}", "JSON does not have .*not JSON compliant.* put it in quotes"),
        (b"stop: &x [a]\noutput_schema: {enum: *x}", r"is not valid YAML: a YAML alias \(\*name\) is not allowed"),
        (b"stop: a\nstop: b", "'stop' is given in line 1 already"),
        (b"stop: 2020-01-01", "JSON does not have .* put it in quotes"),
        (b"stop: !!set {a}", "JSON does not have .*type set"),
        *(
            (b"stop: !!" + tag, "a value cannot be read .* put it in quotes")
            for tag in (b"bool maybe", b"int ''", b"timestamp x")
        ),
        (b"? [a]\n: b\n? [a]\n: b", "not valid YAML: .*unhashable key"),
        (b"- a\n- b", "must be a mapping"),
        (b"[" * 30_000, "is not valid YAML: it nests too deep"),
        (b"output_schema: " + b"{items: " * 300 + b"{}" + b"}" * 300, "nests too deep"),
        (b"a: [", "not valid YAML"),
        (b"\xff", "is not UTF-8"),
        (b'instruction: "\\ud800{input}"', "has text that is not Unicode"),
        (b"stop: 'a'\ninstruction: '{input}" + b"a" * MAX_CONTRACT_BYTES + b"'", "must have at most 16384 characters"),
        (b"instruction: '{input}" + "ä".encode() * 9000 + b"'", "has 18025 bytes as JSON, at most 16384"),
        (b"!!python/object:os.system {}", "not valid YAML"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_contract_names_the_field(data: bytes, said: str) -> None:
    with pytest.raises(FileRefused, match=said) as refused:
        read_contract("adapter_io.yaml", data)
    assert refused.value.file == "adapter_io.yaml" and "pydantic" not in str(refused.value)


def test_an_instruction_leaves_half_of_the_context_to_the_user() -> None:
    def data(count: int) -> bytes:
        return b"instruction: '{input}" + b"a" * (count - len("{input}")) + b"'"

    text, _ = read_contract("adapter_io.yaml", data(200), 100)
    assert len(json.loads(text)["instruction"]) == 200
    with pytest.raises(FileRefused, match=r"instruction: has 201 characters, at most 200 leave half of .* 100 tokens"):
        read_contract("adapter_io.yaml", data(201), 100)


def test_an_intrinsic_of_ibm_is_imported() -> None:
    own: dict[str, Any] = {
        "instruction": "{{ braces }} {last_message} about fish?",
        "parameters": {"temperature": 0.5, "max_completion_tokens": 6, "extra_body": {"guided_json": ENUM}},
        "sentence_boundaries": None,
    }
    expected = {
        "instruction": "{ braces } {input} about fish?",
        "as_message": True,
        "output_schema": ENUM,
        "sampling": {"temperature": 0.5, "max_tokens": 6},
    }
    assert read("io.yaml", INTRINSIC | own) == (expected, ())
    found, [note] = read(
        "io.yaml", INTRINSIC | {"response_format": json.dumps(ENUM), "transformations": [{"type": "nest"}]}
    )
    assert found == {"output_schema": ENUM} and "transformations are steps of IBM's client" in note


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"sentence_boundaries": {"last_message": "i"}}, "sentence_boundaries: cannot be done by this server"),
        ({"instruction": "About {pet}?"}, r"instruction: has \{pet\}"),
        ({"instruction": "{{input}} {last_message}"}, r"instruction: has \{input\}"),
        ({"instruction": "About {"}, "instruction: .*brace"),
        ({"instruction": "About \0?"}, "instruction: has the character NUL"),
        ({"response_format": "{"}, "response_format: is not valid JSON"),
        ({"parameters": {"logprobs": True}}, r"sampling\.logprobs: unknown field"),
        ({"parameters": [1]}, "parameters: must be a mapping"),
        ({"parameters": {"extra_body": "a"}}, "parameters.extra_body: must be a mapping"),
        ({"parameters": {"structured_outputs": [1]}}, "structured_outputs: must be a mapping"),
    ],
    ids=str,
)
def test_an_intrinsic_that_cannot_be_followed_is_refused(own: dict[str, Any], said: str) -> None:
    with pytest.raises(FileRefused, match=said):
        read("io.yaml", INTRINSIC | own)


def test_a_prefix_of_llama_cpp_is_imported_if_it_is_plain_text() -> None:
    listed = {"id": 0, "path": "a.gguf", "scale": 1.0, "task_name": "poems", "prompt_prefix": "Rhyme: "}
    assert read("adapter_io.yaml", [listed])[0] == {"instruction": "Rhyme: {input}"}
    for own, said in (
        ({"prompt_prefix": "<|im_start|>user\n"}, "has '<|im_start|>', which belongs to a prompt template"),
        ({"prompt_prefix": "### Instruction:\n"}, "belongs to a prompt template"),
        ({"alora_invocation_string": "go"}, "together with 'alora_invocation_string'"),
        ({"prompt_prefix": 3}, "must be text"),
    ):
        with pytest.raises(FileRefused) as refused:
            read("adapter_io.yaml", listed | own)
        assert said in str(refused.value)
