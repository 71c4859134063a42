"""The vLLM engine: mixtures of adapters inside vLLM, one plan per request."""

import os

# vLLM's set-up of logging closes every handler of its process: a replica would log nothing more.
os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
