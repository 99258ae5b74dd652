from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest

from gauge_ext.demo import corpus, search, text
from gauge_ext.demo.search import Hit, NameIndex, OnnxEncoder
from gauge_ext.demo.text import TextTokenizer
from gauge_ext.errors import GaugeError


@pytest.mark.parametrize("module", [search, text, corpus])
def test_searching_needs_no_torch(module: object) -> None:
    tree = ast.parse(inspect.getsource(module))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & {"torch", "transformers"}


DIRECTIONS = {"north": (0.0, 1.0), "east": (1.0, 0.0), "northeast": (0.6, 0.8)}


class Compass:
    """Encodes a text as the direction that its first word names."""

    def encode(self, texts: list[str], progress: object = None) -> np.ndarray:
        return np.array([DIRECTIONS[text.split()[0]] for text in texts], dtype=np.float32)


def test_index_returns_the_nearest_first() -> None:
    index = NameIndex(Compass(), ["east.f", "north.g", "northeast.h"])
    assert [hit.name for hit in index.search("north", 2)] == ["north.g", "northeast.h"]
    assert index.search("east", 1) == [Hit("east.f", 1.0)]
    assert index.search("east", 2)[1].score == pytest.approx(0.6)


def test_missing_onnxruntime_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, tokenizer: TextTokenizer
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(GaugeError, match="needs onnxruntime") as caught:
        OnnxEncoder(Path("model.onnx"), tokenizer)
    assert "pip install" in str(caught.value)
