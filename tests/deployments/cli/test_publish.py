from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.cli.adapter_publisher import AdapterPublisher, Item
from deployments.cli.client import is_this_machine
from deployments.publishing.adapter_folders import open_without_links
from tests.deployments.scripted import refusal, run, scripted, words


def answer(name: str, **changes: Any) -> dict[str, Any]:
    plain = {"status": 201, "name": name, "generation": 4, "found_by_auto": True}
    return plain | {"replicas": {"ready": 1, "behind": 0}} | changes


def refused(status: int, message: str) -> dict[str, Any]:
    return {"status": status, **refusal(message)}


def batch(*answers: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": list(answers)}


def adapters(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text(f"config of {name}")
        (folder / name / "optimizer.pt").write_text("large")
    return [folder / name for name in names]


def test_absolute_paths_are_sent_and_the_generation_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [poet] = adapters(tmp_path, "poet")
    monkeypatch.chdir(tmp_path)
    with scripted((201, batch(answer("poet", found_by_auto=False)))) as server:
        result = run("publish", "poet", "--url", server.url)
    assert result.exit_code == 0
    assert (server.asked, server.sent) == ([("POST", "/v1/loras")], [{"adapters": [{"path": str(poet)}]}])
    assert (
        words(result.stdout)
        == "poet is live at generation 4 (by name only: add lora_samples.jsonl or description.txt for auto)"
    )


def test_the_description_of_the_adapter_is_sent(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    said = ("--name", "bard", "--tag", "fun", "--tag", "short", "--template", "chat")
    with scripted((201, batch(answer("bard")))) as server:
        run("publish", poet, *said, "--url", server.url)
    expected = {"path": str(poet), "name": "bard", "tags": ["fun", "short"], "template": "chat"}
    assert server.sent == [{"adapters": [expected]}]


def test_a_base_name_is_sent(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    with scripted((201, batch(answer("poet"))), (400, refusal("base_model: must be short"))) as server:
        run("publish", poet, "--base-name", "tiny", "--url", server.url)
        wrong = run("publish", poet, "--base-name", "tiny", "--url", server.url)
    assert server.sent[0] == {"adapters": [{"path": str(poet), "base_model": "tiny"}]}
    assert "--base-name: must be short" in words(wrong.stderr)


def test_a_share_of_nothing_is_refused_and_a_time_of_nothing_is_sent(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    with scripted((201, batch(answer("poet"))), (201, batch(answer("poet")))) as server:
        refused_share = run("publish", poet, "--share", "0", "--url", server.url)
        assert (refused_share.exit_code, server.asked) == (2, [])
        assert "must be above 0" in words(refused_share.stderr)
        run("publish", poet, "--share", "10", "--url", server.url)
        run("publish", poet, "--ttl", "0", "--url", server.url)  # the server refuses it; it was never permanent
    path = {"path": str(poet)}
    assert server.sent == [{"adapters": [path | {"share": 0.1}]}, {"adapters": [path | {"ttl_s": 0.0}]}]


@pytest.mark.parametrize("names", [("checkpoint-9",), ("checkpoint-9", "checkpoint-100", "checkpoint-20")])
def test_a_training_run_publishes_its_last_checkpoint_under_its_own_name(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    adapters(tmp_path / "my-task", *names)
    last = tmp_path / "my-task" / max(names, key=len)
    for place in (tmp_path / "my-task", last):
        with scripted((201, batch(answer("my-task")))) as server:
            assert run("publish", place, "--url", server.url).exit_code == 0
        assert server.sent == [{"adapters": [{"path": str(last), "name": "my-task"}]}]


def test_a_checkpoint_takes_the_name_that_is_given(tmp_path: Path) -> None:
    [last] = adapters(tmp_path / "my-task", "checkpoint-100")
    with scripted((201, batch(answer("bard")))) as server:
        assert run("publish", last, "--name", "bard", "--url", server.url).exit_code == 0
    assert server.sent == [{"adapters": [{"path": str(last), "name": "bard"}]}]


def test_a_folder_of_training_runs_publishes_each_of_them(tmp_path: Path) -> None:
    adapters(tmp_path / "first", "checkpoint-1", "checkpoint-2")
    adapters(tmp_path, "second")
    with scripted((201, batch(answer("first"), answer("second")))) as server:
        assert run("publish", tmp_path, "--url", server.url).exit_code == 0
    expected = [{"path": str(tmp_path / "first" / "checkpoint-2"), "name": "first"}, {"path": str(tmp_path / "second")}]
    assert server.sent == [{"adapters": expected}]


@pytest.mark.parametrize("uri", ["hf://acme/sql@v2", "runs:/r1/peft", "models:/sql/3", "s3://bucket/poet"])
@pytest.mark.parametrize("upload", [False, True])
def test_a_source_is_sent_as_its_uri(uri: str, upload: bool) -> None:
    with scripted((201, batch(answer("sql")))) as server:
        result = run("publish", uri, "--tag", "db", *(["--upload"] if upload else []), "--url", server.url)
    assert result.exit_code == 0
    assert server.sent == [{"adapters": [{"source": uri, "tags": ["db"]}]}]


def test_a_refused_source_is_named_once() -> None:
    with scripted((207, batch(refused(403, "the source 'hf://acme/sql' is not below a source prefix")))) as server:
        result = run("publish", "hf://acme/sql", "--url", server.url)
    assert (result.exit_code, words(result.stderr).count("hf://acme/sql")) == (1, 1)


def test_samples_of_a_training_file_are_uploaded_in_place_of_the_folders_own(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    (poet / "lora_samples.jsonl").write_text("own samples")
    train = tmp_path / "train.jsonl"
    train.write_text('{"messages": [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}]}')
    with scripted((201, answer("poet"))) as server:
        result = run("publish", poet, "--samples", train, "--url", server.url)
    assert (result.exit_code, words(result.stderr)) == (0, words(f"1 sample from {train}"))
    [body] = server.bodies
    assert b'{"input": "Sing.", "output": "La."}' in body
    assert b"own samples" not in body and body.count(b'filename="lora_samples.jsonl"') == 1


def test_a_training_file_without_samples_stops_the_command(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    train = tmp_path / "train.jsonl"
    train.write_text('{"label": 1}')
    with scripted((500, {})) as server:
        result = run("publish", poet, "--samples", train, "--url", server.url)
    assert (result.exit_code, server.asked) == (1, [])
    assert "known forms are Alpaca" in words(result.stderr)


def test_one_training_file_cannot_be_used_for_two_adapters(tmp_path: Path) -> None:
    adapters(tmp_path, "one", "two")
    with scripted((500, {})) as server:
        result = run("publish", tmp_path, "--samples", "train.jsonl", "--url", server.url)
    assert (result.exit_code, server.asked) == (2, [])
    assert "one training file goes with one adapter folder" in words(result.stderr)


def test_a_dry_run_says_what_would_be_published(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    near = [{"name": "bard", "digest": "d", "score": 0.987}]
    for upload in ((), ("--upload",)):
        row = answer("poet", status=200, generation=0, neighbours=near)
        with scripted((200, row if upload else batch(row))) as server:
            result = run("publish", poet, "--dry-run", *upload, "--url", server.url)
        assert words(result.stdout) == "poet is fit to publish (nearest is bard at 0.99)"
        assert server.asked == [("POST", "/v1/loras?dry_run=true")]


def test_the_summary_of_a_batch_counts_and_names_the_refused(tmp_path: Path) -> None:
    folders = adapters(tmp_path, *[f"a{number:03}" for number in range(300)])
    bad = {folder.name for folder in folders[::22]}

    def outcome(sent: dict[str, Any]) -> dict[str, Any]:
        names = [Path(adapter["path"]).name for adapter in sent["adapters"]]
        return batch(*[refused(400, "bad") if n in bad else answer(n, found_by_auto=n != "a001") for n in names])

    with scripted((207, outcome)) as server:
        result = run("publish", tmp_path, "--url", server.url)
    assert (result.exit_code, len(bad)) == (1, 14)
    assert "286 live (1 by name only), 14 refused" in words(result.stderr)
    assert words(result.stderr).endswith(f"refused: {', '.join(sorted(bad))}")


def test_the_upload_of_one_adapter_reports_every_byte(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    (poet / "adapter_model.safetensors").write_bytes(b"w" * 200_000)
    sent: list[int] = []
    with scripted((201, answer("poet"))) as server, httpx.Client(base_url=server.url) as client:
        list(AdapterPublisher(client, {}, {}, sent=sent.append).by_upload([Item(poet)]))
    assert sum(sent) == 200_000 + len("config of poet")
    assert len(sent) > 3


def test_the_outcome_of_every_folder_is_printed_as_json(tmp_path: Path) -> None:
    poet, bard = adapters(tmp_path, "poet", "bard")
    with scripted((207, batch(answer("poet"), refused(400, "no")))) as server:
        result = run("publish", poet, bard, "--json", "--url", server.url)
    rows = json.loads(result.stdout)["data"]
    assert result.exit_code == 1
    assert rows == [{"folder": str(poet), **answer("poet")}, {"folder": str(bard), **refused(400, "no")}]


@pytest.mark.parametrize(
    ("said", "sent"), [((), {}), (("--public",), {"visibility": "public"}), (("--private",), {"visibility": "private"})]
)
def test_the_visibility_is_sent_only_if_given(tmp_path: Path, said: tuple[str, ...], sent: dict[str, str]) -> None:
    [poet] = adapters(tmp_path, "poet")
    with scripted((201, batch(answer("poet")))) as server:
        run("publish", poet, *said, "--url", server.url)
    assert server.sent == [{"adapters": [{"path": str(poet)} | sent]}]


@pytest.mark.parametrize("upload", [False, True])
def test_clearing_is_sent_as_given(tmp_path: Path, upload: bool) -> None:
    [poet] = adapters(tmp_path, "poet")
    said = ("--no-tags", "--template", "server", "--no-samples", "--no-contract", *(["--upload"] if upload else []))
    with scripted((201, answer("poet") if upload else batch(answer("poet")))) as server:
        assert run("publish", poet, *said, "--url", server.url).exit_code == 0
    if upload:
        [body] = server.bodies
        assert all(f'name="{field}"\r\n\r\n\r\n'.encode() in body for field in ("tags", "samples"))
        assert b'name="contract"\r\n\r\n{}\r\n' in body
    else:
        cleared = {"tags": [], "template": "server", "samples": [], "contract": {}}
        assert server.sent == [{"adapters": [{"path": str(poet)} | cleared]}]


def test_a_contract_in_a_file_is_sent_as_json_and_a_bad_one_is_not(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("instruction: 'Rhyme: {input}'\nstop: END\n")
    bad.write_text("sampling: {temperature: hot}\n")
    with scripted((201, batch(answer("poet", kept={"contract": {"stop": ["END"]}})))) as server:
        result = run("publish", poet, "--contract", good, "--url", server.url)
        refused = run("publish", poet, "--contract", bad, "--url", server.url)
    sent = {"instruction": "Rhyme: {input}", "stop": ["END"]}
    assert server.sent == [{"adapters": [{"path": str(poet), "contract": sent}]}]
    assert words(result.stdout).endswith("contract: stop (kept)")
    assert (refused.exit_code, "sampling.temperature: must be a number" in words(refused.stderr)) == (1, True)


@pytest.mark.parametrize(
    "said",
    [
        ("--no-tags", "--tag", "x"),
        ("--no-samples", "--samples", "train.jsonl"),
        ("--no-contract", "--contract", "io.yaml"),
    ],
)
def test_nothing_is_given_and_cleared(tmp_path: Path, said: tuple[str, ...]) -> None:
    [poet] = adapters(tmp_path, "poet")
    with scripted((500, {})) as server:
        result = run("publish", poet, *said, "--url", server.url)
    assert (result.exit_code, server.asked) == (2, [])
    assert f"cannot be combined with {said[1 + said.index(said[0])]}" in words(result.stderr)


def test_the_line_of_a_new_version_says_what_it_keeps_and_changes(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    kept = {"tags": ["support", "eu"], "template": None, "visibility": "public"}
    changed = {"samples": {"from": 20, "to": 0}}
    with scripted((201, batch(answer("poet", kept=kept, changed=changed)))) as server:
        result = run("publish", poet, "--url", server.url)
    assert words(result.stdout) == "poet is live at generation 4; tags: support, eu (kept); samples: none (was 20)"
    kept, changed = {"visibility": "private"}, {"template": {"from": "alpaca", "to": None}}
    with scripted((201, batch(answer("poet", kept=kept, changed=changed)))) as server:
        result = run("publish", poet, "--url", server.url)
    expected = "template: the server's (was alpaca); visibility: private (kept)"
    assert words(result.stdout) == f"poet is live at generation 4; {expected}"


def test_a_nearest_name_that_is_live_already_is_warned_of(tmp_path: Path) -> None:
    [folder] = adapters(tmp_path, "my run")
    updated = answer("my-run", kept={"visibility": "public"})
    with scripted((201, batch(updated)), (201, batch(updated)), (201, batch(answer("my-run")))) as server:
        dry, done, new = (run("publish", folder, *said, "--url", server.url) for said in (["--dry-run"], [], []))
    assert server.sent[0] == {"adapters": [{"path": str(folder), "name": "my-run"}]}
    assert "my-run: this name was live already" in words(dry.stderr) and "rollback" not in words(dry.stderr)
    assert "`loraretriever rollback my-run`" in words(done.stderr) and "live already" not in words(new.stderr)


@pytest.mark.parametrize("said", [[], ["--dry-run"]])
def test_folders_that_would_share_a_name_are_refused(tmp_path: Path, said: list[str]) -> None:
    folders = [*adapters(tmp_path / "first", "a b"), *adapters(tmp_path / "second", "a-b")]
    with scripted((500, {})) as server:
        result = run("publish", *folders, *said, "--url", server.url)
    assert (result.exit_code, server.asked) == (2, []) and "'a-b' would be the name of 2" in words(result.stderr)


def test_a_warning_is_printed_with_the_adapters_name(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    with scripted((201, batch(answer("poet", warnings=["was it trained?"])))) as server:
        result = run("publish", poet, "--url", server.url)
    assert (result.exit_code, words(result.stderr)) == (0, "warning: poet: was it trained?")


def test_a_warning_of_several_adapters_is_printed_once_with_their_names(tmp_path: Path) -> None:
    folders = adapters(tmp_path, "bard", "poet")
    answers = [answer("bard", warnings=["one wording"]), answer("poet", warnings=["one wording", "no effect"])]
    with scripted((201, batch(*answers))) as server:
        result = run("publish", *folders, "--url", server.url)
    assert words(result.stderr).startswith("warning: bard, poet: one wording warning: poet: no effect")


def test_a_folder_of_adapters_means_all_of_them_in_few_requests(tmp_path: Path) -> None:
    folders = adapters(tmp_path, *[f"a{number:03}" for number in range(70)])
    names = [folder.name for folder in folders]
    with scripted((201, lambda sent: batch(*[answer(Path(a["path"]).name) for a in sent["adapters"]]))) as server:
        result = run("publish", tmp_path, "--url", server.url)
    assert result.exit_code == 0
    assert sorted(len(body["adapters"]) for body in server.sent) == [6, 64]
    assert [line.split()[0] for line in result.stdout.splitlines()] == names


def test_each_failure_names_its_folder_and_the_others_continue(tmp_path: Path) -> None:
    folders = adapters(tmp_path, "bad", "poet", "worse")
    rows = refused(400, "it is bad"), answer("poet", replicas={"ready": 1, "behind": 2}), refused(404, "it is gone")
    with scripted((207, batch(*rows))) as server:
        result = run("publish", *folders, "--url", server.url)
    assert result.exit_code == 1
    assert "poet is live at generation 4 (2 replicas are not up to date yet)" in words(result.stdout)
    assert [
        f"{folder}: {said}" in words(result.stderr)
        for folder, said in zip(folders[::2], ("it is bad", "it is gone"), strict=True)
    ] == [True] * 2
    assert "1 live, 2 refused" in words(result.stderr)


def test_a_refusal_that_names_the_adapter_does_not_repeat_its_folder(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    with scripted((207, batch(refused(400, "adapter 'poet' refused: it is bad")))) as server:
        result = run("publish", poet, "--url", server.url)
    assert words(result.stderr) == "adapter 'poet' refused: it is bad"


def test_a_server_that_refuses_the_request_refuses_every_folder(tmp_path: Path) -> None:
    folders = adapters(tmp_path, "one", "two")
    with scripted((403, refusal("publishing is off"))) as server:
        result = run("publish", *folders, "--url", server.url)
    assert (result.exit_code, len(server.asked)) == (1, 1)
    assert words(result.stderr).startswith("2 adapters refused: publishing is off one, two")


def test_an_unlisted_adapter_is_named_with_its_end(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    row = answer("poet", found_by_auto=False, expires_at="2026-01-02T03:04:05.678901+00:00")
    with scripted((201, batch(row))) as server:
        result = run("publish", poet, "--ttl", "600", "--url", server.url)
    assert words(result.stdout) == "poet is live at generation 4 (by name only, until 2026-01-02T03:04:05 UTC)"


def test_equal_reasons_are_printed_once_and_whole_with_the_names(tmp_path: Path) -> None:
    folders = adapters(tmp_path, "one", "two")
    folders += adapters(tmp_path / "run", "checkpoint-5") + adapters(tmp_path, "other")
    remedy = "it names another base; " * 50 + "set base_model_name_or_path"
    rows = [refused(400, f"adapter {name!r} refused: {remedy}") for name in ("one", "two", "run")]
    with scripted((207, batch(*rows, refused(400, "adapter 'other' refused: it is bad")))) as server:
        result = run("publish", *folders, "--url", server.url)
    said = words(result.stderr)
    assert f"3 adapters refused: {remedy} one, two, run adapter 'other' refused: it is bad" in said
    assert said.count("another base") == 50
    assert said.endswith("refused: one, two, run, other"), "a checkpoint is named as its run"


def test_one_name_cannot_be_used_for_two_adapters(tmp_path: Path) -> None:
    adapters(tmp_path, "one", "two")
    with scripted((500, {})) as server:
        result = run("publish", tmp_path, "--name", "bard", "--url", server.url)
    assert (result.exit_code, server.asked) == (2, [])
    assert "one name cannot be used for 2 adapters" in words(result.stderr)


class Pauses:
    """Publishing to a scripted server; `waits` are the pauses."""

    def __init__(self, url: str, **fields: Any) -> None:
        self.waits: list[float] = []
        self.client = httpx.Client(base_url=url)
        self.publishing = AdapterPublisher(self.client, fields, {}, sleep=self.waits.append)


def test_only_folders_that_got_a_503_are_sent_again(tmp_path: Path) -> None:
    one, two, three = adapters(tmp_path, "one", "two", "three")
    busy = refused(503, "the store is down")
    first = batch(answer("one"), busy, busy)
    with scripted(
        (207, first), (503, refusal("overloaded")), (207, batch(answer("two"), refused(400, "bad")))
    ) as server:
        pauses = Pauses(server.url)
        answers = list(pauses.publishing.by_path([Item(one), Item(two), Item(three)]))
        pauses.client.close()
    assert [(item.place, row["status"]) for item, row in answers] == [(one, 201), (two, 201), (three, 400)]
    assert [len(body["adapters"]) for body in server.sent] == [3, 2, 2]
    assert pauses.waits == [1.0, 2.0]


def test_a_server_that_is_always_overloaded_is_given_up(tmp_path: Path) -> None:
    [one] = adapters(tmp_path, "one")
    with scripted((207, batch(refused(503, "the store is down")))) as server:
        pauses = Pauses(server.url)
        [(item, row)] = pauses.publishing.by_path([Item(one)])
        pauses.client.close()
    assert (item.place, row["error"]["message"]) == (one, "the store is down")
    assert (len(server.asked), pauses.waits) == (4, [1.0, 2.0, 4.0])


def test_uploads_send_one_folder_per_request(tmp_path: Path) -> None:
    folders = adapters(tmp_path, "poet", "bard")
    (tmp_path / "poet" / "lora_samples.jsonl").write_text("samples of poet")
    reply = {key: value for key, value in answer("x").items() if key != "status"}
    with scripted((201, reply)) as server:
        result = run("publish", *folders, "--upload", "--tag", "fun", "--url", server.url)
    assert result.exit_code == 0
    assert all(kind.startswith("multipart/form-data; boundary=") for kind in server.content_types)
    first, second = server.bodies
    for part in (
        b'name="name"\r\n\r\npoet',
        b'name="tags"\r\n\r\nfun',
        b'filename="adapter_config.json"',
        b"config of poet",
        b"samples of poet",
    ):
        assert part in first
    assert b"large" not in first
    assert b"config of bard" in second


def test_an_upload_is_also_sent_again(tmp_path: Path) -> None:
    [one] = adapters(tmp_path, "one")
    with scripted((503, refusal("overloaded")), (202, answer("one"))) as server:
        pauses = Pauses(server.url, name="singer")
        [(_, row)] = pauses.publishing.by_upload([Item(one)])
        pauses.client.close()
    assert (row["name"], pauses.waits) == ("one", [1.0])
    assert [b"config of one" in body and b"singer" in body for body in server.bodies] == [True, True]


def test_a_folder_without_an_adapter_is_reported_and_not_sent(tmp_path: Path) -> None:
    with scripted((500, {})) as server:
        result = run("publish", tmp_path, "--upload", "--url", server.url)
    assert (result.exit_code, server.asked) == (1, [])
    assert f"{tmp_path}: no adapter here" in words(result.stderr)


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("http://127.0.0.1:8000", "application/json"),
        ("http://localhost:8000/live", "application/json"),
        ("http://[::1]:8000", "application/json"),
        ("http://10.0.0.1:8000", "multipart/form-data"),
        ("https://pool.example", "multipart/form-data"),
    ],
)
def test_paths_are_sent_only_to_a_local_server(url: str, kind: str, tmp_path: Path) -> None:
    [one] = adapters(tmp_path, "one")
    assert is_this_machine(url) is (kind == "application/json")
    seen: list[str] = []

    def reply(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["content-type"].partition(";")[0])
        row = answer("one")
        return httpx.Response(201, json=row if kind != "application/json" else batch(row))

    with httpx.Client(base_url=url, transport=httpx.MockTransport(reply)) as client:
        publishing = AdapterPublisher(client, {}, {})
        send = publishing.by_path if is_this_machine(url) else publishing.by_upload
        assert [row["name"] for _, row in send([Item(one)])] == ["one"]
    assert seen == [kind]


def test_a_link_is_not_followed_and_nothing_is_sent(tmp_path: Path) -> None:
    """A foreign folder may have a link to any file that its publisher can read."""
    [poet, plain] = adapters(tmp_path, "poet", "plain")
    (tmp_path / "secret.txt").write_text("a secret")
    (poet / "description.txt").symlink_to("../secret.txt")
    with scripted((201, answer("plain"))) as server:
        result = run("publish", poet, plain, "--upload", "--url", server.url)
    assert result.exit_code == 1
    assert "description.txt is a symbolic link" in words(result.stderr)
    assert server.asked == [("POST", "/v1/loras")]
    assert b"a secret" not in b"".join(server.bodies)


def test_a_file_that_becomes_a_link_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("text")
    (tmp_path / "link").symlink_to("plain")
    with open(tmp_path / "plain", "rb", opener=open_without_links) as file:
        assert file.read() == b"text"
    with pytest.raises(OSError, match="symbolic links"), open(tmp_path / "link", "rb", opener=open_without_links):
        pass


def test_with_a_key_files_are_sent_to_a_server_on_this_machine_too(tmp_path: Path) -> None:
    [poet] = adapters(tmp_path, "poet")
    with scripted((201, answer("poet"))) as server:
        result = run("--key", "lr-x", "publish", poet, "--url", server.url)
    assert result.exit_code == 0, result.stderr
    assert server.content_types[0].startswith("multipart/form-data")
    assert b"config of poet" in server.bodies[0]
