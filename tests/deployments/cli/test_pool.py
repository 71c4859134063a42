from __future__ import annotations

import json
import re
from typing import Any

import pytest

from deployments.api.pool_responses import unserved_objects
from tests.deployments.scripted import lines, refusal, run, scripted, words

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
    with scripted((200, {**ROW, "trial": None, "tags": ["fun"], "versions": versions})) as server:
        result = run("show", "local/poet", "--url", server.url)
    assert (result.exit_code, server.asked) == (0, [("GET", "/v1/loras/local%2Fpoet")])
    live, kept = [line for line in result.stdout.splitlines() if "tester" in line]
    assert ("d" * 12 in live and "live" in live, "e" * 12 in kept and "kept" in kept) == (True, True)
    assert "None" not in result.stdout
    assert "fun" in result.stdout


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


@pytest.mark.parametrize(
    ("options", "body", "trial", "says"),
    [
        (("10", "--version", "e" * 8), {"share": 0.1, "shadow": False, "digest": "e" * 8}, TRIAL, "answers 10 %"),
        (("50", "--shadow"), {"share": 0.5, "shadow": True}, TRIAL | {"share": 0.5, "shadow": True}, "shadows 50 %"),
        (("0",), {"share": 0.0, "shadow": False}, None, "the live version answers every request"),
    ],
)
def test_share_sends_the_share_and_prints_who_answers(
    options: tuple[str, ...], body: dict[str, Any], trial: dict[str, Any] | None, says: str
) -> None:
    with scripted((200, {"name": "poet", "trial": trial, "generation": 9})) as server:
        result = run("share", "poet", *options, "--url", server.url)
    assert (server.asked, server.sent) == ([("POST", "/v1/loras/poet/share")], [body])
    assert says in words(result.stdout) and "since generation 9" in words(result.stdout)


def test_promote_makes_the_version_under_trial_live() -> None:
    answer = {"name": "poet", "digest": "e" * 64, "generation": 9}
    with scripted((200, ROW | {"trial": TRIAL}), (201, answer)) as server:
        result = run("promote", "poet", "--url", server.url)
    assert server.sent[-1] == {"digest": "e" * 64}
    assert f"poet is live as {'e' * 12}" in words(result.stdout)
    with scripted((200, ROW | {"trial": None})) as server:
        result = run("promote", "poet", "--url", server.url)
    assert result.exit_code == 1 and "no version of 'poet' is under trial" in words(result.stderr)


def test_list_and_show_name_the_version_under_trial() -> None:
    page = {"generation": 4, "data": [ROW | {"trial": TRIAL}], "last_id": "poet", "has_more": False}
    with scripted((200, page), (200, ROW | {"trial": TRIAL, "versions": []})) as server:
        for command in (("list",), ("show", "poet")):
            assert f"{'e' * 12} answers 10 % of the requests" in words(run(*command, "--url", server.url).stdout)


def test_verify_prints_the_number_of_intact_blobs() -> None:
    body = lines({"done": 1, "total": 2}, {"done": 2, "total": 2}, {"result": {"num_blobs": 2, "problems": []}})
    with scripted((200, body)) as server:
        result = run("verify", "--url", server.url)
    assert (result.exit_code, server.asked, server.sent) == (0, [("POST", "/v1/pool/verify")], [{}])
    assert "2 blobs, 0 bad" in words(result.stdout)


def test_verify_fails_and_names_bad_blobs() -> None:
    problem = {"adapter": "local/poet@dddddddddddd", "digest": "f" * 64, "problem": "is missing"}
    body = lines({"done": 1, "total": 1, "problem": problem}, {"result": {"num_blobs": 1, "problems": [problem]}})
    with scripted((200, body)) as server:
        result = run("verify", "--url", server.url)
    assert result.exit_code == 1
    assert "local/poet@dddddddddddd: is missing" in words(result.stderr)


@pytest.mark.parametrize(("options", "seconds"), [((), 86_400), (("--retention", "0"), 0)])
def test_gc_prints_the_removed_blobs(options: tuple[str, ...], seconds: float) -> None:
    with scripted((200, {"num_blobs": 3, "num_bytes": 12, "num_projections": 1})) as server:
        result = run("gc", *options, "--url", server.url)
    assert (server.asked, server.sent) == ([("POST", "/v1/pool/gc")], [{"retention_s": seconds}])
    assert "removed 3 blobs and 1 projection, 12 bytes" in words(result.stdout)


@pytest.mark.parametrize(("behind", "note"), [(0, ""), (2, " (2 replicas are not up to date yet)")])
def test_reindex_prints_since_when_the_pool_uses_the_encoder(behind: int, note: str) -> None:
    result_line = {"result": {"encoder": "other", "generation": 9, "replicas": {"ready": 1, "behind": behind}}}
    with scripted((200, lines({"done": 2, "total": 2}, result_line))) as server:
        result = run("reindex", "--encoder", "other", "--url", server.url)
    assert (server.asked, server.sent) == ([("POST", "/v1/pool/reindex")], [{"encoder": "other", "projection": "auto"}])
    assert words(result.stdout) == f"the pool uses other since generation 9{note}"


@pytest.mark.parametrize("command", [("verify",), ("reindex", "--encoder", "other"), ("doctor",)])
@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (503, refusal("the store is down"), "the store is down"),
        (200, lines({"done": 1, "total": 2}, refusal("it went down")), "it went down"),
        (200, lines({"done": 1, "total": 2}), "closed the connection"),
    ],
)
def test_a_failing_job_prints_the_reason(command: tuple[str, ...], status: int, body: Any, said: str) -> None:
    with scripted((status, body)) as server:
        result = run(*command, "--url", server.url)
    assert result.exit_code == 1
    assert said in words(result.stderr)


def test_list_sends_its_filters() -> None:
    page = {"generation": 4, "data": [ROW], "last_id": "poet", "has_more": False}
    with scripted((200, page)) as server:
        result = run("list", "--tag", "fun", "--tag", "short", "--owner", "acme", "--url", server.url)
    assert (result.exit_code, server.asked) == (0, [("GET", "/v1/loras?after=&owner=acme&tag=fun&tag=short")])


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (("rollback", "poet"), {"name": "poet", "digest": "d" * 64, "generation": 5}),
        (("visibility", "poet", "private"), {"name": "poet", "visibility": "private", "generation": 5}),
        (("approve", "poet", "--digest", "d" * 64), {"name": "poet", "digest": "d" * 64, "generation": 5}),
        (("gc",), {"num_blobs": 1, "num_projections": 0, "num_bytes": 9}),
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
