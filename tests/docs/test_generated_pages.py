"""The generated parts of the reference agree with the code, and no code, field, setting or metric lacks a text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from deployments.api.base import LoraOptions
from deployments.api.completions import ChatCompletionRequest, CompletionRequest, RouteQuery
from deployments.api.error_table import reported_errors
from deployments.api.responses_request import ResponsesRequest
from deployments.config.app import AppConfig
from docs.generate import clients, error_codes, metrics, request_fields, settings_files
from docs.generate.__main__ import DOCS, stale_pages
from docs.generate.blocks import BLOCKS
from docs.generate.markdown import block_names, filled, pages_with_blocks, table


def test_no_generated_page_is_out_of_date() -> None:
    stale = [str(path.relative_to(DOCS.parent)) for path in stale_pages(write=False)]
    assert not stale, "run python -m docs.generate"


def test_every_block_is_on_exactly_one_page() -> None:
    names = [name for page in pages_with_blocks(DOCS) for name in block_names(page.read_text(encoding="utf-8"))]
    assert sorted(names) == sorted(BLOCKS)


def test_a_block_is_replaced_and_the_rest_of_the_page_stays() -> None:
    page = "before\n<!-- generated: a -->\nold\n<!-- end of generated -->\nafter\n"
    assert filled(page, {"a": lambda: "new"}) == page.replace("old\n", "\nnew\n")


def test_a_cell_with_a_bar_stays_one_cell() -> None:
    assert table(("a", "b"), [("x|y", "two\nlines")]).splitlines()[2] == r"| x\|y | two lines |"


def test_every_error_has_a_row_with_its_cause_and_remedy() -> None:
    rows = error_codes.error_codes().splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]
    assert all(len(row) == 5 and all(row) for row in cells)
    assert len(cells) == len(list(reported_errors())) + 1  # and the framework's own
    assert ["`overloaded`", "503", "`overloaded_error`", "The worker's queue is full (`worker.max_waiting`)."] in [
        row[:4] for row in cells
    ]


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (ChatCompletionRequest, "chat"),
        (CompletionRequest, "completion"),
        (ResponsesRequest, "responses"),
        (RouteQuery, "route"),
        (LoraOptions, "lora"),
    ],
)
def test_every_request_field_has_a_text(model: type[LoraOptions], kind: str) -> None:
    assert request_fields.texts_of(kind).keys() == model.model_fields.keys()


def test_ignored_fields_are_fields() -> None:
    assert request_fields.ignored() <= request_fields.texts_of("chat").keys()


def test_every_module_that_registers_metrics_is_described() -> None:
    found = metrics.modules()
    assert len(found) == 3
    page = (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8")
    for module in found:
        assert all(f"`ray_{metric.name}`" in page for metric in metrics.registered(module))


def test_every_setting_of_the_top_level_has_a_row_with_a_meaning() -> None:
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| .* \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) > 60
    assert AppConfig.model_fields.keys() <= {name for name, _ in rows} | set(re.findall(r"`(\w+)`", page))
    assert all(meaning.strip() for _, meaning in rows)


def test_every_test_of_a_client_is_in_the_table() -> None:
    shown = clients.clients()
    files = sorted((clients.ROOT / "tests" / "clients").glob("test_*.py"))
    assert len(files) == 8
    for path in files:
        assert path.read_text(encoding="utf-8").split('"""')[1].splitlines()[0] in shown
    assert "langchain-tests" in shown and "streaming with usage" in shown


def test_a_test_of_a_client_without_a_docstring_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test_x.py"
    path.write_text('"""X"""\ndef test_chat() -> None: ...\n')
    with pytest.raises(ValueError, match="test_chat needs a docstring"):
        clients._row(path)


def test_the_example_holds_every_default() -> None:
    text = settings_files.example()
    assert yaml.safe_load(text) is None
    lines = [line.removeprefix("# ") for line in text.splitlines()[3:] if line.startswith("# ")]
    settings = yaml.safe_load("\n".join(lines).replace("~/", f"{Path.home()}/"))
    assert settings.keys() == AppConfig.model_fields.keys()
    found = AppConfig.model_validate(settings).model_copy(update={"store_uri": AppConfig().store_uri})  # was resolved
    assert found.model_dump(mode="json") == AppConfig().model_dump(mode="json")
    assert len([line for line in text.splitlines() if line.startswith("## ")]) > 90


def test_the_schema_accepts_the_defaults_and_refuses_unknown_settings() -> None:
    schema = json.loads(settings_files.schema())
    check = jsonschema.Draft202012Validator(schema)
    assert str(Path.home()) not in json.dumps(schema)
    assert check.is_valid({"worker": {"device": "cuda"}, "worker_scaling": {"num_gpus": 1}, "retrieval": {"k": 2}})
    assert not check.is_valid({"wroker": {}})
    assert not check.is_valid({"worker": {"max_batch": 8}})
    assert not check.is_valid({"retrieval": {"k": 99}})
    assert all("description" in setting for setting in schema["$defs"]["WorkerSettings"]["properties"].values())
