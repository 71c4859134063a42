"""A vLLM that differs from the tested one is refused at the start, with each difference. Needs vLLM."""

from __future__ import annotations

import pytest
from vllm.lora import utils
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from gpu_worker.errors import WorkerConfigInvalid
from gpu_worker.vllm.settings import (
    EXTENSION_POINTS,
    LAYER_ATTRIBUTES,
    PluginSettings,
    check_device,
    check_gpus,
    check_vllm,
)


def test_the_installed_vllm_has_every_extension_point() -> None:
    assert len(EXTENSION_POINTS) == 22 and len(LAYER_ATTRIBUTES) == 21
    check_vllm()


def test_each_difference_is_named_with_the_remedy() -> None:
    points = [(utils, "from_layer", ("layer", "max_loras")), (utils, "to_layer", ("layer",))]
    with pytest.raises(WorkerConfigInvalid) as found:
        check_vllm("0.33.1", points)
    message = str(found.value)
    assert "version 0.32.* is needed, found 0.33.1" in message
    assert "from_layer takes layer, max_loras, lora_config" in message and "instead of layer, max_loras" in message
    assert "vllm.lora.utils has no to_layer" in message and "docs/how-to/install.md" in message


def test_an_attribute_of_a_layer_that_is_gone_is_named() -> None:
    attributes = [(BaseLinearLayerWithLoRA, "create_lora_weights", ("lora_a_stacked", "lora_a_packed"))]
    attributes += [(BaseLinearLayerWithLoRA, "make_lora_weights", ("lora_b_stacked",))]
    with pytest.raises(WorkerConfigInvalid) as found:
        check_vllm(attributes=attributes)
    assert "BaseLinearLayerWithLoRA has no lora_a_packed;" in str(found.value)
    assert "BaseLinearLayerWithLoRA has no lora_b_stacked." in str(found.value)


def test_settings_reach_the_workers_unchanged() -> None:
    sent = PluginSettings(
        num_rank_rows=8,
        cache_dir="/cache",
        modules={"a": "m.a"},
        outputs={"a": 3},
        end_ids=[1, 2],
        special_ids=[1, 2, 5],
        experts={"e.down_proj": (3, 4, 2)},
        expert_bytes=5,
        use_kernel=False,
        free_fill=0.5,
    )
    assert PluginSettings.of(sent.as_additional_config()) == sent


def test_a_build_of_vllm_for_another_device_is_refused_with_the_packages_name() -> None:
    """The tests have the build for CPUs, which would silently compute there."""
    check_device("cpu")
    with pytest.raises(WorkerConfigInvalid, match=r"device is 'cuda', but .* on 'cpu'; install the package vllm as"):
        check_device("cuda")


def test_every_process_of_an_engine_needs_a_gpu() -> None:
    check_gpus(2, 2)
    with pytest.raises(
        WorkerConfigInvalid,
        match=r"size is 4, but .* sees 1 of .* GPUs; set worker_scaling.ray_actor_options.num_gpus to 4",
    ):
        check_gpus(4, 1)
