"""The memory used by one stage, measured in a real process, which includes memory of torch and Arrow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from lora_store import ModuleWeights, write_peft_folder
from tests.lora_store.builders import BASE
from tests.soak import Scale

_MIB = 1 << 20
_MEASURE = """
import itertools, sys, threading, time
from pathlib import Path
from deployments.api.adapters import PublishItem, SentFile
from deployments.publishing.source_folders import open_folder
from lora_store import LoraStore
from lora_store.uploads import PART_BYTES

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def stage(folder, name):
    # As the Store deployment does: the weights arrive in parts; or the folder is used in place.
    if sys.argv[4] == "in place":
        store.stage(Path(folder), name=name)
        return
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix != ".safetensors"}
    for number, path in enumerate(Path(folder).glob("*.safetensors")):
        id = f"{number:032x}"
        with open(path, "rb") as file:
            for part in itertools.count():
                if not (data := file.read(PART_BYTES)):
                    break
                store.uploads.put(id, part, data)
        files[path.name] = SentFile(id, path.stat().st_size)
    with open_folder(PublishItem(name=name, files=files), (), 1 << 31, None, store.uploads.parts) as (made, _):
        store.stage(made, name=name, is_private=True)
    store.uploads.delete([f"{0:032x}"])

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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _adapter(tmp_path_factory.mktemp("small"), 20 * _MIB, 4)


@pytest.fixture(scope="module")
def make_large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a maker of an adapter with this many bytes."""
    return cache(lambda num_bytes: _adapter(tmp_path_factory.mktemp("large"), num_bytes, 8))


@pytest.mark.parametrize(("store_uri", "how"), [("folder", "in place"), ("s3", "in parts")], indirect=["store_uri"])
def test_the_memory_of_a_stage_does_not_depend_on_the_size_of_the_weights(
    how: str, store_uri: str, small: Path, make_large: Callable[[int], Path], scale: Scale
) -> None:
    num_bytes = scale.pick("MiB of the weights", small=96, full=1023) * _MIB
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, store_uri, str(small), str(make_large(num_bytes)), how],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    grown = int(run.stdout)
    scale.record("MiB of memory", grown / _MIB)
    assert grown <= 64 * _MIB
