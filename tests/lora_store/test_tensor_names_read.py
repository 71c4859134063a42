"""Names that other tools give are read as PEFT's, and the stored adapter is the same whatever its names were."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_store import AdapterRefused, LoraStore, ModuleWeights, check_folder
from lora_store.peft_files import MLX_WEIGHTS_FILE, WEIGHTS_FILE, write_peft_folder
from lora_store.tensor_names import read_names, unreadable
from lora_store.validation import CheckedFolder
from lora_store.weights_blob import WeightsBlob
from tests.bad_uploads import config
from tests.lora_store.builders import BASE, IN_A_FOLDER, SHAPES, MakeFolder
from tests.soak import Scale

Shapes = Mapping[str, tuple[int, int]]
Rename = Callable[[str], str]
PREFIX = "base_model.model."
KEY = f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"


def inside(name: str) -> Rename:
    """Return a renaming that puts a wrapper around each layer's parts."""
    return lambda key: key.replace(".mlp.", f".{name}.mlp.").replace(".self_attn.", f".{name}.self_attn.")


def before_layers(prefix: str) -> Rename:
    return lambda key: key.replace(f"{PREFIX}model.", prefix)


# By tool or class; each can only mean one module of a base whose layers are in `model.layers`.
SPELLINGS: dict[str, Rename] = {
    "an adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "another adapter's name": lambda key: key.replace(".weight", ".my-task.weight"),
    "a compiled model": lambda key: f"_orig_mod.{key}",
    "compiled before PEFT": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "FSDP": inside("_fsdp_wrapped_module"),
    "checkpointed layers": inside("_checkpoint_wrapped_module"),
    "FSDP and checkpointed layers": inside("_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "Lightning": lambda key: f"_forward_module.{key}",
    "data parallel": lambda key: f"module.{key}",
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "no prefix of a causal model": lambda key: key.removeprefix(f"{PREFIX}model."),
    "half of the prefix": lambda key: key.replace(PREFIX, "base_model."),
    "multimodal, transformers 4": before_layers(f"{PREFIX}language_model.model."),
    "multimodal, transformers 5": before_layers(f"{PREFIX}model.language_model."),
    "multimodal, no prefix": before_layers("model.language_model."),
    "Idefics": before_layers(f"{PREFIX}model.text_model."),
    "all together": lambda key: inside("_fsdp_wrapped_module")(
        f"_orig_mod.{key.replace(PREFIX, PREFIX + 'language_model.').replace('.weight', '.default.weight')}"
    ),
}
NEEDS_NO_BASE = [name for name in SPELLINGS if name not in ("data parallel", "half of the prefix")]


def respell(folder: Path, rename: Rename) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)


def of_one_rank(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save an adapter of one rank and scaling, as MLX's all are."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: ModuleWeights(
            torch.randn(2, num_in, generator=generator).to(dtype),
            torch.randn(num_out, 2, generator=generator).to(dtype),
            10.0,
        )
        for name, (num_out, num_in) in SHAPES.items()
    }
    write_peft_folder(folder, weights, base_model=BASE)
    return folder


def as_mlx(folder: Path, *, keeps_prefix: bool = False) -> None:
    """Write the folder as MLX does: its own names and config, and transposed matrices."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / WEIGHTS_FILE).items():
        name = key if keeps_prefix else key.removeprefix(PREFIX)
        tensors[name.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")] = tensor.T.contiguous()
    (folder / WEIGHTS_FILE).unlink()
    save_file(tensors, folder / MLX_WEIGHTS_FILE)
    config = json.loads((folder / "adapter_config.json").read_text())
    parameters = {"rank": config["r"], "scale": config["lora_alpha"] / config["r"], "dropout": 0.0}
    mlx = {"fine_tune_type": "lora", "model": BASE, "num_layers": 16, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(mlx))


def check(folder: Path, shapes: Shapes | None = SHAPES) -> CheckedFolder:
    return check_folder(folder, accepts_base={BASE}, module_shapes=shapes)


def digest(checked: CheckedFolder) -> str:
    found = WeightsBlob(checked.stored).digest()
    assert WeightsBlob(checked.modules).digest() == found, "as torch has them"
    return found


def reasons(folder: Path, shapes: Shapes | None = SHAPES) -> tuple[str, ...]:
    with pytest.raises(AdapterRefused) as caught:
        check(folder, shapes)
    return caught.value.reasons


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_stored_as_the_same_adapter(spelling: str, make_folder: MakeFolder) -> None:
    folder = make_folder()
    before = check(folder)
    assert before.warnings == () == tuple(before.paths)
    respell(folder, SPELLINGS[spelling])
    after = check(folder)
    assert digest(after) == digest(before)
    [warning] = after.warnings
    assert warning.startswith("6 tensor names of another tool read as PEFT's: ")
    assert repr(KEY) in warning and repr(SPELLINGS[spelling](KEY)) in warning


@pytest.mark.parametrize("spelling", NEEDS_NO_BASE)
def test_a_check_without_the_base_refuses_no_spelling(spelling: str, tmp_path: Path) -> None:
    folder = of_one_rank(tmp_path)
    respell(folder, SPELLINGS[spelling])
    assert len(check(folder, None).pairs) == len(SHAPES)


@pytest.mark.parametrize("keeps_prefix", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_folder_of_mlx_is_stored_as_the_same_adapter(dtype: torch.dtype, keeps_prefix: bool, tmp_path: Path) -> None:
    folder = of_one_rank(tmp_path, dtype)
    before = check(folder)
    as_mlx(folder, keeps_prefix=keeps_prefix)
    assert digest(check(folder)) == digest(before)
    assert len(check(folder, None).pairs) == len(SHAPES)


@IN_A_FOLDER
def test_a_store_keeps_one_blob_of_two_spellings(make_folder: MakeFolder, store: LoraStore) -> None:
    folder = make_folder()
    first = store.stage(folder, name="one", module_shapes=SHAPES)
    respell(folder, SPELLINGS["multimodal, transformers 4"])
    second = store.stage(folder, name="two", module_shapes=SHAPES)
    assert first.weights_digest == second.weights_digest
    assert not first.warnings and "read as PEFT's" in second.warnings[0]


def test_patterns_match_the_paths_of_the_trained_model(tmp_path: Path) -> None:
    """A rank pattern that begins with the multimodal model's own path applies to the layers that it names."""
    path = "model.language_model.layers.0.mlp.up_proj"
    weights = {
        path: ModuleWeights(torch.ones(3, 6), torch.ones(12, 3), 4.0),
        "model.language_model.layers.0.self_attn.q_proj": ModuleWeights(torch.ones(2, 6), torch.ones(8, 2), 0.5),
    }
    write_peft_folder(tmp_path, weights, base_model=BASE)
    found = check(tmp_path).modules
    assert {name: module.scaling for name, module in found.items()} == {
        "model.layers.0.mlp.up_proj": 4.0,
        "model.layers.0.self_attn.q_proj": 0.5,
    }


def test_a_pattern_of_neither_path_is_refused_as_its_scaling_would_be_lost(tmp_path: Path) -> None:
    weights = {"model.layers.0.mlp.up_proj": ModuleWeights(torch.ones(2, 6), torch.ones(12, 2), 4.0)}
    write_peft_folder(tmp_path, weights, base_model=BASE)
    config(alpha_pattern={r"^model\.language_model\.layers\.0\.mlp": 1})(tmp_path)
    assert check(tmp_path).paths == {}, "with PEFT's names it is left to PEFT, which ignores the pattern"
    respell(tmp_path, SPELLINGS["no prefix of a causal model"])
    [reason] = reasons(tmp_path)
    assert reason.startswith("alpha_pattern has '^model") and "matches none of the tensors' modules" in reason


def test_two_tensors_that_are_one_of_pefts_or_of_two_adapters_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(tensors | {f"_orig_mod.{KEY}": tensors[KEY] + 1}, folder / WEIGHTS_FILE)
    [reason] = reasons(folder)
    assert f"'_orig_mod.{KEY}' and {KEY!r} are the same tensor: keep one of them" in reason
    save_file(tensors, folder / WEIGHTS_FILE)
    respell(folder, lambda key: key.replace(".weight", ".b.weight" if "layers.1" in key else ".a.weight"))
    [reason] = reasons(folder)
    assert "has tensors of several adapters ('a', 'b'): save one adapter a folder" in reason


def test_a_reason_shows_three_of_many_tensors_and_adapters() -> None:
    keys = [KEY.replace(".weight", f".a{number}.weight") for number in range(10_000)]
    same, several = unreadable(keys, read_names(keys, SHAPES))
    assert same.endswith(
        f"{keys[0]!r} and {keys[1]!r} and {keys[10]!r} and 9997 more are the same tensor: keep one of them"
    )
    assert "has tensors of several adapters ('a0', 'a1', 'a10' and 9997 more): save one" in several


def test_torchtunes_own_format_is_read_where_no_rows_are_reordered() -> None:
    names = {"layers.0.attn.output_proj": "self_attn.o_proj", "layers.0.attn.v_proj": "self_attn.v_proj"}
    names |= {f"layers.0.mlp.w{n}": f"mlp.{leaf}_proj" for n, leaf in ((1, "gate"), (2, "down"), (3, "up"))}
    modules = {f"model.layers.0.{module}" for module in names.values()}
    read = read_names([f"{name}.lora_{side}.weight" for name in names for side in "ab"], modules)
    found = {key: (spelling.name, spelling.is_transposed) for key, spelling in read.items()}
    assert found == {
        f"{name}.lora_{side}.weight": (f"{PREFIX}model.layers.0.{module}.lora_{side.upper()}.weight", False)
        for name, module in names.items()
        for side in "ab"
    }


@pytest.mark.parametrize("root", ["model.layers", "model.language_model.layers"])
@pytest.mark.parametrize(
    ("theirs", "module"),
    [
        ("block_sparse_moe.gate", "mlp.gate"),  # Mixtral's
        ("block_sparse_moe.router.layer", "block_sparse_moe.router"),  # GraniteMoE's
    ],
)
def test_a_router_is_read_under_its_name_in_transformers_4(root: str, theirs: str, module: str) -> None:
    key = f"{PREFIX}{root}.3.{theirs}.lora_A.weight"
    modules = [f"model.layers.{layer}.{module}" for layer in (2, 3)]
    assert read_names([key], modules)[key].name == f"{PREFIX}model.layers.3.{module}.lora_A.weight"


@pytest.mark.parametrize("wrapper", ["", "_checkpoint_wrapped_module."])
def test_torchtunes_own_format_of_queries_is_refused_in_one_reason(wrapper: str, make_folder: MakeFolder) -> None:
    folder = make_folder()
    sides = {"lora_A": f"{wrapper}lora_a", "lora_B": f"{wrapper}lora_b"}
    respell(folder, lambda key: re.sub("lora_[AB]", lambda found: sides[found[0]], key.removeprefix(f"{PREFIX}model.")))
    [reason] = reasons(folder)
    assert f"4 tensors have torchtune's own format ('layers.0.self_attn.q_proj.{wrapper}lora_a.weight')" in reason
    assert "let torchtune save the adapter in PEFT's format" in reason


@pytest.mark.parametrize("shapes", [SHAPES, None], ids=["base", "no base"])
def test_layers_of_a_vision_part_are_never_read_as_the_texts(shapes: Shapes | None, make_folder: MakeFolder) -> None:
    """The shapes and the layers' numbers are equal, so only the path tells them from the text part's."""
    folder = make_folder()
    respell(folder, before_layers(f"{PREFIX}model.vision_tower.encoder."))
    [reason] = reasons(folder, shapes)
    assert reason.startswith("6 tensors adapt the vision or audio part of a multimodal model (")
    assert reason.endswith("train with target_modules of the language model only")


def test_names_that_fit_two_modules_are_not_read() -> None:
    modules = ["model.layers.0.up_proj", "language_model.layers.0.up_proj"]
    assert read_names(["layers.0.up_proj.lora_A.weight"], modules) == {}
    assert read_names(["layers.0.up_proj.lora_A.weight"], modules[:1])


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type must be 'lora', got 'dora'"),
        ({"lora_parameters": {"rank": 4, "scale": 2.0, "alpha": 8}}, "lora_parameters has alpha"),
        ({"lora_parameters": {"rank": 0, "scale": 2.0}}, "rank must be a whole number from 1 to 1000000000, got 0"),
        ({"lora_parameters": {"rank": 10**400, "scale": 1.5}}, "rank must be a whole number from 1"),
        ({"lora_parameters": {"rank": 4}}, "scale must be a number other than 0, got None"),
        ({"lora_parameters": {"rank": 5, "scale": 2.0}}, "gives it 5"),
    ],
)
def test_configs_of_mlx_are_refused_by_field(change: dict[str, object], cause: str, tmp_path: Path) -> None:
    folder = of_one_rank(tmp_path)
    as_mlx(folder)
    config(**change)(folder)
    assert any(cause in reason for reason in reasons(folder))


LEAVES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
ROOTS = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "gpt_neox.layers",
    "transformer.h",
)
THEIR_ROOTS = {
    **dict.fromkeys(ROOTS[:3], (*ROOTS[:3], "layers", "model.model.layers", "module.model.layers")),
    "gpt_neox.layers": ("gpt_neox.layers", "model.gpt_neox.layers", "module.gpt_neox.layers"),
    "transformer.h": ("transformer.h", "model.transformer.h", "module.transformer.h"),
}
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


def spelled(draw: random.Random, module: str, root: str, theirs: str, prefix: str, wrapped: set[str]) -> str:
    parts = f"{prefix}{module.replace(root, theirs, 1)}".split(".")
    for wrapper in sorted(wrapped):
        parts.insert(draw.randrange(len(parts)), wrapper)
    return ".".join(parts)


def test_random_spellings_are_stored_as_the_same_adapter_or_refused(tmp_path: Path, scale: Scale) -> None:
    """Every third case doubles a tensor, misses one, belongs to another module, or mixes two adapters."""
    num_refused = 0
    for case in range(scale.pick("spellings", small=40, full=1500)):
        draw = random.Random(case)
        root = draw.choice(ROOTS)
        every = [f"{root}.{layer}.{leaf}" for layer in range(draw.choice((1, 2, 11))) for leaf in LEAVES]
        shapes = {module: (draw.randint(1, 9), draw.randint(1, 9)) for module in every}
        chosen = draw.sample(every, draw.randint(1, len(every)))
        generator = torch.Generator().manual_seed(case)
        rank = draw.randint(1, 5)
        weights = {
            module: ModuleWeights(
                torch.randn(rank, shapes[module][1], generator=generator),
                torch.randn(shapes[module][0], rank, generator=generator),
                2.0,
            )
            for module in chosen
        }
        folder = tmp_path / str(case)
        write_peft_folder(folder, weights, base_model=BASE)
        expected = digest(check(folder, shapes))
        is_mlx = draw.random() < 0.3
        prefix = draw.choice((PREFIX, "", "base_model.")) if not is_mlx else ""
        theirs = draw.choice(THEIR_ROOTS[root])
        adapter = draw.choice(("", ".default", ".task-1")) if not is_mlx else ""
        wrapped = set(draw.sample(WRAPPERS, draw.choice((0, 0, 1, 2)))) if not is_mlx else set()
        names = {module: spelled(draw, module, root, theirs, prefix, wrapped) for module in chosen}
        tensors: dict[str, Tensor] = {}
        for module, name in names.items():
            a, b = weights[module].lora_a, weights[module].lora_b
            if is_mlx:
                tensors |= {f"{name}.lora_a": a.T.contiguous(), f"{name}.lora_b": b.T.contiguous()}
            else:
                tensors |= {f"{name}.lora_A{adapter}.weight": a, f"{name}.lora_B{adapter}.weight": b}
        is_bad = case % 3 == 0
        if is_bad:
            key = draw.choice(sorted(tensors))
            tensor = tensors.pop(key)
            kind = draw.choice(("doubled", "missing", "elsewhere", "two adapters"))
            if kind == "doubled":
                tensors |= {key: tensor, f"module._orig_mod.{key}": tensor.clone()}
            elif kind == "elsewhere":
                part = draw.choice(("vision_tower.", "audio_tower.", "decoder2.", "lm_head."))
                tensors[f"{part}{key}"] = tensor
            elif kind == "two adapters":
                tensors |= {key: tensor}
                tensors[f"{key.rpartition('.lora_')[0]}.lora_{'A' if '.lora_A' in key else 'B'}.other.weight"] = (
                    tensor.clone()
                )
        save_file(tensors, folder / WEIGHTS_FILE)
        if is_bad:
            assert reasons(folder, shapes), case
            num_refused += 1
        else:
            assert digest(check(folder, shapes)) == expected, case
    assert num_refused
