"""The OpenAPI document compared with the routes, by requests that schemathesis derives from it, valid and invalid."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS

from deployments.api.error_table import STATUSES, reported_errors
from retriever_svc import AskedPrompt, DoctorReport, DoctorStep, ReindexStep
from tests.deployments.all_routes import APP
from tests.deployments.app_fakes import http_of, serve_plainly
from tests.deployments.asking import get
from tests.deployments.console_fakes import CountingWorker, MappedRetriever
from tests.deployments.fake_worker import DELTAS
from tests.soak import Scale

URL = "http://test"
DOCUMENT = APP.openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}
OF_ANSWERS = CHECKS.get_by_names(["status_code_conformance", "content_type_conformance", "response_schema_conformance"])
CHECKED = [*CHECKS.get_by_names(["not_a_server_error"]), *OF_ANSWERS]
STATUSES_OF_ALL = {"401", "403", "408", "413", "429", "500", "503"}
WITHOUT_ERRORS = {"/health"}


class Jobs(MappedRetriever):
    """Ends every job on the pool at once, because these tests are about the routes' input."""

    async def reindex(self, model: str, projection: str = "auto") -> AsyncGenerator[ReindexStep]:
        yield ReindexStep(0, 0, {})

    async def doctor(self, tenant: str, prompts: Sequence[AskedPrompt] = ()) -> AsyncGenerator[DoctorStep]:
        yield DoctorStep(0, 0, DoctorReport(7, 3, (), (), (), ()))


def sent(case: Case) -> dict[str, Any]:
    """Return the case as arguments of httpx's `request`."""
    made = requests.Request(**case.as_transport_kwargs(base_url=URL)).prepare()
    headers = {name: value for name, value in made.headers.items() if name.lower() != "content-length"}
    return {"method": made.method, "url": made.url, "headers": headers, "content": made.body}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_no_request_causes_a_server_error_or_an_undocumented_response(
    label: str, mode: GenerationMode, scale: Scale
) -> None:
    statuses: Counter[int] = Counter()
    num_cases = scale.pick("cases", small=5, full=120)
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def start() -> httpx.AsyncClient:
            return await stack.enter_async_context(
                http_of(serve_plainly(worker=CountingWorker(DELTAS), retriever=Jobs()))
            )

        client = runner.run(start())

        @settings(max_examples=num_cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
        def check(case: Case) -> None:
            response = runner.run(client.request(**sent(case)))
            statuses[response.status_code] += 1
            ran_out = response.status_code == 504
            assert not ran_out or "timeout_s" in case.body, "only a client's own limit is that short"
            case.validate_response(response, checks=OF_ANSWERS if ran_out else CHECKED)

        with suppress(Unsatisfiable):  # operations without input
            check()
        runner.run(stack.aclose())
    scale.counts["cases run"] = statuses.total()


def test_every_operation_documents_its_responses_and_the_error_format() -> None:
    for path, operations in DOCUMENT["paths"].items():
        kind_of_error = "AnthropicErrorAnswer" if path.startswith("/v1/messages") else "ErrorAnswer"
        error = {"$ref": f"#/components/schemas/{kind_of_error}"}
        for method, operation in operations.items():
            reported = operation["responses"]
            if path not in WITHOUT_ERRORS:
                assert reported.keys() >= STATUSES_OF_ALL, f"{method} {path}"
            for status, response in reported.items():
                if int(status) < 400:
                    assert all(kind["schema"] for kind in response["content"].values()), f"{method} {path} {status}"
                else:
                    assert response["content"] == {"application/json": {"schema": error}}, f"{method} {path} {status}"
    assert "HTTPValidationError" not in DOCUMENT["components"]["schemas"]


def test_an_error_status_is_described_with_the_codes_that_it_has() -> None:
    expected: dict[str, set[str]] = {}
    for error in reported_errors():
        assert error.kind is not None
        expected.setdefault(str(STATUSES[error.kind][0]), set()).add(error.code)
    described = {
        status: response["description"]
        for operations in DOCUMENT["paths"].values()
        for operation in operations.values()
        for status, response in operation["responses"].items()
        if int(status) >= 400
    }
    assert described.keys() == expected.keys()
    for status, text in described.items():
        assert set(re.findall(r"`([a-z_]+)`", text.partition("Codes: ")[2])) == expected[status], status
        assert ("`Retry-After` says when to retry" in text) is (status in ("429", "503"))


def test_the_document_is_served() -> None:
    assert get("/openapi.json").json() == DOCUMENT
