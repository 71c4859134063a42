from __future__ import annotations

from deployments.observability.request_context import RequestContext
from gpu_worker.front.request.request import Delta


def test_a_prompt_counts_once_with_the_answer_that_found_the_fewest_cached_tokens() -> None:
    context = RequestContext("r", "/v1/completions", num_choices=2)
    for index, (num_prompt, num_cached, num_new) in enumerate([(5, 4, 1), (5, 2, 2), (7, 1, 3), (7, 3, 4)]):
        context.record_delta(index, Delta("", num_prompt, num_new, num_cached_tokens=num_cached))
    assert context.num_tokens == (12, 3, 10)
