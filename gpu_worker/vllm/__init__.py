"""The vLLM engine: mixtures of adapters inside vLLM, one plan per request."""
