from __future__ import annotations

from pathlib import Path

import pytest

from gauge_ext.demo.text import TextTokenizer
from gauge_ext.errors import GaugeError


def test_groups_are_padded_to_their_own_longest(small_model: Path) -> None:
    tokenizer = TextTokenizer(small_model / "tokenizer.json")
    texts = ["reads the given file", "file", "the given", "closes the lock"]
    short, long = tokenizer.groups(texts, 2)
    assert short.rows == [1, 2]
    assert short.attention_mask == [[1, 0], [1, 1]]
    assert long.rows == [3, 0]
    assert long.attention_mask == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert long.input_ids[0][3] == 0
    (the, given) = short.input_ids[1]
    assert long.input_ids[1][1:3] == [the, given]


def test_long_texts_are_cut(small_model: Path) -> None:
    tokenizer = TextTokenizer(small_model / "tokenizer.json", max_tokens=5)
    (group,) = tokenizer.groups(["file " * 40], 8)
    assert len(group.input_ids[0]) == 5


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(GaugeError, match="cannot read a tokenizer from") as caught:
        TextTokenizer(path)
    assert str(path) in str(caught.value)
