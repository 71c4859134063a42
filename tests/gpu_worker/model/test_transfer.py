from __future__ import annotations

import torch

from gpu_worker.model.transfer import to_device


def test_on_the_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(5)
    assert to_device(tensor, torch.device("cpu")) is tensor
