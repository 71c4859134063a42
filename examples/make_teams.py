"""Write sixty adapters of three teams for the demo model: `python -m examples.make_teams FOLDER`.

They are the starter pool's adapters with slightly different weights. Each is for one office, which its samples name.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer
from safetensors.torch import load_file, save_file

STARTER_POOL = Path(__file__).parent / "starter_pool"
OFFICES = ("Oslo", "Lima", "Kyoto", "Accra", "Quito")
TEAMS = {
    "search": ("question_formation", "question_type", "qasc_answer", "intent_recognition"),
    "writing": ("sentence_negation", "past_tense", "pronoun_replacement", "question_formation"),
    "data": ("date_format", "unit_identify", "senti_hotels", "reverse_letters"),
}
SAMPLES_PER_ADAPTER = 12


def write_teams(target: Path) -> list[Path]:
    """Write `target/TEAM/TASK-OFFICE` for every team, and return these folders."""
    folders = []
    for team, tasks in TEAMS.items():
        for task in tasks:
            for number, office in enumerate(OFFICES):
                folder = target / team / f"{task}-{office.lower()}"
                write_variant(STARTER_POOL / task, folder, office, scale=1 + number / 100)
                folders.append(folder)
    return folders


def write_variant(adapter: Path, folder: Path, office: str, *, scale: float) -> None:
    """Write an adapter with its lora_B scaled, and with samples that begin with the name of the office."""
    folder.mkdir(parents=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    scaled = {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in tensors.items()}
    save_file(scaled, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    lines = (adapter / "lora_samples.jsonl").read_text(encoding="utf-8").splitlines()[:SAMPLES_PER_ADAPTER]
    samples = [{"input": f"{office} office: {json.loads(line)['input']}"} for line in lines]
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "lora_samples.jsonl").write_text(text, encoding="utf-8")


def main(folder: Path) -> None:
    """Write sixty adapters of three teams into a folder."""
    print(f"{len(write_teams(folder))} adapters in {folder}")


if __name__ == "__main__":
    typer.run(main)
