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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from lora_store.adapter import ModuleWeights, Shapes
from lora_store.peft_config import EXPERT_PARAMETERS, PeftConfig
from lora_store.safetensors_layout import StoredTensor
from lora_store.tensor_paths import MAX_NAME, WRAPPERS, inner_path, tensor_key

if TYPE_CHECKING:
    from torch import Tensor

GATE_UP, DOWN = EXPERT_PARAMETERS
_KEY = re.compile(
    r"(.+\.experts)(?:((?:\.base_layer)*)|\.(\d{1,4})\.(gate_up_proj|gate_proj|up_proj|down_proj|w[123]))"
    r"\.lora_([AB])(?:\.[A-Za-z0-9_-]+)?\.weight"
)
_LAYER_OF_EXPERT = re.compile(r"\.experts\.\d+\.")
_LAYER = re.compile(r"((?:[^.]+\.)*?\d+)\.(.+)")
# By the name of a single expert's layer: the parameter that it is a part of, and the part's place in it.
_PARTS = {
    **{GATE_UP: (GATE_UP, 0), "gate_proj": (GATE_UP, 0), "up_proj": (GATE_UP, 1), DOWN: (DOWN, 0)},
    **{"w1": (GATE_UP, 0), "w3": (GATE_UP, 1), "w2": (DOWN, 0)},  # Mixtral's names
}
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


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the file. `expert`: None if it stacks all. `depth`: the number of wrappers around it."""

    key: str
    stored: StoredTensor
    depth: int
    expert: int | None
    leaf: str


Pair = dict[str, _Tensor]  # by side, A or B


def read_experts(
    tensors: Mapping[str, StoredTensor], config: PeftConfig, shapes: Shapes | None, max_bytes: int
) -> ExpertTensors:
    """Return the tensors of experts. `shapes`: of the base's modules, if they are known.

    `max_bytes`: of all tensors with the experts that a file leaves out, whose pairs are zeros.
    """
    groups: defaultdict[str, defaultdict[tuple[int, int | None, str], Pair]] = defaultdict(lambda: defaultdict(dict))
    problems: list[str] = []
    keys = set()
    has_layers = shapes is not None and any(map(_LAYER_OF_EXPERT.search, shapes))  # then they are like all others
    for key, stored in tensors.items():
        plain = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        match = _KEY.fullmatch(plain) if len(key) <= MAX_NAME else None
        if match is None or (has_layers and match[3] is not None):
            continue
        keys.add(key)
        expert = None if match[3] is None else int(match[3])
        depth = (match[2] or "").count(".")
        pair = groups[match[1]][depth, expert, match[4] or ""]
        if match[5] in pair and not problems:
            problems.append(f"{pair[match[5]].key[:200]!r} and {key[:200]!r} are the same tensor: keep one of them")
        pair[match[5]] = _Tensor(key, stored, depth, expert, match[4] or "")
    if not keys:
        return ExpertTensors(config, frozenset())
    known = None if shapes is None else _containers(shapes)
    if known is not None and not known:
        reason = (
            f"{min(keys)[:200]!r} changes experts, and this server's base model and engine take no adapters on them:"
            " serve the model with worker.engine 'native', or train with target_modules of attention and dense layers"
        )
        routers = {key for key in tensors if ".gate.lora_" in key}  # PEFT adapts both for target_modules "all-linear"
        return ExpertTensors(config, frozenset(keys | routers), problems=(reason,))
    reader = _Reader(config, shapes, max_bytes)
    for container, group in groups.items():
        try:
            reader.read(container, _find_container(container, known), list(group.values()))
        except ValueError as exc:
            problems.append(f"experts {container[:200]!r}: {exc}")
    single = [key for key in keys if _LAYER_OF_EXPERT.search(key)]
    notes = [f"{len(single)} tensors of single experts read as PEFT's of all: {min(single)[:200]!r}"] if single else []
    return replace(reader.found(), keys=frozenset(keys), problems=tuple(problems), notes=tuple(notes))


class _Reader:
    """Collects the tensors of all layers. `read` raises ValueError for a layer that cannot be read."""

    def __init__(self, config: PeftConfig, shapes: Shapes | None, max_bytes: int) -> None:
        self._config, self._shapes, self._room = config, shapes, max_bytes
        self._tensors: dict[str, StoredTensor] = {}
        self._paths: set[str] = set()
        self._ranks: dict[str, float] = {}
        self._alphas: dict[str, float] = {}
        targets = config.target_parameters
        self._targets = [leaf for leaf in EXPERT_PARAMETERS if any(name.endswith(leaf) for name in targets)]

    def found(self) -> ExpertTensors:
        config = replace(
            self._config,
            rank_pattern=self._config.rank_pattern.preceded_by(self._ranks),
            alpha_pattern=self._config.alpha_pattern.preceded_by(self._alphas),
        )
        return ExpertTensors(config, frozenset(), self._tensors, frozenset(self._paths))

    def read(self, trained: str, container: str, pairs: list[Pair]) -> None:
        """Read one layer's pairs. `trained`, `container`: the path of the experts in the trained model and here."""
        for pair in pairs:
            _check_pair(pair)
        if all(pair["A"].expert is None for pair in pairs):
            for pair, leaf in self._name_stacked(container, pairs):
                self._read_stacked(trained, f"{container}.{leaf}", pair["A"].stored, pair["B"].stored)
        elif any(pair["A"].expert is None for pair in pairs):
            raise ValueError("has tensors of all experts and of single ones: keep one of them")
        else:
            for parameter in EXPERT_PARAMETERS:
                if parts := [pair for pair in pairs if _PARTS[pair["A"].leaf][0] == parameter]:
                    self._read_single(trained, f"{container}.{parameter}", parts)

    def _name_stacked(self, container: str, pairs: list[Pair]) -> Iterator[tuple[Pair, str]]:
        """Yield each pair with its parameter: the one of its shape, or if shapes are not known the one nested so."""
        nested = sorted(pairs, key=lambda pair: pair["A"].depth, reverse=True)  # the innermost first
        for place, pair in enumerate(nested):
            ends = pair["B"].stored.shape[0], pair["A"].stored.shape[1]
            if self._shapes is not None:
                leaves = [leaf for leaf in EXPERT_PARAMETERS if self._shapes[f"{container}.{leaf}"][:2] == ends]
            else:
                leaves = self._targets[place : place + 1] if len(self._targets) == len(nested) else []
            if not leaves or f"{container}.{leaves[0]}" in self._ranks:
                raise ValueError(
                    f"{pair['A'].key[:200]!r} maps {ends[1]} to {ends[0]}, which no parameter of them does"
                )
            yield pair, leaves[0]

    def _read_stacked(self, trained: str, module: str, a: StoredTensor, b: StoredTensor) -> None:
        path = f"{_without_prefix(trained)}.{module.rpartition('.')[2]}"
        rank, rows = self._config.rank_of(path, module), a.shape[0]
        num = self._num_experts(module, math.ceil(rows / rank))
        if rows != num * rank:
            raise ValueError(f"has {rows} rank rows for {num} experts of rank {rank}; they must be {num * rank}")
        stacked_b = b.bits().reshape(b.shape[0], rank, num).transpose(2, 0, 1)
        self._add(module, a.with_bits(a.bits().reshape(num, rank, -1)), b.with_bits(stacked_b))
        self._set(module, {path}, rank, self._config.alpha_of(path, module))

    def _read_single(self, trained: str, module: str, pairs: list[Pair]) -> None:
        """Put the pairs of single experts together. Parts of one parameter are blocks of its B."""
        base = _without_prefix(trained)
        paths = {f"{base}.{pair['A'].expert}.{pair['A'].leaf}" for pair in pairs}
        rank, alpha = pairs[0]["A"].stored.shape[0], self._config.alpha_of(next(iter(paths)))
        places = sorted({_PARTS[pair["A"].leaf][1] for pair in pairs})
        for path in sorted(paths):
            if self._config.rank_of(path) != rank or self._config.alpha_of(path) != alpha:
                raise ValueError("the experts' ranks or alphas differ: train them with one rank and lora_alpha")
        first = pairs[0]["A"].stored, pairs[0]["B"].stored
        if len({(each.stored.shape, each.stored.dtype, side) for pair in pairs for side, each in pair.items()}) > 2:
            raise ValueError("the experts' tensors differ in shape or dtype")
        num = self._num_experts(module, max(int(pair["A"].expert or 0) for pair in pairs) + 1)
        is_whole = any(pair["A"].leaf == GATE_UP for pair in pairs)
        width = first[1].shape[0] * (1 if is_whole or module.endswith(DOWN) else 2)
        a_shape, b_shape = (num, len(places) * rank, first[0].shape[1]), (num, width, len(places) * rank)
        self._room -= math.prod(a_shape) * first[0].bits().itemsize + math.prod(b_shape) * first[1].bits().itemsize
        if self._room < 0:
            raise ValueError("with zeros for the experts that are left out, they exceed admission.max_weights_bytes")
        a, b = np.zeros(a_shape, first[0].bits().dtype), np.zeros(b_shape, first[1].bits().dtype)
        for pair in pairs:
            expert, place = int(pair["A"].expert or 0), _PARTS[pair["A"].leaf][1]
            if expert >= num:
                raise ValueError(f"has expert {expert}, but the base model has {num}")
            rows, out = places.index(place) * rank, place * first[1].shape[0]
            a[expert, rows : rows + rank] = pair["A"].stored.bits()
            b[expert, out : out + first[1].shape[0], rows : rows + rank] = pair["B"].stored.bits()
        self._add(module, first[0].with_bits(a), first[1].with_bits(b))
        growth = math.sqrt(len(places)) if self._config.use_rslora else len(places)
        self._set(module, paths, len(places) * rank, alpha * growth)  # the same scaling with more rank rows

    def _num_experts(self, module: str, otherwise: int) -> int:
        return otherwise if self._shapes is None else self._shapes[module][2]

    def _add(self, module: str, a: StoredTensor, b: StoredTensor) -> None:
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
        if leaf == GATE_UP and f"{container}.{DOWN}" in names:
            container += ".base_layer"
        num_out = weights[name].lora_b.shape[1]
        tensors[tensor_key(container, "A")] = weights[name].lora_a.flatten(0, 1)
        tensors[tensor_key(container, "B")] = weights[name].lora_b.permute(1, 2, 0).reshape(num_out, -1)
    return tensors, names


def _check_pair(pair: Pair) -> None:
    """Raise ValueError unless there are two matrices of one rank."""
    if len(pair) < 2:
        side, other = ("A", "B") if "A" in pair else ("B", "A")
        raise ValueError(f"{pair[side].key[:200]!r} has no lora_{other}")
    a, b = pair["A"].stored.shape, pair["B"].stored.shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise ValueError(f"{pair['A'].key[:200]!r} has lora_A {a} and lora_B {b}; they must be (rank, in), (out, rank)")


def _containers(shapes: Shapes) -> dict[str, str | None]:
    """Return the path of each layer's experts by the layer's path, None where a layer has several."""
    found: dict[str, str | None] = {}
    for container in {name.rpartition(".")[0] for name, shape in shapes.items() if len(shape) > 2}:
        layer = _layer_of(container)[0]
        found[layer] = None if layer in found else container
    return found


def _find_container(trained: str, known: Mapping[str, str | None] | None) -> str:
    """Return the path of the base's experts. Raises: ValueError if it has none there."""
    if known is None:
        return _without_prefix(trained)
    layer, rest = _layer_of(trained)
    container = known.get(layer)
    if container is None or (rest != _layer_of(container)[1] and rest.removesuffix(".experts") not in _BLOCKS):
        raise ValueError("are no experts of the base model that can be adapted")
    return container


def _layer_of(container: str) -> tuple[str, str]:
    """Return the path of the layer, without what surrounds all layers, and the rest of the path."""
    match = _LAYER.fullmatch(inner_path(container.split(".")))
    return (match[1], match[2]) if match else (container, "")


def _without_prefix(trained: str) -> str:
    return trained.rpartition("base_model.model.")[2]
