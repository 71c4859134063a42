"""The engine's results equal the plain model and PEFT's, row by row."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.loop import Engine
from lora_store import check_folder
from lora_store.adapter import AdapterWeights
from lora_store.peft_files import read_peft_folder
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.engine_driver import MakeEngine, ask, by_digest, greedy, run_together
from tests.gpu_worker.families import eager_answer, train, whole_model
from tests.tiny import FAMILIES, TinyFolders, assert_equal_logits, linear_shapes, plan_of, random_adapter, tiny_config

PROMPTS = ["a", "the quick brown fox", "0123456789" * 6, "x y", "lorem ipsum dolor sit amet " * 3]


def mixed_pool(shapes: Mapping[str, tuple[int, int]]) -> list[AdapterWeights]:
    """Return adapters of unequal ranks, scalings and target modules, one with a rank pattern."""
    return [
        random_adapter(shapes, 0, rank=4),
        random_adapter(shapes, 1, rank=2, scaling=0.7),
        random_adapter(shapes, 2, rank=6, modules=lambda name: name.endswith(("q_proj", "v_proj"))),
        random_adapter(shapes, 3, rank_of=lambda name: 3 if "mlp" in name else 1, scaling=16 / 3**0.5),
    ]


def plans_over(pool: Sequence[AdapterWeights]) -> list[Plan]:
    a, b, c, d = pool
    third = 1 / 3
    return [
        BASE_PLAN,
        plan_of("selection", (a, 1.0)),
        plan_of("selection", (c, -0.5)),
        plan_of("mixture", (a, third), (b, third), (c, third)),
        plan_of("fusion", (a, 0.5), (b, 0.5)),
        plan_of("fusion", (b, third), (c, third), (d, third)),
        plan_of("mixture", (d, 0.8), (a, 0.2)),
        plan_of("fusion", (d, 1.0)),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lone_prompt_of_several_steps_equals_the_plain_model(
    family: str, make_engine: MakeEngine, tiny_folders: TinyFolders
) -> None:
    """The first steps have no logits: only the last chunk of the prompt yields a token."""
    num_steps = 3
    prompt = ("0123456789abcdef" * num_steps)[: 16 * num_steps - 5]  # 16 tokens per step; the last chunk is shorter
    engine = make_engine({}, family, max_step_tokens=16)
    head_rows = rows_of_head_products(engine)
    answer = ask(engine, greedy(prompt))
    for _ in range(num_steps - 1):
        engine.step()
    assert (answer.events, sum(head_rows)) == ([], 0)
    engine.run_until_idle()
    tokens = AutoTokenizer.from_pretrained(tiny_folders[family])(prompt).input_ids
    expected_logits, expected_tokens = eager_answer(whole_model(tiny_folders[family]), tokens, 8)
    assert_equal_logits(answer.first_logits, expected_logits)
    assert answer.tokens == expected_tokens
    assert engine.num_steps == num_steps + 7


def rows_of_head_products(engine: Engine) -> list[int]:
    """Record the number of rows of every later product with the output head."""
    rows: list[int] = []
    head = engine.base.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))
    return rows


def test_in_bfloat16_a_mixed_batch_stays_close_to_each_row_alone(
    make_engine: MakeEngine, tiny_folders: TinyFolders
) -> None:
    base = load_base_model(tiny_config(tiny_folders["gemma3"], dtype="bfloat16"))
    pool = mixed_pool(linear_shapes(base))
    engine = make_engine(by_digest(*pool), base=base, prefix_cache=False)
    jobs = [greedy(PROMPTS[i % len(PROMPTS)], plan, i) for i, plan in enumerate(plans_over(pool))]
    for job, answer in zip(jobs, run_together(engine, jobs), strict=True):
        [alone] = run_together(engine, [job])
        assert_equal_logits(answer.first_logits.bfloat16(), alone.first_logits.bfloat16())


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR},
    "attention only": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ALL_LINEAR},
    "rank pattern": {
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"mlp.up_proj": 5, r"layers\.1\.self_attn\.q_proj": 1, "^model.layers.2.mlp.down_proj": 6},
        "target_modules": ALL_LINEAR,
    },
    "both patterns": {
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"q_proj": 9, r"layers\.[01]\..*up_proj": 1},
        "target_modules": ALL_LINEAR,
    },
    "patterns, rank-stabilised": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 4},
        "alpha_pattern": {"v_proj": 7},
        "target_modules": ALL_LINEAR,
    },
    "regular expression": {"r": 4, "lora_alpha": 4, "target_modules": r".*layers\.[02]\.(self_attn\.k|mlp\.gate)_proj"},
}
# Settings of the training only. PEFT saves tensors of their own with the pairs.
TRAINING: dict[str, dict[str, Any]] = {
    "VeLoRA": {"velora_config": VeloraConfig(num_groups=4)},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2)},
}
SHORT_PROMPTS = ["The parrot says", "x"]


@dataclass(frozen=True)
class Trained:
    """A PEFT folder, and the adapter read from it."""

    folder: Path
    weights: AdapterWeights


@pytest.fixture(scope="module")
def trained(tiny_folders: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Return an adapter of every config, created and saved by PEFT, with a random lora_B instead of zeros."""
    pool = {}
    for seed, (name, settings) in enumerate(CONFIGS.items()):
        folder = train(tiny_folders["gemma3"], tmp_path_factory.mktemp("adapter"), seed, **settings)
        pool[name] = Trained(folder, AdapterWeights(f"digest of {name}", read_peft_folder(folder).modules))
    return pool


def logits_of(model: PeftModel, tiny_folders: TinyFolders, prompt: str) -> Tensor:
    """Return PEFT's logits for the prompt's last token."""
    tokens = AutoTokenizer.from_pretrained(tiny_folders["gemma3"])(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens).logits[0, -1]
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_selection_equals_the_peft_model(
    name: str, trained: dict[str, Trained], tiny_folders: TinyFolders, make_engine: MakeEngine
) -> None:
    weights = trained[name].weights
    model = PeftModel.from_pretrained(whole_model(tiny_folders["gemma3"]), trained[name].folder).eval()
    jobs = [greedy(prompt, plan_of("selection", (weights, 1.0)), prompt, num_new=1) for prompt in SHORT_PROMPTS]
    for answer, job in zip(run_together(make_engine(by_digest(weights)), jobs), jobs, strict=True):
        assert isinstance(job.prompt, str)
        expected = logits_of(model, tiny_folders, job.prompt)
        assert_equal_logits(answer.first_logits, expected)
        with model.disable_adapter():
            base = logits_of(model, tiny_folders, job.prompt)
        assert float((expected - base).abs().max()) > 0.05, "the adapter should matter"


@pytest.mark.parametrize("kind", TRAINING)
def test_settings_of_the_training_do_not_change_the_answer(
    kind: str, tiny_folders: TinyFolders, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """Trained for a step, saved by PEFT, checked as an upload, and compared with PEFT's model for generating."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM", **TRAINING[kind]}
    trained = get_peft_model(whole_model(tiny_folders["gemma3"]), LoraConfig(**settings)).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
    for key, parameter in trained.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.15)
    tokens = torch.arange(3, 30)[None]
    trained(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    trained.eval().save_pretrained(tmp_path)
    checked_equals_peft(tmp_path, tiny_folders, make_engine)


def test_float64_tensors_are_rounded_as_by_peft(
    trained: dict[str, Trained], tiny_folders: TinyFolders, make_engine: MakeEngine, tmp_path: Path
) -> None:
    shutil.copytree(trained["plain"].folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    third = {key: tensor.double() / 3 for key, tensor in tensors.items()}
    save_file(third, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    checked_equals_peft(tmp_path, tiny_folders, make_engine)


def checked_equals_peft(folder: Path, tiny_folders: TinyFolders, make_engine: MakeEngine) -> None:
    """Check the folder as an upload, and compare the engine's logits with PEFT's."""
    base = load_base_model(tiny_config(tiny_folders["gemma3"]))
    accepts = {str(tiny_folders["gemma3"])}
    checked = check_folder(folder, accepts_base=accepts, module_shapes=linear_shapes(base))
    weights = AdapterWeights("digest", checked.modules)
    assert len(weights.modules) == 3 * len(ALL_LINEAR)
    model = PeftModel.from_pretrained(whole_model(tiny_folders["gemma3"]), folder).eval()
    job = greedy(SHORT_PROMPTS[0], plan_of("selection", (weights, 1.0)), num_new=1)
    [answer] = run_together(make_engine(by_digest(weights)), [job])
    expected = logits_of(model, tiny_folders, SHORT_PROMPTS[0])
    assert_equal_logits(answer.first_logits, expected)
    with model.disable_adapter():
        assert float((expected - logits_of(model, tiny_folders, SHORT_PROMPTS[0])).abs().max()) > 0.01
