"""vLLM's sampler, with log probabilities that do not depend on the rows beside."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.sampler import Sampler

MOST_LOGPROBS = 20  # that a row of vLLM may ask for


class PlanSampler(Sampler):  # type: ignore[misc]
    """The sampler of a worker process.

    `before_masks`: the step's log probabilities before grammars masked its logits, if a row asks for any.
    """

    before_masks: Tensor | None = None

    def compute_logprobs(self, logits: Tensor) -> Tensor:
        found, self.before_masks = self.before_masks, None
        return super().compute_logprobs(logits) if found is None else found

    def gather_specific_token_logprobs(
        self, logprobs: Tensor, logprob_token_ids: Collection[int], sampled: Tensor
    ) -> LogprobsTensors:
        """Return the log probabilities of the ids that each probe asks for; of the other rows the largest ones.

        vLLM takes this table for all rows of a step with a probe.
        """
        found = super().gather_specific_token_logprobs(logprobs, logprob_token_ids, sampled)
        others = [row for row in range(len(sampled)) if row not in logprob_token_ids]
        num = min(MOST_LOGPROBS, found.logprobs.shape[1] - 1)
        values, ids = logprobs[others].topk(num)
        found.logprobs[others, 1 : num + 1] = values
        found.logprob_token_ids[others, 1 : num + 1] = ids.int()
        return found
