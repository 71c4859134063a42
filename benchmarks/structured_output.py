"""The cost of structured output: tokens per second with one shared schema or tool, and the seconds of a new schema.

`python -m benchmarks.structured_output`. Rounds with and without the schema alternate, so that both meet the same
machine. The schema cannot end within the measured tokens.

`... --few` measures one row and eight greedy rows of the base model instead, and writes nothing: without a grammar;
with one while the output head is computed for all ids; for the allowed ids only; and with runs of certain tokens.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import typer

from benchmarks.engine_cases import NUM_NEW, NUM_ROWS, Loaded, Quick, plans, shown, table_of
from benchmarks.results_file import write_results
from gpu_worker.front.grammar.tool_grammar import tool_grammar
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.tools import HERMES, Function, Tools
from gpu_worker.front.row import Row

ROUNDS, NEW_SCHEMAS = 5, 20
LABELS = "positive", "negative", "neutral"
LONG_LABELS = "very satisfied with the product", "waited too long for the delivery", "another reason to write to us"
SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": {}, "temperature 1": {"temperature": 1.0, "seed": 3}}


def people(number: int = 0) -> Grammar:
    """Return the schema of a long list of people. Each number gives another schema."""
    fields = {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 150}}
    person = {"type": "object", "properties": fields, "required": ["name", "age"], "additionalProperties": False}
    return Grammar("json_schema", json.dumps({"type": "array", "items": person, "minItems": 1000 + number}))


def labels(*texts: str) -> Grammar:
    """Return the schema of a long list of labels, most of whose tokens are certain or one of a few."""
    fields = {"label": {"enum": list(texts)}, "stars": {"type": "integer", "enum": [1, 2, 3]}}
    label = {"type": "object", "properties": fields, "required": ["label", "stars"], "additionalProperties": False}
    return Grammar("json_schema", json.dumps({"type": "array", "items": label, "minItems": 1000}))


def call() -> Grammar:
    """Return the grammar of a required call of a function that takes such a list."""
    list_of_people = {"type": "object", "properties": {"people": json.loads(people().text)}, "required": ["people"]}
    tools = Tools((Function("save", parameters=json.dumps(list_of_people)),), required=True)
    grammar = tool_grammar(tools, HERMES, None)
    assert grammar is not None
    return grammar


def seconds_to_compile(loaded: Loaded, number: int) -> float:
    """Return the seconds until a row can start with a new schema."""
    started = time.perf_counter()
    loaded.engine.grammars.state(people(number), "local", [], 0, loaded.engine.base.vocab_size)
    return time.perf_counter() - started


def measure_few(loaded: Loaded, num_rounds: int, num_new: int) -> None:
    """Print the tokens per second of few rows, in turn: free, with the whole head, with allowed ids, and with runs."""
    table = table_of("rows, grammar", "free tokens/s", "whole head", "allowed ids", "and runs")
    engine, model = loaded.engine, loaded.engine.base.model
    allowed: Any = model.get_output_embeddings()
    prepare = engine.prepare

    def without_runs(*arguments: Any) -> Row:
        row = prepare(*arguments)
        if row.grammar is not None:
            row.grammar.longest_run = 0
        return row

    grammars = {"people": people(), "labels": labels(*LABELS), "long labels": labels(*LONG_LABELS)}
    ways: list[tuple[Any, Any]] = [(allowed.whole, without_runs), (allowed, without_runs), (allowed, prepare)]
    for num_rows in (1, 8):
        rows, base = loaded.prompts(1, num_rows), plans("base", 8, num_rows)
        for name, grammar in grammars.items():
            bound = {"ignore_eos": False, "grammar": grammar}
            loaded.run(base, rows, 4, **bound)
            found = []
            for _ in range(num_rounds):
                rates = [loaded.run(base, rows, num_new)[0]]
                for head, prepared in ways:
                    model.set_output_embeddings(head)
                    engine.prepare = prepared
                    rates.append(loaded.run(base, rows, num_new, **bound)[0])
                found.append(rates)
            medians = [statistics.median(column) for column in zip(*found, strict=True)]
            table.add_row(f"{num_rows}, {name}", *(f"{rate:.0f}" for rate in medians))
    shown(table)


def main(quick: Quick = False, few: bool = False) -> None:
    """Measure, print a table and write the results."""
    num_rounds, num_new = (1, 8) if quick else (ROUNDS, NUM_NEW)
    loaded = Loaded(8)
    if few:
        return measure_few(loaded, num_rounds, num_new)
    rows = loaded.prompts(1, NUM_ROWS)
    first = seconds_to_compile(loaded, 0)
    compiled = [seconds_to_compile(loaded, number) for number in range(1, 3 if quick else NEW_SCHEMAS + 1)]
    table = table_of("", "free tokens/s", "with a grammar", "lost")
    figures, runs = {"first_schema_s": first, "new_schema_ms": 1000 * statistics.median(compiled)}, []
    cases = {name: (settings, people()) for name, settings in SAMPLINGS.items()}
    cases["a required tool, temperature 1"] = SAMPLINGS["temperature 1"], call()
    for name, (settings, grammar) in cases.items():
        bound = settings | {"ignore_eos": False, "grammar": grammar}
        loaded.run(plans("mixture", 8), rows, 4, **bound)
        found: list[tuple[float, float]] = []
        for _ in range(num_rounds):
            free, _ = loaded.run(plans("mixture", 8), rows, num_new, **settings)
            structured, _ = loaded.run(plans("mixture", 8), rows, num_new, **bound)
            found.append((free, structured))
        lost = statistics.median(1 - structured / free for free, structured in found)
        medians = [statistics.median(column) for column in zip(*found, strict=True)]
        table.add_row(name, f"{medians[0]:.0f}", f"{medians[1]:.0f}", f"{100 * lost:.1f} %")
        figures[f"lost_{name.replace(', ', '_').replace(' ', '_')}"] = lost
        runs.append({"sampling": name, "tokens_per_s": found})
    table.add_row("new schema, ms", "", f"{figures['new_schema_ms']:.0f}", "")
    table.add_row("first schema, s", "", f"{first:.1f}", "")
    text = shown(table)
    if not quick:
        write_results("structured_output", figures=figures, table=text, runs=runs, keeps_other_processors=True)


if __name__ == "__main__":
    typer.run(main)
