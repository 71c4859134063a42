from __future__ import annotations

from lora_store.tallies import Tallies, TenantUsage
from tests.lora_store.builders import MakeRecord


def test_equal_weights_of_a_tenant_count_once_and_zeros_are_dropped(make_record: MakeRecord) -> None:
    poet, copy = make_record("poet", "acme"), make_record("copy", "acme")
    tallies = Tallies.of([(poet,), (copy,), (make_record("poet", "globex"),)])
    assert dict(tallies.blobs) == {"a" * 64: 3}
    assert dict(tallies.usage) == {"acme": TenantUsage(2, 100), "globex": TenantUsage(1, 100)}
    editor = tallies.edit()
    editor.replace((poet,), ())
    editor.replace((copy,), ())
    changed = editor.freeze()
    assert (dict(changed.blobs), dict(changed.usage)) == ({"a" * 64: 1}, {"globex": TenantUsage(1, 100)})
    assert dict(tallies.usage)["acme"] == TenantUsage(2, 100)


def test_older_versions_add_bytes_and_no_name(make_record: MakeRecord) -> None:
    older = make_record("poet", "acme", "e" * 64, weights_digest="b" * 64, num_bytes=7)
    assert dict(Tallies.of([(make_record("poet", "acme"), older)]).usage) == {"acme": TenantUsage(1, 107)}
