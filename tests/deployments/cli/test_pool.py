from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from deployments.api.pool_responses import unserved_objects
from deployments.cli.pool import show_bytes
from tests.deployments.scripted import refusal, run, scripted, words

ROW = {
    "id": "poet",
    "name": "poet",
    "digest": "d" * 64,
    "ranks": [2, 4],
    "num_bytes": 9,
    "num_samples": 0,
    "found_by_auto": False,
    "tags": ["fun", "short"],
}


def test_list_shows_the_pool() -> None:
    other = ROW | {"id": "acme/poem"}
    first = {"generation": 3, "data": [other], "last_id": "acme/poem", "has_more": True}
    last = {"generation": 4, "data": [ROW], "last_id": "poet", "has_more": False}
    with scripted((200, first), (200, last)) as server:
        result = run("list", "--url", server.url)
    pages = [("GET", "/v1/loras?after="), ("GET", "/v1/loras?after=acme%2Fpoem")]
    assert (result.exit_code, server.asked) == (0, pages)
    assert "generation 4" in result.stdout
    assert "acme/poem" in result.stdout
    [line] = [line for line in result.stdout.splitlines() if "poet" in line]
    assert "2, 4" in line
    assert "by name only" in line
    assert "fun," in line and "short" in result.stdout


def test_list_says_which_adapters_auto_may_not_choose_yet() -> None:
    others = [{"id": f"acme/{name}", "tenant": "acme", "approved": name == "good"} for name in ("good", "new")]
    rows = [ROW | {"tenant": "local", "approved": False, "found_by_auto": True}]
    rows += [ROW | {"found_by_auto": True} | other for other in others]
    answer = {"generation": 3, "tenant": "local", "data": rows, "last_id": "poet", "has_more": False}
    with scripted((200, answer)) as server:
        printed = run("list", "--url", server.url).stdout
    marks = [("yes" in line, "not approved" in line) for line in printed.splitlines() if "dddd" in line]
    assert marks == [(True, False), (True, False), (False, True)]


def test_a_pipe_gets_every_adapter_on_one_line() -> None:
    name = "a-name-of-sixty-characters-that-no-terminal-has-room-for-xxx"
    answer = {"generation": 3, "data": [ROW | {"id": name}], "last_id": name, "has_more": False}
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    with scripted((200, answer)) as server:
        command = [sys.executable, "-c", "from deployments.cli.main import main; main()", "list", "--url", server.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    [line] = [line for line in done.stdout.splitlines() if name in line]
    assert all(part in line for part in ("d" * 12, "2, 4", "by name only", "fun, short"))


def test_list_says_which_adapters_are_not_served() -> None:
    unserved = unserved_objects((("org/old", 12),))
    answer = {"generation": 3, "unserved": unserved, "data": [ROW], "last_id": "poet", "has_more": False}
    with scripted((200, answer), (200, answer)) as server:
        shown, printed = run("list", "--url", server.url), run("list", "--json", "--url", server.url)
    assert unserved[0]["text"] in words(shown.output)
    assert json.loads(printed.stdout)["unserved"] == unserved


def test_list_sends_the_search_and_prints_all_pages_as_json() -> None:
    first = {"generation": 3, "data": [ROW | {"id": "acme/poem"}], "last_id": "acme/poem", "has_more": True}
    last = {"generation": 4, "data": [ROW], "last_id": "poet", "has_more": False}
    with scripted((200, first), (200, last)) as server:
        result = run("list", "--search", "a b", "--json", "--url", server.url)
    pages = ["/v1/loras?after=&search=a+b", "/v1/loras?after=acme%2Fpoem&search=a+b"]
    assert [path.replace("%20", "+") for _, path in server.asked] == pages
    answer = json.loads(result.stdout)
    assert (answer["generation"], [row["id"] for row in answer["data"]]) == (4, ["acme/poem", "poet"])


def test_show_prints_the_servers_answer_as_json() -> None:
    with scripted((200, ROW | {"versions": []})) as server:
        result = run("show", "poet", "--json", "--url", server.url)
    assert json.loads(result.stdout) == ROW | {"versions": []}


def test_show_prints_an_adapter_and_its_versions() -> None:
    version = {"generation": 3, "created_at": "2026-01-02", "actor": "tester", "source": "s3://bucket/poet"}
    versions = [version | {"digest": "d" * 64, "state": "live"}, version | {"digest": "e" * 64, "state": "kept"}]
    samples = [{"input": "Write a [poem].\nOf \x1b[31mrain", "output": "Drops"}]
    answer = {**ROW, "trial": None, "tags": ["fun"], "versions": versions, "samples": samples}
    with scripted((200, answer)) as server:
        result = run("show", "local/poet", "--url", server.url)
    assert (result.exit_code, server.asked) == (0, [("GET", "/v1/loras/local%2Fpoet?samples=3&varied=true")])
    assert "\nsample: Write a [poem]. Of [31mrain\n" in result.stdout
    live, kept = [line for line in result.stdout.splitlines() if "tester" in line]
    assert ("d" * 12 in live and "live" in live, "e" * 12 in kept and "kept" in kept) == (True, True)
    assert "None" not in result.stdout
    assert "fun" in result.stdout


def test_show_prints_a_contract_as_it_is() -> None:
    contract = {"instruction": "[bold]Rhyme: {input}", "stop": ["É"]}
    with scripted((200, ROW | {"contract": contract, "versions": []})) as server:
        printed = run("show", "poet", "--url", server.url).stdout
    assert all(part in printed for part in ('"instruction": "[bold]Rhyme: {input}"', '"É"'))


def test_show_prints_whole_digests_and_times_to_the_second() -> None:
    row = {"generation": 3, "created_at": "2026-01-02T03:04:05.678901+00:00", "actor": "tester", "source": "poet"}
    versions = [row | {"digest": "d" * 64, "state": "live"}, row | {"digest": "e" * 64, "state": "kept"}]
    answer = {"digest": "0123456789abcdef" * 4, "versions": versions}
    with scripted((200, answer)) as server:
        printed = run("show", "poet", "--url", server.url).stdout
    assert "".join(re.findall(r"[0-9a-f]{16,}", printed)) == "0123456789abcdef" * 4
    assert printed.count("2026-01-02 03:04:05 ") == 2


def test_show_prints_when_a_version_was_published_and_since_when_it_is_live() -> None:
    times = {"created_at": "2026-01-02T03:04:05.678901+00:00", "live_since": "2026-02-03T04:05:06.789012+00:00"}
    with scripted((200, {"id": "poet", **times, "versions": []})) as server:
        printed = words(run("show", "poet", "--url", server.url).stdout)
    assert "published │ 2026-01-02 03:04:05 │" in printed
    assert "live since │ 2026-02-03 04:05:06 │" in printed


def test_withdraw_continues_after_a_refusal_and_fails_at_the_end() -> None:
    with scripted((404, refusal("no adapter 'unknown'")), (200, {"generation": 5})) as server:
        result = run("withdraw", "unknown", "poet", "--url", server.url)
    assert result.exit_code == 1
    assert server.asked == [("DELETE", "/v1/loras/unknown"), ("DELETE", "/v1/loras/poet")]
    assert "unknown: no adapter 'unknown'" in words(result.stderr)
    assert "poet was withdrawn at generation 5" in words(result.stdout)


def test_names_are_escaped_in_the_path() -> None:
    with scripted((404, refusal("no"))) as server:
        run("withdraw", "../pool/gc?x#y", "--url", server.url)
    assert server.asked == [("DELETE", "/v1/loras/..%2Fpool%2Fgc%3Fx%23y")]


@pytest.mark.parametrize(("options", "body"), [((), {}), (("--to", "abcdef01"), {"digest": "abcdef01"})])
def test_rollback_names_the_version_that_is_live_again(options: tuple[str, ...], body: dict[str, Any]) -> None:
    with scripted((201, {"name": "poet", "digest": "d" * 64, "generation": 9})) as server:
        result = run("rollback", "poet", *options, "--url", server.url)
    assert (server.asked, server.sent) == ([("POST", "/v1/loras/poet/rollback")], [body])
    assert f"poet is back at {'d' * 12} since generation 9" in words(result.stdout)


TRIAL = {"digest": "e" * 64, "share": 0.1, "shadow": False}


def test_list_and_show_name_the_version_under_trial() -> None:
    page = {"generation": 4, "data": [ROW | {"trial": TRIAL}], "last_id": "poet", "has_more": False}
    with scripted((200, page), (200, ROW | {"trial": TRIAL, "versions": []})) as server:
        for command in (("list",), ("show", "poet")):
            assert f"{'e' * 12} answers 10 % of the requests" in words(run(*command, "--url", server.url).stdout)


def test_list_sends_its_filters() -> None:
    page = {"generation": 4, "data": [ROW], "last_id": "poet", "has_more": False}
    with scripted((200, page)) as server:
        result = run("list", "--tag", "fun", "--tag", "short", "--owner", "acme", "--url", server.url)
    assert (result.exit_code, server.asked) == (0, [("GET", "/v1/loras?after=&owner=acme&tag=fun&tag=short")])


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (("rollback", "poet"), {"name": "poet", "digest": "d" * 64, "generation": 5}),
        (("access", "private", "poet"), {"name": "poet", "visibility": "private", "generation": 5}),
        (("access", "approve", "poet", "--digest", "d" * 64), {"name": "poet", "digest": "d" * 64, "generation": 5}),
        (("pool", "gc"), {"num_blobs": 1, "num_projections": 0, "num_bytes": 9}),
    ],
)
def test_changes_print_the_answer_as_json(said: tuple[str, ...], answer: dict[str, Any]) -> None:
    with scripted((200, answer)) as server:
        result = run(*said, "--json", "--url", server.url)
    assert (result.exit_code, json.loads(result.stdout)) == (0, answer)


def test_withdraw_prints_every_outcome_as_json() -> None:
    with scripted((404, refusal("no poet")), (200, {"generation": 5})) as server:
        result = run("withdraw", "poet", "bard", "--json", "--url", server.url)
    rows = [{"name": "poet", "error": {"message": "no poet"}}, {"name": "bard", "generation": 5}]
    assert (result.exit_code, json.loads(result.stdout)) == (1, {"data": rows})


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (9, "9 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_439_776, "1.4 MiB"),
        (500 << 20, "500 MiB"),
        (3 << 40, "3.0 TiB"),
    ],
)
def test_sizes_have_a_unit(number: int, shown: str) -> None:
    assert show_bytes(number) == shown


def test_withdrawing_several_asks_only_where_somebody_can_answer() -> None:
    with scripted((200, {"generation": 5})) as server:
        assert run("withdraw", "poet", "bard", "--url", server.url).exit_code == 0
        assert run("withdraw", "poet", "bard", "-y", "--url", server.url).exit_code == 0
    assert len(server.asked) == 4
