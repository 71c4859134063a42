"""Run an encoder's network with OpenVINO on the CPU: about 0.7 of torch's time with the same products.

OpenVINO multiplies bfloat16 numbers where the processor can, and float32 numbers elsewhere or where it is to be exact.
The tokenizer, pooling and normalisation stay those of sentence-transformers, in float32. The vectors have a cosine of
about 0.99997 to those of torch in float32, so both may be in one index.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retriever_svc.saved_network import Run, Vectors, check, compiled, import_openvino, probed, save_network, short

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

logger = logging.getLogger(__name__)


class OpenvinoNetwork(nn.Module):
    """Takes the place of the network in a sentence-transformers model. Use it from one thread at a time."""

    def __init__(self, network: nn.Module, output: str, *, is_exact: bool) -> None:
        """Convert `network` at the first call. `output`: the key of its result that the model's next part reads."""
        super().__init__()
        self.config = network.config  # sentence-transformers reads it
        self._output, self.names, self._is_exact = output, list[str](), is_exact
        self._source: nn.Module | None = network  # until it is converted
        self.converted: Any = None  # OpenVINO's network before its compilation
        self.run: Run | None = None

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """Return {output: (N, T, D)} for tensors (N, T). Other arguments keep the values of the first call."""
        if self._source is not None:
            self.names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
            self.converted = _converted(self._source, inputs, self._output)
            self.run = compiled(self.converted, torch.get_num_threads(), is_exact=self._is_exact)
            self._source = None
        assert self.run is not None
        [rows] = self.run([inputs[name].numpy() for name in self.names]).values()
        return {self._output: torch.from_numpy(rows)}


class _Positional(nn.Module):
    """A network with positional arguments and one result, as the conversion wants it."""

    def __init__(self, network: nn.Module, names: list[str], fixed: Mapping[str, Any], output: str) -> None:
        super().__init__()
        self._network, self._names, self._fixed, self._output = network, names, fixed, output

    def forward(self, *tensors: Tensor) -> Tensor:
        result: Tensor = self._network(**dict(zip(self._names, tensors, strict=True)), **self._fixed)[self._output]
        return result


def use_openvino(
    model: SentenceTransformer,
    encode: Callable[[list[str]], Vectors],
    saves: tuple[Path, str] | None = None,
    *,
    is_exact: bool = False,
) -> bool:
    """Replace the network of `model` in place. Return whether it stays replaced.

    `encode` returns unit rows of texts, by `model`. A model keeps its own network where OpenVINO cannot run it, or
    where the vectors differ. `saves`: place and source for `save_network`; None saves nothing. `is_exact`: as in
    `compiled`.
    """
    transformer: Transformer = model[0]
    own = getattr(transformer, "model", None)
    if not isinstance(own, nn.Module):
        return False  # it has none, such as a table of words' vectors
    expected = probed(encode)
    try:
        transformer.model = network = OpenvinoNetwork(own, _find_output(transformer), is_exact=is_exact)
        check(probed(encode), expected)
    except Exception as exc:  # OpenVINO's errors have no common base
        logger.warning("the encoder runs with torch, as OpenVINO cannot run it: %s", short(exc))
        transformer.model = own
        return False
    if saves is not None:
        facts = {
            "prompts": dict(model.prompts),
            "max_seq_length": model.max_seq_length,
            "dim": model.get_embedding_dimension(),
            "names": network.names,
            "pad": model.tokenizer.pad_token_id,
        }
        save_network(*saves, network.converted, model.tokenizer.backend_tokenizer, facts, expected)
    network.converted = None
    return True


def _find_output(transformer: Transformer) -> str:
    """Return the key of the network's result that the model's next part reads. Raises: ValueError."""
    way = transformer.modality_config["text"]
    name = way["method_output_name"]
    names = [name] if isinstance(name, str) else list(name or ())
    if way["method"] != "forward" or len(names) != 1:
        raise ValueError(f"it reads {names} of the network's method {way['method']}")
    return str(names[0])


def _converted(network: nn.Module, example: Mapping[str, Any], output: str) -> Any:
    """Return OpenVINO's network for tensors of any (N, T), in the order of `example`."""
    tensors = {name: value.clone() for name, value in example.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in example.items() if name not in tensors}
    positional = _Positional(network.eval(), list(tensors), others, output)
    with _quietly(), torch.inference_mode():
        return import_openvino().convert_model(positional, example_input=tuple(tensors.values()))


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
