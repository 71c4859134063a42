from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deployments.store import FolderUpload, StoreDeployment
from lora_store import AdapterRefused


@pytest.mark.parametrize("upload", [FolderUpload(Path("x"), name="tiny"), FolderUpload(Path("somewhere/tiny"))])
def test_no_adapter_takes_the_base_models_name(upload: FolderUpload, tmp_path: Path) -> None:
    store = StoreDeployment(str(tmp_path / "store"), ["tiny", "owner/tiny"])
    with pytest.raises(AdapterRefused, match="the name is the base model's"):
        asyncio.run(store.stage(upload, {}))
