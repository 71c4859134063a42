"""The generated parts of the reference agree with the code, and no code, field, setting or metric lacks a text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from deployments.api.base import LoraOptions
from deployments.api.completions import ChatCompletionRequest, CompletionRequest, RouteQuery
from deployments.api.error_table import reported_errors
from deployments.api.responses_request import ResponsesRequest
from deployments.config.app import AppConfig
from docs.generate import clients, error_codes, models, request_fields, settings_files
from docs.generate.__main__ import DOCS, stale_pages
from docs.generate.blocks import BLOCKS
from docs.generate.markdown import block_names, filled, pages_with_blocks, table
from tests.deployments.all_routes import OPEN_ROUTES, ROLES_OF

GROUPS = {"admission", "sampling_defaults", "worker", "retrieval"}


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


def test_a_family_counts_once_however_many_variants_were_tried() -> None:
    text = models.families()
    rows = re.findall(r"^\| `(?!quantised:)(\S+)`.* \| (native|vllm) \| .*served, equal", text, re.MULTILINE)
    counts = {engine: int(number) for number, engine in re.findall(r"(\d+) families with the (\w+) engine", text)}
    assert counts == {of: len({name for name, engine in rows if engine == of}) for of in ("native", "vllm")}
    assert len(rows) > sum(counts.values())


def test_every_error_has_a_row_with_its_cause_and_remedy() -> None:
    rows = error_codes.error_codes().splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]
    assert all(len(row) == 5 and all(row) for row in cells)
    assert len(cells) == len(list(reported_errors())) + 1  # and the framework's own
    assert ["`replica_died`", "503", "`overloaded_error`", "A replica died while it worked on the request."] in [
        row[:4] for row in cells
    ]


def test_the_table_of_routes_has_every_route_with_its_role() -> None:
    rows = re.findall(
        r"^\| (`[A-Z]+ /.*?) \| `?(\w+)`? \|", (DOCS / "reference" / "http-api.md").read_text(), re.MULTILINE
    )
    found: dict[tuple[str, str], str] = {}
    for routes, role in rows:
        method = ""
        for own, path in re.findall(r"`(?:([A-Z]+) )?(/[^`]*)`", routes):
            method = own or method
            found[method, _without_names(path)] = role
    expected = {(method, _without_names(path)): role or "any" for (method, path), role in ROLES_OF.items()}
    with_role = {route: role for route, role in found.items() if role != "none"}
    assert with_role == expected, "docs/reference/http-api.md lists each route with its role"
    assert found.keys() - with_role.keys() < OPEN_ROUTES


def _without_names(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "{}", path)


def test_a_field_of_chats_is_printed_once_with_what_completions_lack() -> None:
    chats, completions = request_fields.chat_fields(), request_fields.completion_fields()
    first, *rows = [re.findall(r"`(\w+)`", line)[:9] for line in completions.splitlines()]
    assert {"messages", "tools"} < set(first)
    assert [row[0] for row in rows if row] == ["prompt", "logprobs", "echo"]
    in_both = CompletionRequest.model_fields.keys() & ChatCompletionRequest.model_fields.keys()
    assert len(in_both) > 20 and all(chats.count(f"| `{name}` |") == 1 for name in in_both)


@pytest.mark.parametrize("model", [ChatCompletionRequest, CompletionRequest, ResponsesRequest, RouteQuery, LoraOptions])
def test_every_request_field_has_a_text(model: type[BaseModel]) -> None:
    lacking = [name for name, field in model.model_fields.items() if not field.description]
    assert not lacking, "write a text under each of these fields"
    assert len(model.model_fields) > 1


def test_fields_that_do_nothing_are_ignored_and_those_of_responses_differ_from_chats() -> None:
    status = {
        name: kind for name, kind in re.findall(r"^\| `(\w+)` \| (\w+) ", request_fields.chat_fields(), re.MULTILINE)
    }
    ignored = {name for name, kind in status.items() if kind == "ignored"}
    assert ignored == {"metadata", "prompt_cache_key", "safety_identifier", "user"}
    own = re.findall(r"^\| `(\w+)` ", request_fields.responses_fields(), re.MULTILINE)
    assert {"input", "max_output_tokens", "user", "stream"} <= set(own) and "temperature" not in own


def test_a_text_links_the_page_that_it_names() -> None:
    assert "see [lora options](lora-options.md)" in request_fields.route_fields()
    fields = (request_fields.chat_fields, request_fields.completion_fields, request_fields.lora_fields)
    text = "".join(write() for write in fields)
    assert all(f"]({target})" in text for target in request_fields._LINKS.values())


def test_every_setting_of_the_top_level_has_a_row_with_a_meaning() -> None:
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| .* \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) > 60
    assert AppConfig.model_fields.keys() <= {name for name, _ in rows} | set(re.findall(r"`(\w+)`", page))
    assert all(meaning.strip() for _, meaning in rows)


def test_every_test_of_a_client_is_in_the_table() -> None:
    shown = clients.clients()
    files = sorted((clients.ROOT / "tests" / "clients").glob("test_*.py"))
    assert len(files) == 10
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
    assert len([line for line in text.splitlines() if line.startswith("## ")]) > 70


def test_the_schema_accepts_the_defaults_and_refuses_unknown_settings() -> None:
    schema = json.loads(settings_files.schema())
    check = jsonschema.Draft202012Validator(schema)
    assert str(Path.home()) not in json.dumps(schema)
    assert check.is_valid(
        {"worker": {"device": "cuda"}, "worker_scaling": {"ray_actor_options": {"num_gpus": 1}}, "retrieval": {"k": 2}}
    )
    assert not check.is_valid({"wroker": {}})
    assert not check.is_valid({"worker": {"max_batch": 8}})
    assert not check.is_valid({"retrieval": {"k": 99}})
    groups = [schema, *(part for part in schema["$defs"].values() if "properties" in part)]
    texts = {name: setting.get("description") for part in groups for name, setting in part["properties"].items()}
    lacking = {name for name, text in texts.items() if not text} - GROUPS
    assert not lacking and len(texts) > 70, "write a text under each setting's field"
