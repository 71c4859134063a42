"""Read the pools of the wording benchmark: adapters, their samples, and prompts in other words than the samples.

A pool is a file `pools/<part>/<pool>.yaml`, written by hand; `pools/README.md` has the format. Pools are split by part:
thresholds and projections are chosen on `tune`, and results are reported on `test`. The samples and prompts of
`tune_words` and `test_words` are single words and codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

POOLS = Path(__file__).parent / "pools"
Part = Literal["tune", "test", "tune_words", "test_words"]
Samples = Literal["one", "three", "description", "both", "mixed"]
INPUT = "{input}"
# Kinds of a prompt that says the same as the samples in other words.
REWORDED = ("para", "typo", "last", "bare", "other")
# Kinds in which the prompt is only a part of what the client sends.
WRAPPED = ("context", "context_last", "agent", "system", "followup")


@dataclass(frozen=True, slots=True)
class WordedAdapter:
    """An adapter of a pool: its card, the instructions of its training set, and contents for these."""

    name: str
    description: str
    wordings: tuple[str, ...]
    inputs: tuple[str, ...]

    def samples(self, kind: Samples, number: int | None = None) -> list[str]:
        """Return the texts by which the adapter is embedded: at most `number` samples, or the description."""
        if kind == "description":
            return [self.description]
        wordings = self.wordings[:1] if kind in ("one", "both") else self.wordings
        chosen = self.inputs[:number]
        texts = [wordings[place % len(wordings)].replace(INPUT, text) for place, text in enumerate(chosen)]
        return [*texts, self.description] if kind == "both" else texts


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of a client. `own`: the adapter that it is for, None for prompts that no adapter of the pool serves."""

    kind: str
    text: str
    own: str | None = None
    system: str = ""
    previous: str = ""  # the user turn before `text`
    language: str = "en"

    @property
    def messages(self) -> list[tuple[str, str]]:
        """Return the conversation as (role, content)."""
        turns = [("system", self.system)] if self.system else []
        if self.previous:
            turns += [("user", self.previous), ("assistant", "…")]
        return [*turns, ("user", self.text)]


@dataclass(frozen=True, slots=True)
class WordedPool:
    """A pool with its prompts."""

    name: str
    adapters: tuple[WordedAdapter, ...]
    prompts: tuple[Prompt, ...]

    def of_kind(self, *kinds: str) -> list[Prompt]:
        """Return the prompts of these kinds."""
        return [prompt for prompt in self.prompts if prompt.kind in kinds]


def read_pools(part: Part) -> list[WordedPool]:
    """Return the pools of a part, in the order of their names."""
    paths = sorted((POOLS / part).glob("*.yaml"))
    return [_pool(path.stem, _yaml(path)) for path in paths if path.stem != "everyday"]


def read_everyday(part: Part) -> tuple[Prompt, ...]:
    """Return prompts that a general assistant gets and that no adapter should answer."""
    found = _yaml(POOLS / part / "everyday.yaml")
    prompts = [Prompt("everyday", text) for text in found["prompts"]]
    return (*prompts, *(Prompt("everyday_chat", second, previous=first) for first, second in found["chats"]))


def _yaml(path: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def _pool(name: str, data: Mapping[str, Any]) -> WordedPool:
    if "formats" in data:
        adapters, prompts = _combined(data)
    else:
        adapters = [_adapter(row) for row in data["adapters"]]
        prompts = [prompt for row in data["adapters"] for prompt in _own_prompts(row)]
    prompts += [Prompt("neighbour", text) for text in data.get("neighbours", ())]
    prompts += list(_wrapped([prompt for prompt in prompts if prompt.kind == "para"], data))
    return WordedPool(name, tuple(adapters), tuple(prompts))


def _adapter(row: Mapping[str, Any]) -> WordedAdapter:
    return WordedAdapter(row["name"], row["description"], tuple(row["wordings"]), tuple(row["inputs"]))


def _own_prompts(row: Mapping[str, Any]) -> Iterator[Prompt]:
    for text in row["held_inputs"]:
        yield Prompt("same", row["wordings"][0].replace(INPUT, text), row["name"])
    for kind, texts in row["prompts"].items():
        if kind == "other":
            for language, text in texts.items():
                yield Prompt(kind, text, row["name"], language=language)
            continue
        for text in texts:
            yield Prompt(kind, text, row["name"])


def _combined(data: Mapping[str, Any]) -> tuple[list[WordedAdapter], list[Prompt]]:
    """Return an adapter for each domain and format but each fifth pair, which is a neighbour that no adapter serves."""
    adapters, prompts = [], []
    for place, domain in enumerate(data["domains"]):
        for row, form in enumerate(data["formats"]):
            name = f"{domain['name']}__{form['name']}"
            held = domain["held"]
            if (place + row) % 5 == 4:
                prompts.append(Prompt("neighbour", _request(form["requests"], place).replace(INPUT, held[row % 4])))
                continue
            description = f"{domain['about']} {form['description']}"
            adapters.append(WordedAdapter(name, description, tuple(form["wordings"]), tuple(domain["inputs"])))
            prompts.append(Prompt("same", form["wordings"][0].replace(INPUT, held[(row + 1) % 4]), name))
            prompts.append(Prompt("para", _request(form["requests"], place).replace(INPUT, held[row % 4]), name))
            languages = list(form["other"].items())
            language, text = languages[place % len(languages)]
            prompts.append(Prompt("other", text.replace(INPUT, held[(row + 2) % 4]), name, language=language))
    return adapters, prompts


def _request(requests: Sequence[str], place: int) -> str:
    return requests[place % len(requests)]


def _wrapped(own: Sequence[Prompt], data: Mapping[str, Any]) -> Iterator[Prompt]:
    """Yield prompts in which the request is a part of the text, one of each kind for every prompt in `own`."""
    for place, prompt in enumerate(own):
        if contexts := data.get("contexts"):
            context = contexts[place % len(contexts)]
            yield Prompt("context", f"{context}\n\n{prompt.text}", prompt.own)
            yield Prompt("context_last", f"{prompt.text}\n\n{context}", prompt.own)
        if agents := data.get("agents"):
            yield Prompt("agent", f"{agents[place % len(agents)]}\n\n{prompt.text}", prompt.own)
        if systems := data.get("systems"):
            yield Prompt("system", prompt.text, prompt.own, system=systems[place % len(systems)])
        for language, turns in data.get("followups", {}).items():
            turn = turns[place % len(turns)]
            yield Prompt("followup", turn, prompt.own, previous=prompt.text, language=language)
