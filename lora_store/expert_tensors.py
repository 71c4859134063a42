"""Read and write PEFT's tensors of fused experts: one pair of matrices for each expert of a parameter.

PEFT stacks the pairs of all experts: `lora_A` (E · R, I) with rank varying fastest, `lora_B` (O, R · E) with the expert
varying fastest. It wraps a module's parameters one in the other, so names do not say which parameter is meant: the
innermost wrapper (`experts.base_layer`) is that of the parameter that is declared first. Older models have a linear
layer for each expert (`experts.3.gate_proj`). Both spellings are read as the same pairs.
Dims: E experts, R rank, I in, O out.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_store.adapter import ModuleWeights, Shapes
from lora_store.peft_config import EXPERT_PARAMETERS, PeftConfig
from lora_store.safetensors_layout import StoredTensor
from lora_store.tensor_paths import MAX_NAME, MOST_ADDED, WRAPPERS, inner_path, tensor_key

if TYPE_CHECKING:
    from torch import Tensor

_GATE_UP, _DOWN = EXPERT_PARAMETERS
_KEY = re.compile(
    r"(.+\.experts)(?:((?:\.base_layer)*)|\.(\d{1,4})\.(gate_up_proj|gate_proj|up_proj|down_proj|w[123]))"
    r"\.lora_([AB])(?:\.[A-Za-z0-9_-]+)?\.weight"
)
_LAYER_OF_EXPERT = re.compile(r"\.experts\.\d+\.")
_LAYER = re.compile(r"((?:[^.]+\.)*?\d+)\.(.+)")
# By the name of a single expert's layer: the parameter that it is a part of, and the part's place in it.
_PARTS = {
    **{_GATE_UP: (_GATE_UP, 0), "gate_proj": (_GATE_UP, 0), "up_proj": (_GATE_UP, 1), _DOWN: (_DOWN, 0)},
    **{"w1": (_GATE_UP, 0), "w3": (_GATE_UP, 1), "w2": (_DOWN, 0)},  # Mixtral's names
}
_MOST_MATCHES = 100_000  # patterns times paths of single experts' layers; a crafted pattern takes 0.5 ms for a path
_BLOCKS = {"mlp", "block_sparse_moe", "feed_forward", "moe"}  # families' names for what holds the experts


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """An adapter's tensors of experts under the names of the base's parameters, each with a first dimension E.

    `keys`: the file's names of all that were read or refused. `config`: with the ranks and alphas of these modules.
    """

    config: PeftConfig
    keys: frozenset[str]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)  # by PEFT's name of a tensor, as if it were a layer
    paths: frozenset[str] = frozenset()  # in the model that was trained
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what the publisher should know


class _Pair(NamedTuple):
    """A pair of the file. `depth`: wrappers around it. `expert`, `leaf`: None if it stacks all experts."""

    depth: int
    expert: int | None
    leaf: str | None
    key: str
    a: StoredTensor
    b: StoredTensor


def read_experts(
    tensors: Mapping[str, StoredTensor], config: PeftConfig, shapes: Shapes | None, max_bytes: int
) -> ExpertTensors:
    """Return the tensors of experts. `shapes`: of the base's modules, if they are known.

    `max_bytes`: of all tensors with the experts that a file leaves out, whose pairs are zeros.
    """
    groups: defaultdict[str, dict[tuple[int, int | None, str | None], dict[str, str]]] = defaultdict(dict)
    problems: list[str] = []
    keys = set()
    has_layers = shapes is not None and any(map(_LAYER_OF_EXPERT.search, shapes))  # then they are like all others
    for key in tensors:
        plain = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        match = _KEY.fullmatch(plain) if len(key) <= MAX_NAME else None
        if match is None or (has_layers and match[3] is not None):
            continue
        keys.add(key)
        pair = match[2].count(".") if match[2] else 0, None if match[3] is None else int(match[3]), match[4]
        other = groups[match[1]].setdefault(pair, {}).setdefault(match[5], key)
        if other != key and not problems:
            problems.append(f"{other[:200]!r} and {key[:200]!r} are the same tensor: keep one of them")
    if not keys:
        return ExpertTensors(config, frozenset())
    known = None if shapes is None else _containers(shapes)
    if known is not None and not known:
        reason = (
            f"{min(keys)[:200]!r} changes experts, and this server's base model and engine take no adapters on them:"
            " train with target_modules of attention and dense layers, or set worker.enforce_eager to true if the"
            " vLLM engine runs on a GPU, or use worker.engine 'native'"
        )
        routers = {key for key in tensors if ".gate.lora_" in key}  # PEFT adapts both for target_modules "all-linear"
        return ExpertTensors(config, frozenset(keys | routers), problems=(reason,))
    reader = _Reader(config, shapes, max_bytes)
    for container, group in groups.items():
        try:
            pairs = [_Pair(*place, **_sides(keys_of, tensors)) for place, keys_of in group.items()]
            reader.read(container, _find_container(container, known), pairs)
        except ValueError as exc:
            problems.append(f"experts {container[:200]!r}: {exc}")
    single = [key for key in keys if _LAYER_OF_EXPERT.search(key)]
    notes = [f"{len(single)} tensors of single experts read as PEFT's of all: {min(single)[:200]!r}"] if single else []
    return replace(reader.found(), keys=frozenset(keys), problems=tuple(problems), notes=tuple(notes))


class _Reader:
    """Collects the tensors of all layers. `read` raises ValueError for a layer that cannot be read."""

    def __init__(self, config: PeftConfig, shapes: Shapes | None, max_bytes: int) -> None:
        self._config, self._shapes, self._room = config, shapes, max_bytes
        self._num_patterns, self._matches_left = len(config.rank_pattern) + len(config.alpha_pattern), _MOST_MATCHES
        self._tensors: dict[str, StoredTensor] = {}
        self._paths: set[str] = set()
        self._ranks: dict[str, float] = {}
        self._alphas: dict[str, float] = {}

    def found(self) -> ExpertTensors:
        config = replace(
            self._config,
            rank_pattern=self._config.rank_pattern.preceded_by(self._ranks),
            alpha_pattern=self._config.alpha_pattern.preceded_by(self._alphas),
        )
        return ExpertTensors(config, frozenset(), self._tensors, frozenset(self._paths))

    def read(self, trained: str, container: str, pairs: Sequence[_Pair]) -> None:
        """Read one layer's pairs. `trained`, `container`: the path of the experts in the trained model and here."""
        stacked = [pair for pair in pairs if pair.leaf is None]
        if stacked and len(stacked) < len(pairs):
            raise ValueError("has tensors of all experts and of single ones: keep one of them")
        for pair, leaf in self._name_stacked(container, stacked):
            self._read_stacked(trained, f"{container}.{leaf}", pair.a, pair.b)
        for parameter in EXPERT_PARAMETERS:
            if parts := [pair for pair in pairs if pair.leaf and _PARTS[pair.leaf][0] == parameter]:
                self._read_single(trained, f"{container}.{parameter}", parts)

    def _name_stacked(self, container: str, pairs: Sequence[_Pair]) -> Iterator[tuple[_Pair, str]]:
        """Yield each pair with its parameter: the one of its shape, or if shapes are not known the one nested so."""
        nested = sorted(pairs, key=lambda pair: pair.depth, reverse=True)  # the innermost first
        targets = [leaf for leaf in EXPERT_PARAMETERS if self._config.targets_parameter(f"{container}.{leaf}")]
        for place, pair in enumerate(nested):
            ends = pair.b.shape[0], pair.a.shape[1]
            if self._shapes is not None:
                leaves = [leaf for leaf in EXPERT_PARAMETERS if self._shapes[f"{container}.{leaf}"][:2] == ends]
            else:
                leaves = targets[place : place + 1] if len(targets) == len(nested) else []
            if not leaves or f"{container}.{leaves[0]}" in self._ranks:
                raise ValueError(f"{pair.key[:200]!r} maps {ends[1]} to {ends[0]}, which no parameter of them does")
            yield pair, leaves[0]

    def _read_stacked(self, trained: str, module: str, a: StoredTensor, b: StoredTensor) -> None:
        path = f"{_without_prefix(trained)}.{module.rpartition('.')[2]}"
        rank, rows = self._config.find_rank(path, module), a.shape[0]
        num = self._num_experts(module, math.ceil(rows / rank))
        if rows != num * rank:
            raise ValueError(f"has {rows} rank rows for {num} experts of rank {rank}; they must be {num * rank}")
        stacked_b = b.bits().reshape(b.shape[0], rank, num).transpose(2, 0, 1)
        self._add(module, a.with_bits(a.bits().reshape(num, rank, -1)), b.with_bits(stacked_b))
        self._set(module, {path}, rank, self._config.find_alpha(path, module))

    def _read_single(self, trained: str, module: str, pairs: Sequence[_Pair]) -> None:
        """Put the pairs of single experts together. Parts of one parameter are blocks of its B.

        The rank rows of both parts alternate, whatever the file has of them: a fusion adds adapters by rank row, so the
        rows of one part must have the same places in all of them.
        """
        base, a, b = _without_prefix(trained), pairs[0].a, pairs[0].b
        paths = {f"{base}.{pair.expert}.{pair.leaf}" for pair in pairs}
        self._matches_left -= len(paths) * self._num_patterns
        if self._matches_left < 0:
            raise ValueError("rank_pattern and alpha_pattern have too many entries for this many single experts")
        rank, alphas = a.shape[0], {self._config.find_alpha(path) for path in paths}
        if len(alphas) > 1 or {self._config.find_rank(path) for path in paths} != {rank}:
            raise ValueError("the experts' ranks or alphas differ: train them with one rank and lora_alpha")
        if len({(pair.a.shape, pair.a.dtype, pair.b.shape, pair.b.dtype) for pair in pairs}) > 1:
            raise ValueError("the experts' tensors differ in shape or dtype")
        cells = [(pair.expert or 0, _PARTS[pair.leaf or ""][1], pair) for pair in pairs]
        last = max(expert for expert, *_ in cells)
        num, num_out = self._num_experts(module, last + 1), b.shape[0]
        if last >= num:
            raise ValueError(f"has expert {last}, but the base model has {num}")
        num_parts = 1 if module.endswith(_DOWN) or any(pair.leaf == _GATE_UP for pair in pairs) else 2
        if len({cell[:2] for cell in cells}) < len(cells) or any(part >= num_parts for _, part, _ in cells):
            raise ValueError("an expert has the same part under two names, such as w1 and gate_proj")
        a_shape, b_shape = (num, num_parts * rank, a.shape[1]), (num, num_parts * num_out, num_parts * rank)
        self._room -= math.prod(a_shape) * a.bits().itemsize + math.prod(b_shape) * b.bits().itemsize
        if self._room < 0:
            raise ValueError("with zeros for the experts that are left out, they exceed admission.max_weights_bytes")
        all_a, all_b = np.zeros(a_shape, a.bits().dtype), np.zeros(b_shape, b.bits().dtype)
        for expert, part, pair in cells:
            all_a[expert, part::num_parts] = pair.a.bits()
            all_b[expert, part * num_out : (part + 1) * num_out, part::num_parts] = pair.b.bits()
        self._add(module, a.with_bits(all_a), b.with_bits(all_b))
        growth = math.sqrt(num_parts) if self._config.use_rslora else num_parts
        self._set(module, paths, num_parts * rank, alphas.pop() * growth)  # the same scaling with more rank rows

    def _num_experts(self, module: str, otherwise: int) -> int:
        return otherwise if self._shapes is None else self._shapes[module][2]

    def _add(self, module: str, a: StoredTensor, b: StoredTensor) -> None:
        if module in self._ranks:
            raise ValueError("are also in the file under another path: keep one of them")
        self._tensors |= {tensor_key(module, "A"): a, tensor_key(module, "B"): b}

    def _set(self, module: str, paths: set[str], rank: int, alpha: float) -> None:
        self._paths |= paths
        self._ranks[module], self._alphas[module] = rank, alpha


def split_experts(weights: Mapping[str, ModuleWeights]) -> tuple[dict[str, Tensor], list[str]]:
    """Return PEFT's tensors of the modules that are experts, and the modules' names."""
    names = [name for name, module in weights.items() if module.lora_a.ndim > 2]
    tensors = {}
    for name in names:
        container, _, leaf = name.rpartition(".")
        if leaf == _GATE_UP and f"{container}.{_DOWN}" in names:
            container += ".base_layer"
        num_out = weights[name].lora_b.shape[1]
        tensors[tensor_key(container, "A")] = weights[name].lora_a.flatten(0, 1)
        tensors[tensor_key(container, "B")] = weights[name].lora_b.permute(1, 2, 0).reshape(num_out, -1)
    return tensors, names


def _sides(keys: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Return a pair's tensors, and the name of one. Raises: ValueError unless there are two matrices of one rank."""
    key = keys.get("A") or keys["B"]
    if len(keys) < 2:
        raise ValueError(f"{key[:200]!r} has no lora_{'B' if 'A' in keys else 'A'}")
    a, b = tensors[keys["A"]], tensors[keys["B"]]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise ValueError(
            f"{key[:200]!r} has lora_A {a.shape} and lora_B {b.shape}; they must be (rank, in), (out, rank)"
        )
    return {"key": key, "a": a, "b": b}


def _containers(shapes: Shapes) -> dict[str, str | None]:
    """Return the path of each layer's experts by the layer's path, None where a layer has several."""
    found: dict[str, str | None] = {}
    for container in {name.rpartition(".")[0] for name, shape in shapes.items() if len(shape) > 2}:
        layer = _split_layer(container)[0]
        found[layer] = None if layer in found else container
    return found


def _find_container(trained: str, known: Mapping[str, str | None] | None) -> str:
    """Return the path of the base's experts. Raises: ValueError if it has none there."""
    if known is None:
        return _without_prefix(trained)
    layer, rest = _split_layer(trained)
    container = known.get(layer)
    if container is not None and len(_without_prefix(trained)) > len(container) + MOST_ADDED:
        container = None
    if container is None or (rest != _split_layer(container)[1] and rest.removesuffix(".experts") not in _BLOCKS):
        raise ValueError("are no experts of the base model that can be adapted")
    return container


def _split_layer(container: str) -> tuple[str, str]:
    """Return the path of the layer, without what surrounds all layers, and the rest of the path."""
    match = _LAYER.fullmatch(inner_path(container.split(".")))
    return (match[1], match[2]) if match else (container, "")


def _without_prefix(trained: str) -> str:
    return trained.rpartition("base_model.model.")[2]
