"""Load the retrieval experiments over the study's pool, for the command and other stages."""

from __future__ import annotations

from transformers import AutoTokenizer

from benchmarks.paper.common.tasks import TaskList, load_parts, read_pool, read_task_list
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.retrieval.experiments import Experiments
from benchmarks.paper.retrieval.study import study_of
from benchmarks.training.bigbench_tasks import TaskSpec
from gpu_worker.config import WorkerConfig
from gpu_worker.model.base_model import model_source


def load_experiments(workspace: Workspace) -> Experiments:
    """Return the experiments over the fixed pool."""
    listed = read_task_list()
    tokenizer = AutoTokenizer.from_pretrained(model_source(WorkerConfig()))
    parts = load_parts((*listed.tasks, *listed.spares), workspace, tokenizer)
    return Experiments(study_of(listed, pool_specs(listed), parts), workspace)


def pool_specs(listed: TaskList) -> tuple[TaskSpec, ...]:
    """Return the tasks of the fixed pool."""
    return tuple(listed.by_name[name] for name in read_pool())
