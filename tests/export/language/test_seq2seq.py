"""Encoder-decoder models: two graphs that are the model, for text and for speech."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from language_models import VOCABULARY, build

from gauge_ext.errors import ConfigError
from gauge_ext.export import OnnxGenerator, export_seq2seq, validate_seq2seq

pytest.importorskip("transformers")

TARGETS = {"t5": ["q", "v", "lm_head"], "bart": ["q_proj", "v_proj"], "whisper": ["k_proj", "fc1"]}


@pytest.fixture(scope="module")
def exported_t5(attach, tmp_path_factory):
    model = build("t5")
    attach(model, target_modules=TARGETS["t5"])
    folder = tmp_path_factory.mktemp("t5") / "onnx"
    return model, folder, export_seq2seq(model, folder)


def source_of(model):
    generator = torch.Generator().manual_seed(2)
    if model.main_input_name == "input_features":
        frames = 2 * model.config.max_source_positions
        shape = (3, model.config.num_mel_bins, frames)
        return {"input_features": torch.randn(shape, generator=generator)}
    ids = torch.randint(8, VOCABULARY, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, source, length: int) -> np.ndarray:
    """The most probable token after all before it, from the plain model without a cache."""
    start = model.config.decoder_start_token_id
    tokens = torch.full((next(iter(source.values())).shape[0], 1), start)
    for _ in range(length):
        with torch.no_grad():
            logits = model(**source, decoder_input_ids=tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens.numpy()


def test_the_graphs_and_the_folder(exported_t5):
    _, folder, report = exported_t5
    encoder, decoder = report.graphs
    batch, source = "batch_size", "encoder_sequence_length"
    assert encoder.inputs == dict.fromkeys(("input_ids", "attention_mask"), (batch, source))
    cross = [f"{layer}.encoder.{what}" for layer in range(2) for what in ("key", "value")]
    own = [name.replace("encoder", "decoder") for name in cross]
    assert list(encoder.outputs) == ["last_hidden_state", *(f"present.{name}" for name in cross)]
    for name in cross:
        assert encoder.outputs[f"present.{name}"] == (batch, 4, source, 4)
        assert decoder.inputs[f"past_key_values.{name}"] == (batch, 4, source, 4)
    for name in own:
        assert decoder.inputs[f"past_key_values.{name}"] == (batch, 4, "past_sequence_length", 4)
    assert list(decoder.outputs) == ["logits", *(f"present.{name}" for name in own)]
    files = {file.name for file in folder.iterdir()}
    assert {"encoder_model.onnx", "decoder_model.onnx", "config.json"} <= files
    assert {file.name for file in report.files} == files
    assert report.task == decoder.provenance["task"] == "seq2seq"


def test_no_weight_is_where_it_is_not_needed(exported_t5):
    _, folder, _ = exported_t5
    stored = {
        name: {tensor.name for tensor in onnx.load(folder / name).graph.initializer}
        for name in ("encoder_model.onnx", "decoder_model.onnx")
    }
    cross = "decoder.block.0.layer.1.EncDecAttention."
    assert {cross + "k.weight", cross + "v.weight"} <= stored["encoder_model.onnx"]
    assert {cross + "q.weight", cross + "o.weight"} <= stored["decoder_model.onnx"]
    both = stored["encoder_model.onnx"] & stored["decoder_model.onnx"]
    assert {name for name in both if name.endswith("weight")} <= {"shared.weight"}


def test_greedy_is_that_of_torch(exported_t5):
    model, folder, _ = exported_t5
    source = source_of(model)
    expected = greedy(model, source, 12)
    found = OnnxGenerator(folder).generate(
        source["input_ids"],
        attention_mask=source["attention_mask"],
        max_new_tokens=12,
        eos_token_id=None,
    )
    assert np.array_equal(found, expected)
    assert len(np.unique(found)) > 4
    by_generate = model.generate(**source, max_new_tokens=12, do_sample=False)
    ended = OnnxGenerator(folder).generate(
        source["input_ids"], attention_mask=source["attention_mask"], max_new_tokens=12
    )
    assert np.array_equal(ended, by_generate.numpy())


@pytest.mark.parametrize("kind", ["bart", "whisper"])
def test_other_models(kind, adapted, tmp_path):
    model = adapted(build(kind), target_modules=TARGETS[kind])
    report = export_seq2seq(model, tmp_path / kind)
    assert report.whole.passed
    source = source_of(model)
    first, *mask = source.values()
    found = OnnxGenerator(tmp_path / kind).generate(
        first,
        attention_mask=mask[0] if mask else None,
        max_new_tokens=10,
        eos_token_id=None,
        begin_suppress_tokens=None,
    )
    assert np.array_equal(found, greedy(model, source, 10))
    assert len(np.unique(found)) > 4


def test_a_prompt_of_the_decoder(exported_t5):
    model, folder, _ = exported_t5
    source = source_of(model)["input_ids"][:1]
    free = OnnxGenerator(folder).generate(source, max_new_tokens=8, eos_token_id=None)
    more = OnnxGenerator(folder).generate(
        source, decoder_input_ids=free[:, :5], max_new_tokens=4, eos_token_id=None
    )
    assert np.array_equal(more, free)


def test_a_folder_of_another_model_does_not_pass(exported_t5):
    model, folder, _ = exported_t5
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.decoder.block[1].layer[1].EncDecAttention.v.lora_B.mul_(2.0)
    encoder, decoder, whole = validate_seq2seq(folder, other)
    # Values of the cross attention come out of the encoder's graph.
    assert (encoder.passed, decoder.passed, whole.passed) == (False, True, False)
    failed = {
        name for case in encoder.cases for name in (o.name for o in case.outputs if not o.passed)
    }
    assert failed == {"present.1.encoder.value"}
    assert all(judged.passed for judged in validate_seq2seq(folder, model))


def test_onnxruntime_alone(exported_t5):
    """Both graphs fed by hand, against a plain forward."""
    model, folder, _ = exported_t5
    source = source_of(model)
    ids = torch.randint(VOCABULARY, (3, 4))
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=ids).logits.numpy()
    encoder = onnxruntime.InferenceSession(folder / "encoder_model.onnx")
    decoder = onnxruntime.InferenceSession(folder / "decoder_model.onnx")
    names = [value.name for value in encoder.get_outputs()]
    encoded = encoder.run(names, {name: t.numpy() for name, t in source.items()})
    feeds = {
        f"past_key_values.{name.removeprefix('present.')}": value
        for name, value in zip(names[1:], encoded[1:], strict=True)
    }
    for value in decoder.get_inputs():
        if ".decoder." in value.name:
            feeds[value.name] = np.zeros((3, 4, 0, 4), np.float32)
    feeds["encoder_attention_mask"] = source["attention_mask"].numpy()
    feeds["decoder_input_ids"] = ids.numpy()
    np.testing.assert_allclose(decoder.run(["logits"], feeds)[0], expected, atol=2e-4)


def test_models_of_another_kind(llama, mlp, tmp_path):
    for model, missing in ((llama, "decoder_input_ids"), (mlp, "decoder_input_ids")):
        with pytest.raises(ConfigError, match=rf"does not take {missing}.*export_onnx"):
            export_seq2seq(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
