"""The choice among prebuilt libraries for a processor."""

from __future__ import annotations

import pytest

from gpu_worker.native.kernels.kernel_variants import VARIANTS, this_processor

_HASWELL = "fpu sse2 avx avx2 bmi1 bmi2 f16c fma abm movbe"
_SKYLAKE_X = f"{_HASWELL} avx512f avx512bw avx512cd avx512dq avx512vl"
_ICE_LAKE = f"{_SKYLAKE_X} avx512_vnni"
_ZEN_4 = f"{_ICE_LAKE} avx512_bf16"
_SAPPHIRE_RAPIDS = f"{_ZEN_4} amx_tile amx_bf16 amx_int8"


def cpuinfo(*flags: str, key: str = "flags") -> str:
    """Return the text of /proc/cpuinfo with a core for each list of flags."""
    return "\n\n".join(f"processor\t: {core}\n{key}\t\t: {listed}" for core, listed in enumerate(flags))


@pytest.mark.parametrize(
    ("machine", "text", "fitting"),
    [
        ("x86_64", cpuinfo(_SAPPHIRE_RAPIDS), ["x86-64-v4-amx", "x86-64-v4-bf16", "x86-64-v4-vnni", "x86-64-v3"]),
        ("x86_64", cpuinfo(_ZEN_4), ["x86-64-v4-bf16", "x86-64-v4-vnni", "x86-64-v3"]),
        ("x86_64", cpuinfo(f"{_ZEN_4} amx_tile"), ["x86-64-v4-bf16", "x86-64-v4-vnni", "x86-64-v3"]),
        ("x86_64", cpuinfo(f"{_ZEN_4} amx_bf16"), ["x86-64-v4-bf16", "x86-64-v4-vnni", "x86-64-v3"]),
        ("x86_64", cpuinfo(_ICE_LAKE), ["x86-64-v4-vnni", "x86-64-v3"]),
        ("x86_64", cpuinfo(_SKYLAKE_X), ["x86-64-v3"]),
        ("x86_64", cpuinfo(_HASWELL), ["x86-64-v3"]),
        ("x86_64", cpuinfo("fpu sse2 avx"), []),
        ("x86_64", cpuinfo(_SAPPHIRE_RAPIDS, _HASWELL), ["x86-64-v3"]),  # different cores
        ("aarch64", cpuinfo("fp asimd bf16", key="Features"), ["aarch64"]),
        ("aarch64", cpuinfo("fp asimd asimddp", key="Features"), ["aarch64-dotprod", "aarch64"]),
        ("aarch64", cpuinfo("fp", key="Features"), []),
        ("riscv64", cpuinfo("rv64"), []),
        ("x86_64", " ", []),
    ],
)
def test_a_processor_uses_the_fastest_variant_that_it_supports(machine: str, text: str, fitting: list[str]) -> None:
    assert [variant.name for variant in this_processor(text, machine).fitting()] == fitting


def test_each_flag_of_a_variant_is_needed() -> None:
    for variant in VARIANTS:
        for flag in variant.needs:
            others = " ".join(variant.needs - {flag})
            assert variant not in this_processor(cpuinfo(others), variant.machine).fitting()


def test_processors_of_different_models_are_distinguished() -> None:
    one, other = (this_processor(f"model name\t: {name}\n" + cpuinfo(_HASWELL), "x86_64") for name in ("A", "B"))
    assert one.description != other.description
    assert one.flags == other.flags == frozenset(_HASWELL.split())
