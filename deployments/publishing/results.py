"""What a publish answers for each adapter: what the version kept and changed, where it lies, and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from deployments.api.pool_responses import contract_object
from deployments.api.responses import FieldChange, Published, Settled
from deployments.publishing.validator import Outcome, ValidatedAdapter
from lora_store import AdapterRecord, Kept, Key, Staged
from lora_store.validation import NEVER_TRAINED
from retriever_svc.shared_wording import wording_warning

_NO_EFFECT = (
    "it changed the base model's output for a probe by no more than rounding, so its answers may be the base model's:"
    " was it trained too briefly, or at too small a learning rate?"
)

_OVERTAKEN = "the pool got another encoder meanwhile: auto finds this adapter after `loraretriever pool reindex`"


def make_results(
    staged: Sequence[Staged | BaseException],
    outcomes: Sequence[Outcome],
    older: Mapping[Key, Sequence[AdapterRecord]],
    settled: Settled,
) -> list[Published | Exception]:
    """Return the result of each upload. `older`: the kept versions before the commit, by name."""
    results: list[Published | Exception] = []
    for item, outcome in zip(staged, outcomes, strict=True):
        result = make_result(outcome, settled)
        if isinstance(result, Published):
            new = outcome.staged if isinstance(outcome, ValidatedAdapter) else item
            assert isinstance(new, Staged)
            before = older.get(result.ref.key, (None,))[0]
            warnings = find_warnings(new, result.probe_shift, is_found=result.found_by_auto)
            result = replace(_compared(result, new, before), warnings=warnings)
        results.append(result)
    return results


def make_result(outcome: Outcome, settled: Settled) -> Published | Exception:
    """Return the result of one upload."""
    if isinstance(outcome, ValidatedAdapter):
        found = outcome.embedded is not None
        record = outcome.staged.record
        nearest = outcome.embedded.neighbours if outcome.embedded is not None else ()
        # The version that this one follows says nothing.
        neighbours = tuple(near for near in nearest if near.ref.key != record.ref.key)
        return Published(
            record.ref,
            settled.generation,
            settled.ready,
            settled.behind,
            found,
            outcome.shift,
            neighbours,
            expires_at=record.expires_at,
            trial=record.trial,
        )
    if isinstance(outcome, AdapterRecord):
        found = outcome.encoder is not None
        return Published(outcome.ref, outcome.generation, settled.ready, settled.behind, found, outcome.probe_shift, ())
    assert isinstance(outcome, Exception)
    return outcome


def _compared(result: Published, staged: Staged, before: AdapterRecord | None) -> Published:
    """Return the result with what the version kept of the one that was live before, and what differs from it."""
    if before is None:
        return result
    old, new = _make_label(before), _make_label(staged.record)
    keeps: set[Kept] = {*staged.keeps, "visibility"} if staged.record.is_offered else {*staged.keeps}
    if "visibility" in keeps:  # decided by the commit
        new["visibility"] = old["visibility"]
    changed: dict[str, FieldChange] = {
        field: {"from": old[field], "to": value}
        for field, value in new.items()
        if field not in keeps and value != old[field]
    }
    return replace(result, kept={field: value for field, value in new.items() if field in keeps}, changed=changed)


def _make_label(record: AdapterRecord) -> dict[Kept, object]:
    return {
        "tags": list(record.tags),
        "template": record.template,
        "contract": contract_object(record),
        "visibility": record.visibility,
        "samples": record.num_samples,
    }


def find_warnings(staged: Staged, shift: float | None, *, is_found: bool = True) -> tuple[str, ...]:
    """Return what the publisher of a valid adapter should know.

    An unlisted adapter has no warnings: a training loop publishes its first steps, which change little.
    """
    if staged.record.is_unlisted:
        return ()
    has_no_effect = shift == 0.0 and NEVER_TRAINED not in staged.warnings
    warnings = (*staged.warnings, _NO_EFFECT) if has_no_effect else staged.warnings
    if staged.samples and not is_found:
        warnings = (*warnings, _OVERTAKEN)
    wording = wording_warning([sample.input for sample in staged.samples])
    return warnings if wording is None else (*warnings, wording)
