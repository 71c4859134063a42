from __future__ import annotations

from deployments.errors import (
    ModelNotFound,
    PoisonRequest,
    RateLimited,
    RequestInvalid,
    SourceUnavailable,
    VersionNotKept,
)


def test_messages_name_the_given_value_and_the_remedy() -> None:
    assert str(RequestInvalid("lora.k must be 1 to 16", "lora.k")) == "lora.k must be 1 to 16"
    assert "did you mean 'poet'" in str(ModelNotFound("peot", "poet")) and "peot" in str(ModelNotFound("peot"))
    assert "9 requests per minute" in str(RateLimited("9 requests per minute", 2.5))
    assert "3" in str(PoisonRequest(3))
    kept = str(VersionNotKept("poet", "a" * 8, ["b" * 64, "c" * 64]))
    assert "poet" in kept and "a" * 8 in kept and "b" * 12 in kept and "b" * 13 not in kept


def test_the_cause_of_a_failed_source_is_hidden_from_clients() -> None:
    error = SourceUnavailable("s3://b/x", "127.0.0.1 refused")
    assert "127.0.0.1" in str(error) and "127.0.0.1" not in error.client_message and "s3://b/x" in error.client_message
