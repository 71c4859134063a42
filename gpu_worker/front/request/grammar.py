"""The grammar that an answer must follow."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

from gpu_worker.errors import GrammarInvalid

GrammarKind = Literal["json_schema", "regex", "choice", "grammar", "tool_calls"]
MAX_GRAMMAR_CHARS = 1 << 16
MAX_CHOICES = 1000


@dataclass(frozen=True, slots=True)
class Grammar:
    """The grammar of an answer. `text`: a JSON schema, a regular expression, a JSON list of strings, or Lark or GBNF.

    For `tool_calls` it is {"rules": Lark, "schemas": {JSON pointer: schema}}. The rules refer to the schemas, in their
    order, as schema_0, schema_1 and so on.

    Raises: GrammarInvalid.
    """

    kind: GrammarKind
    text: str
    param: str = field(default="grammar", compare=False)  # the request's field, which errors name

    def __post_init__(self) -> None:
        if len(self.text) > MAX_GRAMMAR_CHARS:
            message = f"it has {len(self.text)} characters, at most {MAX_GRAMMAR_CHARS} are allowed; make it smaller"
            raise GrammarInvalid(message, param=self.param)

    @classmethod
    def of_choices(cls, choices: list[str], param: str) -> Grammar:
        """Return the grammar of an answer that is one of these texts. Raises: GrammarInvalid."""
        if not 0 < len(choices) <= MAX_CHOICES or not all(choices):
            message = f"it needs 1 to {MAX_CHOICES} texts that are not empty, got {len(choices)}"
            raise GrammarInvalid(message, param=param)
        return cls("choice", json.dumps(choices), param)


ANY_OBJECT = '{"type": "object"}'
"""The schema of every JSON object."""
