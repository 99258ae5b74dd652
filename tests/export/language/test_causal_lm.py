"""Decoder-only models with a cache: what the graph is, and that it is the model."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from language_models import PAD, VOCABULARY, build

from gauge_ext.errors import ConfigError, ExportError, WriteError
from gauge_ext.export import OnnxGenerator, Tolerance, export_causal_lm, validate_causal_lm
from gauge_ext.export.language import folder as language_folder
from gauge_ext.export.validate import DisagreementError

transformers = pytest.importorskip("transformers")


def merged_by_hand(model):
    """W + s·B·A, from the factors, in a plain model of transformers."""
    plain = build("llama")
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            weight = plain.get_submodule(name).weight
            update = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
            weight.data = (weight.double() + update).float()
    return plain


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows, two of them padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(8, VOCABULARY, (4, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, :1] = 0, 0
    return ids.masked_fill(mask == 0, PAD), mask


def test_the_graph_and_the_folder(exported_llama):
    model, folder, report = exported_llama
    graph = report.graphs[0]
    batch, past = "batch_size", "past_sequence_length"
    assert graph.inputs["input_ids"] == (batch, "sequence_length")
    assert graph.inputs["position_ids"] == (batch, "sequence_length")
    assert graph.inputs["attention_mask"] == (batch, "total_sequence_length")
    # Two key/value heads for four query heads.
    caches = [f"{layer}.{what}" for layer in range(2) for what in ("key", "value")]
    for name in caches:
        assert graph.inputs[f"past_key_values.{name}"] == (batch, 2, past, 4)
        rows, heads, length, size = graph.outputs[f"present.{name}"]
        assert (rows, heads, size) == (batch, 2, 4)
        assert set(length.split(" + ")) == {past, "sequence_length"}
    assert list(graph.outputs) == ["logits", *(f"present.{name}" for name in caches)]
    assert len(graph.inputs) == 3 + len(caches)

    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "gauge_ext.json",
        "genai_config.json",
        "generation_config.json",
        "model.onnx",
    ]
    assert {file.name for file in report.files} == {file.name for file in folder.iterdir()}
    assert report.bytes_written == sum(file.stat().st_size for file in folder.iterdir())
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert json.loads(report.to_json())["graphs"][0]["validation"]["passed"] is True
    assert graph.provenance["task"] == "text-generation"
    assert {"base_sha256", "adapter_sha256"} <= set(graph.provenance)
    assert model.config.use_cache is not None
    assert any(hasattr(layer, "lora_A") for layer in model.modules())


def test_a_tied_output_layer_is_stored_once(exported_llama):
    _, folder, report = exported_llama
    tied = ("model.embed_tokens.weight", "lm_head.weight")
    assert report.graphs[0].parameters["model.embed_tokens.weight"] == tied
    stored = onnx.load(folder / "model.onnx").graph.initializer
    shapes = [sorted(tensor.dims) for tensor in stored]
    assert shapes.count([16, VOCABULARY]) == 1


def test_what_validation_ran(exported_llama):
    _, folder, report = exported_llama
    steps = report.graphs[0].validation
    assert steps.path == folder / "model.onnx"
    names = [case.name for case in steps.cases]
    assert names == [
        *("example", "prefill", "prefill of one token", "decode 1", "decode 4"),
        "decode 1, one row",
    ]
    assert {case.sizes["past_sequence_length"] for case in steps.cases} >= {0, 4, 9}
    assert [case.name for case in report.whole.cases] == ["loop of 5, 1, 4 tokens, left padding"]
    # Only what is not padding is compared: fewer rows than batch times sequence.
    prefill = steps.cases[1].outputs[0]
    assert len(prefill.shape) == 2
    assert 8 <= prefill.shape[0] < 3 * 8


def test_logits_by_hand(exported_llama):
    """onnxruntime alone, fed by hand, against a plain model with W + s·B·A, without a cache."""
    model, folder, _ = exported_llama
    plain = merged_by_hand(model)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    ids = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = plain(input_ids=ids).logits.numpy()
    past = {
        value.name: np.zeros((2, 2, 0, 4), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    found, done = [], 0
    for new in (3, 1, 1, 4):
        feeds = {
            "input_ids": ids[:, done : done + new].numpy(),
            "attention_mask": np.ones((2, done + new), np.int64),
            "position_ids": np.tile(np.arange(done, done + new), (2, 1)),
        }
        outputs = session.run(None, feeds | past)
        found.append(outputs[0])
        past = dict(zip(past, outputs[1:], strict=True))
        done += new
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=2e-4)


def test_greedy_is_that_of_the_adapted_model(exported_llama):
    model, folder, _ = exported_llama
    ids, mask = prompts()
    expected = merged_by_hand(model).generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False
    )
    found = OnnxGenerator(folder).generate(ids, attention_mask=mask, max_new_tokens=24)
    assert np.array_equal(found, expected.numpy())
    without = build("llama").generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False
    )
    assert without.shape != expected.shape or not torch.equal(without, expected)


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma", "gpt2"])
def test_greedy_is_that_of_torch(kind, adapted, tmp_path):
    model = build(kind)
    # GPT-2's linear layers are transformers' Conv1D.
    adapted(model, target_modules=["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj", "o_proj"])
    report = export_causal_lm(model, tmp_path / kind)
    assert report.whole.passed
    ids, mask = prompts()
    expected = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False
    )
    found = OnnxGenerator(tmp_path / kind).generate(ids, attention_mask=mask, max_new_tokens=24)
    assert np.array_equal(found, expected.numpy())
    assert len(np.unique(found[:, 6:])) > 5  # and not one token over and over


def test_a_folder_of_another_model_does_not_pass(exported_llama):
    model, folder, _ = exported_llama
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.lora_B.mul_(2.0)
    steps, whole = validate_causal_lm(folder, other)
    assert not steps.passed
    assert not whole.passed
    assert all(judged.passed for judged in validate_causal_lm(folder, model))


@pytest.fixture
def traced(exported_llama, monkeypatch):
    """Takes the graph that is there instead of making it again: tracing takes seconds."""
    model, folder, report = exported_llama

    def copied(step, example, path, **_):
        shutil.copy(folder / "model.onnx", path)
        return report.graphs[0]

    monkeypatch.setattr(language_folder, "export_onnx", copied)
    return model


def test_nothing_is_left_of_what_disagrees(traced, tmp_path):
    strict = Tolerance(absolute=0.0, relative=0.0)
    with pytest.raises(DisagreementError) as caught:
        export_causal_lm(traced, tmp_path / "out", tolerance=strict)
    assert caught.value.report.path == tmp_path / "out" / "model.onnx"
    assert list(tmp_path.iterdir()) == []


def test_models_of_another_kind(bert, mlp, tmp_path):
    with pytest.raises(ConfigError, match=r"MLP\.forward does not take input_ids.*export_onnx"):
        export_causal_lm(mlp, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"BertModel gives no logits.*AutoModelForCausalLM"):
        export_causal_lm(bert, tmp_path / "out")
    with pytest.raises((ConfigError, ExportError), match="Mamba"):
        export_causal_lm(build("mamba"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something(exported_llama, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(WriteError, match="not an empty folder"):
        export_causal_lm(exported_llama[0], tmp_path)


def test_the_tokenizer_comes_along(traced, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "notes.txt"):
        (source / name).write_text(name)
    export_causal_lm(traced, tmp_path / "out", source=source, validate=False)
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= found
    assert found.isdisjoint({"model.safetensors", "notes.txt"})
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
