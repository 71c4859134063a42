from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model import gguf_model
from gpu_worker.model.base_model import load_base_model, load_config, model_source
from gpu_worker.model.embedding import is_tied
from gpu_worker.model.gguf_blocks import KINDS
from gpu_worker.model.gguf_model import find_gguf, gguf_folder
from gpu_worker.model.quantization import QuantizedLinear
from tests.gpu_worker.model.gguf_tensors import random_tensor
from tests.tiny import tiny_config


def written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_llama(
    path: Path,
    kind: str,
    *,
    without: str = "",
    width: int = 64,
    architecture: str = "llama",
    base: float = 10000.0,
    split: str = "gpt-2",
    first: str = "<bos>",
    more: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> Path:
    """Write a random Llama of one layer with a tokenizer of single bytes."""
    type_ = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(base)
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:-1], "abc"]  # which no merge makes
    writer.add_vocab_size(len(alphabet) + 3)
    writer.add_tokenizer_model("gpt2")
    if split:
        writer.add_tokenizer_pre(split)
    writer.add_token_list([*alphabet, "ab", first, "<eos>"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(alphabet) + 1)
    writer.add_eos_token_id(len(alphabet) + 2)
    sizes = {"token_embd": (259, width), "output": (259, width)}
    sizes |= {f"blk.0.attn_{name}": (width, width) for name in ("q", "output")}
    sizes |= {f"blk.0.attn_{name}": (width // 2, width) for name in ("k", "v")}
    sizes |= {f"blk.0.ffn_{name}": (2 * width, width) for name in ("gate", "up")} | {
        "blk.0.ffn_down": (width, 2 * width)
    }
    for seed, (name, shape) in enumerate((name, shape) for name, shape in sizes.items() if name != without):
        writer.add_tensor(f"{name}.weight", random_tensor(kind, shape, seed), raw_dtype=type_)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    more(writer)
    return written(writer, path)


@pytest.mark.parametrize(("kind", "without"), [*[(kind, "") for kind in KINDS], ("Q8_0", "output"), ("Q4_K", "output")])
def test_a_gguf_file_is_served_with_its_integers(kind: str, without: str, tmp_path: Path) -> None:
    """transformers changes the order of the outputs of two of Llama's layers, and has dequantised weights."""
    file = tiny_llama(tmp_path / "model.gguf", kind, width=256 if kind.endswith("K") else 64, without=without)
    config = tiny_config(file, dtype="auto", cache_dir=tmp_path / "cache")
    model = load_base_model(config).model
    is_shared = is_tied(model)
    assert is_shared == (without == "output")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    if is_shared:
        layers["lm_head"] = layers.pop("model.embed_tokens.source")
    assert len(layers) == 8
    options = {"gguf_file": file.name, "dtype": torch.float32}
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path, **options).named_modules())
    for name, layer in layers.items():
        assert layer.quantized.bits == (4 if kind.startswith("Q4") else 8)
        weight = expected[name].weight.detach()
        error = float(weight.abs().max()) * 2**-9 if kind.endswith("K") else 0  # of scales of 11 bits
        torch.testing.assert_close(layer.quantized.dequantized(), weight, rtol=0, atol=error)
    assert len(list((tmp_path / "cache").glob("gguf-model-*"))) == 1


def test_a_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large vocabulary takes longer than all else."""
    parsed: list[Path | str] = []

    class Reader(gguf.GGUFReader):
        def __init__(self, path: Path | str) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    gguf_folder(tiny_llama(tmp_path / "model.gguf", "Q8_0"), tmp_path / "cache")
    assert len(parsed) == 1 and gguf.GGUFReader is Reader


def llama3_factors(factor: float) -> np.ndarray:
    """Return what llama.cpp writes for the scaling of positions of Llama 3.1, with 8 frequencies."""
    waves = 2 * np.pi * 10000 ** (np.arange(8) / 8)
    smooth = (8192 / waves - 1) / (4 - 1)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(waves < 8192 / 4, 1, np.where(waves > 8192, factor, between)).astype(np.float32)


@pytest.mark.parametrize("factor", [8, 32])
def test_the_scaling_of_positions_of_llama_3_is_found_by_its_factors(factor: float, tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", llama3_factors(factor))

    file = tiny_llama(tmp_path / "model.gguf", "Q8_0", more=more)
    model = load_base_model(tiny_config(file, dtype="auto", cache_dir=tmp_path / "cache")).model
    plain = 10000 ** -(np.arange(8) / 8)
    rope = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    np.testing.assert_allclose(rope.inv_freq.numpy(), plain / llama3_factors(factor), rtol=1e-4)


def rotate_heads_in_part(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_dimension_count(8)
    for name, width in {"q": 64, "k": 32, "v": 32}.items():
        writer.add_tensor(f"blk.0.attn_{name}.bias", np.zeros(width, np.float32))


def have_small_heads(writer: gguf.GGUFWriter) -> None:
    """transformers scales the attention by its default, and the largest model has another number than its heads."""
    writer.add_key_length(16)
    writer.add_sliding_window(512)
    for name, width in {"post_attention": 64, "post_ffw": 64, "attn_q": 16, "attn_k": 16}.items():
        writer.add_tensor(f"blk.0.{name}_norm.weight", np.ones(width, np.float32))


@pytest.mark.parametrize(
    ("architecture", "more", "says"),
    [
        ("llama", lambda writer: writer.add_tensor("rope_freqs.weight", np.full(8, 8, np.float32)), "than Llama 3.1"),
        (
            "llama",
            lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)),
            "has 64 numbers that",
        ),
        ("llama", lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "its positions (yarn"),
        ("llama", lambda writer: writer.add_rope_scaling_factor(8), "scales its positions (linear by 8.0)"),
        ("llama", lambda writer: writer.add_sliding_window(16), "attends to 16 tokens, and transformers reads all"),
        ("qwen2", rotate_heads_in_part, "rotates 8 values of a head, and transformers 16"),
        ("gemma3", have_small_heads, "heads of 16 values, and transformers scales"),
    ],
    ids=["factors", "a bias", "yarn", "linear", "window", "rotation", "heads"],
)
def test_what_transformers_leaves_out_of_a_file_is_refused(
    architecture: str, more: Callable[[gguf.GGUFWriter], object], says: str, tmp_path: Path
) -> None:
    """Otherwise the answers would be those of another model, without a word."""
    file = tiny_llama(tmp_path / "model.gguf", "Q8_0", architecture=architecture, more=more)
    with pytest.raises(BaseModelUnsupported, match=re.escape(says)):
        gguf_folder(file, tmp_path / "cache")


def name_turn_ends(writer: gguf.GGUFWriter) -> None:
    writer.add_eot_token_id(5)
    writer.add_eom_token_id(6)


def have_chats(writer: gguf.GGUFWriter) -> None:
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 2)
    writer.add_chat_template("{{ messages[0].content }}")


@pytest.mark.parametrize(
    ("first", "more", "ends"),
    [
        ("<bos>", lambda writer: None, {258}),
        ("<bos>", name_turn_ends, {5, 6, 258}),
        ("<end_of_turn>", have_chats, {257, 258}),
        ("<end_of_turn>", lambda writer: None, {258}),
    ],
    ids=["of texts", "named", "by its text", "no chats"],
)
def test_the_end_of_a_turn_ends_an_answer(
    first: str, more: Callable[[gguf.GGUFWriter], object], ends: set[int], tmp_path: Path
) -> None:
    file = tiny_llama(tmp_path / "model.gguf", "Q8_0", first=first, more=more)
    base = load_base_model(tiny_config(file, dtype="auto", cache_dir=tmp_path / "cache"))
    assert base.eos_token_ids == ends


@pytest.mark.parametrize(
    ("split", "pieces"),
    [
        ("gpt-2", ["a", "Ġ", "Ġ1234", "!"]),
        ("smollm", ["a", "ĠĠ", "1", "2", "3", "4", "!"]),
        ("llama-bpe", ["a", "Ġ", "Ġ", "123", "4", "!"]),
    ],
)
def test_texts_are_split_as_the_file_says(split: str, pieces: list[str], tmp_path: Path) -> None:
    folder = gguf_folder(tiny_llama(tmp_path / "model.gguf", "Q8_0", split=split), tmp_path / "cache")
    pre_tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in pre_tokenizer.pre_tokenize_str("a  1234!")] == pieces


@pytest.mark.parametrize(
    ("split", "begins", "pieces"),
    [
        ("llama-bpe", None, ["<bos>", "abc"]),
        ("tekken", None, ["<bos>", "abc"]),
        ("llama-bpe", False, ["abc"]),
        ("gpt-2", None, ["ab", "c"]),
        ("gpt-2", True, ["<bos>", "ab", "c"]),
    ],
)
def test_texts_begin_and_words_stay_whole_as_in_llama_cpp(
    split: str, begins: bool | None, pieces: list[str], tmp_path: Path
) -> None:
    """Files of Llama 3 rarely say that a text begins with a token. Its adapters were trained with it."""

    def more(writer: gguf.GGUFWriter) -> None:
        if begins is not None:
            writer.add_add_bos_token(begins)

    folder = gguf_folder(tiny_llama(tmp_path / "model.gguf", "Q8_0", split=split, more=more), tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc").input_ids) == pieces


@pytest.mark.parametrize(("has_space", "piece", "text"), [(None, "▁a", "a"), (True, "▁a", "a"), (False, "a", " a")])
def test_a_space_comes_before_a_text_unless_the_file_forbids_it(
    has_space: bool | None, piece: str, text: str, tmp_path: Path
) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<bos>", "a", "▁", "▁a", *map(str, range(254))])
        writer.add_token_merges(["▁ a"])
        writer.add_bos_token_id(1)
        if has_space is not None:
            writer.add_add_space_prefix(has_space)

    folder = gguf_folder(tiny_llama(tmp_path / "model.gguf", "Q8_0", more=more), tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids) == ["<bos>", piece]
    assert tokenizer.decode([4]) == text


def test_the_base_of_rotations_is_read_where_transformers_does_not(tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_layer_norm_eps(1e-5)
        widths = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64, "ffn_up": 128, "ffn_down": 64}
        for name, width in ({"attn_norm": 64, "ffn_norm": 64} | widths).items():
            writer.add_tensor(f"blk.0.{name}.bias", np.zeros(width, np.float32))
        writer.add_tensor("output_norm.bias", np.zeros(64, np.float32))

    changes = {"architecture": "starcoder2", "without": "blk.0.ffn_gate"}
    file = tiny_llama(tmp_path / "model.gguf", "Q8_0", base=1e6, more=more, **changes)
    model = load_base_model(tiny_config(file, dtype="auto", cache_dir=tmp_path / "cache")).model
    assert model.config.model_type == "starcoder2"
    rope = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    np.testing.assert_allclose(rope.inv_freq.numpy(), 1e6 ** -(np.arange(8) / 8), rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("Q8_0", {"without": "blk.0.ffn_up"}, r"1 of the model's \d+ tensors are missing \(.*up_proj.weight\)"),
        ("Q8_0", {"architecture": "other"}, r"model.gguf cannot be converted \(.*other"),
        ("Q5_1", {}, "has tensors of type Q5_1; the native engine reads GGUF files of Q8_0"),
        ("Q8_0", {"split": "deepseek-llm"}, r"tokenizer.ggml.pre is deepseek-llm\): use the folder"),
        ("Q8_0", {"split": ""}, r"tokenizer.ggml.pre is missing\): use the folder"),
        (None, {}, "cannot be read as a GGUF file"),
    ],
    ids=["a part", "an architecture", "a type of tensors", "a way to split texts", "no way", "a broken file"],
)
def test_a_file_that_cannot_be_converted_is_refused(
    kind: str | None, changes: dict[str, str], says: str, tmp_path: Path
) -> None:
    """The first file of several has a part, and the rest of the model would be random numbers."""
    file = tmp_path / "model.gguf"
    if kind is None:
        file.write_bytes(b"GGUF")
    else:
        tiny_llama(file, kind, **changes)
    with pytest.raises(BaseModelUnsupported, match=says):
        gguf_folder(file, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("gguf-*"))


def test_a_corrected_converter_does_not_read_what_an_earlier_one_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_llama(tmp_path / "model.gguf", "Q8_0")
    folders = []
    for version in (1, 2, 2):
        monkeypatch.setattr(gguf_model, "CONVERTER", version)
        folders.append(gguf_folder(file, tmp_path / "cache"))
    assert folders[0] != folders[1] == folders[2]
    assert (folders[1] / "model.safetensors").exists()


def test_only_the_last_state_of_a_file_stays_in_the_cache(tmp_path: Path) -> None:
    cache, file = tmp_path / "cache", tiny_llama(tmp_path / "model.gguf", "Q8_0")
    (tmp_path / "other").mkdir()
    other = gguf_folder(shutil.copy2(file, tmp_path / "other/model.gguf"), cache)
    first = gguf_folder(file, cache)
    (cache / f".{first.name}-abcd1234").mkdir()  # as a conversion that was killed leaves it
    os.utime(file, ns=(0, 1))
    second = gguf_folder(file, cache)
    assert second != first
    assert {folder for folder in cache.iterdir() if folder.is_dir()} == {other, second}


def test_other_weights_with_the_same_size_and_modification_time_are_converted(tmp_path: Path) -> None:
    file = tiny_llama(tmp_path / "model.gguf", "Q8_0")
    before = file.stat()
    first = load_file(gguf_folder(file, tmp_path / "cache") / "model.safetensors")
    reader = gguf.GGUFReader(file, "r+")
    for tensor in reader.tensors:
        if tensor.name == "output_norm.weight":
            tensor.data[:] *= 2
    reader.data.flush()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    second = load_file(gguf_folder(file, tmp_path / "cache") / "model.safetensors")
    assert second["model.norm.weight"].equal(2 * first["model.norm.weight"])


@pytest.mark.parametrize("engine", ["native", "vllm"])
def test_a_file_that_is_not_there_is_no_reason_for_another_engine(engine: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "model.gguf", engine=engine)
    with pytest.raises(BaseModelUnsupported, match=r"model.gguf' is no file of this machine$"):
        load_config(model_source(config))


def test_one_file_of_a_folder_is_found_and_two_are_refused(tmp_path: Path) -> None:
    assert find_gguf(str(tmp_path)) is None and find_gguf("google/gemma-3-270m") is None
    (tmp_path / "a.gguf").touch()
    assert find_gguf(str(tmp_path)) == tmp_path / "a.gguf" == find_gguf(str(tmp_path / "a.gguf"))
    (tmp_path / "b.gguf").touch()
    with pytest.raises(BaseModelUnsupported, match=r"has 2 GGUF files \(a.gguf, b.gguf\): name one"):
        find_gguf(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert find_gguf(str(tmp_path)) is None
