"""What needs no cache goes through export_onnx: images, and plain modules of any shape."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.export import export_onnx

transformers = pytest.importorskip("transformers")


def merged_by_hand(model: nn.Module) -> nn.Module:
    """A plain copy with W + s·B·A in place of each adapted layer."""
    twin = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            update = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
            plain.weight.data = (layer.weight.double() + update).float()
            if layer.bias is not None:
                plain.bias.data = layer.bias.data.clone()
            parent, _, last = name.rpartition(".")
            setattr(twin.get_submodule(parent), last, plain)
    return twin.eval()


def test_a_vision_transformer(adapted, tmp_path, run_onnx):
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=4,
        num_labels=5,
        initializer_range=0.3,
    )
    model = transformers.ViTForImageClassification(config).eval()
    linear = {n.rpartition(".")[2] for n, m in model.vit.named_modules() if type(m) is nn.Linear}
    adapted(model, target_modules=sorted(linear))
    path = tmp_path / "vit.onnx"
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    report = export_onnx(model, pixels, path, dynamic_shapes={"pixel_values": {0: "batch"}})
    assert report.inputs == {"pixel_values": ("batch", 3, 16, 16)}
    assert report.outputs == {"logits": ("batch", 5)}
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        expected = merged_by_hand(model)(pixel_values=images).logits
        base = copy.deepcopy(model)
        for layer in base.modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B.zero_()
        assert (base(pixel_values=images).logits - expected).abs().max() > 0.1
    found = run_onnx(path, {"pixel_values": images})["logits"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


class Recurrent(nn.Module):
    """A loop over time with a convolution before and a table after it: no transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.inner = nn.Linear(8, 8)
        self.outer = nn.Linear(8, 6)

    def forward(self, series: Tensor, start: Tensor) -> dict[str, Tensor]:
        features = self.conv(series.transpose(1, 2)).transpose(1, 2)
        state = start
        for step in range(4):
            state = torch.tanh(self.inner(state) + features[:, step])
        return {"scores": self.outer(state).log_softmax(-1), "state": state}


def test_a_plain_module(adapted, tmp_path, run_onnx):
    model = adapted(Recurrent().eval(), target_modules=["inner", "outer"])
    path = tmp_path / "recurrent.onnx"
    example = (torch.randn(2, 4, 3), torch.zeros(2, 8))
    rows = {0: "batch"}
    report = export_onnx(model, example, path, dynamic_shapes=(rows, rows))
    assert report.validation.passed
    series, start = torch.randn(7, 4, 3), torch.randn(7, 8)
    with torch.no_grad():
        expected = merged_by_hand(model)(series, start)
    found = run_onnx(path, {"series": series, "start": start})
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)
