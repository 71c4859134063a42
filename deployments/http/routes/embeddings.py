"""`/v1/embeddings`: the vectors of texts by the retriever's encoder."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from deployments.api.base import ignored_fields, refuse_ignored
from deployments.api.embeddings import EmbeddingsRequest, embeddings_answer
from deployments.auth.authenticator import Work
from deployments.generation.planner import reading
from deployments.generation.row_stream import compute_deadline, within
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import AnyContext, AnyServices, InferCaller
from deployments.http.openapi import EMBEDDINGS_ANSWERS
from retriever_svc.encoder import tokens_read

router = APIRouter(route_class=AnsweringRoute)


@router.post("/v1/embeddings", response_model=None, responses=EMBEDDINGS_ANSWERS)
async def embeddings(
    body: EmbeddingsRequest, caller: InferCaller, services: AnyServices, context: AnyContext
) -> Response:
    """Return one vector for each text. `model` is the name of the active encoder."""
    config = services.config
    if config.strict_fields:
        refuse_ignored(body)
    context.ignored, context.model = ignored_fields(body), body.model
    num_tokens = sum(map(tokens_read, body.input))
    work = Work(num_rows=0, num_read=num_tokens, tokens_field="input")
    with services.authenticator.running(caller, work) as usage, reading(usage):
        async with within(compute_deadline(context.arrived_at, None, config.max_request_s)):
            vectors = await services.retriever.vectors(caller.tenant, body.input, body.model)
    context.num_read = num_tokens
    return JSONResponse(embeddings_answer(body, vectors, num_tokens))
