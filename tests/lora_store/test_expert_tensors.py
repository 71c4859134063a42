"""Every spelling of an adapter on fused experts is stored as the same adapter, or refused in one reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from lora_store import AdapterRefused, Limits, ModuleWeights, check_folder
from lora_store.adapter import Shapes
from lora_store.composition import compose
from lora_store.peft_files import WEIGHTS_FILE, write_peft_folder
from lora_store.weights_blob import WeightsBlob
from tests.lora_store.builders import BASE

NUM, WIDTH, INNER, RANK = 3, 6, 4, 2
EXPERTS = "model.layers.0.mlp.experts"
SHAPES: Shapes = {
    "model.layers.0.self_attn.q_proj": (8, WIDTH),
    f"{EXPERTS}.gate_up_proj": (2 * INNER, WIDTH, NUM),
    f"{EXPERTS}.down_proj": (WIDTH, INNER, NUM),
}
LEAVES = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
PREFIX = "base_model.model."
Tensors = dict[str, Tensor]


def single_experts(num: int = NUM, rank: int = RANK, seed: int = 0) -> Tensors:
    """Return an adapter with a linear layer for each expert, as the models of transformers 4 have them."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for expert in range(num):
        for leaf, (num_out, num_in) in LEAVES.items():
            name = f"{PREFIX}{EXPERTS}.{expert}.{leaf}"
            found[f"{name}.lora_A.weight"] = torch.randn(rank, num_in, generator=random)
            found[f"{name}.lora_B.weight"] = torch.randn(num_out, rank, generator=random)
    return found


def stacked(single: Mapping[str, Tensor]) -> Tensors:
    """Return the same adapter as PEFT stacks it, by a slow loop over experts and rank rows. Parts take turns."""
    found = {}
    for wrapper, leaves in ((".base_layer", ["gate_proj", "up_proj"]), ("", ["down_proj"])):
        a_rows, b_columns = [], {}
        for expert in range(NUM):
            for rank in range(RANK):
                for part, leaf in enumerate(leaves):
                    name = f"{PREFIX}{EXPERTS}.{expert}.{leaf}"
                    b = single[f"{name}.lora_B.weight"]
                    a_rows.append(single[f"{name}.lora_A.weight"][rank])
                    column = torch.zeros(len(leaves) * len(b))
                    column[part * len(b) : (part + 1) * len(b)] = b[:, rank]
                    b_columns[(rank * len(leaves) + part) * NUM + expert] = column
        found[f"{PREFIX}{EXPERTS}{wrapper}.lora_A.weight"] = torch.stack(a_rows)
        found[f"{PREFIX}{EXPERTS}{wrapper}.lora_B.weight"] = torch.stack([b_columns[i] for i in sorted(b_columns)], 1)
    return found


def folder_of(path: Path, tensors: Tensors, **config: object) -> Path:
    path.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": BASE, "r": RANK, "lora_alpha": 5, **config}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path / WEIGHTS_FILE)
    return path


def check(folder: Path, shapes: Shapes | None = SHAPES, **limits: int) -> dict[str, ModuleWeights]:
    checked = check_folder(folder, accepts_base={BASE}, module_shapes=shapes, limits=Limits(**limits))
    modules = checked.modules
    assert WeightsBlob(checked.stored).digest() == WeightsBlob(modules).digest(), "a publish copies them without torch"
    return modules


AS_STACKED = {
    "target_parameters": ["gate_up_proj", "mlp.experts.down_proj"],
    "rank_pattern": {r".*\.gate_up_proj": 2 * RANK},
    "alpha_pattern": {r".*\.gate_up_proj": 10},
}
RENAMED: dict[str, Callable[[str], str]] = {
    "transformers 4": lambda key: key,
    "an adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "a compiled model": lambda key: f"_orig_mod.{key}",
    "multimodal": lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
    "Mixtral": lambda key: (
        key.replace(".mlp.", ".block_sparse_moe.")
        .replace("gate_proj", "w1")
        .replace("down_proj", "w2")
        .replace("up_proj", "w3")
    ),
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_every_spelling_of_experts_is_the_same_adapter(rename: Callable[[str], str], tmp_path: Path) -> None:
    single = single_experts()
    of_peft = check(folder_of(tmp_path / "stacked", stacked(single), **AS_STACKED))
    assert of_peft[f"{EXPERTS}.gate_up_proj"].lora_a.shape == (NUM, 2 * RANK, WIDTH)
    found = check(folder_of(tmp_path / "single", {rename(key): tensor for key, tensor in single.items()}))
    assert WeightsBlob(found).digest() == WeightsBlob(of_peft).digest()


def test_each_expert_gets_its_own_change(tmp_path: Path) -> None:
    """An expert without tensors is unchanged, as is the half of a parameter without them."""
    single = {key: tensor for key, tensor in single_experts().items() if ".1." not in key and "up_proj" not in key}
    module = check(folder_of(tmp_path / "some", single))[f"{EXPERTS}.gate_up_proj"]
    change = module.scaling * module.lora_b @ module.lora_a
    for expert in (0, 2):
        a, b = (single[f"{PREFIX}{EXPERTS}.{expert}.gate_proj.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(change[expert], torch.cat([5 / RANK * b @ a, torch.zeros(INNER, WIDTH)]))
    assert not change[1].any()


def average(parts: Sequence[tuple[float, Tensor, Tensor]]) -> Tensor:
    """Return (sum_s m_s B_s) (sum_s m_s A_s), ranks padded with zeros. A (..., R, I), B (..., O, R)."""
    rank = max(a.shape[-2] for _, a, _ in parts)
    sum_a = sum(weight * F.pad(a, (0, 0, 0, rank - a.shape[-2])) for weight, a, _ in parts)
    sum_b = sum(weight * F.pad(b, (0, rank - b.shape[-1])) for weight, _, b in parts)
    return torch.as_tensor(sum_b) @ torch.as_tensor(sum_a)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_fusion_of_single_experts_averages_each_part_with_its_own_kind(use_rslora: bool, tmp_path: Path) -> None:
    """As if every part were a layer of its own: of unequal ranks, and where an adapter has only one part."""
    ranks = {0.5: 2, -0.7: 3, 0.9: 1}  # by the adapter's weight
    files = {weight: single_experts(rank=rank, seed=rank) for weight, rank in ranks.items()}
    files[0.9] = {key: tensor for key, tensor in files[0.9].items() if "up_proj" in key}
    stored = []
    for weight, tensors in files.items():
        folder = folder_of(tmp_path / str(weight), tensors, r=ranks[weight], use_rslora=use_rslora)
        module = check(folder)[f"{EXPERTS}.gate_up_proj"]
        stored.append((weight, module.lora_a, module.scaling * module.lora_b))
    found = average(stored)
    for expert in range(NUM):
        halves = []
        for leaf in ("gate_proj", "up_proj"):
            parts = []
            for weight, tensors in files.items():
                a, b = (tensors.get(f"{PREFIX}{EXPERTS}.{expert}.{leaf}.lora_{side}.weight") for side in "AB")
                if a is not None and b is not None:
                    scaling = 5 / (ranks[weight] ** 0.5 if use_rslora else ranks[weight])
                    parts.append((weight, a, scaling * b))
            halves.append(average(parts))
        torch.testing.assert_close(found[expert], torch.cat(halves))


def test_written_experts_are_read_again(tmp_path: Path) -> None:
    modules = check(folder_of(tmp_path / "one", stacked(single_experts()), **AS_STACKED))
    write_peft_folder(tmp_path / "two", modules, base_model=BASE)
    assert load_file(tmp_path / "two" / WEIGHTS_FILE).keys() == stacked(single_experts()).keys()
    digest = WeightsBlob(modules).digest()
    assert WeightsBlob(check(tmp_path / "two")).digest() == digest
    assert WeightsBlob(check(tmp_path / "two", shapes=None)).digest() == digest, "a dry run without a server"


def test_layers_with_different_parameters_are_read_without_a_known_base(tmp_path: Path) -> None:
    """One layer has both, another one only one, as PEFT writes it: then it is not nested."""
    both = check(folder_of(tmp_path / "one", stacked(single_experts()), **AS_STACKED))
    other = EXPERTS.replace("0", "1")
    for leaf in ("gate_up_proj", "down_proj"):
        modules = both | {f"{other}.{leaf}": both[f"{EXPERTS}.{leaf}"]}
        write_peft_folder(tmp_path / leaf, modules, base_model=BASE)
        assert WeightsBlob(check(tmp_path / leaf, shapes=None)).digest() == WeightsBlob(modules).digest()


def test_experts_are_composed_one_by_one(tmp_path: Path) -> None:
    modules = check(folder_of(tmp_path / "one", single_experts()))
    for rank, bound in ((None, 1e-6), (2, 1.0)):
        composed, error = compose([(modules, 0.5), (modules, -0.2)], rank)
        assert error < bound
        for name, module in modules.items():
            change = 0.3 * module.scaling * module.lora_b @ module.lora_a
            found = composed[name].lora_b @ composed[name].lora_a
            for expert in range(NUM):
                left, values, right = torch.linalg.svd(change[expert], full_matrices=False)
                nearest = left[:, :rank] * values[:rank] @ right[:rank]
                torch.testing.assert_close(found[expert], nearest, atol=1e-5, rtol=0)


def without(key: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != f"{PREFIX}{EXPERTS}.{key}"}


def respelled(old: str, new: str, part: str = "") -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new) if part in key else key: each for key, each in tensors.items()}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], Shapes, str]] = {
    "an engine without experts": (stacked, {"model.layers.0.self_attn.q_proj": (8, WIDTH)}, "take no adapters on them"),
    "another number": (stacked, SHAPES | {f"{EXPERTS}.down_proj": (WIDTH, INNER, 2)}, "for 2 experts of rank"),
    "another width": (stacked, SHAPES | {f"{EXPERTS}.down_proj": (WIDTH, 5, NUM)}, "which no parameter of them does"),
    "another layer": (respelled(".0.mlp", ".7.mlp"), SHAPES, "are no experts of the"),
    "one too many": (
        respelled(".experts.0.", f".experts.{NUM}."),
        SHAPES,
        f"has expert {NUM}, but the base model has {NUM}",
    ),
    "half of a pair": (without("1.down_proj.lora_B.weight"), SHAPES, "has no lora_B"),
    "both spellings": (lambda x: x | stacked(x), SHAPES, "of all experts and of single ones"),
    "two names": (lambda x: x | {f"_orig_mod.{k}": t for k, t in x.items()}, SHAPES, "are the same tensor"),
    "two paths": (respelled("model.layers", "layers", ".1."), SHAPES, "also in the file under another path"),
    "a long path": (respelled(EXPERTS, "model." * 20 + EXPERTS), SHAPES, "are no experts of the"),
    "one part under two names": (
        lambda x: x | respelled("gate_proj", "w1")(x),
        SHAPES,
        "the same part under two names",
    ),
    "two dtypes": (
        lambda x: {k: t.half() if ".1." in k else t for k, t in x.items()},
        SHAPES,
        "differ in shape or dtype",
    ),
}


@pytest.mark.parametrize(("spoil", "shapes", "reason"), REFUSED.values(), ids=REFUSED)
def test_experts_that_cannot_be_read_are_refused(
    spoil: Callable[[Tensors], Tensors], shapes: Shapes, reason: str, tmp_path: Path
) -> None:
    tensors = spoil(single_experts())
    config = AS_STACKED if any("experts.lora_A" in key for key in tensors) else {}
    with pytest.raises(AdapterRefused, match=reason) as refusal:
        check(folder_of(tmp_path / "bad", tensors, **config), shapes)
    assert len(refusal.value.reasons) == 1, refusal.value.reasons


def test_patterns_and_single_experts_are_matched_in_bounded_time(tmp_path: Path) -> None:
    patterns = {f"layers.{number}.q_proj": 2 for number in range(1_000)}
    shapes: Shapes = {name: (*shape[:2], 20) if "experts" in name else shape for name, shape in SHAPES.items()}
    folder = folder_of(tmp_path / "many", single_experts(20), rank_pattern=patterns, alpha_pattern=patterns)
    with pytest.raises(AdapterRefused, match="too many entries for this many single experts"):
        check(folder, shapes)


def test_experts_that_are_left_out_count_towards_the_limit_of_bytes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "one", single_experts(1))
    num_bytes = (folder / WEIGHTS_FILE).stat().st_size
    shapes: Shapes = {name: (*shape[:2], 99) if "experts" in name else shape for name, shape in SHAPES.items()}
    with pytest.raises(AdapterRefused, match=r"exceed admission\.max_weights_bytes"):
        check(folder, shapes, max_weights_bytes=num_bytes)
