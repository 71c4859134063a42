from __future__ import annotations

from typing import Any

import pytest

from deployments.api.pool_responses import unserved_objects
from deployments.cli.pool import show_bytes
from tests.deployments.scripted import refusal, run_with

ROW: dict[str, Any] = {"id": "poet", "name": "poet", "digest": "d" * 64, "ranks": [2, 4], "num_bytes": 9}
ROW |= {"num_samples": 0, "found_by_auto": False, "tags": ["fun", "short"]}
TRIAL = {"digest": "e" * 64, "share": 0.1, "shadow": False}


def page(*rows: dict[str, Any], generation: int = 4, more: bool = False, **about: Any) -> dict[str, Any]:
    return {"generation": generation, "data": list(rows), "last_id": rows[-1]["id"], "has_more": more} | about


def test_list_shows_the_pool_with_all_pages() -> None:
    pages = [(200, page(ROW | {"id": "acme/poem"}, generation=3, more=True)), (200, page(ROW))]
    shown = run_with(pages, "list")
    assert (shown.code, shown.asked) == (0, [("GET", "/v1/loras?after="), ("GET", "/v1/loras?after=acme%2Fpoem")])
    assert "generation 4" in shown.stdout and "acme/poem" in shown.stdout
    [line] = [line for line in shown.stdout.splitlines() if "poet" in line]
    assert all(part in line for part in ("2, 4", "by name only", "fun,")) and "short" in shown.stdout
    printed = run_with(pages, "list", "--search", "a b", "--json")
    asked = [path.replace("%20", "+") for _, path in printed.asked]
    assert asked == ["/v1/loras?after=&search=a+b", "/v1/loras?after=acme%2Fpoem&search=a+b"]
    assert (printed.json["generation"], [row["id"] for row in printed.json["data"]]) == (4, ["acme/poem", "poet"])
    filtered = run_with(page(ROW), "list", "--tag", "fun", "--tag", "short", "--owner", "acme")
    assert filtered.asked == [("GET", "/v1/loras?after=&owner=acme&tag=fun&tag=short")]


def test_list_says_which_adapters_auto_may_not_choose_yet() -> None:
    others = [{"id": f"acme/{name}", "tenant": "acme", "approved": name == "good"} for name in ("good", "new")]
    rows = [ROW | {"tenant": "local", "approved": False, "found_by_auto": True}]
    rows += [ROW | {"found_by_auto": True} | other for other in others]
    rows.append(ROW | {"tenant": "local", "approved": False, "num_samples": 2})  # another encoder embedded it
    printed = run_with(page(*rows, tenant="local"), "list").stdout
    lines = [line for line in printed.splitlines() if "dddd" in line]
    marks = ("yes", "yes", "not approved", "after a reindex")
    assert all(mark in line for mark, line in zip(marks, lines, strict=True))


def test_list_says_which_adapters_are_not_served() -> None:
    answer = page(ROW, unserved=unserved_objects((("org/old", 12),)))
    shown, printed = run_with(answer, "list"), run_with(answer, "list", "--json")
    assert answer["unserved"][0]["text"] in f"{shown.out} {shown.err}"
    assert printed.json["unserved"] == answer["unserved"]


def test_list_and_show_name_the_version_under_trial() -> None:
    row = ROW | {"trial": TRIAL}
    for said in (run_with(page(row), "list"), run_with(row | {"versions": []}, "show", "poet")):
        assert f"{'e' * 12} answers 10 % of the requests" in said.out


def test_show_prints_an_adapter_and_its_versions() -> None:
    """What others wrote is printed as it is, without control codes."""
    version = {"generation": 3, "created_at": "2026-01-02T03:04:05.678901+00:00", "actor": "tester"}
    version["source"] = "[b]p\x1b[2J"
    answer = {
        **ROW,
        "trial": None,
        "source": "[b]bard\x1b[2J",
        "versions": [version | {"digest": "d" * 64, "state": "live"}, version | {"digest": "e" * 64, "state": "kept"}],
        "samples": [{"input": "Write a [poem].\nOf \x1b[31mrain", "output": "Drops"}],
    }
    said = run_with(answer, "show", "local/poet")
    assert (said.code, said.asked) == (0, [("GET", "/v1/loras/local%2Fpoet?samples=3&varied=true")])
    assert "\nsample: Write a [poem]. Of [31mrain\n" in said.stdout
    live, kept = [line for line in said.stdout.splitlines() if "tester" in line]
    assert all(part in live for part in ("d" * 12, "live", "2026-01-02 03:04:05 ", "[b]p [2J"))
    assert all(part in kept for part in ("e" * 12, "kept", "2026-01-02 03:04:05 "))
    assert "[b]bard [2J" in said.stdout and "\x1b" not in said.stdout
    assert "None" not in said.stdout and "fun" in said.stdout
    assert run_with(answer, "show", "poet", "--json").json == answer


def test_show_prints_a_whole_digest() -> None:
    digest = "0123456789abcdef" * 4
    assert digest in run_with({"digest": digest, "versions": []}, "show", "poet").stdout


def test_show_prints_times_to_the_second_and_a_contract_as_it_is() -> None:
    times = {"created_at": "2026-01-02T03:04:05.678901+00:00", "live_since": "2026-02-03T04:05:06.789012+00:00"}
    contract = {"instruction": "[bold]Rhyme: {input}", "stop": ["É\x9b2J"]}
    said = run_with({"id": "poet", **times, "contract": contract, "versions": []}, "show", "poet")
    assert "published │ 2026-01-02 03:04:05 │" in said.out and "live since │ 2026-02-03 04:05:06 │" in said.out
    assert all(part in said.stdout for part in ('  "instruction": "[bold]Rhyme: {input}"', '"É 2J"'))


def test_withdraw_continues_after_a_refusal_and_fails_at_the_end() -> None:
    answers = [(404, refusal("no such adapter")), (200, {"generation": 5})]
    said = run_with(answers, "withdraw", "../pool/gc?x#y", "poet")
    assert (said.code, said.asked) == (
        1,
        [("DELETE", "/v1/loras/..%2Fpool%2Fgc%3Fx%23y"), ("DELETE", "/v1/loras/poet")],
    )
    assert "../pool/gc?x#y: no such adapter" in said.err and "poet was withdrawn at generation 5" in said.out
    printed = run_with(answers, "withdraw", "unknown", "poet", "--json")
    rows = [{"name": "unknown", "error": answers[0][1]["error"]}, {"name": "poet", "generation": 5}]
    assert (printed.code, printed.json) == (1, {"data": rows})
    for yes in ((), ("-y",)):  # it asks only where somebody can answer
        said = run_with({"generation": 5}, "withdraw", "poet", "bard", *yes)
        assert (said.code, len(said.asked)) == (0, 2)


@pytest.mark.parametrize(("options", "body"), [((), {}), (("--to", "abcdef01"), {"digest": "abcdef01"})])
def test_rollback_names_the_version_that_is_live_again(options: tuple[str, ...], body: dict[str, Any]) -> None:
    said = run_with((201, {"name": "poet", "digest": "d" * 64, "generation": 9}), "rollback", "poet", *options)
    assert (said.asked, said.sent) == ([("POST", "/v1/loras/poet/rollback")], [body])
    assert f"poet is back at {'d' * 12} since generation 9" in said.out


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (("rollback", "poet"), {"name": "poet", "digest": "d" * 64, "generation": 5}),
        (("access", "private", "poet"), {"name": "poet", "visibility": "private", "generation": 5}),
        (("access", "approve", "poet", "--digest", "d" * 64), {"name": "poet", "digest": "d" * 64, "generation": 5}),
        (("pool", "gc"), {"num_blobs": 1, "num_projections": 0, "num_bytes": 9}),
    ],
)
def test_changes_print_the_answer_as_json(command: tuple[str, ...], answer: dict[str, Any]) -> None:
    said = run_with(answer, *command, "--json")
    assert (said.code, said.json) == (0, answer)


@pytest.mark.parametrize(
    ("number", "shown"),
    [(1023, "1023 B"), (1024, "1.0 KiB"), (1_439_776, "1.4 MiB"), (500 << 20, "500 MiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes_have_a_unit(number: int, shown: str) -> None:
    assert show_bytes(number) == shown
