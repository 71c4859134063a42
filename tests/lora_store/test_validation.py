from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_store import AdapterRefused, Label, Limits, check_folder
from lora_store.peft_files import TEMPLATE_FILE, template_digest
from lora_store.validation import NO_CHAT_TEMPLATE, CheckedFolder
from tests.bad_uploads import Spoil, add, config, remove, rename, samples, tensors, write
from tests.lora_store.builders import BASE, SHAPES, MakeFolder

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
UP0 = "base_model.model.model.layers.0.mlp.up_proj"


def check(folder: Path, label: Label | None = None, shapes: Any = None, **options: Any) -> CheckedFolder:
    return check_folder(
        folder, label, accepts_base=options.pop("accepts_base", {BASE}), module_shapes=shapes, **options
    )


def refusal(folder: Path, *args: Any, **options: Any) -> tuple[str, ...]:
    with pytest.raises(AdapterRefused) as caught:
        check(folder, *args, **options)
    return caught.value.reasons


def test_an_error_lists_every_reason(make_folder: MakeFolder) -> None:
    folder = make_folder()
    config(use_dora=True, bias="all", base_model_name_or_path="other")(folder)
    add("stray", torch.ones(1))(folder)
    add(f"{UP0}.lora_A.weight", torch.full((2, 6), torch.nan))(folder)
    samples(b"one", b'{"input": "fine"}', b"three")(folder)
    reasons = refusal(folder, Label("a/b", template="jinja"))
    wanted = ["name", "template", "bias", "use_dora", "base model", "stray", "NaN", "line 1", "line 3"]
    assert [word for word in wanted if not any(word in reason for reason in reasons)] == []
    assert len(reasons) == len(wanted)


def test_the_path_of_the_base_is_accepted_and_not_shown_to_others(make_folder: MakeFolder) -> None:
    folder, accepted = make_folder(), {"tiny-base", "/srv/models/tiny-base"}
    config(base_model_name_or_path="/srv/models/tiny-base/")(folder)
    assert check(folder, accepts_base=accepted).base_model == "/srv/models/tiny-base"
    config(base_model_name_or_path="/home/me/tiny-base")(folder)
    [reason] = refusal(folder, accepts_base=accepted)
    assert "/srv" not in reason
    wanted = ["'/home/me/tiny-base'", "accepts 'tiny-base'", "publish it with --base-name", "accepts_base"]
    assert [part for part in wanted if part not in reason] == []


@pytest.mark.parametrize("named", ["/home/me/run-17/base", None])
def test_a_base_that_the_publisher_names_replaces_the_folders(named: str | None, make_folder: MakeFolder) -> None:
    folder, label = make_folder(), Label("poet", base_model=BASE)
    config(base_model_name_or_path=named)(folder)
    assert check(folder, label, SHAPES).base_model == BASE
    [reason] = refusal(folder, replace(label, base_model="other"), SHAPES)
    assert "base_model 'other' is none that this server accepts: 'tiny-base'" in reason
    other = {name: (out + 1, num_in) for name, (out, num_in) in SHAPES.items()}
    assert "but the base model's layer maps" in refusal(folder, label, other)[0]


def test_the_configs_patterns_are_not_matched_with_made_up_modules(make_folder: MakeFolder) -> None:
    folder = make_folder()
    config(rank_pattern={"stray": 9, r"^model\.layers\.0\.mlp\.up_proj": 2})(folder)
    for side, shape in (("A", (4, 6)), ("B", (8, 4))):
        add(f"base_model.model.stray.lora_{side}.weight", torch.ones(shape))(folder)
    [reason] = refusal(folder, None, SHAPES)
    assert "'stray' is not a linear layer of the base model" in reason


def test_the_list_of_reasons_is_limited_and_counts_the_omitted_ones(make_folder: MakeFolder) -> None:
    folder = make_folder()
    strays = {  # pairs whose sides fit in no two in the same way
        f"base_model.model.stray{number}.lora_{side}.weight": torch.ones(number + 1, 2)
        for number in range(100)
        for side in "AB"
    }
    tensors(lambda found, _: found.update(strays))(folder)
    reasons = refusal(folder, None, SHAPES)
    assert len(reasons) == 51 and re.fullmatch(r"and \d\d more", reasons[-1])


def renamed(found: dict[str, Tensor], _: str) -> None:
    for name in list(found):
        found[name.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.")] = found.pop(name)


def without_a(found: dict[str, Tensor], _: str) -> None:
    for name in [name for name in found if ".lora_A." in name]:
        del found[name]


def in_8_bits(found: dict[str, Tensor], _: str) -> None:
    found.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in found.items()})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (tensors(renamed), "is not a LoRA tensor of a linear layer (and 5 more)"),
        (tensors(in_8_bits), "has dtype F8_E4M3, must be one of F64, F32, F16, BF16 (and 5 more)"),
        (tensors(without_a), "has lora_B but no lora_A (and 2 more)"),
    ],
)
def test_one_problem_of_many_tensors_or_modules_is_one_reason(make_folder: MakeFolder, spoil: Spoil, said: str) -> None:
    folder = make_folder()
    spoil(folder)
    [reason] = refusal(folder, None, SHAPES)
    assert reason.endswith(said)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: None,
        remove("lora_samples.jsonl"),
        write("training_args.bin", b"\x80\x04."),
        write("README.md", b"hello"),
        lambda folder: (folder / "checkpoint-1").mkdir(),
        config(lora_dropout=0.1, megatron_core="megatron.core", qalora_group_size=16, runtime_config={"a": 1}),
        config(init_lora_weights="gaussian", task_type="CAUSAL_LM", eva_config={"rho": 2}),
        config(use_dora=False, modules_to_save=None, future_setting=None),
        samples(*[b'{"input": "x", "output": null, "note": 1}'] * 200),
        samples(b'{"input": "%b"}' % (b"x" * 8178)),
        samples(b'{"input": "%b"}' % (b"x" * 9000)),
        samples(*[b'{"input": "x"}'] * 201),
        samples(b'{"input": "x"}\r'),
        tensors(lambda found, _: found.update({key: tensor.bfloat16() for key, tensor in found.items()})),
        tensors(lambda found, _: found.update({key: tensor.double() for key, tensor in found.items()})),
        tensors(lambda found, _: found[f"{Q0}.lora_B.weight"].zero_()),
    ],
)
def test_harmless_files_and_settings_are_accepted(make_folder: MakeFolder, spoil: Callable[[Path], object]) -> None:
    folder = make_folder()
    spoil(folder)
    checked = check(folder, None, SHAPES)
    assert (set(checked.modules), checked.base_model, checked.warnings) == (set(SHAPES), BASE, ())


def test_an_adapter_whose_b_are_all_zero_is_accepted_with_a_warning(make_folder: MakeFolder) -> None:
    folder = make_folder()
    tensors(lambda found, _: [tensor.zero_() for key, tensor in found.items() if "lora_B" in key])(folder)
    [warning] = check(folder).warnings
    assert "every lora_B is zero" in warning


def test_modules_are_not_checked_without_a_known_base(make_folder: MakeFolder) -> None:
    folder = make_folder()
    rename("layers.1", "layers.7")(folder)
    assert "model.layers.7.self_attn.q_proj" in check(folder).modules
    reasons = refusal(folder, None, {"model.layers.0.self_attn.q_proj": (8, 6)})
    assert "is not a linear layer of the base model" in reasons[0]


def test_the_operator_sets_the_limits(make_folder: MakeFolder) -> None:
    reasons = refusal(make_folder(), None, SHAPES, limits=Limits(max_rank=3, max_config_bytes=3, max_tensors=6))
    for said in ("has rank 4, must be 1 to 3", "adapter_config.json: has "):
        assert any(said in reason for reason in reasons)
    reasons = refusal(make_folder(), None, SHAPES, limits=Limits(max_tensors=5))
    assert any("has 6 tensors, at most 5" in reason for reason in reasons)


def test_a_file_no_folder_and_a_folder_of_adapters_give_one_reason(make_folder: MakeFolder, tmp_path: Path) -> None:
    parent = make_folder("checkpoint-1").parent
    make_folder("checkpoint-2")
    cases = {
        parent / "checkpoint-1" / "adapter_config.json": "'adapter_config.json' is a file: give the folder that",
        tmp_path / "nowhere": "'nowhere' is not a folder",
        parent: "it contains adapters in checkpoint-1, checkpoint-2: give one of these",
    }
    for path, said in cases.items():
        [reason] = refusal(path)
        assert said in reason


def test_a_bad_name_comes_with_a_valid_one(make_folder: MakeFolder) -> None:
    assert refusal(make_folder(), Label("my adapter (v2)"))[0].endswith(", such as 'my-adapter-v2'")


SOURCE = "{% for m in messages %}\n{{ m.content }}\n{% endfor %}\n"


@pytest.mark.parametrize("source", [SOURCE, SOURCE.removesuffix("\n"), SOURCE.replace("\n", "\r\n")])
def test_a_known_chat_template_names_the_adapters_template(source: str, make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / TEMPLATE_FILE).write_bytes(source.encode())
    assert check(folder, templates={template_digest(SOURCE): "chat"}).template == "chat"


def test_an_unknown_chat_template_is_refused_unless_the_publisher_names_one(make_folder: MakeFolder) -> None:
    folder, known = make_folder(), {template_digest(SOURCE): "chat"}
    (folder / TEMPLATE_FILE).write_text(SOURCE + "\n")
    [reason] = refusal(folder, templates=known)
    wanted = [TEMPLATE_FILE, "uploaded templates never run", "publish with template 'chat'", "set chat_template"]
    assert [part for part in wanted if part not in reason] == []
    assert check(folder, Label("poet", template="alpaca"), templates=known).template == "alpaca"
    assert check(folder, templates=None).template is None, "it is not judged"
    [reason] = refusal(folder, templates={})
    assert "publish with template 'alpaca', or let the operator set chat_template" in reason


def test_the_base_models_chat_template_can_be_named_only_if_it_has_one(make_folder: MakeFolder) -> None:
    named = Label("poet", template="chat")
    assert refusal(make_folder(), named, templates={}) == (NO_CHAT_TEMPLATE,)
    assert check(make_folder(), named, templates={template_digest(SOURCE): "chat"}).template == "chat"
    assert check(make_folder(), named, templates=None).template == "chat", "it is not judged"


@pytest.mark.parametrize(
    ("content", "problem"), [(b"\xff\xfe", "is not UTF-8"), (b"x" * ((1 << 18) + 1), "takes 262,144 bytes")]
)
def test_a_chat_template_that_cannot_be_read_is_refused(content: bytes, problem: str, make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / TEMPLATE_FILE).write_bytes(content)
    assert problem in refusal(folder, templates={})[0]
