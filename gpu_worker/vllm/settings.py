"""The settings that travel to vLLM's worker processes in `additional_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm import __version__

from gpu_worker.errors import WorkerConfigInvalid

KEY = "loraretriever"
TESTED_VERSION = "0.32."  # the plug-in imports names of vLLM that are not public; see `check_version`


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """How large the bank is and how its products are computed. `free_fill`: value of free rows, see LoraBank.

    `front_pid`: the process of the front end, with which the workers end.
    """

    bank_rank_rows: int
    front_pid: int
    cache_dir: str
    use_kernel: bool = True
    free_fill: float = 0.0

    def as_additional_config(self) -> dict[str, Any]:
        return {KEY: asdict(self)}

    @classmethod
    def of(cls, additional_config: Mapping[str, Any]) -> PluginSettings:
        return cls(**additional_config[KEY])


def check_version() -> None:
    """Raise WorkerConfigInvalid unless the tested version of vLLM is installed."""
    if not __version__.startswith(TESTED_VERSION):
        raise WorkerConfigInvalid(
            f"the vLLM engine needs vLLM {TESTED_VERSION}*, found {__version__}; install it as"
            " docs/how-to/install.md says"
        )
