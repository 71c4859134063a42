"""The tokens of `UnigramTokenizer`, compared with those of `tokenizers`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from retriever_svc import unigram_tokenizer
from retriever_svc.packaged_encoder import PackedEncoder, _packaged_file
from retriever_svc.unigram_tokenizer import UnigramTokenizer, save_unigram
from tests.soak import Scale

ROOT = Path(__file__).resolve().parents[2]
PAD, MAX_TOKENS = 1, 256
HARD = [
    "",
    " ",
    "\n\t\r\x0b\x0c\x85\u2028",
    "  two  spaces,\u00a0three\u2009kinds\u3000of them\u200b. ",
    "▁▁a ▁ b▁",
    "<s> in a text</s><pad>< unk><unk><mask>＜s＞<s",
    "<s><s>",
    "cafe\u0301 e\u0301\u0323 \u0301 o\u0308\u0308 ﬁ ½ № ㎏ Ａ１ ｶﾞ",
    "\x00\x01\x08\x1b[0m\x7f\x9f\ufeff\ufffd\ufffe\uffff",
    "🙂👩‍👩‍👧🇩🇪👍🏽 𝒙² 𐍈 \U000e0041\U0010ffff",
    "把这句话翻译成英文:猫在睡觉。この文を要約してください。다음 문장을 번역해 주세요.",
    "السلام عليكم नमस्ते दुनिया שלום ไม่มีช่องว่าง ქართული Ελληνικά привет Tiếng Việt",
    "\ue000\ue001 \ue000a\ue000\ue001",
    "a" * 16_384,
    "".join(chr(0x4E00 + 7919 * place % 20_000) for place in range(4000)),
    "\u3316" * 4000 + "\u2026" * 1000,
    "\ue000" * 3000 + "猫" * 3000 + "\ue001" * 3000,
    "word " * 400,
    "0123456789" * 40,
    "-=" * 300 + " end",
]


@pytest.fixture(scope="module")
def packaged() -> Tokenizer:
    return PackedEncoder(np.memmap(_packaged_file("any"), np.uint8, "r")).tokenizer()


@pytest.fixture(scope="module")
def differing(packaged: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str]], list[str]]:
    """Return a function that says which texts of a batch have other tokens, or another mask."""
    place = tmp_path_factory.mktemp("unigram")
    assert save_unigram(place, packaged)
    return find_differing(packaged, UnigramTokenizer(place, MAX_TOKENS, PAD))


def find_differing(
    expected: Tokenizer, found: UnigramTokenizer, max_tokens: int = MAX_TOKENS
) -> Callable[[Sequence[str]], list[str]]:
    expected.enable_truncation(max_tokens)
    expected.enable_padding(pad_id=PAD)

    def differing(texts: Sequence[str]) -> list[str]:
        rows, (ids, mask) = expected.encode_batch(texts), found.encode(texts)
        assert (ids.dtype, mask.dtype, ids.shape) == (np.int64, np.int64, (len(texts), len(rows[0].ids)))
        own = zip(texts, rows, ids.tolist(), mask.tolist(), strict=True)
        return [text for text, row, its, read in own if (its, read) != (row.ids, row.attention_mask)]

    return differing


def test_hard_texts_have_the_same_tokens(differing: Callable[[Sequence[str]], list[str]]) -> None:
    assert [text for text in HARD if differing([text])] == []
    assert differing(HARD) == []


def test_the_projects_texts_have_the_same_tokens(differing: Callable[[Sequence[str]], list[str]], scale: Scale) -> None:
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    files += [
        file for folder in ("benchmarks", "examples", "retriever_svc") for file in (ROOT / folder).rglob("*.jsonl")
    ]
    texts = sorted({line[:16_384] for file in files for line in file.read_text(encoding="utf-8").splitlines()})
    assert len(files) > 50 and len(texts) > 5000
    step = scale.pick("steps through the project's lines", small=20, full=1)
    texts = sorted(texts[::step], key=len)  # for little padding
    assert [text for start in range(0, len(texts), 64) for text in differing(texts[start : start + 64])] == []


def characters(rng: random.Random) -> Iterator[str]:
    """Yield characters of all of Unicode, the usual ones more often, and pieces of the vocabulary's kind."""
    ranges = [(0, 0x80), (0x80, 0x250), (0x250, 0x3000), (0x3000, 0xD800), (0xE000, 0x11000), (0x1F000, 0x20000)]
    marks = [*"    \t\n\u3000\u200d\u2581\xa0\u0301", "<s>", "</s>", "<mask>", "ing", "tion", "的", "ة", "ово"]
    while True:
        yield (
            rng.choice(marks) if rng.random() < 0.3 else chr(rng.randrange(*rng.choice([*ranges, (0x20000, 0x110000)])))
        )


def test_random_texts_have_the_same_tokens(differing: Callable[[Sequence[str]], list[str]], scale: Scale) -> None:
    rng = random.Random(0)
    source = characters(rng)
    for _ in range(scale.pick("batches of eight random texts", small=50, full=2500)):
        texts = ["".join(next(source) for _ in range(rng.choice([1, 3, 10, 40, 300]))) for _ in range(8)]
        assert differing(texts) == []


def test_a_long_word_is_read_until_its_first_tokens_are_known(packaged: Tokenizer, tmp_path: Path) -> None:
    """One caller's long texts would hold the interpreter's lock in the process that serves all."""
    assert save_unigram(tmp_path, packaged)
    tokenizer, asked = UnigramTokenizer(tmp_path, MAX_TOKENS, PAD), list[str]()

    class Pieces(dict[str, int]):
        def get(self, piece: str, default: object = None) -> int | None:  # type: ignore[override]
            asked.append(piece)
            return super().get(piece)

    tokenizer._ids = Pieces(tokenizer._ids)
    ids, _ = tokenizer.encode(["\u3316" * 16_384])  # normalized to six characters each
    assert ids.shape == (1, MAX_TOKENS) and 1024 < len(asked) < 16_384


def small_tokenizer() -> Tokenizer:
    """Return a tokenizer with ties, with a name that another one begins with, and with unknown characters in pieces."""
    scored = [("<unk>", 0.0), ("<pad>", 0.0), ("<a>", 0.0), ("<a>b", 0.0), ("▁", -1.0), ("x", -1.0), ("xx", -2.0)]
    scored += [("y", -1.5), ("xy", -2.5), ("yx", -2.5), ("zz", -30.0), ("▁x", -2.0), ("xxx", -3.0), ("zy", -1.0)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<a> $A <pad>", special_tokens=[("<a>", 2), ("<pad>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "<a>", "<a>b"])
    return tokenizer


@pytest.mark.parametrize(("first_check", "max_tokens"), [(1024, MAX_TOKENS), (1, 4), (3, 6)])
def test_ties_and_unknown_characters_are_decided_alike(
    first_check: int, max_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unigram_tokenizer, "_FIRST_CHECK", first_check)
    tokenizer = small_tokenizer()
    assert save_unigram(tmp_path, tokenizer)
    differing = find_differing(tokenizer, UnigramTokenizer(tmp_path, max_tokens, PAD), max_tokens)
    rng = random.Random(1)
    texts = ["".join(rng.choices(["x", "y", "z", " ", "q", "<a>", "b", "▁"], k=rng.randrange(20))) for _ in range(400)]
    assert differing(texts) == []


@pytest.mark.parametrize(
    "change",
    [
        ("model", {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}),
        ("model.byte_fallback", True),
        ("model.unk_id", None),
        ("normalizer", None),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("pre_tokenizer.prepend_scheme", "first"),
        ("post_processor", None),
        (
            "post_processor.single",
            [{"SpecialToken": {"id": "<a>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        ),
        ("added_tokens.0.lstrip", True),
        ("added_tokens", []),
    ],
    ids=str,
)
def test_a_tokenizer_of_another_kind_is_not_saved(change: tuple[str, object], tmp_path: Path) -> None:
    read = json.loads(small_tokenizer().to_str())
    *path, last = change[0].split(".")
    place = read
    for key in path:
        place = place[int(key) if key.isdecimal() else key]
    place[last] = change[1]
    assert not save_unigram(tmp_path, Tokenizer.from_str(json.dumps(read)))
    assert list(tmp_path.iterdir()) == []
