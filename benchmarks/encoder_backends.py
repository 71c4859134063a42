"""Compare runtimes for the encoder: `VENV/bin/python -m benchmarks.encoder_backends`.

The server's own way (OpenVINO, converted without a file), torch with bfloat16 products and in float32, ONNX Runtime
(float32, and 8 bits), and OpenVINO (float32, bfloat16, and 8 bits). The last two use a network that torch exports, with
the tokenizer, the mean over the tokens and the normalisation of the others. Top-1 is that of the `choice` questions of
the paper's study: adapters are embedded in float32, each runtime embeds the questions. VENV has the packages of this
project, `onnxruntime` and `onnx`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.encoder import NUM_BATCH, Texts, decoding_worker, with_torch
from benchmarks.engine_cases import Quick, shown, table_of
from benchmarks.paper.common.workspace import DEFAULT_ROOT, Workspace
from benchmarks.paper.retrieval.loading import load_experiments
from benchmarks.results_file import write_part
from retriever_svc.encoder import INSTRUCTION, Encoder, Vectors, chunks_of, load_model, unit_rows
from retriever_svc.encoder_files import ENGLISH_MODEL

Embed = Callable[[Sequence[str]], Vectors]
Forward = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""Token ids (N, T) and mask (N, T) -> the last layer's (N, T, D)."""
SERVER, TORCH, REFERENCE = "the server", "torch, bfloat16 products", "torch, float32"


class Exported(torch.nn.Module):
    """The network of a sentence-transformers model, for the export."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._network = network

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self._network(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden


class Runtime:
    """A runtime with the tokenizer and the pooling of the model."""

    def __init__(self, model: Any, forward: Forward) -> None:
        self._model, self._forward = model, forward

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Return unit rows, as `Encoder.encode` without a projection: (N, D)."""
        features = self._model.tokenizer(
            [INSTRUCTION + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self._model.max_seq_length,
            return_tensors="np",
        )
        mask = features["attention_mask"]
        return pooled(self._forward(features["input_ids"], mask), mask)


def pooled(hidden: NDArray[np.float32], mask: NDArray[np.int64]) -> Vectors:
    """Return the unit mean over the tokens that are not padding: (N, T, D), (N, T) -> (N, D)."""
    weights = mask[:, :, None].astype(np.float32)
    return unit_rows((hidden * weights).sum(axis=1) / weights.sum(axis=1))


def runtimes(folder: Path) -> dict[str, Embed]:
    """Return all ways to embed texts, each with one thread. `folder`: for the exported network."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = load_model(ENGLISH_MODEL)
    plain, small = folder / "encoder.onnx", folder / "encoder-int8.onnx"
    example = torch.ones(2, 8, dtype=torch.int64)
    axes = {name: {0: "texts", 1: "tokens"} for name in ("ids", "mask", "hidden")}
    torch.onnx.export(
        Exported(model[0].auto_model).eval(),
        (example, example),
        str(plain),
        input_names=["ids", "mask"],
        output_names=["hidden"],
        dynamic_axes=axes,
        dynamo=False,
    )
    quantize_dynamic(plain, small, per_channel=True, weight_type=QuantType.QInt8)
    own, reference = Encoder(ENGLISH_MODEL, num_threads=1), Encoder(ENGLISH_MODEL, num_threads=1, dtype="float32")
    return {
        SERVER: own.encode_plain,
        TORCH: with_torch().encode_plain,
        REFERENCE: reference.encode_plain,
        "ONNX Runtime, float32": Runtime(model, _onnx(plain)),
        "ONNX Runtime, 8 bits": Runtime(model, _onnx(small)),
        "OpenVINO, float32": Runtime(model, _openvino(plain, "f32")),
        "OpenVINO, bfloat16": Runtime(model, _openvino(plain, "bf16")),
        "OpenVINO, 8 bits": Runtime(model, _openvino(small, "f32")),
    }


def _onnx(path: Path) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(["hidden"], {"ids": ids, "mask": mask})[0]


def _openvino(path: Path, precision: str) -> Forward:
    import openvino  # after the server's encoder, which keeps it from sending usage reports

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda ids, mask: compiled({"ids": ids, "mask": mask})[0]


def in_chunks(embed: Embed, texts: Sequence[str]) -> Vectors:
    """Embed many texts in the server's chunks. Return rows in the order of the texts."""
    rows: dict[str, Vectors] = {}
    for chunk in chunks_of(dict.fromkeys(("", text) for text in texts)):
        rows.update(zip((text for _, text in chunk), embed([text for _, text in chunk]), strict=True))
    return np.stack([rows[text] for text in texts])


def top1(adapters: Vectors, questions: Vectors, own: NDArray[np.int64]) -> float:
    """Return the share of questions (Q, D) whose own adapter (Q,) has the largest product. adapters (A, D)."""
    return float(((questions @ adapters.T).argmax(axis=1) == own).mean())


def accuracies(ways: Mapping[str, Embed], root: Path, per_task: int) -> dict[str, dict[str, float]]:
    """Return top-1 of each way, and its lowest cosine with the reference."""
    tasks = load_experiments(Workspace(root)).study.tasks
    adapters = unit_rows(np.stack([in_chunks(ways[REFERENCE], task.samples).mean(axis=0) for task in tasks]))
    texts = [text for task in tasks for text in task.choice[:per_task]]
    own = np.array([place for place, task in enumerate(tasks) for _ in task.choice[:per_task]])
    vectors = {name: in_chunks(embed, texts) for name, embed in ways.items()}
    return {
        name: {
            "top1": top1(adapters, rows, own),
            "lowest_cosine": float((rows * vectors[REFERENCE]).sum(axis=1).min()),
            "questions": float(len(texts)),
        }
        for name, rows in vectors.items()
    }


def milliseconds(
    ways: Mapping[str, Embed], count: int, size: int = 1, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Return each way's median for `size` new texts of 40 tokens, taking turns. By default it is CPU time."""
    texts = Texts()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for embed in ways.values():
        embed(texts(size))
    for _ in range(count):
        for name, embed in ways.items():
            batch = texts(size)
            started = clock()
            embed(batch)
            found[name].append(1000 * (clock() - started))
    return {name: statistics.median(times) for name, times in found.items()}


def latencies(ways: Mapping[str, Embed], count: int) -> dict[str, dict[str, float]]:
    """Return each way's wall times, alone and next to a decoding worker. They need an idle machine."""
    alone = milliseconds(ways, count, clock=time.perf_counter)
    with decoding_worker():
        busy = milliseconds(ways, count, clock=time.perf_counter)
    return {way: {"alone_ms": alone[way], "next_to_worker_ms": busy[way]} for way in ways}


def write(part: str, rows: Mapping[str, dict[str, float]], *, is_trial: bool) -> None:
    """Print a part of the comparison, and write it unless it is a trial."""
    columns = list(rows[SERVER])
    table = table_of("runtime, one thread", *columns)
    for way, row in rows.items():
        table.add_row(way, *[f"{row[column]:.4f}" if row[column] <= 1 else f"{row[column]:,.1f}" for column in columns])
    text = shown(table)
    if not is_trial:
        numbers = {f"{way}: {column}": value for way, row in rows.items() for column, value in row.items()}
        write_part("encoder_backends", part, figures=numbers, table=text, runs=[dict(rows)])


def main(
    root: Annotated[Path, typer.Option(help="folder of the paper's study")] = DEFAULT_ROOT,
    count: Annotated[int, typer.Option(help="texts that are timed")] = 40,
    per_task: Annotated[int, typer.Option(help="choice questions of each task")] = 25,
    latency: Annotated[bool, typer.Option(help="measure only wall times, on an idle machine")] = False,
    quick: Quick = False,
) -> None:
    """Measure CPU time and accuracy on any machine, about 15 minutes; with --latency wall times, three minutes."""
    count, per_task = (3, 1) if quick else (count, per_task)
    with tempfile.TemporaryDirectory() as name:
        ways = runtimes(Path(name))
        if latency:
            write("latency", latencies(ways, count), is_trial=quick)
            return
        one, batch = milliseconds(ways, count), milliseconds(ways, max(count // 20, 1), NUM_BATCH)
        times = {way: {"cpu_ms": one[way], f"cpu_ms_{NUM_BATCH}": batch[way]} for way in ways}
        write("cpu_time", times, is_trial=quick)
        write("accuracy", accuracies(ways, root, per_task), is_trial=quick)


if __name__ == "__main__":
    typer.run(main)
