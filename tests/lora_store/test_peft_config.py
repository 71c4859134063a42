from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    OFTConfig,
    PeftConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils.other import get_pattern_key
from transformers import LlamaConfig, LlamaForCausalLM

from lora_store import AdapterRefused, ModuleWeights, check_folder, write_peft_folder
from lora_store.peft_config import PatternTable, pattern_problems
from tests.bad_uploads import config as change
from tests.lora_store.builders import MakeFolder, read_folder


@pytest.mark.parametrize("rank", [1, 2, 7, 16])
def test_scaling_is_alpha_over_rank_and_over_its_root_for_rslora(tmp_path: Path, rank: int) -> None:
    weights = {"m": ModuleWeights(torch.ones(rank, 3), torch.ones(2, rank), 5 / rank)}
    write_peft_folder(tmp_path, weights, base_model="b")
    assert read_folder(tmp_path).modules["m"].scaling == pytest.approx(5 / rank)
    change(use_rslora=True)(tmp_path)
    assert read_folder(tmp_path).modules["m"].scaling == pytest.approx(5 / math.sqrt(rank))


def _reason(folder: Path) -> str:
    with pytest.raises(AdapterRefused) as caught:
        check_folder(folder, accepts_base={"tiny-base"}, module_shapes=None)
    [reason] = caught.value.reasons
    return reason


KINDS: dict[str, PeftConfig] = {
    "VERA": VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "LOHA": LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ADALORA": AdaLoraConfig(target_modules=["q_proj", "v_proj"], total_step=10),
    "OFT": OFTConfig(target_modules=["q_proj"], oft_block_size=2),
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_kind_is_refused_for_that_reason_alone(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    get_peft_model(LlamaForCausalLM(config), KINDS[kind]).save_pretrained(tmp_path)
    change(base_model_name_or_path="tiny-base")(tmp_path)
    assert _reason(tmp_path).startswith(f"peft_type must be 'LORA', got {kind!r}: train a LoRA adapter, or let PEFT's")


@pytest.mark.parametrize(
    ("base_model", "said"),
    [
        ("org/tiny-base", "this server accepts 'tiny-base'. If they are the same weights, "),
        ("org/tiny-base-bnb-4bit", "It is a quantised copy; its adapters usually work on the full model."),
        ("org/tiny-base-bnb-4bit", "accepts_base, and compare with `loraretriever publish --dry-run FOLDER --parity`"),
        (None, "adapter_config.json names no base model (base_model_name_or_path); this server accepts 'tiny-base'"),
    ],
)
def test_another_base_is_refused_with_a_remedy(make_folder: MakeFolder, base_model: str | None, said: str) -> None:
    folder = make_folder()
    change(base_model_name_or_path=base_model)(folder)
    assert said in _reason(folder)


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj"],
        ["layers.0.q_proj", "q_proj"],
        ["q_proj", "layers.0.q_proj"],
        ["^model.layers.0.q_proj"],
        ["^layers.0.q_proj"],
        [".*"],
        ["proj"],
        ["q|k", "k_proj"],
        [r"layers\.[01]\.k_proj", "q_pro."],
        ["model.layers.0.q_proj$"],
    ],
    ids=str,
)
@pytest.mark.parametrize("module", ["model.layers.0.q_proj", "model.layers.10.k_proj", "q_proj", "xq_proj", "k"])
def test_patterns_are_resolved_as_by_peft(patterns: list[str], module: str) -> None:
    values = {pattern: number for number, pattern in enumerate(patterns)}
    assert PatternTable(values).get([module], -1) == values.get(get_pattern_key(values.keys(), module), -1)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(a+)+", "too complex"),
        ("(a|a)(a|a)(a|a)x", "too complex"),
        (".*.*.*x", "too complex"),
        ("(" + "|" * 118 + ")(" + "|" * 118 + ").*.*[~!]", "at most 8 of |"),
        ("|".join(map(str, range(70))), "at most 8 of |"),
        (f"({'|'.join('m' * number for number in range(1, 12))}).*[~!]", "at most 8 of |"),
        (f"({'|'.join(map(str, [*range(12), 3]))})x", "at most 8 of |"),
        ("(.|.).*.*[~!]", "plain words"),
        (".*.*(|)[~!]", "plain words"),
        (r".*\.(gate|gate_up)_proj.*", "plain words"),
        (r"\((m|mo).*.*", "plain words"),
        ("(?=a)", "too complex"),
        (r"(a)\1", "too complex"),
        ("(", "is not a valid regular expression"),
        ("q{4294967295}", "is not a valid regular expression: the repetition number is too large"),
        ("a" * 257, "has 257 characters"),
    ],
)
def test_a_pattern_that_could_take_too_long_is_refused(pattern: str, problem: str) -> None:
    [found] = pattern_problems({pattern: 1}, max_patterns=10)
    assert problem in found


def test_a_table_of_many_patterns_is_refused() -> None:
    assert pattern_problems({f"m{n}": 1 for n in range(11)}, 10) == ["has 11 patterns, at most 10"]
    assert re.search("more than 64 times", pattern_problems({f".*m{n}.*": 1 for n in range(40)}, 100)[0])
    assert re.search("more than 256 times", pattern_problems({f"{n}(|||||||)": 1 for n in range(40)}, 100)[0])


@pytest.mark.parametrize(
    "pattern",
    [
        "(q|k|v|o|gate|up|down)_proj",
        r"(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        r"layers\.(0|1|2|10|11)\..*(q|v)_proj",
        r"layers\.\d+\..*\.(q|k|v|o)_proj",
        rf"layers\.({'|'.join(map(str, range(48)))})\.self_attn\..*_proj",
        r".*layers.*(self_attn\.q|mlp\.up|mlp\.down)_proj",
        "q_proj|k_proj|v_proj",
        ".*q_proj|.*v_proj",
    ],
)
def test_a_pattern_with_ordinary_alternatives_is_accepted(pattern: str) -> None:
    assert pattern_problems({f"layers.{number}.{pattern}": 1 for number in range(5)}, max_patterns=100) == []
