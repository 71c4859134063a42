"""The clients of a running `benchmarks.vllm_peer` or `benchmarks.cpu_peer`."""

from __future__ import annotations

import ctypes.util
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.engine_cases import NUM_NEW, NUM_ROWS, RANK, Prompt
from lora_store import Strategy

_KV_GIB = 1  # 32 rows of 144 tokens take a tenth
MAX_LEN = 512
_SCRIPT = Path(__file__).with_name("vllm_peer.py")


class PeerFailed(Exception):
    """The other software's process ended before it answered."""


class Peer:
    """A context manager: other software on all cores. Between its turns its processes are stopped and use no CPU."""

    def __init__(self, python: Path, script: Path, log: Path, **settings: Any) -> None:
        settings |= {"num_rows": NUM_ROWS, "max_model_len": MAX_LEN}
        reading, writing = os.pipe()
        self.log = log
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [str(python), str(script), json.dumps(settings), str(writing)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                pass_fds=[writing],
                env=environment_of(python),
                text=True,
                process_group=0,  # one group, to stop all of its processes together
            )
        os.close(writing)
        self._answers = os.fdopen(reading)
        self.version: str = self._answer()["version"]
        self._signal(signal.SIGSTOP)

    def __call__(
        self, rows: Sequence[Prompt], num_new: int = NUM_NEW, *, strategy: Strategy = "base", num_active: int = 0
    ) -> float:
        """Return tokens per second, measured in the other process around its `generate`.

        `strategy`, `num_active`: see `engine_cases.plans`, for this project's engine. Others use `num_active` adapters.
        """
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        batch = {"rows": [row.ids for row in rows], "texts": [row.text for row in rows], "num_new": num_new}
        batch |= {"strategy": strategy, "num_active": num_active}
        self._process.stdin.write(json.dumps(batch) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        assert answer["num_tokens"] == len(rows) * num_new
        speed: float = answer["num_tokens"] / answer["seconds"]
        return speed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise PeerFailed(f"a peer ended; its last output:\n{self.log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)


class Vllm(Peer):
    """vLLM."""

    def __init__(
        self, python: Path, model: str, adapters: Sequence[Path], log: Path, *, num_with_plans: int = 0
    ) -> None:
        """`adapters`: vLLM's own. `num_with_plans`: if above 0, use this project's engine with so many adapters."""
        names, engine = [str(folder) for folder in adapters], "plans" if num_with_plans else "stock"
        settings = {"engine": engine, "num_adapters": num_with_plans, "model": model, "adapters": names, "rank": RANK}
        super().__init__(python, _SCRIPT, log, **settings)


def environment_of(python: Path) -> dict[str, str]:
    """Return the environment that vLLM's guide for CPUs recommends."""
    cores = os.cpu_count() or 1
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    preloaded = [str(openmp)] if openmp.exists() else []
    if tcmalloc := ctypes.util.find_library("tcmalloc_minimal"):  # Debian: libtcmalloc-minimal4
        preloaded.append(tcmalloc)
    return os.environ | {
        "PYTHONPATH": str(_SCRIPT.parents[1]),
        "PYTHONSAFEPATH": "1",  # this folder has an http.py
        "LD_PRELOAD": ":".join(preloaded),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",  # "auto" keeps one core free
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
