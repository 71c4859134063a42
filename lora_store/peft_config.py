"""Read PEFT's `adapter_config.json`: rank and scaling per module, and every setting beyond plain LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lora_store.bounded_files import Limits, read_json
from lora_store.errors import FileRefused

CONFIG_FILE = "adapter_config.json"

_DEFAULT_RANK = 8  # LoraConfig's own default, for a config without the key
_DEFAULT_ALPHA = 8
_MAX_ALPHA = 10**9

# Settings beyond rank and scaling that do not change what the adapter computes.
_HARMLESS = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "runtime_config"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # how training began
        *("velora_config", "monteclora_config"),  # how gradients were computed, and noise during training
        *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),  # act only with others
    }
)
_READ = frozenset(
    {
        *("base_model_name_or_path", "peft_type", "bias", "init_lora_weights"),
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    }
)
_VARIANTS = {
    "use_dora": "DoRA",
    "modules_to_save": "fully trained modules",
    "lora_bias": "LoRA biases",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA, which changes the base model's weights",
    "arrow_config": "Arrow routing",
}
_APPROXIMATE = "let PEFT's save_as_lora approximate this one"
# These initialisations rewrite the base model's weights, so the adapter alone does not hold all of the training.
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MAX_PATTERN_LEN = 256
_MAX_MODULE_LEN = 256
_MAX_REPEATS = 2
_MAX_GROUPS = 2
# Of |: one fewer than the alternatives that it separates. The latter between plain words beside at most one repeat.
_MAX_ALTERNATIVES, _MAX_WORDS = 8, 64
_MAX_TABLE_REPEATS = 64
_MAX_TABLE_ALTERNATIVES = 256
_REPEAT = re.compile(r"[*+?{]")
_WORDS = re.compile(r"(?<!\\)\(((?:\w|\\\.)+(?:\|(?:\w|\\\.)+)+)\)")  # a group whose alternatives are plain words
_DANGEROUS = re.compile(r"\)[*+?{]|\(\?|\\[0-9]")  # a repeated group, look-around or flags, a back-reference


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The parsed `adapter_config.json`. `unsupported` lists every setting that asks for more than plain LoRA.

    The settings of another kind of adapter (`is_lora` is false) are not read.
    """

    base_model: str | None
    rank: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: PatternTable
    alpha_pattern: PatternTable
    unsupported: tuple[str, ...]
    is_lora: bool = True
    target_parameters: frozenset[str] = frozenset()

    def is_bare_parameter(self, module: str) -> bool:
        """Return whether the module was adapted as a bare parameter, whose path is then what patterns match."""
        return self.targets_parameter(f"{module}.weight")

    def targets_parameter(self, path: str) -> bool:
        """Return whether `target_parameters` has the path, or its end after a dot."""
        parts = path.split(".")
        return any(".".join(parts[start:]) in self.target_parameters for start in range(len(parts)))

    def find_rank(self, *paths: str) -> int:
        """Return the module's rank. `paths`: what the module is called, in the model that was trained and here."""
        return int(self.rank_pattern.get(paths, self.rank))

    def find_alpha(self, *paths: str) -> float:
        """Return the module's lora_alpha. `paths`: as for `rank_of`."""
        return self.alpha_pattern.get(paths, self.lora_alpha)

    def find_scaling(self, rank: int, *paths: str) -> float:
        """Return lora_alpha / rank, or lora_alpha / sqrt(rank) for rsLoRA. `paths`: as for `rank_of`."""
        return self.find_alpha(*paths) / (math.sqrt(rank) if self.use_rslora else rank)


def read_base_model(folder: Path, limits: Limits) -> str | None:
    """Return the base model that the folder's config names, None if it names none or cannot be read."""
    try:
        return read_config(folder, limits).base_model
    except FileRefused:
        return None


def read_config(folder: Path, limits: Limits) -> PeftConfig:
    """Parse the config. Raises: FileRefused, which lists every setting of a wrong type."""
    raw = read_json(folder / CONFIG_FILE, limits.max_config_bytes)
    if "peft_type" not in raw and isinstance(raw.get("lora_parameters"), dict):
        raw = _from_mlx(raw)
    if (kind := raw.get("peft_type")) != "LORA":
        return _of_another_kind(raw.get("base_model_name_or_path"), kind)
    tables = {key: raw.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    problems = _type_problems(raw) + _table_problems(tables, limits)
    if problems:
        raise FileRefused(CONFIG_FILE, problems)
    return PeftConfig(
        base_model=(raw.get("base_model_name_or_path") or "").rstrip("/") or None,
        rank=raw.get("r", _DEFAULT_RANK),
        lora_alpha=raw.get("lora_alpha", _DEFAULT_ALPHA),
        use_rslora=raw.get("use_rslora", False),
        rank_pattern=PatternTable(tables["rank_pattern"]),
        alpha_pattern=PatternTable(tables["alpha_pattern"]),
        unsupported=tuple(_unsupported(raw)),
        target_parameters=frozenset(_names(raw.get("target_parameters") or [])),
    )


def _from_mlx(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of MLX's own config under PEFT's names. MLX adds scale · x A B.

    Raises: FileRefused for DoRA, full training, and old versions' configs, whose scale is multiplied by alpha / rank.
    """
    parameters, kind = raw["lora_parameters"], raw.get("fine_tune_type", "lora")
    rank, scale = parameters.get("rank"), parameters.get("scale")
    problems = []
    if kind != "lora":
        problems.append(f"fine_tune_type must be 'lora', got {_short(kind)}: train with MLX's --fine-tune-type lora")
    if "alpha" in parameters:
        problems.append("lora_parameters has alpha, as old versions of MLX wrote it: train with a newer one")
    if not _is_rank(rank) or rank > _MAX_ALPHA:  # a larger one may be no float
        problems.append(f"lora_parameters.rank must be a whole number from 1 to {_MAX_ALPHA}, got {_short(rank)}")
    if not _is_alpha(scale):
        problems.append(f"lora_parameters.scale must be a number other than 0, got {_short(scale)}")
    if problems:
        raise FileRefused(CONFIG_FILE, problems)
    base_model = raw.get("base_model_name_or_path", raw.get("model"))
    return {"peft_type": "LORA", "base_model_name_or_path": base_model, "r": rank, "lora_alpha": scale * rank}


def _of_another_kind(base_model: object, kind: object) -> PeftConfig:
    reason = f"peft_type must be 'LORA', got {_short(kind)}: train a LoRA adapter, or {_APPROXIMATE}"
    patterns = PatternTable({})
    named = base_model if isinstance(base_model, str) else None
    return PeftConfig(named, _DEFAULT_RANK, _DEFAULT_ALPHA, False, patterns, patterns, (reason,), is_lora=False)


def _type_problems(raw: Mapping[str, Any]) -> list[str]:
    base_model, rank = raw.get("base_model_name_or_path"), raw.get("r", _DEFAULT_RANK)
    alpha, rslora = raw.get("lora_alpha", _DEFAULT_ALPHA), raw.get("use_rslora", False)
    checks = [
        (base_model is None or isinstance(base_model, str), "base_model_name_or_path", "a string", base_model),
        (_is_rank(rank), "r", "a whole number above 0", rank),
        (_is_alpha(alpha), "lora_alpha", f"a number other than 0, at most {_MAX_ALPHA}", alpha),
        (isinstance(rslora, bool), "use_rslora", "true or false", rslora),
    ]
    return [f"{key} must be {wanted}, got {_short(got)}" for good, key, wanted, got in checks if not good]


def _table_problems(tables: Mapping[str, Any], limits: Limits) -> list[str]:
    problems = []
    for key, wanted, is_value in (
        ("rank_pattern", "a whole number above 0", _is_rank),
        ("alpha_pattern", f"a number other than 0, at most {_MAX_ALPHA}", _is_alpha),
    ):
        table = tables[key]
        if not isinstance(table, dict):
            problems.append(f"{key} must be an object, got {_short(table)}")
            continue
        problems += [f"{key} {problem}" for problem in pattern_problems(table, limits.max_patterns)]
        bad = [pattern for pattern, value in table.items() if not is_value(value)]
        problems += [f"{key} of {pattern[:100]!r} must be {wanted}, got {_short(table[pattern])}" for pattern in bad]
    return problems


def _unsupported(raw: Mapping[str, Any]) -> list[str]:
    found = []
    if raw.get("bias", "none") != "none":
        found.append(f"bias must be 'none', got {_short(raw['bias'])}")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        found.append(
            f"init_lora_weights {_short(init)} changes the base model's weights: convert the adapter to plain LoRA with"
            " PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key, value in raw.items():
        if value and key in _VARIANTS:
            approximate = f", or {_APPROXIMATE}" if key == "use_dora" else ""
            found.append(f"{key} ({_VARIANTS[key]}) is not supported: train LoRA on linear layers only{approximate}")
        elif value and key == "target_parameters":
            if others := sorted(name for name in _names(value) if not name.endswith((*EXPERT_PARAMETERS, ".weight"))):
                found.append(
                    f"target_parameters has {_short(others[0])}: only the parameters of fused experts"
                    f" ({', '.join(EXPERT_PARAMETERS)}) and the weight of a router or a linear layer can be adapted"
                )
        elif value and key not in _HARMLESS | _READ:
            found.append(
                f"{CONFIG_FILE} sets {_short(key)}, which this version does not know: upgrade the server, or remove the"
                " setting if it does not change the adapter"
            )
    return found


def _names(value: object) -> list[str]:
    """Return a JSON list's strings, or the value as the only one."""
    return [str(name) for name in value] if isinstance(value, list) else [str(value)]


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) <= _MAX_ALPHA


def _short(value: object) -> str:
    return repr(value)[:100] if isinstance(value, str | int | float | None) else f"a JSON {type(value).__name__}"


class PatternTable:
    """Values by pattern. The first pattern in file order that matches a module's path, or its end after a dot, wins."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = dict(values)
        self._compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in self._values.items()]

    def __len__(self) -> int:
        return len(self._values)

    def get(self, paths: Collection[str], default: float) -> float:
        """Return the value of the first pattern that matches the first path that any matches, or `default`."""
        for path in paths:
            if len(path) > _MAX_MODULE_LEN:  # limits the time per pattern; no real module path is this long
                continue
            for pattern, value in self._compiled:
                if pattern.match(path):
                    return value
            if path in self._values:
                return self._values[path]
        return default

    def preceded_by(self, values: Mapping[str, float]) -> PatternTable:
        """Return the table with the values of whole paths before all others."""
        return PatternTable({"^" + re.escape(path): value for path, value in values.items()} | self._values)

    def without_match(self, paths: Collection[str]) -> list[str]:
        """Return the patterns that match none of the paths."""
        known = [path for path in paths if len(path) <= _MAX_MODULE_LEN]
        tables = zip(self._values, self._compiled, strict=True)
        return [name for name, (compiled, _) in tables if name not in known and not any(map(compiled.match, known))]


def pattern_problems(patterns: Mapping[str, object], max_patterns: int) -> list[str]:
    """Return the reasons why these patterns cannot be compiled or matched in bounded time."""
    if len(patterns) > max_patterns:
        return [f"has {len(patterns)} patterns, at most {max_patterns}"]
    if sum(len(_REPEAT.findall(pattern)) for pattern in patterns) > _MAX_TABLE_REPEATS:
        return [f"uses * + ? {{ more than {_MAX_TABLE_REPEATS} times in all its patterns together"]
    if sum(pattern.count("|") for pattern in patterns) > _MAX_TABLE_ALTERNATIVES:
        return [f"uses | more than {_MAX_TABLE_ALTERNATIVES} times in all its patterns together"]
    return [f"pattern {pattern[:100]!r} {problem}" for pattern in patterns if (problem := _problem(pattern))]


def _problem(pattern: str) -> str | None:
    if len(pattern) > _MAX_PATTERN_LEN:
        return f"has {len(pattern)} characters, at most {_MAX_PATTERN_LEN}"
    num_repeats = len(_REPEAT.findall(pattern))
    has_words = num_repeats < 2 and not _multiplies_matches(pattern, _has_prefix_beside_numbers)
    too_many = num_repeats > _MAX_REPEATS or pattern.count("(") > _MAX_GROUPS
    if too_many or pattern.count("|") > (_MAX_WORDS if has_words else _MAX_ALTERNATIVES) or _DANGEROUS.search(pattern):
        return (
            f"is too complex: at most {_MAX_REPEATS} of * + ? {{, at most {_MAX_GROUPS} groups, at most"
            f" {_MAX_ALTERNATIVES} of |, or {_MAX_WORDS} between plain words beside one of * + ? {{, no repeated group"
        )
    if num_repeats > 1 and _multiplies_matches(pattern, _has_prefix):
        return (
            "is too complex: beside two of * + ? {, | may only separate plain words in a group, none of which begins"
            " another"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as exc:  # the latter for a number of repeats that is too large
        return f"is not a valid regular expression: {exc}"
    return None


def _multiplies_matches(pattern: str, match_together: Callable[[list[str]], bool]) -> bool:
    """Return whether many alternatives of a group may match at one place, so that what follows is tried for each.

    `match_together`: whether plain words may.
    """
    rest = _WORDS.sub(lambda group: group[0] if match_together(group[1].split("|")) else "", pattern)
    return "(" in rest and "|" in rest


def _has_prefix_beside_numbers(words: list[str]) -> bool:
    """Return whether one of the words is there twice or begins another. Numbers of layers may begin others."""
    others = [word for word in words if not word.isdecimal() or len(word) > 3]
    return len({*words}) < len(words) or _has_prefix(others)


def _has_prefix(words: list[str]) -> bool:
    """Return whether one of the words begins another, or is one twice."""
    return any(word.startswith(before) for before, word in pairwise(sorted(words)))
