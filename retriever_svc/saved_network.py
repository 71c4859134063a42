"""Keep the packaged encoder's network beside its files, so that a later start needs neither torch nor transformers.

`openvino_network.py` converts the network once. It is saved with its tokenizer and with torch's vectors of some texts,
and each start compares its own vectors of these texts with them, as after the conversion. The tokens' mean is computed
here, since sentence-transformers would import torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lora_store.built_folder import build_folder
from lora_store.files import hash_file
from retriever_svc.unigram_tokenizer import RULES, Tokens, UnigramTokenizer, save_unigram

logger = logging.getLogger(__name__)

Run = Callable[[list[NDArray[np.int64]]], Mapping[Any, NDArray[np.float32]]]
Vectors = NDArray[np.float32]

_LEAST_COSINE = 0.999  # to the vectors of torch in float32
_LONG = "Translate to French: the cat sleeps on the old sofa in the kitchen. "
_PROBES = ["", "Is it so?", _LONG], [20 * _LONG]  # a batch with padding, and a text of all tokens that are read
_REASON_CHARS = 400  # of an error, on one line; OpenVINO names the place in its sources first
# Texts are padded to a multiple of this many tokens, so that there are few lengths. For the first text of a length
# OpenVINO makes kernels, which takes 5 ms, and every change of the length takes 1 ms.
_LENGTHS = 16
_MAX_KERNELS = 1024  # that are kept: each number of texts of each length needs its own; 1,024 take about 200 MB
_MAKERS = ("openvino", "sentence-transformers", "tokenizers", "transformers")  # libraries that the result depends on
SUFFIX = ".openvino-2"  # of the folder; another number makes the files again after a change of their format
_RECORD, _FACTS, _NETWORK, _TOKENIZER, _VECTORS = "record.json", "facts.json", "network.xml", "tokenizer.json", "v.npy"


class SavedEncoder:
    """A saved network with what `Encoder` uses of a SentenceTransformer. Use it from one thread at a time."""

    def __init__(self, place: Path, max_tokens: int, num_threads: int | None, *, is_exact: bool) -> None:
        """Load and compile the network. `num_threads`: None means the CPUs that the process may use."""
        facts = json.loads((place / _FACTS).read_text(encoding="utf-8"))
        self.prompts: dict[str, str] = facts["prompts"]
        self.max_seq_length: int = min(max_tokens, facts["max_seq_length"])
        self._dim, self._names = facts["dim"], facts["names"]
        load = UnigramTokenizer if (place / RULES).exists() else _OtherTokenizer
        self._pad: int = facts["pad"]
        self._tokenizer = load(place, self.max_seq_length, self._pad)
        network = import_openvino().Core().read_model(place / _NETWORK)
        self._run = compiled(network, num_threads or _num_cpus(), is_exact=is_exact)

    def get_embedding_dimension(self) -> int:
        return int(self._dim)

    def encode(self, texts: Sequence[str], *, prompt: str, **_: object) -> Vectors:
        """Return the mean of each text's tokens as unit rows (N, D). Other options have their values in `Encoder`."""
        ids, mask = self._widened(*self._tokenizer.encode([prompt + text for text in texts]))
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        [tokens] = self._run([inputs[name] for name in self._names]).values()  # (N, T, D)
        means = np.einsum("ntd,nt->nd", tokens, mask.astype(np.float32)) / mask.sum(axis=1, keepdims=True)
        rows: Vectors = (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)
        return rows

    def _widened(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Tokens:
        """Return tokens (N, T) with padding up to one of a few lengths."""
        length = ids.shape[1]
        extra = min(-length % _LENGTHS, max(self.max_seq_length - length, 0))
        return np.pad(ids, ((0, 0), (0, extra)), constant_values=self._pad), np.pad(mask, ((0, 0), (0, extra)))


class _OtherTokenizer:
    """A tokenizer that is run by `tokenizers`, with the interface of `UnigramTokenizer`."""

    def __init__(self, place: Path, max_tokens: int, pad: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(place / _TOKENIZER))
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.enable_padding(pad_id=pad)

    def encode(self, texts: Sequence[str]) -> Tokens:
        read = self._tokenizer.encode_batch(texts)
        return np.array([each.ids for each in read]), np.array([each.attention_mask for each in read])


def load_saved(
    place: Path,
    source: str,
    prompt_of: Callable[[SavedEncoder], str],
    max_tokens: int,
    num_threads: int | None,
    *,
    is_exact: bool,
) -> SavedEncoder | None:
    """Return the encoder saved at `place`. `prompt_of`: the text before each text of the comparison with torch.

    None, unless the installed libraries made it from `source` and its files are whole. None too, after a warning, if it
    cannot be loaded or its vectors differ from torch's.
    """
    if not _is_current(place, source):
        return None
    try:
        saved = SavedEncoder(place, max_tokens, num_threads, is_exact=is_exact)
        prompt = prompt_of(saved)
        check(probed(lambda texts: saved.encode(texts, prompt=prompt)), np.load(place / _VECTORS))
    except Exception as exc:  # OpenVINO's errors have no common base
        logger.warning("the saved encoder in %s is not used, which takes seconds and memory: %s", place, short(exc))
        return None
    return saved


def save_network(
    place: Path, source: str, network: Any, tokenizer: Tokenizer, facts: Mapping[str, Any], expected: Vectors
) -> None:
    """Save a converted network, unless it has been. Log a warning if that fails: the next start converts again.

    `source`: a text that identifies the files it was made from. `expected`: torch's vectors of the probes.
    """
    try:
        with FileLock(place.with_name(f".{place.name}.lock")):
            if _is_current(place, source):
                return  # another process has saved it
            with build_folder(place) as target:
                import_openvino().save_model(network, target / _NETWORK)  # in 16 bits, which the weights came in
                if not save_unigram(target, tokenizer):
                    tokenizer.save(str(target / _TOKENIZER), pretty=False)
                np.save(target / _VECTORS, expected)
                (target / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
                (target / _RECORD).write_text(json.dumps(_record(target, source)), encoding="utf-8")
    except Exception as exc:  # OpenVINO's errors have no common base
        logger.warning("the converted encoder cannot be saved in %s: %s", place, short(exc))


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry: it would send an event to Google Analytics."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino  # imported here, since it takes half a second

    return openvino


def compiled(network: Any, num_threads: int, *, is_exact: bool) -> Run:
    """Compile a network for the CPU. `is_exact`: it computes in float32 even if the processor multiplies bfloat16."""
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": num_threads,
        "ENABLE_CPU_PINNING": False,  # of several processes all would use the first core
        "CPU_RUNTIME_CACHE_CAPACITY": _MAX_KERNELS,
    } | ({"INFERENCE_PRECISION_HINT": "f32"} if is_exact else {})
    run: Run = import_openvino().Core().compile_model(network, "CPU", settings)
    return run


def probed(encode: Callable[[list[str]], Vectors]) -> Vectors:
    """Return the vectors of the texts that two runtimes are compared by."""
    return np.concatenate([encode(texts) for texts in _PROBES])


def check(found: Vectors, expected: Vectors) -> None:
    """Raise ValueError unless the unit rows have nearly the same directions."""
    cosines = (found * expected).sum(axis=1)
    if not (cosines > _LEAST_COSINE).all():  # NaN is not
        raise ValueError(f"its vectors have a cosine of {cosines.min():.4f} to those of torch")


def short(error: Exception) -> str:
    """Return the error's text on one line, or its kind."""
    return textwrap.shorten(str(error), _REASON_CHARS) or type(error).__name__


def _num_cpus() -> int:
    """Return the number of threads that torch would use: Ray sets this variable for each replica."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))


def _is_current(place: Path, source: str) -> bool:
    """Return whether the installed libraries made these files from `source`, and they are whole."""
    try:
        return bool(json.loads((place / _RECORD).read_text(encoding="utf-8")) == _record(place, source))
    except (OSError, ValueError):
        return False


def _record(folder: Path, source: str) -> dict[str, str]:
    """Return the source, the versions of the libraries that make the files, and the SHA-256 of each file."""
    found = {"source": source} | {name: importlib.metadata.version(name) for name in _MAKERS}
    for path in sorted(folder.iterdir()):
        if path.name != _RECORD:
            found[path.name] = hash_file(path)
    return found
