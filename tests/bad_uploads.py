"""Kinds of invalid uploads: how to damage a valid folder, and the cause that the refusal must name.

The damage functions need only a samples file and modules of the base model in the valid folder.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

CONFIG, WEIGHTS, SAMPLES = "adapter_config.json", "adapter_model.safetensors", "lora_samples.jsonl"
Spoil = Callable[[Path], object]
Tensors = dict[str, Tensor]
BadFolders = dict[str, tuple[Spoil, str]]  # how to damage a valid folder, and the cause that the refusal must name


def write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def config(**changes: Any) -> Spoil:
    """Change settings of the config."""

    def spoil(folder: Path) -> None:
        settings = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(settings | changes))

    return spoil


def tensors(change: Callable[[Tensors, str], object]) -> Spoil:
    """Change the tensors; the second argument is the first module's key, without its side."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found, min(found).partition(".lora_")[0])
        save_file(found, folder / WEIGHTS)

    return spoil


def add(key: str, tensor: Tensor) -> Spoil:
    """Add a tensor. `{module}` in the key is replaced by the first module's name."""
    return tensors(lambda found, module: found.update({key.format(module=module): tensor}))


def fill(side: str, value: float, dtype: torch.dtype | None = None) -> Spoil:
    """Set every number of the first module's side to `value`, or keep the values and change the dtype."""

    def change(found: Tensors, module: str) -> None:
        old = found[f"{module}.lora_{side}.weight"]
        found[f"{module}.lora_{side}.weight"] = torch.full_like(old, value, dtype=dtype or old.dtype)

    return tensors(change)


def resize(change: Callable[[int, int, int], tuple[tuple[int, ...], tuple[int, ...]]]) -> Spoil:
    """Set the first module's shapes to the result of `change` for its rank, in and out."""

    def spoil(found: Tensors, module: str) -> None:
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        a_shape, b_shape = change(*found[a].shape, found[b].shape[0])
        found |= {a: torch.ones(a_shape), b: torch.ones(b_shape)}

    return tensors(spoil)


def rename(old: str, new: str) -> Spoil:
    """Replace `old` in every tensor's key."""

    def change(found: Tensors, module: str) -> None:
        for key in list(found):
            found[key.replace(old, new)] = found.pop(key)

    return tensors(change)


def samples(*lines: bytes) -> Spoil:
    return write(SAMPLES, b"\n".join(lines) + b"\n")


def header(text: bytes, *, claimed: int | None = None, data: bytes = b"\0" * 16) -> Spoil:
    """Write the weights file with this header and data."""
    return write(WEIGHTS, struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-16])


def _lengthen(folder: Path) -> None:
    with open(folder / WEIGHTS, "ab") as file:
        file.write(b"\0" * 8)


def _link_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def _dangling_samples(folder: Path) -> None:
    (folder / SAMPLES).unlink()
    (folder / SAMPLES).symlink_to("/nowhere")


def _pipe(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def _folder_for(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def _sparse(name: str, size: int) -> Spoil:
    return lambda folder: os.truncate(folder / name, size)


def _many_files(folder: Path) -> None:
    for number in range(1001):
        (folder / f"{number}.txt").touch()


def _both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


_ONE = b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
_NOT_SAFETENSORS = "adapter_model.safetensors: is not a valid safetensors file, so copy or save it again"
_PICKLE = pickle.dumps({"weight": [1.0]})

_FILES: BadFolders = {
    "no config": (remove(CONFIG), "adapter_config.json: is missing"),
    "no weights": (remove(WEIGHTS), "adapter_model.safetensors: is missing"),
    "pickle": (write("adapter_model.bin", _PICKLE), "adapter_model.bin is a pickle, which runs code when read"),
    "pickle by another name": (write(WEIGHTS, _PICKLE), "adapter_model.safetensors: has a header of"),
    "link to weights": (_link_weights, "'adapter_model.safetensors' is a symbolic link"),
    "dangling link": (_dangling_samples, "'lora_samples.jsonl' is a symbolic link"),
    "unread link": (lambda folder: (folder / "README.md").symlink_to("/etc/hosts"), "'README.md' is a symbolic link"),
    "named pipe": (_pipe, "adapter_config.json: is not a regular file"),
    "folder for weights": (_folder_for(WEIGHTS), "adapter_model.safetensors: is not a regular file"),
    "folder for samples": (_folder_for(SAMPLES), "lora_samples.jsonl: is not a regular file"),
    "many files": (_many_files, "more than 1000 files"),
    "large weights": (
        _sparse(WEIGHTS, (1 << 30) + 1),
        "this server takes 1,073,741,824 bytes (admission.max_weights_bytes). float32 weights take half as much",
    ),
    "large config": (
        _sparse(CONFIG, (1 << 20) + 1),
        "adapter_config.json: has 1,048,577 bytes; this server takes 1,048,576",
    ),
}

_WEIGHTS_FILE: BadFolders = {
    "header bomb": (header(b"{}", claimed=1 << 62), f"has a header of {1 << 62} bytes, at most 4194304"),
    "header past the end": (header(b"{}", claimed=1 << 20), "adapter_model.safetensors: has a broken header"),
    "empty weights": (write(WEIGHTS, b""), "has a header of 0 bytes"),
    "truncated weights": (_cut, _NOT_SAFETENSORS),
    "trailing bytes": (_lengthen, _NOT_SAFETENSORS),
    "nested header": (header(b'{"a":' + b"[" * 100_000), "has a broken header: it nests too deep"),
    "duplicate tensors": (header(b'{"k": %b, "k": %b}' % (_ONE, _ONE)), "repeats the keys ['k']"),
    "header is a list": (header(b"[]"), "must be a JSON object, got list"),
    "header is not text": (header(b"\xff\xfe{}"), "adapter_model.safetensors: has a broken header"),
    "no tensors": (write(WEIGHTS, save({})), "has no tensors"),
}

_CONFIG_FILE: BadFolders = {
    "invalid json": (write(CONFIG, b"{"), "adapter_config.json: is not valid JSON"),
    "nested json": (write(CONFIG, b"[" * 100_000), "is not valid JSON: it nests too deep"),
    "duplicate setting": (write(CONFIG, b'{"r": 1, "r": 2}'), "repeats the keys ['r']"),
    "config is a list": (write(CONFIG, b"[]"), "must be a JSON object, got list"),
    "not utf-8": (write(CONFIG, b"\xff\xfe{}"), "adapter_config.json: is not valid JSON"),
    "other base": (config(base_model_name_or_path="other"), "the adapter names 'other' as its base model"),
    "no base": (config(base_model_name_or_path=None), "adapter_config.json names no base model"),
    "base of wrong type": (config(base_model_name_or_path=["tiny-base"]), "base_model_name_or_path must be a string"),
    "other method": (config(peft_type="IA3"), "peft_type must be 'LORA', got 'IA3'"),
    "dora": (
        config(use_dora=True),
        "use_dora (DoRA) is not supported: train LoRA on linear layers only, or let PEFT's save_as_lora approximate",
    ),
    "saved modules": (config(modules_to_save=["lm_head"]), "modules_to_save (fully trained modules)"),
    "bias": (config(bias="all"), "bias must be 'none', got 'all'"),
    "lora bias": (config(lora_bias=True), "lora_bias (LoRA biases)"),
    "trained tokens": (config(trainable_token_indices=[1]), "trainable_token_indices (trained tokens)"),
    "bare parameters": (config(target_parameters=["x"]), "target_parameters has 'x': only the parameters of fused"),
    "replicated layers": (config(layer_replication=[[0, 1]]), "layer_replication (replicated layers)"),
    "activated lora": (config(alora_invocation_tokens=[1]), "alora_invocation_tokens (activated LoRA)"),
    "block-diagonal": (config(use_bdlora={"nblocks": 2}), "use_bdlora (block-diagonal LoRA) is not supported"),
    "kasa": (config(kasa_config={"beta": 1e-4}), "kasa_config (KaSA, which changes the base model's weights)"),
    "arrow": (config(arrow_config={"top_k": 3}), "arrow_config (Arrow routing) is not supported"),
    "qalora": (config(use_qalora=True), "use_qalora (QALoRA)"),
    "pissa": (config(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4' changes the base"),
    "unknown setting": (
        config(use_quantum=True),
        "sets 'use_quantum', which this version does not know: upgrade the server, or remove",
    ),
    "rank of text": (config(r="8"), "r must be a whole number above 0, got '8'"),
    "rank true": (config(r=True), "r must be a whole number above 0"),
    "alpha nan": (config(lora_alpha=float("nan")), "lora_alpha must be a number other than 0"),
    "alpha zero": (config(lora_alpha=0), "lora_alpha must be a number other than 0"),
    "alpha huge": (config(lora_alpha=10**400), "lora_alpha must be a number other than 0"),
    "rslora of text": (config(use_rslora="yes"), "use_rslora must be true or false"),
    "patterns a list": (config(rank_pattern=["q_proj"]), "rank_pattern must be an object"),
    "runaway pattern": (config(alpha_pattern={"(a+)+": 1}), "alpha_pattern pattern '(a+)+' is too complex"),
    "pattern of text": (config(alpha_pattern={"q_proj": "1"}), "alpha_pattern of 'q_proj' must be"),
}

_TENSORS: BadFolders = {
    "dora tensor": (add("{module}.lora_magnitude_vector", torch.ones(8)), "belongs to DoRA"),
    "bias tensor": (add("{module}.lora_B.bias", torch.ones(8)), "lora_B.bias' is a bias"),
    "lora on embedding": (
        add("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 9)),
        "changes vocabulary",
    ),
    "embedding": (add("base_model.model.model.embed_tokens.weight", torch.ones(9, 6)), "changes vocabulary"),
    "head": (add("base_model.model.lm_head.weight", torch.ones(9, 6)), "changes vocabulary"),
    "trained module": (
        add("base_model.model.score.modules_to_save.weight", torch.ones(9, 6)),
        "is a fully trained module",
    ),
    "rank 257": (resize(lambda r, i, o: ((257, i), (o, 257))), "has rank 257, must be 1 to 256"),
    "rank 0": (resize(lambda r, i, o: ((0, i), (o, 0))), "has rank 0, must be 1 to 256"),
    "rank not the config's": (resize(lambda r, i, o: ((r + 1, i), (o, r + 1))), "but adapter_config.json gives it"),
    "only a": (tensors(lambda found, module: found.pop(f"{module}.lora_B.weight")), "has lora_A but no lora_B"),
    "only b": (tensors(lambda found, module: found.pop(f"{module}.lora_A.weight")), "has lora_B but no lora_A"),
    "sides do not fit": (resize(lambda r, i, o: ((r, i), (o, r - 1))), "their shapes must be (rank, in) and"),
    "sides swapped": (resize(lambda r, i, o: ((o, r), (r, i))), "their shapes must be (rank, in) and"),
    "three dims": (resize(lambda r, i, o: ((r, i, 1), (o, r))), "their shapes must be (rank, in) and"),
    "no dims": (resize(lambda r, i, o: ((), ())), "lora_A () and lora_B ()"),
    "in of another base": (resize(lambda r, i, o: ((r, i - 1), (o, r))), "the base model's layer maps"),
    "out of another base": (resize(lambda r, i, o: ((r, i), (o + 1, r))), "the base model's layer maps"),
    "nan": (fill("A", torch.nan), "lora_A.weight' contains NaN or infinity"),
    "infinity": (fill("B", -torch.inf), "lora_B.weight' contains NaN or infinity"),
    "bfloat16 nan": (fill("A", torch.nan, torch.bfloat16), "lora_A.weight' contains NaN or infinity"),
    "overflow": (
        _both(config(lora_alpha=10**6, alpha_pattern={}), fill("B", 3e38, torch.float32)),
        "overflows its dtype once scaled",
    ),
    "large float64": (fill("A", 1e39, torch.float64), "lora_A.weight' contains NaN or infinity"),
    "int8": (fill("A", 1, torch.int8), "has dtype I8, must be one of F64, F32, F16, BF16"),
    "unknown module": (add("base_model.model.model.layers.9.x.lora_A.weight", torch.ones(4, 6)), "'model.layers.9.x'"),
    "nothing matched": (rename("layers.", "blocks."), "is not a linear layer of the base model that can be adapted"),
    "keys of a vision part": (
        rename("base_model.model.model.", "base_model.model.vision_tower."),
        "adapt the vision or audio part of a multimodal model ('base_model.model.vision_tower.",
    ),
    "keys of another library": (rename(".lora_A.", ".lora_down."), "is not a LoRA tensor of a linear layer"),
    "unknown key": (add("model.layers.0.extra", torch.ones(2)), "'model.layers.0.extra' is not a LoRA tensor"),
    "key with adapter name": (
        add("{module}.lora_A.default.weight", torch.ones(4, 6)),
        "lora_A.weight' are the same tensor: keep one of them",
    ),
    "key with dots": (
        add("base_model.model...lora_A.weight", torch.ones(4, 6)),
        "'base_model.model...lora_A.weight' is not a LoRA tensor",
    ),
}

_SAMPLE_FILES: BadFolders = {
    "samples of text": (samples(b"Write a poem."), "lora_samples.jsonl: line 1 is not valid JSON"),
    "binary samples": (write(SAMPLES, bytes(range(256))), "lora_samples.jsonl: line 1 is not valid JSON"),
    "empty samples": (write(SAMPLES, b""), "lora_samples.jsonl: is empty"),
    "blank samples": (write(SAMPLES, b" \n\n"), "lora_samples.jsonl: is empty"),
    "nested sample": (samples(b'{"input": ' + b"[" * 8000), "line 1 is not valid JSON: it nests too deep"),
    "sample is a list": (samples(b'{"input": "x"}', b'["x"]'), "line 2 is not valid JSON: it must be a JSON"),
    "number as text": (samples(b'{"text": 1}'), 'line 1 needs a text "text"'),
    "sample without input": (samples(b'{"other": "x"}'), 'line 1 needs a text "input"'),
    "sample of space": (samples(b'{"input": " "}'), 'line 1 needs a text "input" that is not blank'),
    "number as input": (samples(b'{"input": 1}'), 'line 1 needs a text "input"'),
    "number as output": (samples(b'{"input": "x", "output": 1}'), 'line 1 has an "output" that is not a'),
    "half a surrogate": (samples(b'{"input": "\\ud800"}'), "line 1 contains half of a surrogate pair"),
    "long output": (
        samples(b'{"input": "x", "output": "%b"}' % (b"x" * 8193)),
        'line 1 has an "output" of more than 8192 bytes',
    ),
    "long line": (samples(b'{"input": "x"}' + b" " * (1 << 20)), "line 1 has more than 1,048,576 bytes"),
    "long samples file": (_sparse(SAMPLES, 17 << 20), "has 17,825,792 bytes; this server takes 16,777,216"),
    "empty description": (write("description.txt", b" \n"), "description.txt: is empty"),
    "binary description": (write("description.txt", b"\xff"), "description.txt: is not UTF-8"),
    "long description": (
        write("description.txt", b"x" * 8193),
        "description.txt: has 8,193 bytes; this server takes 8,192",
    ),
}

BAD_FOLDERS: BadFolders = _FILES | _WEIGHTS_FILE | _CONFIG_FILE | _TENSORS | _SAMPLE_FILES

_BAD_NAMES = (
    *("..", ".", "auto", "", "a/b", "../up", "/etc/passwd", "a\\b", "a\nb", "a\0b", "a\x1b[0m", "a\x7fb", "\u202egnp"),
    *("a b", " a", "x" * 65, "poet\n", "naïve", "a:b", "a@b", "%2e%2e", "a%00"),
)
# Arguments of `LoraStore.stage` for a valid folder, and the beginning of the refusal's only reason.
BAD_LABELS: dict[str, tuple[Mapping[str, Any], str]] = {
    **{f"name {name!r}": ({"name": name}, f"name {name!r} must be 1 to 64 of") for name in _BAD_NAMES},
    "tenant with a slash": ({"tenant": "../them"}, "tenant '../them' must be"),
    "tag with a space": ({"tags": ["fine", "not fine"]}, "tag 'not fine' must be"),
    "33 tags": ({"tags": [f"t{number}" for number in range(33)]}, "tags: at most 32, got 33"),
    "template of its own": ({"template": "{{ x }}"}, "template must be one of alpaca, chat, server, got"),
    "unknown visibility": ({"visibility": "secret"}, "visibility must be one of public, private, got 'secret'"),
}
