"""The error codes, from the error table, with a cause and a remedy for each."""

from __future__ import annotations

from deployments.api import error_table
from docs.generate.markdown import code, table
from docs.generate.texts import load

# Codes that are given outside the table: (status, type).
_BESIDES = {
    "internal_error": ("500", "server_error"),
    "http_error": ("404, 405, …", "not_found_error, invalid_request_error"),
}


def error_codes() -> str:
    """Return one row for each code. Raises: KeyError for a code without a text."""
    texts, rows = load("errors"), []
    for name, (status, kind) in sorted(codes().items()):
        rows.append((code(name), status, code(kind), texts[name]["cause"], texts[name]["remedy"]))
    return table(("code", "status", "`type`", "cause", "remedy"), rows)


def codes() -> dict[str, tuple[str, str]]:
    """Return each code with its HTTP status and error type."""
    found: dict[str, tuple[str, str]] = {}
    for _, status, kind, name in error_table.TABLE:
        assert found.setdefault(name, (str(status), kind)) == (str(status), kind), f"{name} has two statuses or types"
    return found | _BESIDES
