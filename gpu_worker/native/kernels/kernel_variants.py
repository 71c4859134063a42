"""The processor variants of prebuilt kernels, and the choice among them at start.

Imports only the standard library, because the image's build stage has no torch.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_V4_VNNI = _V4 | {"avx512_vnni"}
_V4_BF16 = _V4_VNNI | {"avx512_bf16"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kind of processor. `needs`: required flags of /proc/cpuinfo; `options`: compiler options."""

    name: str
    machine: str  # as `platform.machine()` names it
    needs: frozenset[str]
    options: tuple[str, ...]


_VNNI = ("-march=x86-64-v4", "-mavx512vnni")  # 8-bit integers
_BF16 = (*_VNNI, "-mavx512bf16")
_TILES = ("-mamx-tile", "-mamx-bf16", "-mamx-int8")
VARIANTS = (  # the fastest first
    Variant("x86-64-v4-amx", "x86_64", _V4_BF16 | {"amx_tile", "amx_bf16", "amx_int8"}, (*_BF16, *_TILES)),
    Variant("x86-64-v4-bf16", "x86_64", _V4_BF16, _BF16),
    Variant("x86-64-v4-vnni", "x86_64", _V4_VNNI, _VNNI),
    Variant("x86-64-v3", "x86_64", _V3, ("-march=x86-64-v3",)),
    Variant("aarch64-dotprod", "aarch64", frozenset({"asimd", "asimddp"}), ("-march=armv8.2-a+dotprod",)),
    Variant("aarch64", "aarch64", frozenset({"asimd"}), ("-march=armv8-a",)),
)


@dataclass(frozen=True, slots=True)
class Processor:
    """The processor of this machine."""

    machine: str
    flags: frozenset[str]
    description: str  # differs for processors that need different native code

    def fitting(self) -> list[Variant]:
        """Return the variants that this processor can run, the fastest first."""
        return [variant for variant in VARIANTS if variant.machine == self.machine and variant.needs <= self.flags]


def this_processor(cpuinfo: str | None = None, machine: str | None = None) -> Processor:
    """Parse the text of /proc/cpuinfo. `cpuinfo`, `machine`: None reads them from this machine."""
    if cpuinfo is None:
        cpuinfo = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    lines = [line for line in cpuinfo.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part"))]
    listed = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    flags = frozenset.intersection(*map(frozenset, listed)) if listed else frozenset[str]()
    return Processor(machine or platform.machine(), flags, "\n".join(sorted(set(lines))) or platform.processor())
