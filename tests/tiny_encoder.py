"""A random encoder that a test creates and trains within a second. Its tokens are whole words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BertTokenizerFast

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOPICS = ("boat", "cake", "debt", "goat")
_FILLERS = tuple(f"filler{number}" for number in range(40))


def topic_texts(num_texts: int, *, seed: int, topics: Sequence[str] = TOPICS) -> dict[str, list[str]]:
    """Return texts by topic: two of the topic's four own words among six common words."""
    rng = random.Random(seed)

    def text(topic: str) -> str:
        own = [f"{topic}{number}" for number in rng.sample(range(4), 2)]
        words = own + rng.sample(_FILLERS, 6)
        return " ".join(rng.sample(words, len(words)))

    return {topic: [text(topic) for _ in range(num_texts)] for topic in topics}


def save_tiny_encoder(folder: Path, topics: Sequence[str] = TOPICS) -> Path:
    """Save a sentence-transformers folder whose vocabulary has the words of `topic_texts`."""
    words = [*_SPECIAL, *(f"{topic}{number}" for topic in topics for number in range(4)), *_FILLERS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    raw = folder.with_name(f"{folder.name}-transformer")
    BertModel(config).save_pretrained(raw)
    BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64).save_pretrained(raw)
    network = Transformer(str(raw))
    SentenceTransformer(modules=[network, Pooling(network.get_embedding_dimension())], device="cpu").save(
        str(folder), create_model_card=False
    )
    return folder
