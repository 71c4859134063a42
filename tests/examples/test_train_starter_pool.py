from __future__ import annotations

from pathlib import Path

from benchmarks.starter_pool import NUM_TRAINED
from examples.train_starter_pool import append_other_words


def test_a_new_pool_keeps_the_samples_that_were_written_by_hand(tmp_path: Path) -> None:
    published, samples = tmp_path / "published.jsonl", tmp_path / "new.jsonl"
    published.write_text("trained\n" * NUM_TRAINED + "in other words\n", encoding="utf-8")
    samples.write_text("trained anew\n", encoding="utf-8")
    append_other_words(samples, tmp_path / "no such task.jsonl")
    append_other_words(samples, published)
    assert samples.read_text(encoding="utf-8") == "trained anew\nin other words\n"
