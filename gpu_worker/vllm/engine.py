"""vLLM behind the InferenceEngine interface.

The queue, the loads and the residency of adapters are those of `front` and `bank`, in this process. vLLM gets a row
when all its adapters are in the workers' banks, and never more rows than its batch has places. So vLLM's scheduler
needs no change, and no request can name an adapter that the workers lack, which would end their process.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, Collection, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from vllm import TokensPrompt
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from gpu_worker.bank.device_layout import to_device_layout
from gpu_worker.bank.load_threads import load_executor
from gpu_worker.bank.loader import Fetch
from gpu_worker.config import VllmWorkerConfig
from gpu_worker.engine import EngineHealth, InferenceEngine
from gpu_worker.errors import EngineStopped, GrammarInvalid, SamplingInvalid
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.preprocess import RequestPreprocessor, grammar_compiler
from gpu_worker.front.request.request import Job
from gpu_worker.front.row import Row, Sink
from gpu_worker.model.checkpoint import check_checkpoint
from gpu_worker.model.eager_check import ADAPTER_PLAN, DIGEST
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.vllm.engine_args import build_config, errors_of_children, expert_bytes, find_max_len, sockets_folder
from gpu_worker.vllm.front_model import FrontModel, load_front_model, narrowed
from gpu_worker.vllm.fusions import FusionLoader, with_fusion
from gpu_worker.vllm.model_check import CheckedAnswer, CheckedPrompt, check_model
from gpu_worker.vllm.packing import Change
from gpu_worker.vllm.plan_path import PlanIds, make_path
from gpu_worker.vllm.processes import kill_descendants
from gpu_worker.vllm.remote_bank import RemoteBank
from gpu_worker.vllm.row_runner import NewToken, RowRunner
from gpu_worker.vllm.sampling import check_params, probed_ids, prompt_scores, sampling_params, scored
from gpu_worker.vllm.settings import check_device, check_gpus, check_vllm
from lora_store.adapter import Shapes

_WATCH_PERIOD_S = 5.0


class VllmEngine(InferenceEngine):
    """An AsyncLLM, its worker processes, and the rows that wait for them or run in them."""

    def __init__(
        self,
        llm: AsyncLLM,
        model: FrontModel,
        config: VllmWorkerConfig,
        fetch: Fetch,
        *,
        sockets: TemporaryDirectory[str],
        executor: Executor | None,
        stream_interval_ms: float,
        niceness: int,
    ) -> None:
        # It checks each grammar, so that vLLM gets none that it cannot compile.
        self._grammars = grammar_compiler(model, config.tool_parser)
        uses_kernel = config.device == "cpu" and config.lora_products == "auto"
        super().__init__(
            RequestPreprocessor.of(config, model, find_max_len(config, model), self._grammars),
            dtype=model.dtype,
            max_waiting=config.max_waiting,
            stream_interval_ms=stream_interval_ms,
            niceness=niceness,
            num_missing_kernels=int(uses_kernel and LoraKernel.load(Path(config.cache_dir)) is None),
        )
        self._llm, self._model, self._config, self._sockets = llm, model, config, sockets
        self._loop = asyncio.get_running_loop()
        self._executor = executor or load_executor(config.load_threads)
        cache = llm.vllm_config.cache_config
        kv_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        loader = FusionLoader(
            fetch,
            to_device_layout=partial(to_device_layout, shapes=model.shapes, dtype=model.dtype),
            executor=self._executor,
            budget_bytes=config.host_cache_bytes,
            on_done=self._loaded,
        )
        self._bank = RemoteBank(self._change_bank, self._fail)
        self._rows = RowRunner(
            config,
            self._generate,
            self._bank,
            loader,
            kv_tokens=kv_tokens,
            expert_bytes=expert_bytes(config, model),
        )
        watching = self._rows.watch(lambda: llm.collective_rpc("check_health"), _WATCH_PERIOD_S)
        self._watching = self._loop.create_task(watching)
        self._plan_ids = PlanIds()
        self._request_numbers = itertools.count()

    @classmethod
    async def start(
        cls,
        config: VllmWorkerConfig,
        fetch: Fetch,
        *,
        executor: Executor | None = None,
        stream_interval_ms: float = 25.0,
        niceness: int = 0,
        free_fill: float = 0.0,
        is_compiled: bool = True,
        stat_loggers: Sequence[type] = (),
    ) -> VllmEngine:
        """Start vLLM and its workers, which takes from ten seconds to minutes and blocks the event loop for most of it.

        `niceness`: the thread that tokenizes comes after threads of this nice value. `free_fill`: value of free bank
        rows, see LoraBank.
        `is_compiled`: let torch.compile compile the base model.
        `stat_loggers`: classes that vLLM reports its metrics to; none: it computes none.
        Raises: BaseModelUnsupported, WorkerConfigInvalid, WarmUpFailed with the error that ended a process of vLLM.
        """
        check_vllm()
        check_device(config.device)
        if config.device == "cuda":
            check_gpus(config.tensor_parallel_size, torch.cuda.device_count())
        model = load_front_model(config)
        is_checked = check_checkpoint(model.source)
        if config.device == "cpu" and config.lora_products == "auto":
            LoraKernel.load(config.cache_dir)  # compiled once here, then every worker finds it
        is_compiled = is_compiled and not config.enforce_eager
        vllm_config = build_config(config, model, free_fill=free_fill, is_compiled=is_compiled)
        sockets = sockets_folder()
        llm: AsyncLLM | None = None
        with errors_of_children(vllm_config):
            try:
                llm = AsyncLLM.from_vllm_config(vllm_config, stat_loggers=[*stat_loggers], disable_log_stats=True)
                if not is_checked:  # vLLM has downloaded the files meanwhile
                    check_checkpoint(model.source)
                banks = await llm.collective_rpc("describe_bank")
                model = narrowed(model, [bank["ends"] for bank in banks])
                max_len = find_max_len(config, model)
                change, answer = partial(change_banks, llm), partial(answer_check, llm)
                model = await check_model(config, model, max_len, change, answer)
            except BaseException:
                if llm is not None:
                    llm.shutdown()
                sockets.cleanup()
                raise
        return cls(
            llm,
            model,
            config,
            fetch,
            sockets=sockets,
            executor=executor,
            stream_interval_ms=stream_interval_ms,
            niceness=niceness,
        )

    @property
    def module_shapes(self) -> Shapes:
        return self._model.shapes

    async def forget(self, weights_digests: Collection[str]) -> bool:
        is_gone = self._rows.forget(weights_digests)
        await self._bank.drained()
        return is_gone

    async def status(self) -> EngineStatus:
        return self._rows.status()

    async def expected(self) -> frozenset[str]:
        return self._rows.expected()

    def health(self) -> EngineHealth:
        if self._llm.errored:
            self._fail(EngineStopped("a process of vLLM has ended"))
        failure = self._rows.failure
        return EngineHealth(
            failure is None, self._rows.seconds_without_progress(), None if failure is None else str(failure)
        )

    def kill(self) -> None:
        kill_descendants()

    def stop(self) -> None:
        self._fail(EngineStopped("it was stopped"))
        self._watching.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._grammars.close()
        self._close_threads()
        self._llm.shutdown()
        self._sockets.cleanup()

    def _submit(self, rows: Sequence[Row]) -> None:
        self._rows.submit(rows)

    def _cancel(self, rows: Sequence[Row]) -> None:
        self._rows.cancel(rows)

    async def _load(self, weights_digests: Collection[str]) -> None:
        await asyncio.gather(*self._rows.load(weights_digests), return_exceptions=True)

    def _prepare(
        self, job: Job, sink: Sink, *, capture_first_logits: bool = False, arrived: float | None = None
    ) -> Row:
        """Prepare the job with a fusion as the one adapter that it is."""
        job = replace(job, plan=with_fusion(job.plan))
        return super()._prepare(job, sink, capture_first_logits=capture_first_logits, arrived=arrived)

    async def _generate(self, row: Row) -> AsyncGenerator[Sequence[NewToken]]:
        """Run the row in vLLM.

        Raises: GrammarInvalid or SamplingInvalid for what only vLLM refuses; EngineStopped if vLLM fails for another
        reason than the request itself.
        """
        path = make_path(row.plan)
        request = None if path is None else LoRARequest(path, self._plan_ids(path), path)
        prompt = TokensPrompt(prompt_token_ids=row.tokens[: row.num_prompt_tokens])
        if path is not None or not self._config.prefix_cache_shares_base:
            prompt["cache_salt"] = row.tenant  # vLLM's prefix cache separates plans by path, and tenants by this
        name = f"{next(self._request_numbers)}"
        try:
            params = sampling_params(row, self._model.vocab_size)
            async with aclosing(self._llm.generate(prompt, params, name, lora_request=request)) as outputs:
                async for output in outputs:
                    row.num_cached_tokens = output.num_cached_tokens or 0
                    if output.prompt_logprobs is not None and len(row.prompt) == 1:
                        row.add_prompt_scores(prompt_scores(row, output.prompt_logprobs))
                    if row.has_unsound_prompt:
                        raise row.failure
                    yield self._new_tokens(row, output.outputs[0])
        except VLLMClientError as exc:
            message, grammar = str(exc.args[0]), row.sampling.grammar
            if grammar is None:
                raise SamplingInvalid(message) from exc
            raise GrammarInvalid(message, param=grammar.param) from exc
        except EngineDeadError as exc:
            self._fail(exc)
            raise EngineStopped("a process of vLLM has ended") from exc
        except EngineGenerateError as exc:  # the step failed, not the request: another replica may compute it
            raise EngineStopped("vLLM failed to compute the step") from exc

    def _new_tokens(self, row: Row, output: CompletionOutput) -> list[NewToken]:
        tokens: Sequence[int] = output.token_ids
        found = output.logprobs
        if row.capture_first_logits and found:
            ids = probed_ids(self._model.vocab_size)
            row.first_logits = torch.tensor([found[0][token_id].logprob for token_id in ids])
        num_top = row.sampling.logprobs
        if num_top is None:
            return [(token, None) for token in tokens]
        return [(token, scored(token, entry, num_top)) for token, entry in zip(tokens, found, strict=True)]

    async def _change_bank(self, changes: list[Change]) -> dict[str, str]:
        return await change_banks(self._llm, changes)

    def _fail(self, failure: Exception) -> None:
        self._rows.stop(failure)

    def _loaded(self) -> None:
        """Start rows whose loads have ended. Called from the executor's threads."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._rows.pump)


async def change_banks(llm: AsyncLLM, changes: list[Change]) -> dict[str, str]:
    """Apply the changes in every worker. Return why adapters are unfit for one of them, by weights digest."""
    refusals: list[dict[str, str]] = await llm.collective_rpc("change_bank", args=(changes,))
    return {digest: problem for of_worker in refusals for digest, problem in of_worker.items()}


async def answer_check(llm: AsyncLLM, prompt: CheckedPrompt) -> CheckedAnswer:
    """Let vLLM answer a prompt of the check at start."""
    path = make_path(ADAPTER_PLAN) if prompt.has_adapter else None
    request = None if path is None else LoRARequest(path, 1, path)
    name = f"{DIGEST}-{uuid.uuid4()}"
    tokens = TokensPrompt(prompt_token_ids=prompt.tokens, cache_salt=name)
    params = check_params(scores_prompt=prompt.scores_prompt)
    async with aclosing(llm.generate(tokens, params, name, lora_request=request)) as outputs:
        output = [output async for output in outputs][-1]
    new = output.outputs[0]
    entries = [*(output.prompt_logprobs or [None])[1:], *new.logprobs]
    return CheckedAnswer(
        list(new.token_ids), [{token: entry.logprob for token, entry in each.items()} for each in entries]
    )
