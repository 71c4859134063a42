from __future__ import annotations

import pytest
import torch

from lora_store import AdapterRef, AdapterWeights, ModuleWeights, is_valid_name


@pytest.mark.parametrize(
    ("names", "are_valid"),
    [(["a", "A-b_c.9", "x" * 64, "..."], True), (["", "x" * 65, "a/b", "a b", "auto", ".", "..", "é", "a\n"], False)],
)
def test_letters_digits_dots_dashes_and_underscores_make_a_name(names: list[str], are_valid: bool) -> None:
    assert [name for name in names if is_valid_name(name) != are_valid] == []


def test_another_tenant_uses_the_name_with_its_owner() -> None:
    ref = AdapterRef("acme", "poet", "d" * 64)
    assert (ref.name_for("acme"), ref.name_for("globex")) == ("poet", "acme/poet")
    assert str(ref) == "acme/poet@dddddddddddd"


def test_an_adapter_needs_as_many_rank_rows_as_its_widest_module() -> None:
    modules = {str(rank): ModuleWeights(torch.ones(rank, 3), torch.ones(2, rank), 1.0) for rank in (2, 8, 4)}
    assert AdapterWeights("w", modules).max_rank == 8
