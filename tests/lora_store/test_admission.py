from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_store import AdapterRefused, Limits, check_folder

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
UP0 = "base_model.model.model.layers.0.mlp.up_proj"
Spoil = Callable[[Path], object]


def _config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return spoil


def _set(key: str, tensor: torch.Tensor) -> Spoil:
    return _tensors(lambda tensors: tensors.update({key: tensor}))


def _write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def _remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def _samples(*lines: bytes) -> Spoil:
    return _write("lora_samples.jsonl", b"\n".join(lines) + b"\n")


def _header(header: bytes, claimed: int | None = None) -> Spoil:
    return _write("adapter_model.safetensors", struct.pack("<Q", claimed or len(header)) + header + b"\0" * 16)


def _link_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.rename(folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")


def _dangling_samples(folder: Path) -> None:
    (folder / "lora_samples.jsonl").unlink()
    (folder / "lora_samples.jsonl").symlink_to("/nowhere")


def _pipe(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")


def _sparse(name: str, size: int) -> Spoil:
    return lambda folder: os.truncate(folder / name, size)


def _many_files(folder: Path) -> None:
    for number in range(1001):
        (folder / f"{number}.txt").touch()


def _zero(tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        tensor.mul_(0 if "lora_B" in key else 1)


def _resize(a: tuple[int, ...], b: tuple[int, ...]) -> Spoil:
    return _tensors(
        lambda tensors: tensors.update({f"{Q0}.lora_A.weight": torch.ones(a), f"{Q0}.lora_B.weight": torch.ones(b)})
    )


ONE = b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
REFUSALS: dict[str, tuple[Spoil, str]] = {
    "no config": (_remove("adapter_config.json"), "adapter_config.json: is missing"),
    "no weights": (_remove("adapter_model.safetensors"), "adapter_model.safetensors: is missing"),
    "pickle": (_write("adapter_model.bin", b"\x80\x04."), "adapter_model.bin is a pickle, which runs code when read"),
    "link to weights": (_link_weights, "'adapter_model.safetensors' is a symbolic link"),
    "dangling link": (_dangling_samples, "'lora_samples.jsonl' is a symbolic link"),
    "unread link": (lambda folder: (folder / "README.md").symlink_to("/etc/hosts"), "'README.md' is a symbolic link"),
    "named pipe": (_pipe, "adapter_config.json: is not a regular file"),
    "many files": (_many_files, "more than 1000 files"),
    "large weights": (_sparse("adapter_model.safetensors", (1 << 29) + 1), "has 536870913 bytes, at most 536870912"),
    "large config": (_sparse("adapter_config.json", (1 << 20) + 1), "adapter_config.json: has 1048577 bytes"),
    "header bomb": (_header(b"{}", claimed=1 << 62), f"claims a header of {1 << 62} bytes, at most 4194304"),
    "header past the end": (_header(b"{}", claimed=1 << 20), "adapter_model.safetensors: has a broken header"),
    "empty weights": (_write("adapter_model.safetensors", b""), "claims a header of 0 bytes"),
    "nested header": (_header(b'{"a":' + b"[" * 100_000), "has a broken header: nests too deep"),
    "duplicate tensors": (_header(b'{"k": %b, "k": %b}' % (ONE, ONE)), "duplicate keys ['k']"),
    "header is a list": (_header(b"[]"), "must be a JSON object, got list"),
    "offsets past the end": (
        _header(b'{"k": {"dtype":"F32","shape":[99],"data_offsets":[0,396]}}'),
        "not a valid safe",
    ),
    "no tensors": (_tensors(lambda tensors: tensors.clear()), "holds no tensors"),
    "invalid json": (_write("adapter_config.json", b"{"), "adapter_config.json: is not valid JSON"),
    "nested json": (_write("adapter_config.json", b"[" * 100_000), "is not valid JSON: nests too deep"),
    "duplicate setting": (_write("adapter_config.json", b'{"r": 1, "r": 2}'), "duplicate keys ['r']"),
    "config is a list": (_write("adapter_config.json", b"[]"), "must be a JSON object, got list"),
    "not utf-8": (_write("adapter_config.json", b"\xff\xfe{}"), "adapter_config.json: is not valid JSON"),
    "other base": (_config(base_model_name_or_path="other"), "base model 'other' is not accepted here"),
    "no base": (_config(base_model_name_or_path=None), "base model 'None' is not accepted here"),
    "base of wrong type": (_config(base_model_name_or_path=["tiny-base"]), "base_model_name_or_path must be a string"),
    "other method": (_config(peft_type="IA3"), "peft_type must be 'LORA', got 'IA3'"),
    "dora": (_config(use_dora=True), "use_dora (DoRA) is not served"),
    "dora tensor": (_set(f"{Q0}.lora_magnitude_vector", torch.ones(8)), "belongs to DoRA"),
    "saved modules": (_config(modules_to_save=["lm_head"]), "modules_to_save (fully trained modules)"),
    "bias": (_config(bias="all"), "bias must be 'none', got 'all'"),
    "lora bias": (_config(lora_bias=True), "lora_bias (LoRA biases)"),
    "bias tensor": (_set(f"{Q0}.lora_B.bias", torch.ones(8)), f"tensor '{Q0}.lora_B.bias' is a bias"),
    "trained tokens": (_config(trainable_token_indices=[1]), "trainable_token_indices (trained tokens)"),
    "bare parameters": (_config(target_parameters=["x"]), "target_parameters (LoRA on bare parameters)"),
    "replicated layers": (_config(layer_replication=[[0, 1]]), "layer_replication (replicated layers)"),
    "activated lora": (_config(alora_invocation_tokens=[1]), "alora_invocation_tokens (activated LoRA)"),
    "qalora": (_config(use_qalora=True), "use_qalora (QALoRA)"),
    "pissa": (_config(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4' changes the base"),
    "unknown setting": (_config(use_quantum=True), "setting 'use_quantum' is not known"),
    "lora on embedding": (_set("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 9)), "vocabulary"),
    "embedding": (_set("base_model.model.model.embed_tokens.weight", torch.ones(9, 6)), "changes vocabulary"),
    "head": (_set("base_model.model.lm_head.weight", torch.ones(9, 6)), "changes vocabulary"),
    "rank of text": (_config(r="8"), "r must be a whole number above 0, got '8'"),
    "rank true": (_config(r=True), "r must be a whole number above 0"),
    "alpha nan": (_config(lora_alpha=float("nan")), "lora_alpha must be a number other than 0"),
    "alpha zero": (_config(lora_alpha=0), "lora_alpha must be a number other than 0"),
    "alpha huge": (_config(lora_alpha=10**400), "lora_alpha must be a number other than 0"),
    "rslora of text": (_config(use_rslora="yes"), "use_rslora must be true or false"),
    "patterns a list": (_config(rank_pattern=["q_proj"]), "rank_pattern must be an object"),
    "runaway pattern": (_config(alpha_pattern={"(a+)+": 1}), "alpha_pattern pattern '(a+)+' is too complex"),
    "pattern of text": (_config(alpha_pattern={"q_proj": "1"}), "alpha_pattern of 'q_proj' must be"),
    "rank 257": (_resize((257, 6), (8, 257)), "has rank 257, must be 1 to 256"),
    "rank 0": (_resize((0, 6), (8, 0)), "has rank 0, must be 1 to 256"),
    "rank not the config's": (_resize((3, 6), (8, 3)), "has rank 3, adapter_config.json gives it 4"),
    "only a": (_tensors(lambda tensors: tensors.pop(f"{Q0}.lora_B.weight")), "q_proj' has lora_A but no lora_B"),
    "only b": (_tensors(lambda tensors: tensors.pop(f"{Q0}.lora_A.weight")), "q_proj' has lora_B but no lora_A"),
    "sides do not fit": (_resize((4, 6), (8, 3)), "lora_A (4, 6) and lora_B (8, 3), which do not fit each other"),
    "three dims": (_resize((4, 6, 1), (8, 4)), "lora_A (4, 6, 1) and lora_B (8, 4)"),
    "no dims": (_resize((), ()), "lora_A () and lora_B ()"),
    "in of another base": (_resize((4, 5), (8, 4)), "maps 5 to 8, the base model's layer maps 6 to 8"),
    "out of another base": (_resize((4, 6), (9, 4)), "maps 6 to 9, the base model's layer maps 6 to 8"),
    "nan": (_set(f"{Q0}.lora_A.weight", torch.full((4, 6), torch.nan)), f"'{Q0}.lora_A.weight' holds NaN"),
    "infinity": (_set(f"{Q0}.lora_B.weight", torch.full((8, 4), -torch.inf)), f"'{Q0}.lora_B.weight' holds NaN or inf"),
    "overflow": (_set(f"{Q0}.lora_B.weight", torch.full((8, 4), 3e38)), "q_proj' overflows its dtype once scaled"),
    "f64": (_set(f"{Q0}.lora_A.weight", torch.ones(4, 6).double()), f"'{Q0}.lora_A.weight' has dtype F64"),
    "int8": (
        _set(f"{Q0}.lora_A.weight", torch.ones(4, 6).to(torch.int8)),
        "has dtype I8, must be one of F32, F16, BF16",
    ),
    "every b zero": (_tensors(_zero), "every lora_B is zero"),
    "unknown module": (_set("base_model.model.model.layers.9.x.lora_A.weight", torch.ones(4, 6)), "'model.layers.9.x'"),
    "unknown key": (_set("model.layers.0.extra", torch.ones(2)), "tensor 'model.layers.0.extra' is no LoRA tensor"),
    "key with adapter name": (
        _set(f"{Q0}.lora_A.default.weight", torch.ones(4, 6)),
        f"'{Q0}.lora_A.default.weight' is",
    ),
    "key with dots": (
        _set("base_model.model...lora_A.weight", torch.ones(4, 6)),
        "'base_model.model...lora_A.weight' is",
    ),
    "samples of text": (_samples(b"Write a poem."), "lora_samples.jsonl: line 1 is not a JSON object"),
    "empty samples": (_write("lora_samples.jsonl", b""), "lora_samples.jsonl: line 1 is not a JSON object"),
    "sample is a list": (_samples(b'{"input": "x"}', b'["x"]'), "line 2 is not a JSON object: must be a JSON object"),
    "sample without input": (_samples(b'{"text": "x"}'), "line 1 needs a text `input`"),
    "sample of space": (_samples(b'{"input": " "}'), "line 1 needs a text `input`"),
    "number as input": (_samples(b'{"input": 1}'), "line 1 needs a text `input`"),
    "number as output": (_samples(b'{"input": "x", "output": 1}'), "line 1 has an `output` that is not text"),
    "half a surrogate": (_samples(b'{"input": "\\ud800"}'), "line 1 holds half of a surrogate pair"),
    "201 samples": (_samples(*[b'{"input": "x"}'] * 201), "has 201 lines, at most 200"),
    "long sample": (_samples(b'{"input": "%b"}' % (b"x" * 8192)), "line 1 has 8205 bytes, at most 8192"),
    "long samples file": (_sparse("lora_samples.jsonl", 1 << 21), "lora_samples.jsonl: has 2097152 bytes"),
    "empty description": (_write("description.txt", b" \n"), "description.txt: is empty"),
    "binary description": (_write("description.txt", b"\xff"), "description.txt: is not UTF-8"),
    "long description": (_write("description.txt", b"x" * 8193), "description.txt: has 8193 bytes, at most 8192"),
}


def _stored(uri: str) -> list[Path]:
    return [path for path in Path(uri, "blobs").rglob("*") if path.is_file()]


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_folder_is_refused_by_name_and_nothing_is_stored(open_store, store_uri, make_folder, module_shapes, case):
    spoil, reason = REFUSALS[case]
    folder = make_folder()
    spoil(folder)
    with pytest.raises(AdapterRefused) as caught:
        open_store().stage(folder, module_shapes=module_shapes)
    assert any(reason in given for given in caught.value.reasons), caught.value.reasons
    assert reason in str(caught.value)
    assert _stored(store_uri) == []


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        *(({"name": name}, "name ") for name in ("..", ".", "auto", "", "a/b", "../up", "a\nb", "a\0b", "a\x1b[0m")),
        *(({"name": name}, "name ") for name in ("a b", "x" * 65, "poet\n", "naïve", "a:b", "a@b")),
        ({"tenant": "../them"}, "tenant '../them' must be"),
        ({"tags": ["fine", "not fine"]}, "tag 'not fine' must be"),
        ({"tags": [f"t{number}" for number in range(33)]}, "has 33 tags, at most 32"),
        ({"template": "jinja"}, "template must be one of alpaca, chat, got 'jinja'"),
        ({"visibility": "secret"}, "visibility must be one of public, private, got 'secret'"),
    ],
    ids=repr,
)
def test_a_bad_label_is_refused_by_name_and_nothing_is_stored(open_store, store_uri, make_folder, label, reason):
    with pytest.raises(AdapterRefused) as caught:
        open_store().stage(make_folder(), **label)
    [given] = caught.value.reasons
    assert given.startswith(reason)
    assert "\n" not in given and "\x1b" not in given
    assert _stored(store_uri) == []


def test_every_reason_is_told_at_once(open_store, make_folder):
    folder = make_folder()
    _config(use_dora=True, bias="all", base_model_name_or_path="other")(folder)
    _set("stray", torch.ones(1))(folder)
    _set(f"{UP0}.lora_A.weight", torch.full((2, 6), torch.nan))(folder)
    _samples(b"one", b'{"input": "fine"}', b"three")(folder)
    with pytest.raises(AdapterRefused) as caught:
        open_store().stage(folder, name="a/b", template="jinja")
    wanted = ["name", "template", "bias", "use_dora", "base model", "stray", "NaN", "line 1", "line 3"]
    assert [word for word in wanted if not any(word in reason for reason in caught.value.reasons)] == []
    assert len(caught.value.reasons) == len(wanted)


def test_made_up_modules_never_meet_the_configs_patterns(open_store, make_folder, module_shapes):
    folder = make_folder()
    _config(rank_pattern={"stray": 9, r"^model\.layers\.0\.mlp\.up_proj": 2})(folder)
    pair = {
        "base_model.model.stray.lora_A.weight": torch.ones(4, 6),
        "base_model.model.stray.lora_B.weight": torch.ones(8, 4),
    }
    _tensors(lambda tensors: tensors.update(pair))(folder)
    with pytest.raises(AdapterRefused) as caught:
        open_store().stage(folder, module_shapes=module_shapes)
    [reason] = caught.value.reasons
    assert "'stray' is no linear layer of the base model" in reason


def test_reasons_are_bounded_and_their_number_told(open_store, make_folder, module_shapes):
    folder = make_folder()
    _tensors(lambda tensors: tensors.update({f"stray{number}": torch.ones(1) for number in range(100)}))(folder)
    with pytest.raises(AdapterRefused) as caught:
        open_store().stage(folder, module_shapes=module_shapes)
    assert len(caught.value.reasons) == 51
    assert caught.value.reasons[-1] == "and 50 more"


def test_a_missing_folder_is_refused(open_store, tmp_path):
    with pytest.raises(AdapterRefused, match="'nowhere' is not a folder"):
        open_store().stage(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: None,
        _remove("lora_samples.jsonl"),
        _write("training_args.bin", b"\x80\x04."),
        _write("README.md", b"hello"),
        lambda folder: (folder / "checkpoint-1").mkdir(),
        _config(lora_dropout=0.1, megatron_core="megatron.core", qalora_group_size=16, runtime_config={"a": 1}),
        _config(init_lora_weights="gaussian", task_type="CAUSAL_LM", eva_config={"rho": 2}),
        _config(use_dora=False, modules_to_save=None, future_setting=None),
        _samples(*[b'{"input": "x", "output": null, "note": 1}'] * 200),
        _samples(b'{"input": "%b"}' % (b"x" * 8178)),
        _samples(b'{"input": "x"}\r'),
        _tensors(lambda tensors: tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()})),
        _tensors(lambda tensors: tensors[f"{Q0}.lora_B.weight"].zero_()),
    ],
)
def test_what_is_harmless_is_admitted(make_folder, module_shapes, spoil):
    folder = make_folder()
    spoil(folder)
    admitted = check_folder(folder, accepts_base={"tiny-base"}, module_shapes=module_shapes)
    assert set(admitted.modules) == set(module_shapes)
    assert admitted.base_model == "tiny-base"


def test_modules_are_not_matched_where_the_base_is_not_known(make_folder):
    folder = make_folder()
    _tensors(
        lambda tensors: [
            tensors.update({key.replace("layers.1", "layers.7"): tensors.pop(key)}) for key in list(tensors)
        ]
    )(folder)
    admitted = check_folder(folder, accepts_base={"tiny-base"}, module_shapes=None)
    assert "model.layers.7.self_attn.q_proj" in admitted.modules
    with pytest.raises(AdapterRefused, match="is no linear layer of the base model"):
        check_folder(folder, accepts_base={"tiny-base"}, module_shapes={"model.layers.0.self_attn.q_proj": (8, 6)})


def test_limits_are_the_operators(make_folder, module_shapes):
    with pytest.raises(AdapterRefused) as caught:
        check_folder(
            make_folder(),
            accepts_base={"tiny-base"},
            module_shapes=module_shapes,
            limits=Limits(max_rank=3, max_samples=1, max_tensors=6),
        )
    assert any("has rank 4, must be 1 to 3" in reason for reason in caught.value.reasons)
    assert any("has 2 lines, at most 1" in reason for reason in caught.value.reasons)


def test_the_number_of_tensors_is_bounded_before_they_are_read(make_folder, module_shapes):
    with pytest.raises(AdapterRefused, match="holds 6 tensors, at most 5"):
        check_folder(
            make_folder(), accepts_base={"tiny-base"}, module_shapes=module_shapes, limits=Limits(max_tensors=5)
        )
