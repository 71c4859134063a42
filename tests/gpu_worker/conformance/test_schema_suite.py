"""Schemas of JSON Schema's own test suite: those that compile always give valid JSON."""

from __future__ import annotations

import json
import random

from gpu_worker.errors import GrammarInvalid
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.request import Completion, Job, SamplingParams
from gpu_worker.front.text.token_bytes import TokenBytes
from tests.gpu_worker.conformance.driver import HostedEngine, job
from tests.gpu_worker.front.grammar.schemas import is_valid, suite_schemas
from tests.soak import Scale
from tests.tiny import byte_tokenizer

_BYTES = TokenBytes(byte_tokenizer().backend_tokenizer)
# A random model rarely ends a text or an object, so it is made to prefer what ends them.
_ENDS = tuple((token, 3.0) for token in range(256) if _BYTES(token) in (b'"', b"}", b"]"))
_ANSWERS = 4  # to each schema


def answer_to(schema: object, seed: int) -> Job:
    params = SamplingParams(
        max_tokens=120,
        temperature=1.0,
        seed=seed,
        logit_bias=_ENDS,
        grammar=Grammar("json_schema", json.dumps(schema), "response_format"),
    )
    return job("make one", sampling=params)


def test_random_schemas_of_the_suite_give_valid_json(hosted: HostedEngine, scale: Scale) -> None:
    schemas = suite_schemas()
    random.Random(5).shuffle(schemas)
    wanted = scale.pick("schemas", small=6, full=200)
    num_compiled = num_whole = num_refused = 0
    for draft, schema in schemas:
        if num_compiled == wanted:
            break
        outcomes = hosted.outcomes(*[answer_to(schema, seed) for seed in range(_ANSWERS)])
        if isinstance(outcomes[0], GrammarInvalid):
            num_refused += 1
            continue
        num_compiled += 1
        for answer in outcomes:
            assert isinstance(answer, Completion), (schema, answer)
            if answer.finish_reason == "stop":
                num_whole += 1
                assert is_valid(draft, schema, answer.text), (schema, answer.text)
    assert num_compiled == wanted
    assert num_whole > 2 * wanted, "most answers must end"
    scale.record("refused schemas", num_refused)
    scale.record("whole answers", num_whole)
