from __future__ import annotations

from lora_store import (
    Sample,
)

SAMPLES = {
    "german": [Sample("Translate to German: good morning."), Sample("How do you say cheese in German?")],
    "sums": [Sample("What is 3 + 4?"), Sample("Add 12 and 30.")],
}
