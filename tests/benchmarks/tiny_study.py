"""Three made-up tasks, each with inputs of one topic and one word as the answer to all of them."""

from __future__ import annotations

import random

from benchmarks.training.bigbench_tasks import TaskSpec
from benchmarks.training.lora_training import Recipe

SPECS = [
    TaskSpec(name, f"bigbench/benchmark_tasks/{name}/task.json", cluster, "{x}", metric)
    for name, cluster, metric in [("animals", "a", "em"), ("cities", "a", "em"), ("sums", "b", "rouge_l")]
]
_WORDS = {
    "animals": ["cat", "dog", "cow", "hen"],
    "cities": ["Rome", "Oslo", "Bonn", "Lima"],
    "sums": ["1", "2", "3", "4"],
}
RECIPE = Recipe(
    first_layer=0,
    num_steps=25,
    batch_tokens=400,
    learning_rate=2e-2,
    scales=(1.0,),
    vocabulary_len=300,
    learnt_loss=0.05,
)


def examples(task: str) -> list[dict[str, str]]:
    draw = random.Random(task)
    texts = {" ".join(draw.choices(_WORDS[task], k=5)) for _ in range(400)}
    return [{"input": text, "target": task[:2]} for text in sorted(texts)]
