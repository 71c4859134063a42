from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from lora_store import AdapterRef
from lora_store.errors import (
    AdapterNotFound,
    AdapterRefused,
    EncoderIncomplete,
    FileRefused,
    LoraStoreError,
    QuotaExceeded,
    StoreDamaged,
    StoreFull,
    StoreIsNewer,
    StoreUnavailable,
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AdapterRefused("poet", ["rank 0", "no weights"]), "adapter 'poet' refused: rank 0; no weights$"),
        (FileRefused("a.json", ["first", "second"]), r"a\.json: first; a\.json: second$"),
        (AdapterNotFound("peot", "poet"), r"no adapter 'peot'; did you mean 'poet'\?$"),
        (AdapterNotFound("poet"), "no adapter 'poet'$"),
        (AdapterNotFound("poet", owner="acme"), "'poet' belongs to tenant 'acme'; only its own keys may change it$"),
        (
            QuotaExceeded("adapters", 6, 5),
            "quota exceeded: the tenant may have 5 adapters, and this would make it 6; withdraw adapters first",
        ),
        (
            StoreDamaged("/a/part-1", "is empty"),
            "the adapter store is damaged: /a/part-1 is empty; .*`loraretriever pool repair --store URI` with its URI$",
        ),
        (StoreIsNewer("change it", "0.3.0"), ".* Use release 0.3.0 or later$"),
        (StoreIsNewer("change it", ""), ".* Use the release that changed it, or a later one$"),
    ],
)
def test_a_message_names_what_is_wrong_and_what_to_do(error: LoraStoreError, said: str) -> None:
    assert re.match(said, str(error))


@pytest.mark.parametrize("error", [StoreUnavailable, StoreFull, lambda cause: StoreDamaged(cause, "is empty")])
def test_clients_are_not_told_the_location_of_the_store(
    error: Callable[[str], StoreUnavailable | StoreDamaged],
) -> None:
    made = error("s3://secret-bucket: connection refused")
    assert "secret-bucket" in str(made)
    assert "bucket" not in made.client_message


def test_a_full_disk_is_called_full_and_damage_is_not_to_be_retried() -> None:
    assert StoreFull("x").client_message.startswith("the store's disk is full")
    assert "cannot be reached" not in str(StoreFull("x"))
    assert "try again" not in StoreDamaged("/pool/part-1", "is empty").client_message


def test_adapters_without_an_embedding_are_named_only_by_digest() -> None:
    """Other tenants' names are not shown."""
    refs = [AdapterRef("acme", f"plan-{number}", f"{number:064x}"[::-1]) for number in range(5)]
    message = str(EncoderIncomplete(refs))
    assert message.startswith("5 live adapters have no embedding") and "plan" not in message
    assert [ref.digest[:12] in message for ref in refs] == [True, True, True, False, False]
