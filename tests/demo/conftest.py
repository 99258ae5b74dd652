"""A small language, a tokenizer and a BERT for it: the demo without its 90 MB."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gauge_ext.demo.corpus import Pair, words_of
from gauge_ext.demo.encoder import SentenceEncoder, load_encoder
from gauge_ext.demo.text import TextTokenizer

_VERBS = {"open": "Opens", "close": "Closes", "read": "Reads", "write": "Writes", "seek": "Scans"}
_THINGS = (
    *("file", "socket", "archive", "window", "database"),
    *("mailbox", "thread", "queue", "lock", "stream"),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Over matrices this small, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pairs() -> list[Pair]:
    """Fifty pairs that a small model can learn: a verb and a thing in both."""
    return [
        Pair(f"{thing}lib.{thing.title()}.{verb}", f"{says} the given {thing}")
        for thing in _THINGS
        for verb, says in _VERBS.items()
    ]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair]) -> Path:
    """A transformers folder with a tokenizer, as the demo's package has one."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("small_model")
    texts = [pair.sentence for pair in pairs] + [words_of(pair.name) for pair in pairs]
    words = sorted({word.lower() for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    transformers.set_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(small_model: Path) -> SentenceEncoder:
    return load_encoder(small_model)


@pytest.fixture
def tokenizer(small_model: Path) -> TextTokenizer:
    return TextTokenizer(small_model / "tokenizer.json")
