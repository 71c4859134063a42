from __future__ import annotations

import pytest
import torch

from gpu_worker.model.transfer import to_device


def test_on_the_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(5)
    assert to_device(tensor, torch.device("cpu")) is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_a_copy_on_a_gpu_has_the_same_values() -> None:
    tensor = torch.arange(5)
    copy = to_device(tensor, torch.device("cuda"))
    assert copy.device.type == "cuda" and torch.equal(copy.cpu(), tensor)
