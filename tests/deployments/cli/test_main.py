from __future__ import annotations

import importlib.metadata
import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.cli.client import MOVED
from lora_store import ROUTED_STRATEGIES
from tests.deployments.listening import listener
from tests.deployments.scripted import COMMAND, run, scripted, words


def events_of(*events: dict[str, Any], done: bool = True) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if done else "")


def delta(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}], **more}


def test_the_version_is_printed() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"loraretriever {importlib.metadata.version('loraretriever')}\n")


def test_shells_get_completion() -> None:
    assert "--install-completion" in run("--help").stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("worker: {bank_rows: 3}", "bank_rows"),
        ("template: jinja", "template"),
        ("- a\n- list", "list"),
        ("worker: [unclosed", "bad.yaml:1:18: expected"),
    ],
)
def test_a_bad_config_is_reported_and_nothing_starts(tmp_path: Path, folder: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    for command in (("publish", "--dry-run", folder), ("serve",)):
        result = run(*command, "--config", file)
        assert result.exit_code == 1
        assert said in result.stderr


def test_a_missing_config_is_reported(tmp_path: Path, folder: Path) -> None:
    result = run("publish", "--dry-run", folder, "--config", tmp_path / "nowhere.yaml")
    assert result.exit_code == 1
    assert "nowhere.yaml" in words(result.stderr).replace(" ", "")


def test_serve_says_that_its_port_is_in_use(config: Path) -> None:
    with listener() as port:
        result = run("serve", "--config", config, "--port", port)
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in words(result.stderr)
    assert "--port 0 uses a free port" in words(result.stderr)


def test_serve_names_a_preloaded_folder_that_holds_no_adapter(config: Path, tmp_path: Path) -> None:
    result = run("serve", "--config", config, "--port", 0, "--preload", tmp_path / "typo")
    assert result.exit_code == 1
    assert "typo" in result.stderr


def test_ask_says_how_to_go_on_where_no_adapter_fits() -> None:
    lora = {"strategy": "base", "adapters": [], "abstained": True}
    answer = events_of(delta("Hi", lora=lora))
    plan = {"data": [{"candidates": [{"name": "poet", "score": 0.2}, {"name": "bard", "score": 0.1}]}]}
    one = {"data": [{"candidates": plan["data"][0]["candidates"][:1]}]}
    with scripted((200, answer), (200, plan), (200, answer), (429, {}), (200, answer), (200, one)) as server:
        said = ("ask", "Hi", "--strategy", "fusion", "--url", server.url)
        near, unknown, only = (words(run(*said).stderr) for _ in range(3))
    assert only.startswith("base: no adapter fits; the nearest is poet. ")
    assert near.startswith("base: no adapter fits; the nearest are poet, bard. `loraretriever route`")
    assert unknown.startswith("base: no adapter fits. `loraretriever route`") and "--model NAME" in unknown
    options = {"strategy": "fusion", "k": 3, "fallback": "base"}
    assert server.sent[1] == {"prompt": "Hi", "model": "auto", "lora": options}


def test_ask_and_route_say_which_of_several_base_models_answers() -> None:
    lora = {"strategy": "base", "adapters": [], "base_model": "code-3b", "generation": 4, "candidates": []}
    with scripted((200, events_of(delta("Hi", lora=lora)))) as server:
        assert words(run("ask", "Hi", "--url", server.url).stderr) == "base on code-3b: no adapter"
    candidate = {"name": "poet", "score": 0.5, "threshold": 0.75, "confidence": 0.5}
    with scripted((200, {"data": [lora | {"candidates": [candidate]}]})) as server:
        result = run("route", "Hi", "-m", "code-3b:auto", "--url", server.url)
    assert "base model code-3b" in words(result.stdout)
    assert server.sent == [{"prompt": "Hi", "model": "code-3b:auto", "lora": {"explain": True}}]


def test_ask_streams_the_text_and_prints_the_adapters() -> None:
    lora = {"strategy": "mixture", "adapters": [{"name": "poet", "weight": 0.5}, {"name": "coder", "weight": 0.5}]}
    body = events_of(delta("", lora=lora), delta("Hel"), delta("lo [b]"), {"choices": []})
    with scripted((200, body)) as server:
        result = run("ask", "Hi", "there", "--url", server.url, "--model", "poet", "--max-tokens", 7)
    assert server.asked == [("POST", "/v1/chat/completions")]
    assert result.exit_code == 0
    assert result.stdout == "Hello [b]\n"
    assert words(result.stderr) == "mixture: poet × 0.50, coder × 0.50"
    assert [(s["model"], s["max_tokens"], s["temperature"], s["stream"]) for s in server.sent] == [
        ("poet", 7, 0.0, True)
    ]
    assert server.sent[0]["messages"] == [{"role": "user", "content": "Hi there"}]


def test_ask_sends_a_system_message_and_options_and_prints_the_whole_answer_as_json() -> None:
    answer = {"choices": [{"message": {"content": "é"}}], "lora": {"strategy": "base", "adapters": []}}
    with scripted((200, answer)) as server:
        said = ("--system", "Be brief.", "--strategy", "fusion", "--k", 2, "--json")
        said += ("--option", "width=0.5", "-o", "depth=2")
        result = run("ask", "Hi", *said, "--url", server.url)
    assert json.loads(result.stdout) == answer
    [sent] = server.sent
    assert [message["content"] for message in sent["messages"]] == ["Be brief.", "Hi"]
    assert sent["lora"] == {"strategy": "fusion", "k": 2, "strategy_options": {"width": 0.5, "depth": 2.0}}
    assert "stream" not in sent


@pytest.mark.parametrize("command", ["ask", "route"])
def test_a_strategy_is_one_of_the_registered_names(command: str) -> None:
    """The command refuses another one itself, and its help lists them."""
    refused, helped = run(command, "Hi", "--strategy", "best"), run(command, "--help")
    assert (refused.exit_code, helped.exit_code) == (2, 0)
    assert all(f"'{name}'" in words(refused.stderr) and name in helped.stdout for name in ROUTED_STRATEGIES)


@pytest.mark.parametrize("pair", ["width", "width=wide", "width=1=2", "width=nan", ""])
def test_an_option_of_a_strategy_is_a_name_with_a_number(pair: str) -> None:
    result = run("ask", "Hi", "--option", pair)
    assert result.exit_code == 2
    assert "'--option': must be NAME=NUMBER" in words(result.stderr)


def test_ask_reads_the_prompt_from_standard_input() -> None:
    lora = {"strategy": "base", "adapters": []}
    with scripted((200, events_of(delta("", lora=lora), delta("Hello")))) as server:
        result = run("ask", "-", "--url", server.url, input="two\nlines\n")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert server.sent[0]["messages"] == [{"role": "user", "content": "two\nlines"}]


def test_ask_and_route_pass_on_how_readily_to_abstain() -> None:
    lora = {"strategy": "base", "adapters": []}
    plan = lora | {"generation": 1, "candidates": []}
    with scripted((200, events_of(delta("", lora=lora))), (200, {"data": [plan]})) as server:
        assert run("ask", "Hi", "--abstain", "never", "--url", server.url).exit_code == 0
        assert run("route", "Hi", "--abstain", "strict", "--url", server.url).exit_code == 0
    assert [sent["lora"] for sent in server.sent] == [{"abstain": "never"}, {"explain": True, "abstain": "strict"}]


def test_ask_fails_with_the_streams_error() -> None:
    lora = {"strategy": "base", "adapters": []}
    body = events_of(delta("", lora=lora), {"error": {"message": "it stopped"}}, done=False)
    with scripted((200, body)) as server:
        result = run("ask", "Hi", "--url", server.url)
    assert result.exit_code == 1
    assert "it stopped" in result.stderr


SHOWN = [{"input": "Write\x1b a\n[poem].", "score": 0.5}]


def test_route_shows_candidates_and_the_weights_of_the_plan() -> None:
    plan = {
        "strategy": "selection",
        "generation": 4,
        "adapters": [{"name": "poet", "weight": 1.0}],
        "candidates": [
            {"name": "poet", "score": 0.75, "threshold": 0.625, "confidence": 0.5, "samples": SHOWN},
            {"name": "coder", "score": 0.5, "threshold": 0.875, "confidence": 0.0},
        ],
        "why": "poet fits: it scores 0.750 and needs 0.625.",
        "contract": {"adapter": "poet", "applied": ["instruction", "stop"]},
    }
    with scripted((200, {"data": [plan]})) as server:
        result = run("route", "Hi", "--url", server.url)
    assert (server.asked, server.sent) == ([("POST", "/v1/route")], [{"prompt": "Hi", "lora": {"explain": True}}])
    rows = [line for line in result.stdout.splitlines() if line.startswith(("│ poet", "│ coder"))]
    assert ["1.000" in row for row in rows] == [True, False]
    assert ["0.625" in rows[0], "0.875" in rows[1]] == [True, True]
    assert "needs 0.625" in result.stdout
    assert "poet is asked by its contract: instruction, stop." in words(result.stdout)
    assert "sample of poet, 0.500: Write a [poem]." in words(result.stdout)
    assert ["0.750" in rows[0], "0.500" in rows[1]] == [True, True]


def test_route_sends_its_options_and_prints_the_plan_as_json() -> None:
    plan = {"strategy": "selection", "generation": 4, "adapters": [], "candidates": [], "why": "no adapter fits"}
    with scripted((200, {"data": [plan]})) as server:
        said = ("--k", 5, "--strategy", "selection", "--tag", "fun", "--tag", "short", "--json")
        result = run("route", "Hi", *said, "--url", server.url)
    options = {"strategy": "selection", "k": 5, "filter": {"tags": ["fun", "short"]}, "explain": True}
    assert (json.loads(result.stdout), server.sent) == (plan, [{"prompt": "Hi", "lora": options}])


def test_a_port_in_use_is_reported_before_the_servers_packages_are_imported() -> None:
    script = """if True:
        import sys
        from deployments.cli.main import cli
        try:
            cli(["serve", "--port", sys.argv[1]])
        finally:
            print({"ray", "torch"} & set(sys.modules))
    """
    with listener() as port:
        command = [sys.executable, "-c", script, str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (1, "set()")
    assert "--port 0 uses a free port" in done.stderr


def test_the_commands_start_without_the_servers_packages() -> None:
    heavy = ("torch", "ray", "numpy", "pyarrow", "fastapi", "pydantic", "transformers", "lora_store")
    script = f"import sys, deployments.cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_chat_sends_every_turn_and_starts_again_on_demand() -> None:
    lora = {"strategy": "base", "adapters": []}
    answers = [(200, events_of(delta("", lora=lora), delta(text))) for text in ("Hello", "Two", "Anew")]
    with scripted(*answers) as server:
        typed = "Hi\n\nMore\n/new\nAgain\n/exit\nnever sent\n"
        result = run("ask", "--chat", "--system", "Be brief.", "--k", 2, "--url", server.url, input=typed)
    assert (result.exit_code, result.stdout) == (0, "Hello\nTwo\nAnew\n")
    said = [[message["content"] for message in sent["messages"]] for sent in server.sent]
    assert said == [["Be brief.", "Hi"], ["Be brief.", "Hi", "Hello", "More"], ["Be brief.", "Again"]]
    assert [sent["lora"] for sent in server.sent] == [{"k": 2}] * 3


def test_arrow_keys_edit_the_line_of_a_chat() -> None:
    lora = {"strategy": "base", "adapters": []}
    terminal, end = pty.openpty()
    with scripted((200, events_of(delta("", lora=lora), delta("Hello")))) as server:
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
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
            os.close(terminal)
    assert server.sent[0]["messages"] == [{"role": "user", "content": "Hi"}]


def test_chat_prints_all_messages_as_json_at_the_end() -> None:
    lora = {"strategy": "base", "adapters": []}
    with scripted((200, events_of(delta("", lora=lora), delta("Hello")))) as server:
        result = run("ask", "--chat", "--json", "--url", server.url, input="Hi\n")
    assert [m["content"] for m in json.loads(result.stdout)["messages"]] == ["Hi", "Hello"]


def test_serve_prints_the_settings_in_use(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("options", [(), ("--print-config",)])
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("base_model: /nosuch/model", "base_model: /nosuch/model: no such folder"),
        ("base_model: {here}", "base_model: {here} has no config.json; name the folder of a model"),
        (
            "keys_file: {here}/nokeys.yaml",
            "keys_file: {here}/nokeys.yaml: no such file; `loraretriever keys new --file` makes",
        ),
    ],
)
def test_serve_refuses_files_that_do_not_exist_before_it_starts(
    options: tuple[str, ...], text: str, line: str, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text.format(here=tmp_path))
    result = run("serve", "--config", file, "--port", 0, *options)
    assert result.exit_code == 1
    assert "".join(line.format(here=tmp_path).split()) in "".join(result.stderr.split())


def test_settings_are_printed_without_the_servers_packages() -> None:
    script = """if True:
        import sys
        from deployments.cli.main import cli
        cli(["serve", "--print-config"], standalone_mode=False)
        print({"ray", "torch"} & set(sys.modules), file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (0, "set()")
    assert "base_model: " in done.stdout


def test_a_missing_base_model_is_refused_without_the_servers_packages() -> None:
    script = """if True:
        import sys
        from deployments.cli.main import cli
        try:
            cli(["serve", "--base-model", "/nosuch/model", "--port", "0"])
        finally:
            print({"ray", "torch"} & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (1, "set()")
    assert done.stderr.strip() == "base_model: /nosuch/model: no such folder"


def test_a_dry_run_without_a_server_prints_its_outcome_as_json(config: Path, folder: Path) -> None:
    found = run("publish", "--dry-run", folder, "--config", config, "--json")
    [outcome] = json.loads(found.stdout)["data"]
    assert outcome == {
        "name": "poet",
        "is_fit": True,
        "num_modules": 1,
        "num_samples": 2,
        "num_lines": 2,
        "warnings": [],
    }
    (folder / "adapter_model.safetensors").unlink()
    refused = run("publish", "--dry-run", folder, "--config", config, "--json")
    [outcome] = json.loads(refused.stdout)["data"]
    assert (refused.exit_code, outcome["is_fit"], len(outcome["reasons"])) == (1, False, 1)


def test_help_has_a_short_option_and_no_command_is_no_mistake() -> None:
    full = run("--help")
    assert (full.exit_code, run("-h").stdout, run().stdout) == (0, full.stdout, full.stdout)
    for group in ("trial", "access", "pool", "keys", "samples"):
        assert (run(group).exit_code, run(group).stdout) == (0, run(group, "-h").stdout)


def test_the_commands_are_eighteen_on_two_levels() -> None:
    assert list(COMMAND.commands) == [
        *("serve", "ask", "route", "status", "publish", "list", "show", "withdraw", "rollback", "compose", "batch"),
        *("usage", "trial", "access", "name", "pool", "keys", "samples"),
    ]
    assert list(COMMAND.commands["samples"].commands) == ["list", "accept", "reject", "undo"]
    assert list(COMMAND.commands["trial"].commands) == ["start", "stop", "promote"]
    assert list(COMMAND.commands["access"].commands) == ["public", "private", "approve"]
    assert list(COMMAND.commands["keys"].commands) == ["new", "list", "rotate", "expire", "revoke"]
    assert sorted(COMMAND.commands["pool"].commands) == sorted(
        ["verify", "repair", "gc", "doctor", "evaluate", "reindex", "train", "export", "import"]
    )


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_or_foreign_name_is_answered_with_the_one_to_type(old: str) -> None:
    result = run(old, "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"there is no {old!r}; use {MOVED[old]}\n"


def test_every_hint_names_a_command_that_exists() -> None:
    for hint in MOVED.values():
        for typed in re.findall(r"`loraretriever ([a-z]+)(?: ([a-z]+)\b)?", hint):
            command = COMMAND.commands[typed[0]]
            assert not getattr(command, "commands", None) or typed[1] in command.commands, hint


def test_short_options_are_those_of_long_ones() -> None:
    with scripted((200, {"choices": []})) as server:
        run("ask", "Hi", "-m", "poet", "-n", 7, "-s", "Be brief.", "-k", 2, "--json", "-u", server.url)
    [sent] = server.sent
    assert (sent["model"], sent["max_tokens"], sent["lora"]) == ("poet", 7, {"k": 2})
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}


def test_help_shows_types_and_arguments_in_one_spelling() -> None:
    for command in (("ask",), ("publish",), ("keys", "new"), ("pool", "train"), ("trial", "start"), ("batch",)):
        shown = "\n".join(line for line in run(*command, "-h").stdout.splitlines() if "--help" not in line)
        assert not any(odd in shown for odd in ("<str>", "<bool>", "<int", "<path>", "<list", "PLACES", "......")), (
            shown
        )


def test_a_choice_is_checked_before_the_server_is_asked() -> None:
    result = run("ask", "Hi", "--abstain", "sometimes")
    assert result.exit_code == 2 and "'never', 'lenient', 'balanced'" in words(result.stderr)


STATS = {
    "base_model": "tiny",
    "defaults": {"strategy": "mixture", "k": 3},
    "pool": {"generation": 9, "oldest_generation": 9, "num_adapters": 14},
    "workers": {
        "replicas": {"answered": 2, "silent": 1},
        "num_running": 3,
        "max_running": 64,
        "num_waiting": 5,
        "bank_adapters": 4,
        "bank_rows_occupied": 40,
        "bank_rows": 512,
    },
}


def test_status_shows_the_model_the_pool_and_the_load() -> None:
    with scripted((200, STATS), (200, STATS), (200, STATS | {"workers": None})) as server:
        shown, printed = run("status", "-u", server.url), run("status", "--json", "-u", server.url)
        of_user = run("status", "-u", server.url)
    assert server.asked[0] == ("GET", "/v1/stats")
    for part in (
        "tiny",
        "14 adapters that you may use, at generation 9",
        "mixture, k = 3",
        "2, 1 silent; 3 of 64 rows running, 5 waiting",
    ):
        assert part in words(shown.stdout)
    assert "4 adapters in 40 of 512 rank rows" in words(shown.stdout)
    assert json.loads(printed.stdout) == STATS
    assert of_user.exit_code == 0 and "shown to keys with the role admin" in words(of_user.stdout)


def test_status_says_which_base_model_sleeps() -> None:
    asleep = STATS["workers"] | {"replicas": {"answered": 0, "silent": 0}}
    with scripted((200, STATS | {"models": {"awake": STATS["workers"], "sleepy": asleep}})) as server:
        shown = words(run("status", "-u", server.url).stdout)
    assert "awake workers: 2, 1 silent" in shown and shown.endswith("sleepy workers: none; the next request starts one")


def test_printed_settings_hide_the_values_of_environment_variables(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    variables = {"env_vars": {"AWS_SECRET_ACCESS_KEY": "correct-horse"}}
    scaling = {"ray_actor_options": {"runtime_env": variables}}
    for settings in ({"store_scaling": scaling}, {"models": [{"worker_scaling": scaling}]}):
        file.write_text(json.dumps(settings))
        result = run("serve", "--config", file, "--print-config")
        assert result.exit_code == 0 and "AWS_SECRET_ACCESS_KEY" in result.stdout
        assert "correct-horse" not in result.output
