"""The base model as clients and publishers meet it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from gpu_worker.config import PACKAGED_ALIASES, PACKAGED_MODEL
from gpu_worker.front.request.model_files import (
    chat_templates_of_files,
    read_chat_template,
    sampling_defaults_of_files,
    template_of_files,
)
from lora_store.peft_files import template_digest
from retriever_svc import ServedBases


@dataclass(frozen=True)
class ServedModel:
    """The base model under its name, with what a request to it may ask for. Made once from the settings.

    `accepted_names`: every `base_model_name_or_path` that an adapter may have: names, and the path of the base model's
    folder. Properties that read the model's files read them once.
    """

    name: str
    base: str  # the packaged default, a Hugging Face id, a folder, or a GGUF file
    accepted_names: frozenset[str]
    template: Literal["auto", "alpaca", "chat"] = "auto"
    chat_template: Path | None = None
    has_own_defaults: bool = False  # whether the base model's files may give sampling parameters
    given_defaults: Mapping[str, float] | None = None  # the operator's, which override those of the files
    max_model_len: int = 2048
    max_new_tokens: int = 8192
    max_request_s: float = 600

    @cached_property
    def template_in_use(self) -> str:
        """The template of chats: `alpaca` or `chat`, or `auto` where the model's files are not on this machine."""
        if self.template != "auto":
            return self.template
        if self.chat_template is not None:
            return "chat"
        return "alpaca" if self.base == PACKAGED_MODEL else template_of_files(self.base)

    @cached_property
    def known_templates(self) -> dict[str, str] | None:
        """The template `chat` by the digests of its files: the operator's, and the base model's own.

        None where the base model's files are not on this machine, so that an adapter's file cannot be compared.
        """
        own = () if self.base == PACKAGED_MODEL else chat_templates_of_files(self.base)
        if own is None:
            return None
        named = () if self.chat_template is None else (read_chat_template(self.chat_template),)
        return {template_digest(source): "chat" for source in (*named, *own)}

    @cached_property
    def sampling_defaults(self) -> dict[str, float]:
        """The values for what a request leaves unset, by name: the operator's, then the base model's if it is here."""
        own = sampling_defaults_of_files(self.base) if self.has_own_defaults else {}
        return own | dict(self.given_defaults or {})


@dataclass(frozen=True)
class ServedModels:
    """All served base models. The first one answers where no adapter fits."""

    models: tuple[ServedModel, ...]

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self.models)

    @cached_property
    def first(self) -> ServedModel:
        return self.models[0]

    @cached_property
    def are_several(self) -> bool:
        return len(self.models) > 1

    @cached_property
    def bases(self) -> ServedBases:
        """The base models whose adapters are served: those that publishing accepts."""
        return ServedBases({model.name: model.accepted_names for model in self.models})

    @cached_property
    def accepted_names(self) -> frozenset[str]:
        """Every name that an adapter may have for one of them."""
        return frozenset().union(*[model.accepted_names for model in self.models])

    @cached_property
    def widest(self) -> ServedModel:
        """The one with the longest context, which bounds requests whose base model is not known yet."""
        return max(self.models, key=lambda model: model.max_model_len)

    @cached_property
    def by_name(self) -> dict[str, ServedModel]:
        """The base models by the names that plans have; the first also by ""."""
        return {"": self.first, **{model.name: model for model in self.models}}

    def limiting(self, model: str) -> ServedModel:
        """Return the base model whose limits hold for a request's `model`: of those that may answer the widest."""
        base_model, _ = self.split(model)
        return self.by_name[base_model] if base_model else self.widest

    def made_for(self, base_model: str | None) -> ServedModel:
        """Return the base model that an adapter names; the first one where it names none, or one that is not served."""
        return self.by_name[self.bases.find(base_model or "") or ""]

    def split(self, model: str) -> tuple[str, str]:
        """Split a request's `model`: return the base model that it names, or "", and the rest: an adapter's name.

        The rest is "" for a base model alone, and `model` itself where it names no served base model.
        """
        head, _, tail = model.partition(":")
        is_base = any(head == served.name for served in self.models)
        return (head, tail) if is_base and (tail or head == model) else ("", model)


def find_accepted_names(base: str, name: str, others: tuple[str, ...], cache_dir: Path) -> frozenset[str]:
    """Return every name that an adapter may have for the base model, with the paths of its folder on this machine."""
    is_packaged = base == PACKAGED_MODEL
    names = {base, name, *others}
    if is_packaged:
        names.update(PACKAGED_ALIASES)
    if is_packaged or Path(base).is_absolute() or Path(base).is_dir():
        folder = cache_dir / PACKAGED_MODEL if is_packaged else Path(base).absolute()
        names.update({str(folder), str(folder.resolve()), folder.name})
    return frozenset(names)
