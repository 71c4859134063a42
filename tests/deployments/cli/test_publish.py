from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.cli import adapter_publisher
from deployments.cli.adapter_publisher import AdapterPublisher, Item, open_without_links
from deployments.cli.client import is_this_machine
from deployments.publishing import adapter_folders
from tests.deployments.scripted import Answer, Outcome, refusal, run_with, scripted


def answer(name: str, **changes: Any) -> dict[str, Any]:
    plain = {"status": 201, "name": name, "generation": 4, "found_by_auto": True}
    return plain | {"replicas": {"ready": 1, "behind": 0}} | changes


def refused(status: int, message: str) -> dict[str, Any]:
    return {"status": status, **refusal(message)}


def batch(*answers: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": list(answers)}


def publish(rows: Any, *arguments: object) -> Outcome:
    """Publish to a server that answers with this row, these rows, or these answers of status and body."""
    if isinstance(rows, dict):
        rows = [rows]
    return run_with((207, batch(*rows)) if isinstance(rows[0], dict) else list(rows), "publish", *arguments)


def publish_nothing(*arguments: object) -> Outcome:
    """Publish to a server that must not be asked."""
    said = run_with((500, {}), "publish", *arguments)
    assert said.asked == []
    return said


def adapters(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text(f"config of {name}")
        (folder / name / "optimizer.pt").write_text("large")
    return [folder / name for name in names]


@pytest.fixture
def poet(tmp_path: Path) -> Path:
    return adapters(tmp_path, "poet")[0]


def test_absolute_paths_are_sent_and_the_generation_is_printed(poet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(poet.parent)
    said = publish(answer("poet", found_by_auto=False), "poet")
    assert (said.code, said.asked) == (0, [("POST", "/v1/loras")])
    assert said.sent == [{"adapters": [{"path": str(poet)}]}]
    hint = "(by name only: add lora_samples.jsonl or description.txt for auto)"
    assert said.out == f"poet is live at generation 4 {hint}"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (
            ("--name", "bard", "--tag", "fun", "--tag", "short", "--template", "chat"),
            {"name": "bard", "tags": ["fun", "short"], "template": "chat"},
        ),
        (("--base-name", "tiny"), {"base_model": "tiny"}),
        (("--share", "10"), {"share": 0.1}),
        (("--ttl", "0"), {"ttl_s": 0.0}),  # the server refuses it; it was never permanent
        (("--public",), {"visibility": "public"}),
        (("--private",), {"visibility": "private"}),
        (
            ("--no-tags", "--template", "server", "--no-samples", "--no-contract"),
            {"tags": [], "template": "server", "samples": [], "contract": {}},
        ),
    ],
)
def test_what_is_given_is_sent(poet: Path, given: tuple[str, ...], sent: dict[str, Any]) -> None:
    assert publish(answer("poet"), poet, *given).sent == [{"adapters": [{"path": str(poet)} | sent]}]


def test_an_upload_sends_what_is_cleared(poet: Path) -> None:
    cleared = ("--no-tags", "--template", "server", "--no-samples", "--no-contract")
    said = publish([(201, answer("poet"))], poet, *cleared, "--upload")
    [body] = said.server.bodies
    assert said.code == 0 and b'name="contract"\r\n\r\n{}\r\n' in body
    assert all(f'name="{field}"\r\n\r\n\r\n'.encode() in body for field in ("tags", "samples"))


def test_a_contract_in_a_file_is_sent_as_json_and_a_bad_one_is_not(poet: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("instruction: 'Rhyme: {input}'\nstop: END\n")
    bad.write_text("sampling: {temperature: hot}\n")
    said = publish(answer("poet", kept={"contract": {"stop": ["END"]}}), poet, "--contract", good)
    sent = {"instruction": "Rhyme: {input}", "stop": ["END"]}
    assert said.sent == [{"adapters": [{"path": str(poet), "contract": sent}]}]
    assert said.out.endswith("contract: stop (kept)")
    wrong = publish_nothing(poet, "--contract", bad)
    assert (wrong.code, "sampling.temperature: must be a number" in wrong.err) == (1, True)


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (("poet", "--share", "0"), 2, "must be above 0"),
        (("poet", "--no-tags", "--tag", "x"), 2, "cannot be combined with --tag"),
        (("poet", "--no-samples", "--samples", "t.jsonl"), 2, "cannot be combined with --samples"),
        (("poet", "--no-contract", "--contract", "io.yaml"), 2, "cannot be combined with --contract"),
        (("poet", "--samples", "unlabelled.jsonl"), 1, "known forms are Alpaca"),
        (("two", "--samples", "unlabelled.jsonl"), 2, "one training file goes with one adapter folder"),
        (("two", "--name", "bard"), 2, "one name cannot be used for 2 adapters"),
        (("two", "first/a b", "second/a-b"), 2, "'a-b' would be the name of 2"),
        (("hf://acme/many@v1/poet", "hf://acme/many@v2/poet"), 2, "'poet' would be the name of 2"),
        (("models:/sql/3", "runs:/r1/sql"), 2, "'sql' would be the name of 2"),
        (("poet", "s3://bucket/poet"), 2, "'poet' would be the name of 2"),
        (("none", "--upload"), 1, "none: no adapter here"),
        ((), 2, "FOLDER: is missing"),
        (("poet", "--prune"), 2, "--prune: needs --file"),
        (("--file", "pool.yaml", "poet"), 2, "--file: describes each adapter"),
        (("--file", "pool.yaml", "--tag", "x"), 2, "--file: describes each adapter"),
        (("poet", "--config", "x.yaml"), 2, "--config: needs --dry-run"),
        (("poet", "--parity"), 2, "--parity: needs --dry-run"),
        (("s3://bucket/poet", "--dry-run", "--config", "x.yaml"), 2, "only a server can read s3://bucket/poet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_call_is_refused_and_nothing_is_sent(
    given: tuple[str, ...], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters(tmp_path, "poet", "two/one", "two/other", "first/a b", "second/a-b")
    (tmp_path / "none").mkdir()
    (tmp_path / "unlabelled.jsonl").write_text('{"label": 1}')
    monkeypatch.chdir(tmp_path)
    said = publish_nothing(*given)
    assert (said.code, says in said.err) == (code, True), said.err


def test_a_training_run_publishes_its_last_checkpoint_under_its_own_name(tmp_path: Path) -> None:
    _, last, _ = adapters(tmp_path / "my-task", "checkpoint-9", "checkpoint-100", "checkpoint-20")
    for given, name in (([last.parent], "my-task"), ([last], "my-task"), ([last, "--name", "bard"], "bard")):
        assert publish(answer(name), *given).sent == [{"adapters": [{"path": str(last), "name": name}]}]


def test_a_source_is_sent_as_its_uri_and_named_once_if_it_is_refused() -> None:
    for uri in ("hf://acme/sql@v2", "runs:/r1/peft", "models:/sql/3", "s3://bucket/poet"):
        for upload in ((), ("--upload",)):
            said = publish(answer("sql"), uri, "--tag", "db", *upload)
            assert (said.code, said.sent) == (0, [{"adapters": [{"source": uri, "tags": ["db"]}]}])
    said = publish(refused(403, "the source 'hf://acme/sql' is not below a source prefix"), "hf://acme/sql")
    assert (said.code, said.err.count("hf://acme/sql")) == (1, 1)


def test_samples_of_a_training_file_are_uploaded_in_place_of_the_folders_own(poet: Path, tmp_path: Path) -> None:
    (poet / "lora_samples.jsonl").write_text("own samples")
    train = tmp_path / "train.jsonl"
    train.write_text('{"messages": [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}]}')
    said = publish([(201, answer("poet"))], poet, "--samples", train)
    assert (said.code, said.err) == (0, f"1 sample from {train}")
    [body] = said.server.bodies
    assert b'{"input": "Sing.", "output": "La."}' in body
    assert b"own samples" not in body and body.count(b'filename="lora_samples.jsonl"') == 1


@pytest.mark.parametrize("upload", [(), ("--upload",)])
def test_a_dry_run_says_what_would_be_published(upload: tuple[str, ...], poet: Path) -> None:
    row = answer("poet", status=200, generation=0, neighbours=[{"name": "bard", "digest": "d", "score": 0.987}])
    said = publish([(200, row)] if upload else row, poet, "--dry-run", *upload)
    assert said.out == "poet is fit to publish (nearest is bard at 0.99)"
    assert said.asked == [("POST", "/v1/loras?dry_run=true")]


def test_a_folder_of_adapters_is_sent_in_few_requests_and_its_summary_names_the_refused(tmp_path: Path) -> None:
    names = [folder.name for folder in adapters(tmp_path, *[f"a{number:03}" for number in range(70)])]
    bad = set(names[::5])

    def outcome(sent: dict[str, Any]) -> dict[str, Any]:
        wanted = [Path(adapter["path"]).name for adapter in sent["adapters"]]
        return batch(*[refused(400, "bad") if n in bad else answer(n, found_by_auto=n != "a001") for n in wanted])

    said = publish([(207, outcome)], tmp_path)
    assert (said.code, len(bad)) == (1, 14)
    assert sorted(len(body["adapters"]) for body in said.sent) == [6, 64]
    assert [line.split()[0] for line in said.stdout.splitlines()] == [name for name in names if name not in bad]
    assert "56 live (1 by name only), 14 refused" in said.err
    assert said.err.endswith(f"refused: {', '.join(sorted(bad))}")


def test_the_outcome_of_every_folder_is_printed_as_json(tmp_path: Path) -> None:
    poet, bard = adapters(tmp_path, "poet", "bard")
    rows = answer("poet"), refused(400, "no")
    said = publish(rows, poet, bard, "--json")
    assert said.code == 1
    assert said.json["data"] == [{"folder": str(poet), **rows[0]}, {"folder": str(bard), **rows[1]}]


def test_a_nearest_name_that_is_live_already_is_warned_of(tmp_path: Path) -> None:
    [folder] = adapters(tmp_path, "my run")
    updated = answer("my-run", kept={"visibility": "public"})
    dry, done, new = publish(updated, folder, "--dry-run"), publish(updated, folder), publish(answer("my-run"), folder)
    assert dry.sent == [{"adapters": [{"path": str(folder), "name": "my-run"}]}]
    assert "my-run: this name was live already" in dry.err and "rollback" not in dry.err
    assert "`loraretriever rollback my-run`" in done.err and "live already" not in new.err


def test_a_warning_is_printed_once_with_the_names_of_its_adapters(tmp_path: Path) -> None:
    bard, poet = adapters(tmp_path, "bard", "poet")
    one = publish(answer("poet", warnings=["was it trained?"]), poet)
    assert (one.code, one.err) == (0, "warning: poet: was it trained?")
    rows = [answer("bard", warnings=["one wording"]), answer("poet", warnings=["one wording", "no effect"])]
    assert publish(rows, bard, poet).err.startswith("warning: bard, poet: one wording warning: poet: no effect")


def test_each_failure_names_its_folder_and_the_others_continue(tmp_path: Path) -> None:
    bad, poet, worse = adapters(tmp_path, "bad", "poet", "worse")
    said = publish([refused(400, "it is bad"), answer("poet"), refused(404, "it is gone")], bad, poet, worse)
    assert (said.code, said.out) == (1, "poet is live at generation 4")
    assert all(part in said.err for part in (f"{bad}: it is bad", f"{worse}: it is gone", "1 live, 2 refused"))
    named = publish(refused(400, "adapter 'poet' refused: it is bad"), poet)
    assert named.err == "adapter 'poet' refused: it is bad", "a refusal that names the adapter needs no folder"


def test_a_server_that_refuses_the_request_refuses_every_folder(tmp_path: Path) -> None:
    said = publish([(403, refusal("publishing is off"))], *adapters(tmp_path, "one", "two"))
    assert (said.code, len(said.asked)) == (1, 1)
    assert said.err.startswith("2 adapters refused: publishing is off one, two")


def malformed(place: int, problem: str) -> Answer:
    """Return the answer to a request whose entry at this place has a wrong field."""
    return 400, {"error": refusal(f"adapters.{place}.{problem}")["error"] | {"param": f"adapters.{place}.name"}}


def test_a_malformed_entry_is_refused_alone_and_the_others_are_sent_again(tmp_path: Path) -> None:
    folders = adapters(tmp_path, *"abcd")
    wrong = "name: must have at most 64 characters"
    answers = malformed(1, wrong), malformed(2, wrong), (207, batch(answer("a"), refused(404, "it is gone")))
    rows, server, waits = send("by_path", folders, *answers)
    sent = [[Path(adapter["path"]).name for adapter in body["adapters"]] for body in server.sent]
    assert sent == [["a", "b", "c", "d"], ["a", "c", "d"], ["a", "c"]] and waits == []
    named = [(place.name, row["status"], row.get("error", {}).get("message")) for place, row in rows]
    assert named == [("a", 201, None), ("b", 400, wrong), ("c", 404, "it is gone"), ("d", 400, wrong)]


def test_entries_that_are_all_malformed_end_the_requests(tmp_path: Path) -> None:
    rows, server, _ = send("by_path", adapters(tmp_path, *"abc"), malformed(0, "name: is wrong"))
    assert [row["error"]["message"] for _, row in rows] == ["name: is wrong"] * 3 and len(server.asked) == 3
    rows, server, _ = send("by_path", adapters(tmp_path / "other", *"abc"), malformed(7, "name: is wrong"))
    assert [row["status"] for _, row in rows] == [400] * 3 and len(server.asked) == 1, "there is no such entry"


def test_equal_reasons_are_printed_once_and_whole_with_the_names(tmp_path: Path) -> None:
    folders = adapters(tmp_path, "one", "two")
    folders += adapters(tmp_path / "run", "checkpoint-5") + adapters(tmp_path, "other")
    remedy = "it names another base; " * 50 + "set base_model_name_or_path"
    rows = [refused(400, f"adapter {name!r} refused: {remedy}") for name in ("one", "two", "run")]
    said = publish([*rows, refused(400, "adapter 'other' refused: it is bad")], *folders).err
    assert f"3 adapters refused: {remedy} one, two, run adapter 'other' refused: it is bad" in said
    assert said.count("another base") == 50
    assert said.endswith("refused: one, two, run, other"), "a checkpoint is named as its run"


def send(method: str, folders: list[Path], *answers: Answer, **fields: Any) -> tuple[Any, Any, list[float]]:
    """Return what a publisher got for each folder, the requests, and its pauses."""
    waits: list[float] = []
    with scripted(*answers) as server, httpx.Client(base_url=server.url) as client:
        publishing = AdapterPublisher(client, fields, {}, sleep=waits.append)
        rows = [(item.place, row) for item, row in getattr(publishing, method)([*map(Item, folders)])]
    return rows, server, waits


def test_only_folders_that_got_a_503_are_sent_again(tmp_path: Path) -> None:
    folders = adapters(tmp_path, "one", "two", "three")
    busy = refused(503, "the store is down")
    first, last = batch(answer("one"), busy, busy), batch(answer("two"), refused(400, "bad"))
    rows, server, waits = send("by_path", folders, (207, first), (503, refusal("overloaded")), (207, last))
    assert [(place, row["status"]) for place, row in rows] == list(zip(folders, (201, 201, 400), strict=True))
    assert [len(body["adapters"]) for body in server.sent] == [3, 2, 2]
    assert waits == [1.0, 2.0]


def test_a_server_that_is_always_overloaded_is_given_up(poet: Path) -> None:
    [(place, row)], server, waits = send("by_path", [poet], (207, batch(refused(503, "the store is down"))))
    assert (place, row["error"]["message"]) == (poet, "the store is down")
    assert (len(server.asked), waits) == (4, [1.0, 2.0, 4.0])


def test_a_limit_of_the_key_is_waited_for(tmp_path: Path) -> None:
    folders = adapters(tmp_path, "one", "two")
    limited = 429, refusal("the key's limit of 1 requests per minute is exceeded"), {"Retry-After": "20"}
    done = 201, answer("one")
    rows, server, waits = send("by_upload", folders, done, *[limited] * 6, done)
    assert [row["status"] for _, row in rows] == [201, 201] and len(server.asked) == 8
    assert waits == [20.0] * 6


@pytest.mark.parametrize(("asked", "waits"), [("7", 7), ("900", 60), ("Wed, 21 Oct 2026 07:28:00 GMT", 1), ("0", 1)])
def test_the_server_says_how_long_to_wait_up_to_a_minute(poet: Path, asked: str, waits: float) -> None:
    busy = 503, refusal("overloaded"), {"Retry-After": asked}
    assert send("by_path", [poet], busy, (207, batch(answer("poet"))))[2] == [waits]


def test_a_limit_that_others_use_up_ends_the_retries(poet: Path) -> None:
    [(_, row)], server, waits = send("by_path", [poet], (429, refusal("the limit is exceeded"), {"Retry-After": "60"}))
    assert row == refused(429, "the limit is exceeded")
    assert (len(server.asked), waits) == (31, [60.0] * 30)


def test_an_interrupted_command_does_not_wait_for_a_limit(poet: Path) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def interrupt(_: Any) -> dict[str, Any]:
        signal.pthread_kill(main, signal.SIGINT)
        return refusal("the limit is exceeded")

    with scripted((429, interrupt, {"Retry-After": "60"})) as server, httpx.Client(base_url=server.url) as client:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            list(AdapterPublisher(client, {}, {}).by_path([Item(poet)]))
        assert time.monotonic() - began < 30 and len(server.asked) == 1


def test_uploads_send_one_folder_per_request(tmp_path: Path) -> None:
    folders = adapters(tmp_path, "poet", "bard")
    (tmp_path / "poet" / "lora_samples.jsonl").write_text("samples of poet")
    reply = {key: value for key, value in answer("x").items() if key != "status"}
    said = publish([(201, reply)], *folders, "--upload", "--tag", "fun")
    assert said.code == 0
    assert all(kind.startswith("multipart/form-data; boundary=") for kind in said.server.content_types)
    first, second = said.server.bodies
    parts = (b'name="name"\r\n\r\npoet', b'name="tags"\r\n\r\nfun', b'filename="adapter_config.json"')
    assert all(part in first for part in (*parts, b"config of poet", b"samples of poet"))
    assert b"large" not in first and b"config of bard" in second


def test_the_upload_of_one_adapter_reports_every_byte(poet: Path) -> None:
    (poet / "adapter_model.safetensors").write_bytes(b"w" * 200_000)
    sent: list[int] = []
    with scripted((201, answer("poet"))) as server, httpx.Client(base_url=server.url) as client:
        list(AdapterPublisher(client, {}, {}, sent=sent.append).by_upload([Item(poet)]))
    assert sum(sent) == 200_000 + len("config of poet") and len(sent) > 3


def test_an_upload_is_also_sent_again(poet: Path) -> None:
    overloaded = 503, refusal("overloaded")
    [(_, row)], server, waits = send("by_upload", [poet], overloaded, (202, answer("poet")), name="singer")
    assert (row["name"], waits) == ("poet", [1.0])
    assert [b"config of poet" in body and b"singer" in body for body in server.bodies] == [True, True]


@pytest.mark.parametrize(
    ("url", "is_local"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost:8000/live", True),
        ("http://[::1]:8000", True),
        ("http://10.0.0.1:8000", False),
        ("https://pool.example", False),
    ],
)
def test_paths_are_sent_only_to_a_server_on_this_machine(url: str, is_local: bool) -> None:
    assert is_this_machine(url) is is_local


def test_with_a_key_files_are_sent_to_a_server_on_this_machine_too(poet: Path) -> None:
    said = run_with((201, answer("poet")), "--key", "lr-x", "publish", poet)
    assert said.code == 0, said.err
    assert said.server.content_types[0].startswith("multipart/form-data") and b"config of poet" in said.server.bodies[0]


def test_a_link_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    with open(tmp_path / "plain", "rb", opener=open_without_links) as file:
        assert file.read() == b"12345"
    with pytest.raises(OSError, match="symbolic links"):
        open_without_links(str(tmp_path / "link"), os.O_RDONLY)


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_sent(
    poet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: str, flags: int) -> int:
        if Path(path).parent == poet:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open_without_links(path, flags)

    monkeypatch.setattr(adapter_publisher, "open_without_links", opened)
    said = publish([(201, answer("plain"))], poet, *adapters(tmp_path, "plain"), "--upload")
    assert (said.code, said.asked) == (1, [("POST", "/v1/loras")])
    assert f"{poet / 'adapter_config.json'}: Permission denied" in said.err and "plain is live" in said.out


@pytest.mark.parametrize("listed", [False, True])
def test_a_folder_that_cannot_be_read_is_named(listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    file = tmp_path / "pool.yaml"
    file.write_text("adapters: [{source: closed}]")
    monkeypatch.setattr(adapter_folders, "_adapter_at", refuse)
    said = publish([(201, {})], *(["--file", file] if listed else [tmp_path / "closed"]))
    assert (said.code, said.asked) == (1, [])
    assert f"{'adapters: closed' if listed else tmp_path / 'closed'}: Permission denied" in said.err


def test_a_link_is_not_followed_and_nothing_is_sent(poet: Path, tmp_path: Path) -> None:
    """A foreign folder may have a link to any file that its publisher can read."""
    (tmp_path / "secret.txt").write_text("a secret")
    (poet / "description.txt").symlink_to("../secret.txt")
    said = publish([(201, answer("plain"))], poet, *adapters(tmp_path, "plain"), "--upload")
    assert (said.code, said.asked) == (1, [("POST", "/v1/loras")])
    assert "description.txt is a symbolic link" in said.err and b"a secret" not in said.server.bodies[0]
