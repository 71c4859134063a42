"""Learning from requests that name an adapter, by the commands, against the live application."""

from __future__ import annotations

import json
from typing import Any

from lora_store import Sample, write_peft_folder
from tests.e2e.live import BASE, Live, eventually, run
from tests.tiny import random_adapter

NAME = "beacons"
NAMED = "Which beacon stood at Cape Grey in 1850, and who kept its lamp?"
REWORDED = "Who kept the lamp of the beacon at Cape Grey in 1850?"


def answering(live: Live, prompt: str) -> list[str]:
    """Return the adapters that `auto` chooses."""
    plan: dict[str, Any] = live.call("POST", "/v1/route", json={"prompt": prompt}).json()["data"][0]
    return [row["name"] for row in plan["adapters"]]


def proposed(live: Live) -> list[str]:
    return [row["input"] for row in json.loads(run(live, "samples", "list", NAME, "--json"))["data"]]


def test_a_prompt_that_names_an_adapter_is_accepted_and_found_in_other_words_until_it_is_undone(live: Live) -> None:
    folder = live.folders / NAME
    samples = [Sample(f"{verb} lighthouses, please.") for verb in ("Tell me about", "Explain", "Describe")]
    write_peft_folder(folder, random_adapter(live.shapes, 9900).modules, base_model=BASE, samples=samples)
    first = live.publish(folder)["digest"]
    try:
        assert NAME not in answering(live, REWORDED)
        live.text(NAME, NAMED, max_tokens=2)
        eventually(lambda: proposed(live) == [NAMED])

        run(live, "samples", "accept", NAME)
        assert proposed(live) == []
        assert answering(live, REWORDED)[0] == NAME
        versions = live.call("GET", f"/v1/loras/{NAME}").json()["versions"]
        assert [(row["state"], row["digest"] == first) for row in versions] == [("live", False), ("kept", True)]

        run(live, "samples", "undo", NAME)
        assert NAME not in answering(live, REWORDED)
        assert live.call("GET", f"/v1/loras/{NAME}").json()["digest"] == first
    finally:
        run(live, "withdraw", NAME)
