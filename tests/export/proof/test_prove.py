"""The whole proof of small models, and the page that shows it."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from gauge_ext.errors import ConfigError
from gauge_ext.export import Tolerance, export_onnx
from gauge_ext.export.language.causal_lm import causal_kind
from gauge_ext.export.proof.perplexity import Perplexity, text_perplexity
from gauge_ext.export.proof.prove import prove
from gauge_ext.export.proof.subject import Subject


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    path = tmp_path_factory.mktemp("linear") / "m.onnx"
    x = torch.randn(2, 4)
    export_onnx(model, (x,), path, dynamic_shapes=({0: "batch"},), validate=False)
    return Subject(path, model, (x,))


@pytest.fixture
def tokenized(exported_llama, tmp_path):
    """The folder with a tokenizer of words."""
    tokenizers = pytest.importorskip("tokenizers")
    model, folder, _ = exported_llama
    copy = shutil.copytree(folder, tmp_path / "llama")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(copy / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    return model, copy


class Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.said = ""
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.said += data + " "


def test_everything_about_a_file(linear):
    proof = prove(linear.path, [linear], latency=0.01, memory=True, batches=(1, 8))
    assert proof.passed
    assert [row.batch for row in proof.latencies] == [1, 8]
    for row in proof.latencies:
        assert set(row.seconds) == {"torch", "onnxruntime"}
        assert all(seconds > 0 for seconds in row.seconds.values())
    assert [row.batch for row in proof.memories] == [1, 8]
    assert all(row.run > 0 for row in proof.memories)
    found = json.loads(proof.to_json())
    assert found["passed"] is True
    assert found["provenance"]["gauge_ext.base_sha256"]
    assert found["latencies"][0]["seconds"]["torch"] > 0
    page = proof.to_html()
    said = Text(page).said
    assert "m.onnx agrees with torch" in said
    for words in (
        "Latency",
        "Memory",
        "Provenance",
        "base sha256",
        "onnxruntime",
        "All comparisons: 5",
    ):
        assert words in said
    assert not re.search(r"https?:|<script|url\(", page)


def test_a_static_graph_is_timed_as_it_is(tmp_path):
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    export_onnx(model, (x,), tmp_path / "m.onnx", validate=False)
    proof = prove(tmp_path / "m.onnx", [Subject(tmp_path / "m.onnx", model, (x,))], latency=0.01)
    assert [row.batch for row in proof.latencies] == [5]


def test_what_disagrees(linear):
    other = copy.deepcopy(linear.module)
    with torch.no_grad():
        other[0].bias += 0.01
    proof = prove(linear.path, [replace(linear, module=other)])
    assert not proof.passed
    assert proof.failures[0].startswith("m.onnx, onnxruntime ")
    assert not proof.latencies
    page = proof.to_html()
    said = Text(page).said
    assert "m.onnx does not agree with torch" in said
    assert "✗" in said
    assert "Latency" not in said
    assert json.loads(proof.to_json())["failures"] == list(proof.failures)


def test_a_language_model(exported_llama):
    model, folder, _ = exported_llama
    kind = causal_kind(model)
    subjects = kind.subjects(folder, 0)
    proof = prove(
        folder,
        subjects,
        wholes=[lambda: kind.whole(folder, None, 0)],
        latency=0.01,
        batches=(1, 2),
    )
    assert proof.passed, proof.failures
    assert len(proof.validations) == 2
    timed = [(row.what, row.batch) for row in proof.latencies]
    assert timed == [
        (f"model.onnx {what}", batch)
        for what in ("prefill of 32", "decode 1 after 32")
        for batch in (1, 2)
    ]
    tight = Tolerance(absolute=0.0, relative=0.0)
    assert not prove(folder, subjects, tolerance=tight).passed


def test_perplexity(tokenized):
    model, folder = tokenized
    text = " ".join(f"w{i * i % 50}" for i in range(70))
    found = text_perplexity(folder, model, text, window=16)
    assert found.tokens == 70
    assert found.passed
    assert abs(found.difference) < 1e-4
    # Without the adapter it is another model.
    ids = torch.tensor([i * i % 50 for i in range(16)])
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
    nll = nn.functional.cross_entropy(logits, ids[1:])
    first = text_perplexity(folder, model, " ".join(f"w{i}" for i in ids.tolist()))
    assert first.torch == pytest.approx(math.exp(nll))
    with pytest.raises(ConfigError, match="1 tokens"):
        text_perplexity(folder, model, "w1")


def test_a_perplexity_that_is_off(linear):
    proof = prove(linear.path, [linear], perplexity=lambda: Perplexity(10, 5.0, 5.1))
    assert not proof.passed
    assert "perplexity 5.1000, torch's is 5.0000" in proof.failures[0]
    assert "Perplexity" in Text(proof.to_html()).said


def test_no_tokenizer(exported_llama):
    model, folder, _ = exported_llama
    with pytest.raises(ConfigError, match="has no tokenizer"):
        text_perplexity(folder, model, "words")


def test_the_page_in_a_browser(linear, look):
    proof = prove(linear.path, [linear], latency=0.01, memory=True)
    seen = look(proof.to_html(), ".fill")
    assert seen.scroll_width <= seen.client_width == 390  # nothing sticks out sideways
    assert seen.counts[0] >= 7
    assert seen.errors == []
