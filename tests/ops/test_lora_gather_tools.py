"""``lora_gather`` under torch's tools: compile, ONNX export, jit.trace and torch.func."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gather_problems import SCALING, Problem
from marks import needs_compiled
from torch import Tensor, nn

from gauge_ext.ops import lora_gather

pytestmark = needs_compiled


class Layer(nn.Module):
    """A layer as a stranger would write it, on the op alone."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        p = Problem([0], sizes=(4, 5), dtype=dtype)
        self.weight, self.bias = nn.Parameter(p.weight, False), nn.Parameter(p.bias, False)
        self.lora_A = nn.ParameterList([t.detach() for t in p.lora_A])
        self.lora_B = nn.ParameterList([t.detach() for t in p.lora_B])

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        lora = (list(self.lora_A), list(self.lora_B), SCALING)
        return lora_gather(x, self.weight, self.bias, *lora, index)

    def by_hand(self, x: Tensor, index: Tensor) -> Tensor:
        rows = []
        for row, i in zip(x, index.tolist(), strict=True):
            merged = self.weight
            if i >= 0:
                merged = merged + SCALING[i] * self.lora_B[i] @ self.lora_A[i]
            rows.append(row @ merged.T + self.bias)
        return torch.stack(rows)


def batch(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 4, generator=generator, dtype=dtype)
    return x, torch.randint(-1, 4, (rows,), generator=generator)


def test_compile_fullgraph_forward_and_backward() -> None:
    layer = Layer()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    factors = [*layer.lora_A, *layer.lora_B]
    for rows in (3, 7, 11):  # the third size must be served by a graph with symbolic sizes
        x, index = batch(rows)
        y, expected = compiled(x, index), layer.by_hand(x, index)
        torch.testing.assert_close(y, expected)
        exact = torch.autograd.grad(expected.square().sum(), factors, allow_unused=True)
        for actual, wanted in zip(
            torch.autograd.grad(y.square().sum(), factors), exact, strict=True
        ):
            torch.testing.assert_close(
                actual, torch.zeros_like(actual) if wanted is None else wanted
            )


def test_plain_onnx_export(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = Layer(torch.float32).eval()
    path = tmp_path / "layer.onnx"
    rows = torch.export.Dim.DYNAMIC
    example = batch(3, torch.float32)
    dynamic = ({0: rows}, {0: rows})
    torch.onnx.export(layer, example, path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x, index = batch(9, torch.float32)
    names = [entry.name for entry in session.get_inputs()]
    (y,) = session.run(None, dict(zip(names, (x.numpy(), index.numpy()), strict=True)))
    np.testing.assert_allclose(y, layer.by_hand(x, index).detach().numpy(), atol=1e-5)


def test_jit_trace_and_torch_func() -> None:
    layer = Layer()
    traced = torch.jit.trace(layer, batch(3))
    assert "gauge_ext::" not in str(traced.graph)
    x, index = batch(9)
    torch.testing.assert_close(traced(x, index), layer.by_hand(x, index))
    actual = torch.func.grad(lambda rows: layer(rows, index).square().sum())(x)
    expected = torch.func.grad(lambda rows: layer.by_hand(rows, index).square().sum())(x)
    torch.testing.assert_close(actual, expected)
    _, tangent = torch.func.jvp(lambda rows: layer(rows, index), (x,), (x,))
    torch.testing.assert_close(tangent, layer.by_hand(x, index) - layer.bias)
    batched = torch.func.vmap(layer)(x.view(3, 3, 4), index.view(3, 3))
    torch.testing.assert_close(batched.view(9, 5), layer.by_hand(x, index))
