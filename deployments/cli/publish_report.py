"""Say what became of adapters that were sent to be published."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.progress import track

from deployments.cli.adapter_publisher import Answered, Item
from deployments.cli.options import name_options
from deployments.cli.output import behind_note, err, print_json, say, show_error, show_warning
from deployments.json_types import JsonObject
from deployments.publishing.adapter_folders import AdapterFolder

Refused = dict[str, list[tuple[Item, str]]]  # by reason, with the whole message


def report_json(answers: Iterable[Answered], total: int, is_dry: bool) -> int:
    """Print the outcome for all adapters as JSON. Return the number of failures."""
    rows: list[JsonObject] = []
    for item, answer in answers:
        rows.append({"source" if item.is_source else "folder": str(item.place), **answer})
    print_json({"data": rows})
    return sum("error" in row for row in rows)


def report_lines(answers: Iterable[Answered], total: int, is_dry: bool) -> int:
    """Print the outcome for each adapter, the refusals, and a summary of several. Return the number of failures."""
    refused: Refused = {}
    warned: dict[str, list[str]] = {}  # names by warning
    started, by_name = time.monotonic(), 0
    for item, answer in track(
        answers, "publishing", total, console=err, transient=True, disable=total == 1 or not err.is_terminal
    ):
        if "error" in answer:
            note_refusal(refused, item, answer)
            continue
        by_name += not answer["found_by_auto"]
        say(describe_outcome(answer, is_dry))
        for warning in (*answer.get("warnings", ()), *_replaced(item, answer, is_dry)):
            warned.setdefault(warning, []).append(answer["name"])
    for warning, named in warned.items():
        show_warning(f"warning: {', '.join(named)}: {warning}")
    show_refusals(refused)
    names = [item.label for same in refused.values() for item, _ in same]
    if total > 1:
        good = "fit to publish" if is_dry else "live"
        only = f" ({by_name} by name only)" if by_name else ""
        err.print(
            f"{total - len(names)} {good}{only}, {len(names)} refused, {time.monotonic() - started:.0f} s",
            highlight=False,
        )
        if names:
            err.print(f"refused: {', '.join(names)}", markup=False, highlight=False, soft_wrap=True)
    return len(names)


def _replaced(item: Item, answer: JsonObject, is_dry: bool) -> Iterator[str]:
    """Yield that an adapter with this name was live, if no person gave the folder this name."""
    is_known = "kept" in answer or "changed" in answer
    if is_known and isinstance(item.place, Path) and answer["name"] == item.name != AdapterFolder.of(item.place).name:
        back = "" if is_dry else f"; `loraretriever rollback {item.name}` makes the version before live again"
        yield f"this name was live already, and is only near {str(item.place)!r}: --name gives another one{back}"


def note_refusal(refused: Refused, item: Item, answer: JsonObject) -> None:
    """Add a refused adapter to those with the same reason."""
    message = name_options(answer["error"]["message"])
    refused.setdefault(message.removeprefix(f"adapter {item.label!r} refused: "), []).append((item, message))


def show_refusals(refused: Refused) -> None:
    """Print each reason once, with the adapters that it concerns."""
    for reason, same in refused.items():
        if len(same) == 1:
            show_error(_named(*same[0]))
        else:
            show_error(f"{len(same)} adapters refused: {reason}\n  {', '.join(item.label for item, _ in same)}")


def describe_outcome(answer: JsonObject, is_dry: bool) -> str:
    notes = [] if answer["found_by_auto"] else ["by name only: add lora_samples.jsonl or description.txt for auto"]
    if "expires_at" in answer:
        notes = [f"by name only, until {answer['expires_at'][:19]} UTC"]
    if is_dry:
        notes += [f"nearest is {near['name']} at {near['score']:.2f}" for near in answer.get("neighbours", ())[:1]]
    elif behind := answer["replicas"]["behind"]:
        notes.append(behind_note(behind))
    note = f" ({'; '.join(notes)})" if notes else ""
    done = "is fit to publish" if is_dry else f"is live at generation {answer['generation']}"
    if not is_dry and "trial" in answer:
        done = f"{describe_share(answer['trial'])} since generation {answer['generation']}"
    return "; ".join([f"{answer['name']} {done}{note}", *_label_notes(answer)])


def _label_notes(answer: JsonObject) -> Iterator[str]:
    """Yield what the new version kept of the one that was live before, and what changed."""
    kept, changed = answer.get("kept", {}), answer.get("changed", {})
    for name in ("tags", "template", "contract", "visibility", "samples"):
        if name in changed:
            yield f"{name}: {_shown(name, changed[name]['to'])} (was {_shown(name, changed[name]['from'])})"
        elif kept.get(name) and kept[name] != "public":
            yield f"{name}: {_shown(name, kept[name])} (kept)"


def _shown(field: str, value: object) -> str:
    if not value:
        return "the server's" if field == "template" else "none"
    return ", ".join(map(str, value)) if isinstance(value, list | dict) else str(value)  # a contract prints its fields


def describe_share(trial: JsonObject) -> str:
    """Return what a version under trial does, without its name."""
    verb = "shadows" if trial["shadow"] else "answers"
    return f"{trial['digest'][:12]} {verb} {trial['share'] * 100:g} % of the requests"


def _named(item: Item, message: str) -> str:
    """Return the message with the place in front, unless it names the adapter or the source already."""
    is_named = f"adapter {item.label!r}" in message or str(item.place) in message
    return message if is_named else f"{item.place}: {message}"
