from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from deployments.cli import peft_parity
from gpu_worker.errors import BaseModelUnsupported
from lora_store import AdapterRefused, ModuleWeights, Sample, write_peft_folder
from tests.deployments.adapter_records import BASE
from tests.deployments.scripted import Outcome, run, run_with, words

Check = Callable[..., Outcome]


@pytest.fixture
def check(config: Path) -> Check:
    """Return a dry run of these folders without a server."""
    return lambda *arguments: run_with((500, {}), "publish", "--dry-run", *arguments, "--config", config)


def test_a_good_folder_is_fit_to_publish(folder: Path, check: Check) -> None:
    said = check(folder)
    assert (said.code, said.asked) == (0, []) and "poet: 1 module, 2 samples, fit to publish" in said.out
    [outcome] = check(folder, "--json").json["data"]
    counts = {"num_modules": 1, "num_samples": 2, "num_lines": 2}
    assert outcome == {"name": "poet", "is_fit": True, "warnings": [], **counts}


GIVEN = {
    "rhyme.yaml": "instruction: 'Rhyme: {input}'",
    "hot": "sampling: {temperature: hot}",
    "train": '{"messages": [{"role": "user", "content": "Sing."}]}',
    "unlabelled": '{"label": 1}',
}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--name", "bard", "--tag", "fun", "--template", "chat", "--contract", "rhyme.yaml"), "bard: 1 module, 2 sam"),
        (("--no-tags", "--template", "server", "--no-contract", "--share", "5"), "poet: 1 module, 2 sam"),
        (("--samples", "train"), "1 module, 1 sample, fit"),
        (("--no-samples",), "1 module, 0 samples, fit"),
        (("--ttl", "60"), "1 module, 0 samples, fit"),
    ],
)
def test_options_that_a_server_would_take_are_fit(
    options: tuple[str, ...], says: str, folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    for name, text in GIVEN.items():
        Path(name).write_text(text)
    said = check(folder, *options)
    assert (said.code, says in said.out) == (0, True), said.out + said.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--name", "a b"), "refused: name 'a b' must be 1 to 64 of"),
        (("--name", ""), "refused: name '' must be"),
        (("--tag", "a b"), "refused: tag 'a b' must be"),
        (("--ttl", "0"), "--ttl: must be"),
        (("--share", "5", "--public"), "`visibility` cannot be combined with `share`"),
        (("--base-name", "other"), "refused: base_model 'other' is none that this server accepts"),
        (("--contract", "hot"), "sampling.temperature: must be a number"),
        (("--samples", "unlabelled"), "unlabelled: has no row with a user's text"),
        (("--samples", "nowhere"), "nowhere: cannot be read"),
    ],
)
def test_options_that_a_server_would_refuse_are_refused(
    options: tuple[str, ...], says: str, folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    for name, text in GIVEN.items():
        Path(name).write_text(text)
    said = check(folder, *options)
    assert (said.code, says in said.err) == (1, True), said.out + said.err


def test_every_reason_against_a_folder_is_printed_and_options_replace_what_is_bad(folder: Path, check: Check) -> None:
    config, train = folder / "adapter_config.json", folder.parent / "train.jsonl"
    config.write_text(config.read_text().replace(BASE, "another-base"))
    (folder / "adapter_io.yaml").write_text("sampling: {temperature: hot}")
    (folder / "lora_samples.jsonl").write_text("[]\n")
    train.write_text(GIVEN["train"])
    remedies = {
        "another-base": ("--base-name", BASE),
        "adapter_io.yaml": ("--no-contract",),
        "lora_samples.jsonl": ("--samples", train),
    }
    said, printed = check(folder), check(folder, "--json")
    assert (said.code, said.err.count("refused: ")) == (1, 3) and all(reason in said.err for reason in remedies)
    [outcome] = printed.json["data"]
    assert (printed.code, outcome["is_fit"], len(outcome["reasons"])) == (1, False, 3)
    for reason, options in remedies.items():
        better = check(folder, *options)
        assert (better.code, better.err.count("refused: "), reason in better.err) == (1, 2, False)
    assert check(folder, *chain.from_iterable(remedies.values())).code == 0


def test_a_place_without_an_adapter_is_refused(folder: Path, tmp_path: Path, check: Check) -> None:
    (tmp_path / "empty").mkdir()
    missing = check(tmp_path / "nowhere")
    assert missing.code == 1 and missing.err.endswith("nowhere: no such folder")
    assert "is a file; give the folder that contains it" in check(folder / "adapter_config.json").err
    assert check(tmp_path / "empty").err.endswith("no adapter here, adapter_config.json is missing")


def test_each_adapter_of_a_folder_is_checked_and_the_refused_are_counted(
    folder: Path, tmp_path: Path, check: Check
) -> None:
    many = tmp_path / "many"
    for name in ("bard", "bad", "poet", "worse"):
        shutil.copytree(folder, many / name)
    for name in ("bad", "worse"):
        (many / name / "adapter_model.safetensors").unlink()
    said = check(many)
    assert (said.code, [line.partition(":")[0] for line in said.stdout.splitlines()]) == (1, ["bard", "poet"])
    assert said.err.startswith("bad, worse: refused: adapter_model.safetensors: is missing")
    assert said.err.endswith("2 fit to publish, 2 refused")
    assert check(many, "--parity").code == 1
    fit = [(row["name"], row["is_fit"]) for row in check(many, "--json").json["data"]]
    assert fit == [("bad", False), ("bard", True), ("poet", True), ("worse", False)]
    assert check(many / "bard", many / "poet").err.endswith("2 fit to publish, 0 refused")


@pytest.mark.parametrize(
    ("count", "hint"),
    [
        (0, "auto cannot find it"),
        (1, "1 sample, fit"),
        (2, "more reliably with 20"),
        (20, "20 samples, fit to publish"),
        (300, "200 samples of 300, spread over the file, fit to publish"),
    ],
)
def test_a_dry_run_says_how_well_auto_can_find_the_adapter(folder: Path, check: Check, count: int, hint: str) -> None:
    lines = [json.dumps({"input": f"Verse {number}."}) for number in range(count)]
    (folder / "lora_samples.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if not count:
        (folder / "lora_samples.jsonl").unlink()
    said = check(folder)
    assert said.code == 0 and hint in said.out


@pytest.mark.parametrize("mixture", [1e-6, 2e-3, float("nan")])
def test_parity_is_printed_for_each_strategy_and_fails_above_its_tolerance(
    mixture: float, folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    differences = {"selection": 3e-6, "mixture": mixture, "fusion": 0.0}
    monkeypatch.setattr(peft_parity, "parity_with_peft", lambda *_: differences)  # typer calls by name only
    said = check(folder, "--parity")
    assert "at most 0.001" in said.out and all(strategy in said.out for strategy in differences)
    apart = not mixture < 1e-3
    assert (said.code, "mixture differ from PEFT" in said.err) == (apart, apart)


@pytest.mark.parametrize(("mixture", "shown", "code"), [(1e-6, 1e-6, 0), (2e-3, 2e-3, 1), (float("nan"), None, 1)])
def test_parity_is_part_of_the_json_and_fails_above_its_tolerance(
    mixture: float, shown: float | None, code: int, folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_parity, "parity_with_peft", lambda *_: {"selection": 3e-6, "mixture": mixture})
    said = check(folder, "--parity", "--json")
    [outcome] = said.json["data"]
    assert (said.code, outcome["is_fit"], outcome["parity"]) == (code, True, {"selection": 3e-6, "mixture": shown})
    assert ("mixture differ from PEFT" in said.err) == bool(code)


def test_what_only_the_comparison_refuses_is_refused_in_the_json(
    folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = AdapterRefused("poet", ["q_proj maps 8 to 9"])
    monkeypatch.setattr(peft_parity, "parity_with_peft", Mock(side_effect=refused))
    said = check(folder, "--parity", "--json")
    assert (said.code, said.json["data"]) == (1, [{"name": "poet", "is_fit": False, "reasons": [*refused.reasons]}])


def test_parity_has_the_limits_of_the_settings(
    folder: Path, config: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(config.read_text() + "admission: {max_rank: 7}\n")
    compare = Mock(return_value={"selection": 0.0})
    monkeypatch.setattr(peft_parity, "parity_with_peft", compare)
    assert check(folder, "--parity").code == 0
    assert compare.call_args.args[-1].max_rank == 7


@pytest.mark.parametrize(
    "error", [AdapterRefused("poet", ["q_proj maps 8 to 9"]), BaseModelUnsupported("q_proj maps 8 to 9")]
)
def test_what_prevents_the_comparison_is_said_without_a_traceback(
    error: Exception, folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_parity, "parity_with_peft", Mock(side_effect=error))
    said = check(folder, "--parity")
    assert said.code == 1 and "q_proj maps 8 to 9" in said.err


def test_an_adapter_whose_b_are_all_zero_is_fit_with_a_warning(check: Check, tmp_path: Path) -> None:
    weights = {"model.layers.0.mlp.up_proj": ModuleWeights(torch.ones(2, 6), torch.zeros(8, 2), 2.0)}
    write_peft_folder(tmp_path / "poet", weights, base_model=BASE, samples=[Sample("Rhyme.")])
    said = check(tmp_path / "poet")
    assert (said.code, "fit to publish" in said.out) == (0, True)
    assert "warning: poet: every lora_B is zero" in said.err


def test_without_a_server_a_dry_run_checks_here_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.cli.publish.answers", lambda url: False)
    result = run("publish", "--dry-run", folder)
    assert "no server answers at http://127.0.0.1:8000: checked without one" in words(result.stderr)
    assert result.exit_code == 1 and f"names '{BASE}'" in words(result.stderr), "another base than the packaged model"


def test_a_dry_run_at_a_given_address_needs_its_server_or_settings(folder: Path, config: Path) -> None:
    result = run("publish", "--dry-run", folder, "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "no server answers at http://127.0.0.1:1; start it, or add --config FILE" in words(result.stderr)
    assert run("publish", "--dry-run", folder, "--url", "http://127.0.0.1:1", "--config", config).exit_code == 0
