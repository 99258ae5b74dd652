"""Models of transformers: ModelOutput, attention masks, tied embeddings, several operator sets."""

from __future__ import annotations

import copy
from collections import Counter

import onnx
import pytest
import torch

from gauge_ext.errors import ExportError
from gauge_ext.export import export_onnx

transformers = pytest.importorskip("transformers")

AXES = {0: "batch", 1: "sequence"}
SHAPES = {"input_ids": AXES, "attention_mask": AXES}


@pytest.fixture(scope="module")
def _classifier():
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


@pytest.fixture
def classifier(_classifier, adapted):
    return adapted(copy.deepcopy(_classifier), target_modules=["query", "value", "classifier"])


@pytest.fixture
def inputs(token_ids):
    mask = torch.ones_like(token_ids)
    mask[1, 4:] = 0
    return {"attention_mask": mask, "input_ids": token_ids}


def ops_of(path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def test_a_classification_head_in_an_old_opset(classifier, inputs, tmp_path, run_onnx):
    path = tmp_path / "bert.onnx"
    report = export_onnx(classifier, inputs, path, dynamic_shapes="auto", opset=17)
    model = onnx.load(path)
    assert {o.version for o in model.opset_import if o.domain == ""} == {17}
    assert report.inputs == dict.fromkeys(("input_ids", "attention_mask"), ("batch", "sequence"))
    assert report.outputs == {"logits": ("batch", 3)}

    # Each parameter under its own name; only those that no output depends on are missing.
    stored = {tensor.name for tensor in model.graph.initializer}
    assert {name for name, _ in merged_names(classifier)} == stored & set(report.parameters)

    cases = report.validation.cases
    assert [case.name for case in cases[:3]] == ["example", "smallest", "larger"]
    assert cases[1].sizes == {"batch": 1, "sequence": 1}
    assert cases[2].sizes["batch"] > 3
    assert cases[2].sizes["sequence"] > 7
    assert all(output.top1 == 1.0 for case in cases for output in case.outputs)

    ids = torch.randint(50, (5, 11))
    mask = (torch.arange(11) < torch.tensor([11, 3, 1, 7, 9])[:, None]).long()
    with torch.no_grad():
        expected = classifier.eval()(input_ids=ids, attention_mask=mask).logits
    found = run_onnx(path, {"input_ids": ids, "attention_mask": mask})["logits"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def merged_names(model):
    return [
        (name, tensor)
        for name, tensor in model.named_parameters()
        if not name.endswith(("lora_A", "lora_B"))
    ]


def test_tied_weights_are_stored_once(llama, inputs, adapted, tmp_path, run_onnx):
    adapted(llama)
    path = tmp_path / "llama.onnx"
    # attention is one node from opset 23 on
    report = export_onnx(llama, inputs, path, dynamic_shapes=SHAPES, opset=23)
    assert ops_of(path)["Attention"] == 2
    tied = ("model.embed_tokens.weight", "lm_head.weight")
    assert report.parameters["model.embed_tokens.weight"] == tied
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    assert "lm_head.weight" not in stored
    assert sum(list(t.dims) in ([50, 16], [16, 50]) for t in stored.values()) == 1
    assert {name for name, _ in merged_names(llama)} <= set(stored)
    top1 = [output.top1 for case in report.validation.cases for output in case.outputs]
    assert top1 == [1.0] * 5

    ids = torch.randint(50, (4, 12))
    with torch.no_grad():
        expected = llama(input_ids=ids).logits
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(run_onnx(path, feeds)["logits"], expected, atol=1e-5, rtol=0)


def test_a_cache_in_the_output_is_explained(llama, inputs, tmp_path):
    llama.config.use_cache = True
    # transformers 5.24 renamed the output, "past_key_values" before, to "cache".
    name = next(key for key, value in llama(**inputs).items() if "Cache" in type(value).__name__)
    with pytest.raises(ExportError, match=rf"DynamicCache.*'{name}'.*use_cache = False"):
        export_onnx(llama, inputs, tmp_path / "llama.onnx")
