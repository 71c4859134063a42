from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.house import sources
from benchmarks.house.sources import Spread, measure

_FILES = {
    "deployments/__init__.py": "from typing import Any\n",
    "deployments/app.py": "import deployments.errors\nfrom deployments.room import tool\nfrom typing import Any\n"
    "def build(x: Any) -> Any:\n    return x\n",
    "deployments/errors.py": "class Error(Exception): pass\n" + "\n" * 60,
    "deployments/room/tool.py": "from deployments.errors import Error\ndef use() -> None:\n    pass\n\n\n",
    "lora_store/blobs.py": "def get() -> int:\n    return 1\n",
    "lora_store/names.py": "def name() -> str:\n    return ''\n",
    "tests/deployments/test_app.py": "",
    "tests/deployments/room/test_tool_at_scale.py": "",
    "tests/deployments/test_fuzz.py": "",
    "tests/deployments/whole/test_nonsense.py": "",
    "tests/lora_store/test_blobs.py": "",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in _FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_small_checkout_is_measured_as_by_hand(checkout: Path) -> None:
    found = measure(checkout)
    assert found.num_sources == 5
    assert found.folders == {"deployments": 2, "deployments/room": 1}
    assert (found.largest_importer, found.largest_imports) == ("deployments/app.py", 2)
    assert found.num_any == 3  # one import and two annotations; `__init__.py` is not measured
    assert found.num_small_files == 2
    assert found.functions == Spread(2, 2, 2)


def test_tests_belong_to_the_source_they_are_named_after(checkout: Path) -> None:
    found = measure(checkout)
    assert found.tests_without_source == ("tests/deployments/test_fuzz.py",)
    assert found.sources_without_test == ("lora_store/names.py",)  # errors.py defines no function


def test_tests_of_the_running_application_belong_to_sources_too(checkout: Path) -> None:
    (checkout / "tests/e2e").mkdir()
    (checkout / "tests/e2e/test_names.py").touch()
    (checkout / "tests/e2e/test_anything.py").touch()
    found = measure(checkout)
    assert found.sources_without_test == ()
    assert found.tests_without_source == ("tests/deployments/test_fuzz.py",)


def test_a_suite_tests_the_modules_that_it_imports_and_is_named_as_it_likes(checkout: Path) -> None:
    suite = checkout / "tests/lora_store/conformance"
    suite.mkdir()
    (suite / "test_parity.py").write_text("from lora_store.names import name\n")
    found = measure(checkout)
    assert found.sources_without_test == ()
    assert found.tests_without_source == ("tests/deployments/test_fuzz.py",)


def test_modules_that_run_inside_vllm_need_no_test_of_their_name(checkout: Path) -> None:
    (checkout / "gpu_worker/vllm").mkdir(parents=True)
    (checkout / "gpu_worker/vllm/layers.py").write_text("def add() -> None:\n    pass\n")
    assert measure(checkout).sources_without_test == ("lora_store/names.py",)


def test_every_source_has_a_test_of_its_name_and_every_test_a_source() -> None:
    found = measure(Path(sources.__file__).parents[2])
    assert found.sources_without_test == ()
    assert found.tests_without_source == ()


def test_files_and_functions_above_their_limits_are_listed(checkout: Path) -> None:
    body = "    pass\n" * 40
    (checkout / "lora_store/long.py").write_text("# comment\n\n\ndef long() -> None:\n" + body)
    (checkout / "tests/lora_store/test_long.py").write_text("\n" * 401)
    (checkout / "tests/lora_store/test_names.py").write_text("\n" * 400)
    found = measure(checkout)
    assert found.long_functions == ("lora_store/long.py:4 long",)
    assert found.long_files == ("tests/lora_store/test_long.py",)


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no source files"):
        measure(tmp_path)


def test_this_checkout_keeps_its_bounds() -> None:
    found = measure(Path(sources.__file__).parents[2])
    assert found.num_sources > 200
    assert max(found.folders.values()) <= 16
    assert found.long_files == found.long_functions == ()
