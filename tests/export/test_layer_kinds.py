"""Every kind of adapted layer in onnxruntime, which has to agree with the unmerged model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gauge_ext
from gauge_ext.adapters import LoRAConfig
from gauge_ext.export import export_onnx


class Attention(nn.Module):
    """Self-attention that returns its output alone."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def images(*shape: int) -> Tensor:
    return torch.randn(2, *shape)


KINDS = {
    "embedding": (nn.Sequential(nn.Embedding(9, 6)), torch.randint(9, (2, 4)), {}),
    "embedding, DoRA": (
        nn.Sequential(nn.Embedding(9, 6)),
        torch.randint(9, (2, 4)),
        {"use_dora": True},
    ),
    "conv1d": (nn.Sequential(nn.Conv1d(4, 6, 3, stride=2)), images(4, 9), {}),
    "conv2d, dilated": (nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2)), images(3, 7, 7), {}),
    "conv2d, circular": (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
        images(3, 6, 6),
        {},
    ),
    "conv2d, groups": (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), images(4, 6, 6), {}),
    "conv2d, DoRA": (nn.Sequential(nn.Conv2d(3, 4, 3)), images(3, 6, 6), {"use_dora": True}),
    "conv3d": (nn.Sequential(nn.Conv3d(2, 3, 2)), images(2, 3, 3, 3), {}),
    "linear, DoRA": (nn.Sequential(nn.Linear(6, 5)), torch.randn(2, 6), {"use_dora": True}),
    "linear without bias, lora_bias": (
        nn.Sequential(nn.Linear(6, 5, bias=False)),
        torch.randn(2, 6),
        {"lora_bias": True},
    ),
    "attention": (Attention(), images(5, 8), {"target_modules": ["attn"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_exported_merged_and_agrees(kind, tmp_path, run_onnx):
    model, x, fields = KINDS[kind]
    config = LoRAConfig(**{"rank": 4, "alpha": 2, "target_modules": ["0"], **fields})
    with torch.no_grad():
        plain = model.eval()(x)
        gauge_ext.attach(model, config)
        for parameter in gauge_ext.adapter_parameters(model):
            nn.init.normal_(parameter, std=0.4)
        expected = model(x)
    assert (expected - plain).abs().max() > 0.01
    path = tmp_path / "model.onnx"
    report = export_onnx(model, (x,), path, dynamic_shapes=({0: "batch"},))
    assert report.validation.passed
    assert not [name for name in report.parameters if "lora_" in name]
    (found,) = run_onnx(path, {next(iter(report.inputs)): x}).values()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gauge_ext.detach(model)
