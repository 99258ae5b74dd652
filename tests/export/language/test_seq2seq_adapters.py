"""Encoder and decoder with adapters as inputs: each layer in one graph, and torch's tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from language_models import VOCABULARY, adapter_folder, build

import gauge_ext
from gauge_ext.errors import AdapterMismatchError, ConfigError
from gauge_ext.export import (
    OnnxGenerator,
    export_seq2seq,
    write_onnx_adapter,
)
from gauge_ext.export.adapters.file import read_table

pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["t5", "whisper"])
def made(request, attach, tmp_path_factory):
    kind = request.param
    root = tmp_path_factory.mktemp(kind)
    plain = adapter_folder(kind, attach, root / "a", 1)
    model = gauge_ext.load_adapter(build(kind), root / "a")
    return kind, root, plain, model, export_seq2seq(model, root / "onnx", mode="adapters")


def source_of(model):
    generator = torch.Generator().manual_seed(2)
    if model.main_input_name == "input_features":
        shape = (3, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=generator)}
    ids = torch.randint(8, VOCABULARY, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, source):
    start = model.config.decoder_start_token_id
    tokens = torch.full((3, 1), start)
    for _ in range(10):
        with torch.no_grad():
            logits = model(**source, decoder_input_ids=tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens.numpy()


def generate(generator, source, adapter):
    first, *mask = source.values()
    return generator.generate(
        first,
        attention_mask=mask[0] if mask else None,
        max_new_tokens=10,
        adapter=adapter,
        eos_token_id=None,
        begin_suppress_tokens=None,
    )


def test_greedy_is_that_of_torch(made, tmp_path):
    kind, root, plain, _model, report = made
    assert all(graph.validation.passed for graph in report.graphs)
    assert [case.passed for case in report.whole.cases] == [True, True]
    source = source_of(plain)
    expected = {None: greedy(build(kind), source), "a": greedy(plain, source)}
    assert not np.array_equal(expected[None], expected["a"])
    files = {}
    for graph in report.graphs:
        files[graph.path.name] = tmp_path / f"{graph.path.stem}.onnx_adapter"
        write_onnx_adapter(root / "a", graph.path, files[graph.path.name])
    for given in (root / "a", files):
        generator = OnnxGenerator(root / "onnx", {"a": given})
        for adapter in ("a", None, "a"):
            assert np.array_equal(generate(generator, source, adapter), expected[adapter])
    found = generate(generator, source, ["a", None, "a"])
    for row, adapter in enumerate(["a", None, "a"]):
        assert np.array_equal(found[row], expected[adapter][row])


def test_each_layer_is_in_one_graph(made):
    _, _root, _, model, report = made
    encoder, decoder = (read_table(graph.path) for graph in report.graphs)
    adapted = {n for n, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert set(encoder.inputs) | set(decoder.inputs) == adapted
    assert not set(encoder.inputs) & set(decoder.inputs)
    assert set(encoder.elsewhere) == set(decoder.inputs)
    # Values of the cross attention are made once, by the encoder's graph.
    assert any("decoder" in name for name in encoder.inputs)


def test_other_sources(made):
    _, root, _, _, _report = made
    generator = OnnxGenerator(root / "onnx")
    with pytest.raises(ConfigError, match=r"mapping with what.*onnx-adapter"):
        generator.add("a", root / "a" / "adapter_model.safetensors")
    arrays = {"x.lora_A": np.zeros((2, 2), np.float32)}
    with pytest.raises(AdapterMismatchError):
        generator.add("a", {"decoder_model.onnx": {}, "encoder_model.onnx": arrays})
    assert generator.adapters == ()
    generator.add("a", root / "a")  # the failure left nothing behind


def test_adapters_on_the_decoder_alone(attach, tmp_path):
    root = tmp_path
    both = attach(build("bart"), target_modules=["q_proj"])
    gauge_ext.save_adapter(both, root / "both")
    targets = [n for n, m in both.named_modules() if hasattr(m, "lora_A") and "decoder" in n]
    model = attach(build("bart"), target_modules=targets)
    report = export_seq2seq(model, root / "onnx", mode="adapters")
    encoder, decoder = (read_table(graph.path) for graph in report.graphs)
    assert (set(encoder.inputs), set(decoder.inputs)) == (set(), set(targets))
    assert [case.passed for case in report.whole.cases] == [True, True]
    gauge_ext.save_adapter(model, root / "one")
    generator, source = OnnxGenerator(root / "onnx", {"one": root / "one"}), source_of(model)
    for adapter, torchs in (("one", model), (None, build("bart"))):
        assert np.array_equal(generate(generator, source, adapter), greedy(torchs, source))
    with pytest.raises(AdapterMismatchError, match="in another graph"):
        write_onnx_adapter(root / "one", report.graphs[0].path, root / "e.onnx_adapter")
    with pytest.raises(AdapterMismatchError, match="encoder"):
        OnnxGenerator(root / "onnx", {"both": root / "both"})
