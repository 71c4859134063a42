"""Publishing processes, for tests that start, race and kill them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from uuid import uuid4

from lora_store import AdapterNotFound, AdapterRef, Location, LoraStore
from lora_store.catalogue import Catalogue
from lora_store.events import Publish
from tests.lora_store.builders import BASE, embedding

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.lora_store.publishing"])  # so that a process starts in milliseconds


@dataclass(frozen=True, slots=True)
class Done:
    """The change that one process made at one generation. `digest` is None for a withdrawal."""

    name: str
    digest: str | None
    generation: int


def publish(store: LoraStore, folder: Path, name: str) -> Done:
    staged = store.stage(folder, name=name)
    generation = store.commit([staged], [embedding()], [1.0], "me")
    return Done(name, staged.ref.digest, generation)


def publish_all(uri: str, work: Sequence[tuple[Path, str]]) -> list[Done]:
    """Publish each (folder, name) in its own commit."""
    store = LoraStore(uri, accepts_base=[BASE])
    return [publish(store, folder, name) for folder, name in work]


def withdraw_all(uri: str, names: Sequence[str]) -> list[Done]:
    """Withdraw each name in its own commit. Skip names that are not live."""
    store, done = LoraStore(uri, accepts_base=[BASE]), []
    for name in names:
        try:
            done.append(Done(name, None, store.withdraw("local", [name], "me").generation))
        except AdapterNotFound:
            continue
    return done


def publish_watched(uri: str, folder: Path, name: str, channel: Connection, die_at: int | None) -> None:
    """Open the store, wait for a message, publish, and send the number of files that were touched.

    `die_at`: kill this process when it touches that file, before it does.
    """
    store = LoraStore(uri, accepts_base=[BASE])
    _watched(uri, channel, die_at, lambda: publish(store, folder, name))


def fold_watched(uri: str, folder: Path, name: str, channel: Connection, die_at: int | None) -> None:
    """Like `publish_watched`, with a commit of one record after which the catalogue is folded. `folder` is not read."""
    catalogue = Catalogue(Location(uri), min_tail=0)
    record = next(iter(catalogue.snapshot().records.values()))
    new = replace(record, ref=AdapterRef("local", name, uuid4().hex * 2))

    def fold() -> None:
        catalogue.commit(lambda _: [Publish(new)] * 20)

    _watched(uri, channel, die_at, fold)


def _watched(uri: str, channel: Connection, die_at: int | None, work: Callable[[], object]) -> None:
    channel.send("ready")
    channel.recv()
    touched = 0

    def touch(event: str, args: tuple[object, ...]) -> None:
        nonlocal touched
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(uri):
            if touched == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            touched += 1

    sys.addaudithook(touch)
    work()
    channel.send(touched)
