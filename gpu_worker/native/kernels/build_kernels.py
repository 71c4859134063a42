"""Build all kernels for every variant of this machine: `python -m gpu_worker.native.kernels.build_kernels --out DIR`.

The image's build stage runs this command and copies DIR to `gpu_worker/native/kernels/prebuilt`. It needs only a C++
compiler.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu_worker.native.kernels.kernel_build import Compiler, KernelUnavailable, file_name, kernel_names, name_library
from gpu_worker.native.kernels.kernel_variants import VARIANTS, Variant


def prebuilt_path(folder: Path, variant: Variant, name: str) -> Path:
    """Return the path below `folder` of a kernel's library for a variant."""
    return folder / variant.name / file_name(name, *variant.options)


def build(folder: Path, machine: str, compiler: Compiler) -> list[Path]:
    """Build every kernel for every variant of `machine` and return the libraries.

    Raises: KernelUnavailable if the compiler fails or no variant matches the machine.
    """
    variants = [variant for variant in VARIANTS if variant.machine == machine]
    if not variants:
        known = ", ".join(sorted({variant.machine for variant in VARIANTS}))
        raise KernelUnavailable(f"no prebuilt kernels for machine '{machine}'; supported: {known}")
    built = []
    for variant in variants:
        for name in kernel_names():
            library = prebuilt_path(folder, variant, name)
            library.parent.mkdir(parents=True, exist_ok=True)
            library.parent.chmod(0o755)  # independent of the umask: libraries in folders writable by others are refused
            compiler.compile(name_library(name), variant.options, library)
            built.append(library)
    return built


def main(arguments: Sequence[str] | None = None) -> int:
    summary = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m gpu_worker.native.kernels.build_kernels", description=summary)
    parser.add_argument("--out", type=Path, required=True, help="the folder to build into, created if missing")
    out: Path = parser.parse_args(arguments).out
    try:
        built = build(out, platform.machine(), Compiler.find())
    except KernelUnavailable as exc:
        print(exc, file=sys.stderr)
        return 1
    for library in built:
        print(library.relative_to(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
