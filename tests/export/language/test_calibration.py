"""int8-static of models that generate: ranges out of prefill and steps, and prompts refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from language_models import END, VOCABULARY, adapter_targets, build
from onnx import numpy_helper

import gauge_ext
from gauge_ext.export import (
    OnnxGenerator,
    QuantizationOptions,
    export_causal_lm,
    export_seq2seq,
    read_provenance,
)
from gauge_ext.export.language import calibration as language_calibration
from gauge_ext.export.language import folder as language_folder

pytest.importorskip("transformers")


def prompts(seed, rows, length):
    return np.random.default_rng(seed).integers(8, VOCABULARY, (rows, length))


def options(*sets):
    return QuantizationOptions(calibration=sets)


@pytest.fixture
def traced(monkeypatch):
    """``traced(folder, report)`` takes graphs that are there: tracing takes seconds."""

    def use(folder, report):
        def copied(step, example, path, **_):
            shutil.copy(folder / path.name, path)
            return next(graph for graph in report.graphs if graph.path.name == path.name)

        monkeypatch.setattr(language_folder, "export_onnx", copied)

    return use


@pytest.fixture(scope="module")
def exported_t5(attach, tmp_path_factory):
    model = attach(build("t5"), target_modules=adapter_targets("t5"))
    folder = tmp_path_factory.mktemp("t5") / "onnx"
    return model, folder, export_seq2seq(model, folder, validate=False)


def step_of(path: Path, weight: str) -> tuple[float, int]:
    """Scale and zero point of what is multiplied with a weight."""
    graph = onnx.load(path).graph
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    (product,) = (
        node
        for node in graph.node
        if node.op_type == "MatMul"
        and made.get(node.input[1]) is not None
        and made[node.input[1]].input[0] == f"{weight}_quantized"
    )
    read = made[product.input[0]]
    assert read.op_type == "DequantizeLinear"
    return float(values[read.input[1]]), int(values[read.input[2]])


def expected_step(seen: list[torch.Tensor]) -> tuple[float, int]:
    """Of 8 bits over the range of all that a layer saw, 0 in it."""
    least = min(0.0, min(float(one.min()) for one in seen))
    most = max(0.0, max(float(one.max()) for one in seen))
    return (most - least) / 255, round(-least / ((most - least) / 255))


def inputs_of(model, layer, calls):
    """What a layer of the plain model is given."""
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, given: seen.append(given[0].detach())
    )
    with torch.no_grad():
        for call in calls:
            model(**call, use_cache=False)
    hook.remove()
    return seen


def test_ranges_are_those_of_prompts_and_of_what_is_written_after_them(
    exported_llama, traced, tmp_path
):
    model, folder, report = exported_llama
    traced(folder, report)
    gauge_ext.save_adapter(model, tmp_path / "saved")
    plain = gauge_ext.merge(gauge_ext.load_adapter(build("llama"), tmp_path / "saved"))
    ids = prompts(3, 3, 6)
    mask = np.ones_like(ids)
    mask[1, :2] = 0  # padding on the left
    mask[2, 4:] = 0  # and on the right
    out = tmp_path / "out"
    found = export_causal_lm(
        model,
        out,
        precision="int8-static",
        quantization=options({"input_ids": ids[:1]}, {"input_ids": ids, "attention_mask": mask}),
    )

    calls = []
    for row, seen in zip(ids, mask, strict=True):
        alone = torch.from_numpy(row[seen == 1])[None]
        whole = plain.generate(
            alone,
            attention_mask=torch.ones_like(alone),
            max_new_tokens=16,
            do_sample=False,
            use_cache=False,
        )
        calls.append({"input_ids": whole[:, :-1]})  # the last token is written and not read
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        name = {"lm_head": "model.embed_tokens.weight.transposed"}.get(layer, f"{layer}.weight")
        scale, zero = step_of(out / "model.onnx", name)
        expected = expected_step(inputs_of(plain, layer, calls))
        assert scale == pytest.approx(expected[0], rel=1e-4), layer
        assert zero == expected[1], layer

    lost = found.graphs[0].quantization
    assert lost.precision == "int8-static"
    assert 0 < lost.weight_error < 2e-2
    names = [case.name for case in lost.cases]
    assert "decode 4" in names
    assert names[-2:] == ["calibration prompt 1, prefill", "calibration prompt 1, step"]
    assert 0.97 < lost.cosine < 1.0
    assert found.whole.passed
    (written,) = found.generated
    assert written.top1 > 0.8
    said = read_provenance(out).graphs["model.onnx"]
    assert said["precision"] == "int8-static"
    text = OnnxGenerator(out).generate(ids[:1], max_new_tokens=5, eos_token_id=None)
    assert text.shape == (1, 11)


def test_encoder_and_decoder(exported_t5, traced, tmp_path):
    model, folder, report = exported_t5
    traced(folder, report)
    gauge_ext.save_adapter(model, tmp_path / "saved")
    plain = gauge_ext.merge(gauge_ext.load_adapter(build("t5"), tmp_path / "saved"))
    source = prompts(5, 10, 9)
    # Of a model that ends at once, the beginnings say what it is to be calibrated on.
    begun = np.concatenate([np.zeros((10, 1), np.int64), prompts(6, 10, 5)], 1)
    out = tmp_path / "out"
    found = export_seq2seq(
        model,
        out,
        precision="int8-static",
        quantization=options(
            {"input_ids": source[:2]}, {"input_ids": source, "decoder_input_ids": begun}
        ),
    )
    calls = []
    starts = [(row, [0]) for row in source[:2]] + list(zip(source, begun, strict=True))
    for row, start in starts:
        alone, first = torch.from_numpy(row)[None], torch.tensor([[*start]])
        whole = plain.generate(
            alone, decoder_input_ids=first, max_new_tokens=16, do_sample=False, use_cache=False
        )
        calls.append({"input_ids": alone, "decoder_input_ids": whole[:, :-1]})
    for graph, layer in (
        ("encoder_model.onnx", "encoder.block.1.layer.0.SelfAttention.q"),
        ("encoder_model.onnx", "decoder.block.1.layer.1.EncDecAttention.k"),
        ("decoder_model.onnx", "decoder.block.1.layer.1.EncDecAttention.q"),
    ):
        scale, zero = step_of(out / graph, f"{layer}.weight")
        expected = expected_step(inputs_of(plain, layer, calls))
        assert scale == pytest.approx(expected[0], rel=1e-4), layer
        assert zero == expected[1], layer

    encoder, decoder = found.graphs
    assert encoder.quantization.cases[-1].name == "calibration prompt 1, encoder"
    assert decoder.quantization.cases[-2].name == "calibration prompt 1, prefill"
    for one in (encoder, decoder):
        assert one.quantization.precision == "int8-static"
        assert 0 < one.quantization.weight_error < 2e-2
    assert found.generated[0].top1 > 0.7
    # The first tokens that it writes are torch's.
    with torch.no_grad():
        first = plain(
            input_ids=torch.from_numpy(source), decoder_input_ids=torch.zeros(10, 1).long()
        ).logits[:, -1]
    written = OnnxGenerator(out).generate(source, max_new_tokens=1)
    assert (written[:, 1] == first.argmax(-1).numpy()).mean() >= 0.8


def test_with_adapters_as_inputs_each_prompt_runs_without_and_with(attach, traced, tmp_path):
    model = attach(build("llama"), target_modules=["q_proj", "v_proj", "down_proj"])
    report = export_causal_lm(model, tmp_path / "onnx", mode="adapters", validate=False)
    traced(tmp_path / "onnx", report)
    found = export_causal_lm(
        model,
        tmp_path / "out",
        mode="adapters",
        precision="int8-static",
        quantization=options({"input_ids": prompts(3, 1, 6)}),
    )
    names = [case.name for case in found.graphs[0].quantization.cases]
    assert names[-4:] == [
        "calibration prompt 1, prefill",
        "calibration prompt 1, step",
        "calibration prompt 1, prefill, with adapter",
        "calibration prompt 1, step, with adapter",
    ]
    gauge_ext.save_adapter(model, tmp_path / "saved")
    merged = gauge_ext.merge(gauge_ext.load_adapter(build("llama"), tmp_path / "saved"))
    seen = []
    for plain in (build("llama"), merged):
        whole = plain.generate(
            torch.from_numpy(prompts(3, 1, 6)),
            attention_mask=torch.ones(1, 6).long(),
            max_new_tokens=16,
            do_sample=False,
        )
        layer = "model.layers.1.mlp.down_proj"
        seen += inputs_of(plain, layer, [{"input_ids": whole[:, :-1]}])
    scale, _ = step_of(tmp_path / "out" / "model.onnx", f"{layer}.weight")
    assert scale == pytest.approx(expected_step(seen)[0], rel=1e-4)
    assert min(one.top1 for one in found.generated) > 0.8


def test_it_ends_where_the_model_ends(exported_llama, tmp_path):
    model, folder, _ = exported_llama
    generator = OnnxGenerator(folder)
    for seed in range(40):
        ids = prompts(seed, 1, 4)
        written = generator.generate(ids, max_new_tokens=16, eos_token_id=None)[0, 4:].tolist()
        if END in written[:-1]:
            break
    else:
        pytest.fail("no prompt leads to the end token")
    held = language_calibration.Calibration(
        folder, model, [language_calibration.Prompt(ids, None, 16)]
    )
    fed = list(held.feeds("model.onnx"))
    assert len(fed) == written.index(END) + 1  # prefill, and each token but the end
    pasts = [one["past_key_values.0.key"].shape[2] for one in fed]
    assert pasts == [0, *range(4, 4 + len(fed) - 1)]
