"""Retrieval: the encoder, the adapter index, and the Retriever that turns prompts into plans."""
