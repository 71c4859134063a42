"""The errors of the API: one row for each class of an error that can reach a client."""

from __future__ import annotations

import inspect

from deployments.api.error_table import HTTP_ERROR, STATUSES, reported_errors
from docs.generate.markdown import code, table

_OF_THE_FRAMEWORK = (
    code(HTTP_ERROR),
    "400, 404, 405, …",
    code("not_found_error, invalid_request_error"),
    "The path or method does not exist, a form cannot be read, the request is not HTTP, or its head exceeds 16 KiB.",
    "Compare with the [HTTP API](http-api.md).",
)


def error_codes() -> str:
    """Return one row for each error, by its code: the cause is the class's docstring."""
    rows = {_OF_THE_FRAMEWORK}
    for error in reported_errors():
        assert error.kind is not None
        status, type_ = STATUSES[error.kind]
        cause = inspect.cleandoc(error.__doc__ or "").split("\n\n")[0]
        rows.add((code(error.code), str(status), code(type_), cause, error.remedy))
    return table(("code", "status", "`type`", "cause", "remedy"), sorted(rows))
