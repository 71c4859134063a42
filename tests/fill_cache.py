"""Fill the cache folder with the packaged models and the kernels, before many processes of tests need them at once."""

from __future__ import annotations

from gpu_worker.model.packaged_model import packaged_folder
from gpu_worker.native.kernels.kernel_build import kernel_names
from gpu_worker.native.kernels.kernel_loading import load_library
from lora_store.location import DEFAULT_CACHE_DIR
from retriever_svc.encoder import Encoder
from retriever_svc.encoder_files import PACKAGED_MODELS

if __name__ == "__main__":
    for name in kernel_names():
        load_library(name, DEFAULT_CACHE_DIR)
    packaged_folder(DEFAULT_CACHE_DIR)
    for name in PACKAGED_MODELS:
        Encoder(name)
