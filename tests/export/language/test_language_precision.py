"""Models that generate in fewer bits: what is measured, what they write, and what the files say."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from language_models import adapter_folder, adapter_targets, build

import gauge_ext
from gauge_ext.errors import ConfigError
from gauge_ext.export import (
    OnnxGenerator,
    QuantizationLossError,
    QuantizationOptions,
    Tolerance,
    export_causal_lm,
    export_seq2seq,
    read_provenance,
)
from gauge_ext.export.language import folder as language_folder
from gauge_ext.export.language.causal_lm import causal_kind

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def opened(attach, tmp_path_factory):
    """A Llama with an adapter, its graph with inputs for adapters, and W + s·B·A by hand."""
    root = tmp_path_factory.mktemp("opened")
    plain = adapter_folder("llama", attach, root / "a", 1)
    model = gauge_ext.load_adapter(build("llama"), root / "a")
    report = export_causal_lm(model, root / "onnx", mode="adapters", validate=False)
    return model, root, report, plain


@pytest.fixture
def traced(monkeypatch):
    """``traced(folder, report)`` takes a graph that is there: tracing takes seconds."""

    def use(folder, report):
        def copied(step, example, path, **_):
            shutil.copy(folder / "model.onnx", path)
            return report.graphs[0]

        monkeypatch.setattr(language_folder, "export_onnx", copied)

    return use


def agreement(folder, model, plain, adapter=None) -> tuple[int, int]:
    """How many tokens the graphs choose, and for how many the plain model would choose the same.

    The plain model is asked for each token on its own, one row at a time, without padding.
    """
    sample = causal_kind(model).sample(0)
    prompt, mask = sample.ids[:, :5], sample.mask[:, :5]
    generator = OnnxGenerator(folder, {} if adapter is None else {"a": adapter})
    written = torch.from_numpy(
        generator.generate(
            prompt.numpy(),
            attention_mask=mask.numpy(),
            max_new_tokens=16,
            eos_token_id=None,
            adapter=None if adapter is None else "a",
        )
    )
    agreed = 0
    for row, seen in zip(written, mask, strict=True):
        first = int((seen == 0).sum())
        for end in range(5, 21):
            with torch.no_grad():
                logits = plain(row[None, first:end], use_cache=False).logits[0, -1]
            agreed += int(logits.argmax()) == int(row[end])
    return written[:, 5:].numel(), agreed


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_merged_and_then_in_fewer_bits(precision, exported_llama, traced, tmp_path):
    model, folder, report = exported_llama
    traced(folder, report)
    out = tmp_path / "out"
    found = export_causal_lm(model, out, precision=precision)
    graph = found.graphs[0]
    lost = graph.quantization
    assert lost.precision == precision
    assert lost.bytes_before == (folder / "model.onnx").stat().st_size
    assert graph.bytes_written == (out / "model.onnx").stat().st_size
    assert "model.layers.0.self_attn.q_proj.weight" in {layer.name for layer in lost.layers}
    assert 0 < lost.weight_error < {"fp16": 1e-3, "int8": 2e-2, "int4": 0.2}[precision]
    assert [case.name for case in lost.cases] == [case.name for case in graph.validation.cases]
    # Of padding nothing is compared: three rows of 8, two of them padded.
    prefill = next(case for case in lost.cases if case.name == "prefill")
    assert len(prefill.outputs[0].shape) == 2
    # The float32 graphs were judged, and these measured against torch, in the same loop.
    assert found.whole.passed
    assert [case.name for case in found.measured.cases] == [c.name for c in found.whole.cases]
    measured = found.measured.cases[0].outputs[0].max_abs
    assert measured > found.whole.cases[0].outputs[0].max_abs
    # And they wrote.
    plain = gauge_ext.merge(gauge_ext.load_adapter(build("llama"), _saved(model, tmp_path)))
    (written,) = found.generated
    assert (written.tokens, written.agreed) == agreement(out, model, plain)
    assert written.top1 > {"fp16": 0.95, "int8": 0.8, "int4": 0.4}[precision]
    said = read_provenance(out).graphs["model.onnx"]
    assert said["precision"] == precision
    assert json.loads(said["validation"])["against"] == "float32"
    assert json.loads(said["generation"]) == {
        "tokens": written.tokens,
        "agreed": written.agreed,
        "against": "torch",
    }
    assert {"base_sha256", "adapter_sha256"} <= set(said)


def _saved(model, tmp_path):
    gauge_ext.save_adapter(model, tmp_path / "saved")
    return tmp_path / "saved"


def test_the_base_in_fewer_bits_and_adapters_as_inputs(opened, traced, tmp_path):
    model, root, report, plain = opened
    traced(root / "onnx", report)
    out = tmp_path / "out"
    found = export_causal_lm(model, out, mode="adapters", precision="int8")
    lost = found.graphs[0].quantization
    names = [case.name for case in lost.cases]
    assert "decode 4" in names
    assert "decode 4, with adapter" in names
    stored = {t.name: t for t in onnx.load(out / "model.onnx").graph.initializer}
    factor = stored["model.layers.0.self_attn.q_proj.lora_A"]
    assert (factor.data_type, list(factor.dims)) == (onnx.TensorProto.FLOAT, [16, 0])
    alone, adapted = found.generated
    assert (alone.name, adapted.name) == ("alone", "with adapter")
    assert (alone.tokens, alone.agreed) == agreement(out, model, build("llama"))
    assert (adapted.tokens, adapted.agreed) == agreement(out, model, plain, root / "a")
    assert min(alone.top1, adapted.top1) > 0.8


def test_float32_graphs_write_what_torch_writes(exported_llama):
    _, _, report = exported_llama
    assert report.measured is None
    assert [one.top1 for one in report.generated] == [1.0]


def test_encoder_and_decoder(attach, tmp_path):
    model = attach(build("bart"), target_modules=adapter_targets("bart"))
    found = export_seq2seq(model, tmp_path / "onnx", precision="int8")
    encoder, decoder = found.graphs
    for graph in (encoder, decoder):
        assert graph.quantization.precision == "int8"
        assert graph.files == (graph.path,)
        assert {case.name for case in graph.quantization.cases} >= {"example"}
        assert graph.provenance["precision"] == "int8"
    assert "generation" in decoder.provenance
    assert "generation" not in encoder.provenance
    assert found.generated[0].tokens == 32
    assert found.generated[0].top1 > 0.8
    assert sorted(file.name for file in found.files) == sorted(
        file.name for file in (tmp_path / "onnx").iterdir()
    )
    ids = np.array([[9, 10, 11, 12]])
    assert OnnxGenerator(tmp_path / "onnx").generate(ids, max_new_tokens=5).shape[1] > 1


def test_what_is_refused(exported_llama, traced, tmp_path):
    model, folder, report = exported_llama
    traced(folder, report)
    strict = QuantizationOptions(tolerance=Tolerance(relative=1e-9))
    with pytest.raises(QuantizationLossError, match="int8 loses more"):
        export_causal_lm(model, tmp_path / "out", precision="int8", quantization=strict)
    with pytest.raises(ConfigError, match="must be one of"):
        export_causal_lm(model, tmp_path / "out", precision="int3")
    with pytest.raises(ConfigError, match="precision is 'fp32'"):
        export_causal_lm(model, tmp_path / "out", quantization=strict)
    with pytest.raises(ConfigError, match="float64"):
        export_causal_lm(build("llama").double(), tmp_path / "out", precision="int8")
    assert list(tmp_path.iterdir()) == []
