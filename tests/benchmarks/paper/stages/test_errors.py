"""Classes of wrong answers, from known answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.paper.answering.answers import Asker, known_answers
from benchmarks.paper.answering.methods import MAIN
from benchmarks.paper.answering.runs import Bench, run_all
from benchmarks.paper.answering.study import Weights
from benchmarks.paper.stages import errors
from benchmarks.paper.stages.errors import COMPANION, FORM, OTHER, RIGHT, Form, error_class
from benchmarks.training.bigbench_tasks import Item, TaskSpec
from lora_store import LoraStore


def form_of(labels: Sequence[str], *answers: str) -> Form:
    spec = TaskSpec("t", "t", "c", "{x}", "em", tuple(labels))
    return Form.of(spec, [Item("", (answer,)) for answer in answers])


@pytest.mark.parametrize(
    ("labels", "text", "fits"),
    [
        (["yes", "no"], "No.", True),
        (["yes", "no"], "maybe", False),
        ([], "a word", True),
        ([], "three plain words", False),
        ([], "42", False),
        ([], "two\nlines of text", True),
    ],
)
def test_an_answer_fits_options_or_the_words_and_characters_of_the_training(
    labels: list[str], text: str, fits: bool
) -> None:
    assert form_of(labels, "one", "or two").fits(Item("", ("one",)), text.partition("\n")[0]) is fits


def test_options_that_the_input_shows_are_the_form() -> None:
    shown = Item("Which?\nOPTIONS:\n- red\n- dark blue", ("red",))
    assert form_of([], "red").fits(shown, "dark blue") and not form_of([], "red").fits(shown, "green")


def test_a_wrong_answer_has_one_class() -> None:
    form, item = form_of(["yes", "no"], "yes"), Item("", ("yes",))
    assert error_class(form, item, "yes", True, ["yes"]) == RIGHT
    assert error_class(form, item, "Oslo", False, ["oslo."]) == COMPANION
    assert error_class(form, item, "Oslo", False, ["Rome"]) == FORM
    assert error_class(form, item, "no", False, []) == OTHER


def test_rows_are_classed_from_the_cache_without_the_model(
    bench: Bench, asked: tuple[Asker, LoraStore, Weights], tmp_path: Path
) -> None:
    """The tiny adapters answer their task's word, so a wrong adapter's answer is known to be that adapter's."""
    methods = {name: MAIN[name] for name in ("perfect", "base", "selection_ood", "mixture_iid")}
    rows = run_all(bench, methods, 3, tmp_path).to_pandas()
    before = bench.asker.engine.counters.num_requests
    texts = known_answers(bench.study.workspace.root / "answers.jsonl")
    known = errors.Known(texts, asked[1].snapshot(), str(bench.asker.engine.base.dtype))
    found = errors.classed_rows(rows, bench.study, known).to_pandas()
    assert bench.asker.engine.counters.num_requests == before
    exact = [name for name, spec in bench.study.specs.items() if spec.metric != "rouge_l"]
    assert set(found["task"]) == set(exact)
    assert found.groupby("run").size().eq(3 * len(exact)).all()
    assert set(found[found["run"] == "perfect"]["class"]) == {RIGHT}
    assert set(found[found["run"] == "selection_ood"]["class"]) == {COMPANION}
    assert (found["score"] == found["without_dots"]).all()
    found.to_parquet(tmp_path / errors.ROWS)
    errors.write_tables(tmp_path)
    text = (tmp_path / "errors.md").read_text()
    assert "| selection ood | 2 | 6 | 0.0 | 100.0 | 0.0 | 0.0 |" in text
    assert "that a companion gives alone" in errors.sentence(tmp_path) and "6 questions" in errors.sentence(tmp_path)
    assert errors.company_sentence(tmp_path) == ""
    named = {"perfect": "own (companions)", "base": "own_third"}
    found[found["run"].isin(named)].assign(run=found["run"].map(named)).to_parquet(tmp_path / errors.ROWS)
    share = 100 * (found[found["run"] == "base"]["class"] == FORM).mean()
    assert f"(answers of a wrong form: {share:.1f} (" in errors.company_sentence(tmp_path)


def test_full_stops_are_counted_and_unknown_answers_are_left_out(bench: Bench) -> None:
    questions = {(q.task, q.number): q for q in bench.study.questions("test", 1)}
    task = "animals"
    row = {"run": "base", "task": task, "number": 0, "strategy": "base", "adapters": [], "weights": []}
    key = errors.answer_key(questions[task, 0], errors.Plan("base"), "float32")
    answer = f"{questions[task, 0].item.answers[0]}."
    for texts, count in (({key: answer}, 1), ({}, 0)):
        known = errors.Known(texts, None, "float32")  # type: ignore[arg-type]
        found = errors.classed_rows(pd.DataFrame([row]), bench.study, known).to_pylist()
        assert [(r["score"], r["without_dots"], r["class"]) for r in found] == [(0.0, 1.0, OTHER)] * count


def test_routers_are_scored_without_full_stops_where_their_answers_were_given(tmp_path: Path) -> None:
    """Rows that were written before, retrieved methods and free text have no such score."""
    classed = pd.DataFrame(
        {"run": "mixture_iid", "task": "a", "number": [0, 1], "class": RIGHT, "score": 1.0, "without_dots": 1.0}
    )
    classed.to_parquet(tmp_path / errors.ROWS)
    assert errors.router_rows(tmp_path).empty
    assert errors.dots_sentence(tmp_path) == "On the equal mixture that is 0.0 (0.0 to 0.0) points."
    rows = pd.DataFrame({"run": "smear", "task": "a", "number": [0, 1], "score": [0.0, 1.0]})
    rows.to_parquet(tmp_path / "baselines.parquet")
    assert errors.router_rows(tmp_path).empty
    free = pd.DataFrame({"run": ["smear"], "task": ["b"], "number": [0], "score": [0.5], "without_dots": [None]})
    layers = pd.concat([rows.assign(without_dots=1.0), rows.assign(run="mixture_iid", without_dots=0.0), free])
    layers.to_parquet(tmp_path / "layer_routers.parquet")
    found = errors.router_rows(tmp_path)
    assert set(found["run"]) == {"smear in every layer"} and found["without_dots"].tolist() == [1.0, 1.0]
    assert "| smear in every layer | 50.0 (0.0 to 100.0) |" in errors.section(classed, found)
    twice = pd.concat([found, found.assign(run="mixture_iid")])
    assert errors.section(classed, twice) == errors.section(classed, found), "a classed run has one line"
    assert ", on trained routers and LoRAHub at most 50.0 (0.0 to 100.0)." in errors.dots_sentence(tmp_path)


def test_weights_that_were_rounded_for_the_rows_are_found_again() -> None:
    rounded = [round(weight, 4) for weight in (1 / 3, 3 / 5, 1 / 6, 1.0, 0.7342)]
    assert errors._exact(rounded) == [1 / 3, 3 / 5, 1 / 6, 1.0, 0.7342]
