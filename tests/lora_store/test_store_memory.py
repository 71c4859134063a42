"""The memory used by one stage, measured in a real process, which includes memory of torch and Arrow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from lora_store import ModuleWeights, write_peft_folder
from tests.lora_store.builders import BASE
from tests.soak import Scale

_MIB = 1 << 20
_MEASURE = """
import sys, threading, time
from pathlib import Path
import numpy as np
from deployments.publishing.source_folders import PublishItem, folder_of
from lora_store import LoraStore

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def stage(folder, name):
    # An upload reaches the Store as arrays in shared memory, which a mapped file simulates.
    files = {path.name: np.memmap(path, np.uint8, "r") for path in Path(folder).iterdir()}
    with folder_of(PublishItem(name=name, files=files), (), 1 << 30) as made:
        store.stage(made, name=name)

store = LoraStore(sys.argv[1], accepts_base=["tiny-base"])
stage(sys.argv[2], "warm-up")
before, most, is_over = anonymous(), 0, threading.Event()

def watch():
    global most
    while not is_over.is_set():
        most = max(most, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
stage(sys.argv[3], "measured")
is_over.set()
thread.join()
print(most - before)
"""


def _adapter(folder: Path, num_bytes: int, num_modules: int) -> Path:
    rank, width = 8, num_bytes // (num_modules * 2 * 8 * 4)
    weights = {
        f"model.layers.{number}.mlp.up_proj": ModuleWeights(torch.randn(rank, width), torch.randn(width, rank), 2.0)
        for number in range(num_modules)
    }
    write_peft_folder(folder, weights, base_model=BASE)
    return folder


def test_a_stage_takes_at_most_one_and_a_half_times_its_upload(store_uri: str, tmp_path: Path, scale: Scale) -> None:
    num_bytes = scale.pick("MiB of the upload", small=48, full=512) * _MIB - 16 * _MIB
    small, large = _adapter(tmp_path / "small", _MIB, 4), _adapter(tmp_path / "large", num_bytes, 8)
    size = sum(path.stat().st_size for path in large.iterdir())
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, store_uri, str(small), str(large)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    grown = int(run.stdout)
    scale.record("times the upload", grown / size)
    assert 0.5 * size < grown <= 1.5 * size
