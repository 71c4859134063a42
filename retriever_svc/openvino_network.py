"""Run an encoder's network with OpenVINO on the CPU: about 0.7 of torch's time with the same products.

OpenVINO multiplies bfloat16 numbers where the processor can, and float32 numbers elsewhere. The tokenizer, pooling and
normalisation stay those of sentence-transformers, in float32. The vectors have a cosine of about 0.99997 to those of
torch in float32, so both may be in one index.
"""

from __future__ import annotations

import logging
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

logger = logging.getLogger(__name__)

_LEAST_COSINE = 0.999  # to the vectors of torch in float32
_LONG = "Translate to French: the cat sleeps on the old sofa in the kitchen. "
_PROBES = ["", "Is it so?", _LONG], [20 * _LONG]  # a batch with padding, and a text of all tokens that are read
_REASON_CHARS = 400  # of an error, on one line; OpenVINO names the place in its sources first
_MAX_KERNELS = 1024  # that are kept: each length of a text needs its own; 1,024 take about 200 MB

Run = Callable[[list[NDArray[np.int64]]], Mapping[Any, NDArray[np.float32]]]


class OpenvinoNetwork(nn.Module):
    """Takes the place of the network in a sentence-transformers model. Use it from one thread at a time."""

    def __init__(self, network: nn.Module, output: str) -> None:
        """Convert `network` at the first call. `output`: the key of its result that the model's next part reads."""
        super().__init__()
        self.config = network.config  # sentence-transformers reads it
        self._output, self._names = output, list[str]()
        self._source: nn.Module | None = network  # until it is converted
        self.run: Run | None = None

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """Return {output: (N, T, D)} for tensors (N, T). Other arguments keep the values of the first call."""
        if self._source is not None:
            self._names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
            self.run = _compiled(self._source, inputs, self._output)
            self._source = None
        assert self.run is not None
        [rows] = self.run([inputs[name].numpy() for name in self._names]).values()
        return {self._output: torch.from_numpy(rows)}


class _Positional(nn.Module):
    """A network with positional arguments and one result, as the conversion wants it."""

    def __init__(self, network: nn.Module, names: list[str], fixed: Mapping[str, Any], output: str) -> None:
        super().__init__()
        self._network, self._names, self._fixed, self._output = network, names, fixed, output

    def forward(self, *tensors: Tensor) -> Tensor:
        result: Tensor = self._network(**dict(zip(self._names, tensors, strict=True)), **self._fixed)[self._output]
        return result


def use_openvino(model: SentenceTransformer, encode: Callable[[list[str]], NDArray[np.float32]]) -> bool:
    """Replace the network of `model` in place. Return whether it stays replaced.

    `encode` returns unit rows of texts, by `model`. A model keeps its own network where OpenVINO cannot run it, or
    where the vectors differ.
    """
    transformer: Transformer = model[0]
    own = getattr(transformer, "model", None)
    if not isinstance(own, nn.Module):
        return False  # it has none, such as a table of words' vectors
    expected = _probed(encode)
    try:
        transformer.model = OpenvinoNetwork(own, _output_of(transformer))
        cosines = (_probed(encode) * expected).sum(axis=1)
        if not (cosines > _LEAST_COSINE).all():  # NaN is not
            raise ValueError(f"its vectors have a cosine of {cosines.min():.4f} to those of torch")
    except Exception as exc:  # OpenVINO's errors have no common base
        reason = textwrap.shorten(str(exc), _REASON_CHARS) or type(exc).__name__
        logger.warning("the encoder runs with torch, as OpenVINO cannot run it: %s", reason)
        transformer.model = own
        return False
    return True


def _probed(encode: Callable[[list[str]], NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([encode(texts) for texts in _PROBES])


def _output_of(transformer: Transformer) -> str:
    """Return the key of the network's result that the model's next part reads. Raises: ValueError."""
    way = transformer.modality_config["text"]
    name = way["method_output_name"]
    names = [name] if isinstance(name, str) else list(name or ())
    if way["method"] != "forward" or len(names) != 1:
        raise ValueError(f"it reads {names} of the network's method {way['method']}")
    return str(names[0])


def _compiled(network: nn.Module, example: Mapping[str, Any], output: str) -> Run:
    """Compile a network for tensors of any (N, T), in the order of `example`, and for as many threads as torch has."""
    # `import openvino` would send an event to Google Analytics. Without this package it has nothing to send it with.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino  # after torch, which is enough for models that it cannot run

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # of several processes all would use the first core
        "CPU_RUNTIME_CACHE_CAPACITY": _MAX_KERNELS,
    }
    tensors = {name: value.clone() for name, value in example.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in example.items() if name not in tensors}
    positional = _Positional(network.eval(), list(tensors), others, output)
    with _quietly(), torch.inference_mode():
        converted = openvino.convert_model(positional, example_input=tuple(tensors.values()))
        compiled: Run = openvino.Core().compile_model(converted, "CPU", settings)
    return compiled


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide warnings of the conversion, and restore the root logger.

    torch warns of decisions that depend on a shape, and transformers of a loss. OpenVINO changes the root logger, and
    leaves it changed after a failure.
    """
    own, root = logging.getLogger("transformers.modeling_utils"), logging.getLogger()
    before = own.disabled, root.level, root.filters[:], root.handlers[:]
    try:
        own.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.disabled, level, root.filters[:], root.handlers[:] = before
        root.setLevel(level)
