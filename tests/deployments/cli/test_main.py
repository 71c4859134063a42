from __future__ import annotations

import importlib.metadata
import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.api.pool_responses import unserved_objects
from deployments.cli.options import MOVED
from lora_store import ROUTED_STRATEGIES
from tests.deployments.listening import listener
from tests.deployments.scripted import COMMAND, run, run_alone, run_with, scripted, words

BASE_PLAN: dict[str, Any] = {"strategy": "base", "adapters": []}


def events_of(*events: dict[str, Any], done: bool = True) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if done else "")


def delta(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}], **more}


def make_stream(*texts: str, lora: dict[str, Any] = BASE_PLAN) -> str:
    return events_of(delta("", lora=lora), *map(delta, texts), {"choices": []})


def test_the_program_prints_its_version_and_its_help_if_there_is_no_command() -> None:
    result, full = run("--version"), run("--help")
    assert (result.exit_code, result.stdout) == (0, f"loraretriever {importlib.metadata.version('loraretriever')}\n")
    assert (full.exit_code, run("-h").stdout, run().stdout) == (0, full.stdout, full.stdout)
    assert "--install-completion" in full.stdout
    for group in ("trial", "access", "pool", "keys", "samples", "name"):
        shown = run(group)
        assert (shown.exit_code, f"{group} [OPTIONS] COMMAND" in shown.stdout) == (0, True)


def test_an_old_or_foreign_name_is_answered_with_the_one_to_type() -> None:
    for old, hint in MOVED.items():
        result = run(old, "x")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == f"there is no {old!r}; use {hint}\n"
        for typed in re.findall(r"`loraretriever ([a-z]+)(?: ([a-z]+)\b)?", hint):
            command = COMMAND.commands[typed[0]]
            assert not getattr(command, "commands", None) or typed[1] in command.commands, hint


def commands_of(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command below this one with its path."""
    for name, each in getattr(command, "commands", {}).items():
        yield from commands_of(each, *path, name)
    if not getattr(command, "commands", None):
        yield path, command


def test_no_option_takes_a_number_that_json_does_not_have() -> None:
    found = [(path, p) for path, each in commands_of(COMMAND) for p in each.params]
    numbers = [(path, param) for path, param in found if param.type_descriptor.annotation is float]
    assert len(numbers) >= 7
    for path, param in numbers:
        before = ["x"] if path == ("trial", "start") else []
        for value in ("nan", "inf"):
            given = [value] if param.param_type_name == "argument" else [f"{param.opts[0]}={value}"]
            result = run(*path, *before, *given)
            assert result.exit_code == 2 and "Invalid value" in words(result.stderr), (path, result.stderr)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--host", ""), "--host: is empty; give a value, or leave the option out"),
        (("--store", ""), "--store: is empty"),
        (("--base-model", ""), "--base-model: is empty"),
        (("--port", "70000"), "Invalid value for '--port'"),
        (("--metrics-port", "-1"), "Invalid value for '--metrics-port'"),
    ],
)
def test_an_option_of_an_unset_variable_or_a_wrong_port_starts_no_server(option: tuple[str, str], says: str) -> None:
    result = run("serve", "--print-config", *option)
    assert result.exit_code in (1, 2) and says in words(result.stderr) and result.stdout == ""


def test_help_shows_types_and_arguments_in_one_spelling() -> None:
    odd = ("<str>", "<bool>", "<int", "<path>", "<list", "PLACES", "......")
    for command in (("ask",), ("publish",), ("keys", "new"), ("pool", "train"), ("trial", "start"), ("batch",)):
        shown = "\n".join(line for line in run(*command, "-h").stdout.splitlines() if "--help" not in line)
        assert not any(word in shown for word in odd), shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("worker: {bank_rows: 3}", "bank_rows"),
        ("worker: [unclosed", "settings.yaml:1:18:expected"),
        (None, "settings.yaml"),
    ],
)
def test_a_bad_config_is_reported_and_nothing_starts(tmp_path: Path, folder: Path, text: str | None, said: str) -> None:
    file = tmp_path / "settings.yaml"
    if text is not None:
        file.write_text(text)
    for command in (("publish", "--dry-run", folder), ("serve",)):
        result = run(*command, "--config", file)
        assert result.exit_code == 1 and said in "".join(result.stderr.split())


def test_serve_names_a_preloaded_folder_that_holds_no_adapter(config: Path, tmp_path: Path) -> None:
    result = run("serve", "--config", config, "--port", 0, "--preload", tmp_path / "typo")
    assert result.exit_code == 1 and "typo" in result.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("worker: {engine: vllm}", "set worker.engine to native"),
        ("keys_file: nokeys.yaml", "nokeys.yaml: no such file; `loraretriever keys new --file` makes"),
    ],
)
def test_serve_refuses_files_that_it_cannot_use_before_anything_starts(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    (tmp_path / "x.gguf").touch()
    given = ("--config", tmp_path / "settings.yaml", "--base-model", tmp_path / "x.gguf")
    result = run("serve", *given, "--print-config")
    assert result.exit_code == 1 and says in words(result.stderr)


def test_commands_import_only_what_they_need_and_print_whole_lines_to_a_pipe(folder: Path, config: Path) -> None:
    """Each of them takes seconds to import. The lightest commands come first in the one process."""
    os.unsetenv("COLUMNS")  # readline sets it for other processes
    of_servers = ("torch", "ray", "ray.data", "transformers", "fastapi", "huggingface_hub")
    row: dict[str, Any] = {"id": "x" * 60, "digest": "d" * 64, "ranks": [2, 4], "num_bytes": 9, "num_samples": 0}
    row |= {"found_by_auto": False, "tags": ["fun", "short"]}
    with listener() as port, scripted((200, {"generation": 1, "data": [row], "has_more": False})) as server:
        version, listed, no_model, no_port, settings, dry, no_rows = run_alone(
            (*of_servers, "numpy", "pyarrow", "pydantic", "lora_store"),
            ("--version",),
            ("list", "--url", server.url),
            ("serve", "--base-model", "/nosuch/model", "--port", 0),
            ("serve", "--port", port),
            ("serve", "--print-config"),
            ("publish", "--dry-run", folder, "--config", config),
            ("batch", "nofile.parquet", folder.parent / "out"),
        )
    assert version[::3] == (0, [])
    [line] = [line for line in listed[1].splitlines() if row["id"] in line]
    assert all(part in line for part in ("d" * 12, "2, 4", "by name only", "fun, short"))
    assert no_model[:3] == (1, "", "base_model: /nosuch/model: no such folder or GGUF file")
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in words(no_port[2])
    assert no_port[0] == 1 and "--port 0 uses a free port" in words(no_port[2])
    assert settings[::2] == (0, "") and "base_model: " in settings[1]
    assert dry[0] == 0 and "fit to publish" in words(dry[1])
    assert not {*of_servers} & set(dry[3]), "also of the commands before it"
    assert no_rows[:3] == (1, "", "no parquet file at nofile.parquet") and not {"torch", "ray.data"} & set(no_rows[3])


def test_serve_prints_the_settings_in_use_without_secrets(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("api_key: a-long-secret\nworker: {max_batch_size: 8}\nretrieval: {k: 2}\n")
    options = ("--base-model", "far/model", "--device", "cuda", "--template", "chat", "--store", tmp_path / "pool")
    result = run("serve", "--config", file, *options, "--print-config")
    printed = yaml.safe_load(result.stdout)
    assert (printed["base_model"], printed["template"]) == ("far/model", "chat")
    assert printed["store_uri"].endswith(f"{tmp_path}/pool")
    assert (printed["worker"]["device"], printed["worker"]["max_batch_size"]) == ("cuda", 8)
    workers = printed["worker_scaling"]
    assert (workers["ray_actor_options"]["num_gpus"], workers["max_ongoing_requests"]) == (1, 2112)
    assert "a-long-secret" not in result.stdout
    assert run("serve", "--template", "jinja", "--print-config").exit_code == 1
    variables = {"env_vars": {"AWS_SECRET_ACCESS_KEY": "correct-horse"}}
    scaling = {"ray_actor_options": {"runtime_env": variables}}
    as_list = {"ray_actor_options": {"runtime_env": {"env_vars": ["AWS_SECRET_ACCESS_KEY=correct-horse"]}}}
    file.write_text(json.dumps({"store_scaling": as_list}))
    assert "correct-horse" not in run("serve", "--config", file, "--print-config").output
    for settings in ({"store_scaling": scaling}, {"models": [{"worker_scaling": scaling}]}):
        file.write_text(json.dumps(settings))
        result = run("serve", "--config", file, "--print-config")
        assert result.exit_code == 0 and "AWS_SECRET_ACCESS_KEY" in result.stdout
        assert "correct-horse" not in result.output


def test_ask_says_how_to_go_on_where_no_adapter_fits() -> None:
    answer = events_of(delta("Hi", lora=BASE_PLAN | {"abstained": True}))
    candidates = [{"name": "poet", "score": 0.2}, {"name": "bard", "score": 0.1}]
    plans = [(200, {"data": [{"candidates": some}]}) for some in (candidates, candidates[:1])]
    with scripted((200, answer), plans[0], (200, answer), (429, {}), (200, answer), plans[1]) as server:
        said = ("ask", "Hi", "--abstain", "strict", "--url", server.url)
        near, unknown, only = (words(run(*said).stderr) for _ in range(3))
    assert only.startswith("base: no adapter fits; the nearest is poet. ")
    assert near.startswith("base: no adapter fits; the nearest are poet, bard. `loraretriever route`")
    assert unknown.startswith("base: no adapter fits. `loraretriever route`") and "--model NAME" in unknown
    options = {"abstain": "strict", "k": 3, "fallback": "base"}
    assert server.sent[1] == {"prompt": "Hi", "model": "auto", "lora": options}


def test_ask_and_route_say_which_of_several_base_models_answers() -> None:
    lora = BASE_PLAN | {"base_model": "code-3b", "generation": 4, "candidates": []}
    assert run_with(events_of(delta("Hi", lora=lora)), "ask", "Hi").err == "base on code-3b: no adapter"
    candidate = {"name": "poet", "score": 0.5, "threshold": 0.75, "confidence": 0.5}
    said = run_with({"data": [lora | {"candidates": [candidate]}]}, "route", "Hi", "-m", "code-3b:auto")
    assert "base model code-3b" in said.out
    assert said.sent == [{"prompt": "Hi", "model": "code-3b:auto", "lora": {"explain": True}}]


def test_ask_streams_the_text_and_prints_the_adapters() -> None:
    lora = {"strategy": "mixture", "adapters": [{"name": "poet", "weight": 0.5}, {"name": "coder", "weight": 0.5}]}
    answer = make_stream("Hel", "lo [b]", lora=lora)
    said = run_with(answer, "ask", "Hi", "there", "--model", "poet", "--max-tokens", 7, "--abstain", "never")
    assert said.asked == [("POST", "/v1/chat/completions")]
    assert (said.code, said.stdout, said.err) == (0, "Hello [b]\n", "mixture: poet × 0.50, coder × 0.50")
    [sent] = said.sent
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["stream"]) == ("poet", 7, 0.0, True)
    assert (sent["messages"], sent["lora"]) == ([{"role": "user", "content": "Hi there"}], {"abstain": "never"})


def test_ask_and_route_print_a_text_for_a_file_as_it_is() -> None:
    text = f"all:\n\tcc a.c\rb :bug: 12:100:30 [b] {'x' * 3000} {'y ' * 1500}."
    for parts in ([text], list(text)):
        assert run_with(make_stream(*parts), "ask", "Hi").stdout == f"{text}\n"
    plan = BASE_PLAN | {"generation": 4, "candidates": [], "why": text}
    assert run_with({"data": [plan]}, "route", "Hi").stdout == f"{text}\n"


@pytest.mark.parametrize("short", [False, True])
def test_ask_sends_a_system_message_and_options_and_prints_the_whole_answer_as_json(short: bool) -> None:
    answer = {"choices": [{"message": {"content": "é"}}], "lora": BASE_PLAN}
    names = ("-s", "-k", "-o", "-n", "-m") if short else ("--system", "--k", "--option", "--max-tokens", "--model")
    values = ("Be brief.", 2, "width=0.5", 7, "poet")
    given = [part for pair in zip(names, values, strict=True) for part in pair]
    said = run_with(answer, "ask", "Hi", *given, "-o", "depth=2", "--strategy", "fusion", "--json")
    assert said.json == answer
    [sent] = said.sent
    assert [(m["role"], m["content"]) for m in sent["messages"]] == [("system", "Be brief."), ("user", "Hi")]
    assert sent["lora"] == {"strategy": "fusion", "k": 2, "strategy_options": {"width": 0.5, "depth": 2.0}}
    assert (sent["model"], sent["max_tokens"], "stream" in sent) == ("poet", 7, False)


@pytest.mark.parametrize("command", ["ask", "route"])
def test_a_choice_is_checked_before_the_server_is_asked(command: str) -> None:
    """The command refuses another one itself, and its help lists the registered strategies."""
    refused, helped = run(command, "Hi", "--strategy", "best"), run(command, "--help")
    assert (refused.exit_code, helped.exit_code) == (2, 0)
    assert all(f"'{name}'" in words(refused.stderr) and name in helped.stdout for name in ROUTED_STRATEGIES)
    result = run(command, "Hi", "--abstain", "sometimes")
    assert result.exit_code == 2 and "'never', 'lenient', 'balanced'" in words(result.stderr)


@pytest.mark.parametrize("pair", ["width", "width=wide", "width=1=2", "width=nan", ""])
def test_an_option_of_a_strategy_is_a_name_with_a_number(pair: str) -> None:
    result = run("ask", "Hi", "--option", pair)
    assert result.exit_code == 2 and "'--option': must be NAME=NUMBER" in words(result.stderr)


def test_ask_reads_the_prompt_from_standard_input() -> None:
    said = run_with(make_stream("Hello"), "ask", "-", input="two\nlines\n")
    assert (said.code, said.stdout) == (0, "Hello\n")
    assert said.sent[0]["messages"] == [{"role": "user", "content": "two\nlines"}]


def test_ask_fails_with_the_streams_error() -> None:
    body = events_of(delta("", lora=BASE_PLAN), {"error": {"message": "it stopped"}}, done=False)
    said = run_with(body, "ask", "Hi")
    assert said.code == 1 and "it stopped" in said.err


def test_route_shows_candidates_and_the_weights_of_the_plan() -> None:
    samples = [{"input": "Write\x1b a\n[poem].", "score": 0.5}]
    plan = {
        "strategy": "selection",
        "generation": 4,
        "adapters": [{"name": "poet", "weight": 1.0}],
        "candidates": [
            {"name": "poet", "score": 0.75, "threshold": 0.625, "confidence": 0.5, "samples": samples},
            {"name": "coder", "score": 0.5, "threshold": 0.875, "confidence": 0.0},
        ],
        "why": "poet fits: it scores 0.750 and needs 0.625.",
        "contract": {"adapter": "poet", "applied": ["instruction", "stop"]},
    }
    said = run_with({"data": [plan]}, "route", "Hi")
    assert (said.asked, said.sent) == ([("POST", "/v1/route")], [{"prompt": "Hi", "lora": {"explain": True}}])
    rows = [line for line in said.stdout.splitlines() if line.startswith(("│ poet", "│ coder"))]
    assert ["1.000" in row for row in rows] == [True, False]
    assert all(part in rows[0] for part in ("0.625", "0.750"))
    assert all(part in rows[1] for part in ("0.875", "0.500"))
    assert "needs 0.625" in said.stdout
    assert "poet is asked by its contract: instruction, stop." in said.out
    assert "sample of poet, 0.500: Write a [poem]." in said.out


def test_route_sends_its_options_and_prints_the_plan_as_json() -> None:
    plan = {"strategy": "selection", "generation": 4, "adapters": [], "candidates": [], "why": "no adapter fits"}
    given = ("--k", 5, "--strategy", "selection", "--tag", "fun", "--tag", "short", "--abstain", "strict", "--json")
    said = run_with({"data": [plan]}, "route", "Hi", *given)
    options = {"strategy": "selection", "k": 5, "filter": {"tags": ["fun", "short"]}, "abstain": "strict"}
    assert (said.json, said.sent) == (plan, [{"prompt": "Hi", "lora": options | {"explain": True}}])


def test_chat_sends_every_turn_and_starts_again_on_demand() -> None:
    answers = [(200, make_stream(text)) for text in ("Hello", "Two", "Anew")]
    typed = "Hi\n\nMore\n/new\nAgain\n/exit\nnever sent\n"
    said = run_with(answers, "ask", "--chat", "--system", "Be brief.", "--k", 2, input=typed)
    assert (said.code, said.stdout) == (0, "Hello\nTwo\nAnew\n")
    turns = [[message["content"] for message in sent["messages"]] for sent in said.sent]
    assert turns == [["Be brief.", "Hi"], ["Be brief.", "Hi", "Hello", "More"], ["Be brief.", "Again"]]
    assert [sent["lora"] for sent in said.sent] == [{"k": 2}] * 3


def test_chat_prints_all_messages_as_json_at_the_end() -> None:
    said = run_with(make_stream("Hello"), "ask", "--chat", "--json", input="Hi\n")
    assert [message["content"] for message in said.json["messages"]] == ["Hi", "Hello"]


def test_arrow_keys_edit_the_line_of_a_chat_whose_answers_do_not_move_the_terminal() -> None:
    terminal, end = pty.openpty()
    with scripted((200, make_stream("Hello \x1b[2J\ttab\r!"))) as server:
        script = "from deployments.cli.main import main; main()"
        command = [sys.executable, "-c", script, "ask", "--chat", "--url", server.url]
        process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=os.environ | {"TERM": "xterm"})
        os.close(end)
        try:
            shown = b""
            while b"> " not in shown:
                assert select.select([terminal], [], [], 60)[0], shown
                shown += os.read(terminal, 1024)
            os.write(terminal, b"Hii\x1b[D\x7f\n/exit\n")  # left, and delete the letter before
            with suppress(OSError):  # the program closed it
                while select.select([terminal], [], [], 60)[0]:
                    shown += os.read(terminal, 1024)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
            os.close(terminal)
    assert "Hello \N{REPLACEMENT CHARACTER}[2J" in shown.decode()
    assert server.sent[0]["messages"] == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("words", "target", "code", "says"),
    [
        (["ask", "-"], os.devnull, 2, "an argument or the standard input is not text in UTF-8"),
        (["route", b"caf\xe9"], os.devnull, 2, "an argument or the standard input is not text in UTF-8"),
        (["list", "--json"], "/dev/full", 1, "[Errno 28] No space left on device"),
    ],
    ids=str,
)
def test_text_that_is_no_utf_8_and_a_full_output_are_a_line(
    words: list[str | bytes], target: str, code: int, says: str
) -> None:
    script = "from deployments.cli.main import main; main()"
    with (
        scripted((200, {"data": [], "has_more": False, "generation": 1, "total": 0, "unserved": []})) as server,
        open(target, "w") as stdout,
    ):
        command = [sys.executable, "-c", script, *words, "--url", server.url]
        done = subprocess.run(command, input=b"caf\xe9", stdout=stdout, stderr=subprocess.PIPE, check=False, timeout=60)
    assert (done.returncode, done.stderr.decode()) == (code, f"{says}\n")


def test_status_shows_the_models_the_pool_and_the_load() -> None:
    stats: dict[str, Any] = {
        "base_model": "tiny",
        "defaults": {"strategy": "mixture", "k": 3},
        "pool": {"generation": 9, "oldest_generation": 9, "num_adapters": 14},
    }
    load = {"replicas": {"answered": 2, "silent": 1}, "num_running": 3, "max_running": 64, "num_waiting": 5}
    load |= {"bank_adapters": 4, "bank_rows_occupied": 40, "bank_rows": 512}
    stats["workers"] = load
    unserved = unserved_objects((("org/old", 12),))
    said = run_with([stats, {"unserved": unserved}], "status")
    assert said.asked == [("GET", "/v1/stats"), ("GET", "/v1/loras?limit=1")]
    assert said.err == unserved[0]["text"]
    silent = stats | {"pool": {"generation": None, "oldest_generation": None, "num_adapters": None}}
    unknown = run_with(silent, "status")
    assert unknown.asked == [("GET", "/v1/stats")]
    assert "pool: not known, because no Retriever answers" in unknown.out and "None" not in unknown.out
    for part in (
        *("tiny", "14 adapters that you may use, at generation 9", "mixture, k = 3"),
        *("2, 1 silent; 3 of 64 rows running, 5 waiting", "4 adapters in 40 of 512 rank rows"),
    ):
        assert part in said.out
    assert run_with(stats, "status", "--json").json == stats
    of_user = run_with(stats | {"workers": None}, "status")
    assert of_user.code == 0 and "shown to keys with the role admin" in of_user.out
    asleep = load | {"replicas": {"answered": 0, "silent": 0}}
    several = run_with(stats | {"models": {"awake": load, "sleepy": asleep}}, "status").out
    assert "awake workers: 2, 1 silent" in several
    assert several.endswith("sleepy workers: none; the next request starts one")
