"""``lora_linear_group`` among torch's tools: compiled, exported, traced, checkpointed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from group_problems import GROUPS, by_hand, make
from marks import needs_compiled
from torch import Tensor, nn

from gauge_ext.ops import draw_seed, lora_linear_group

pytestmark = needs_compiled


class Group(nn.Module):
    """Two layers on the op alone, the second without a bias."""

    def __init__(self, dropout_p: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        p = make(dtype=dtype)
        self.scalings, self.dropout_p = p.scalings, dropout_p
        self.weights = nn.ParameterList(p.weights).requires_grad_(False)
        self.bias = nn.Parameter(torch.ones(5, dtype=dtype), requires_grad=False)
        self.lora_As = nn.ParameterList(nn.Parameter(a.detach()) for a in p.lora_As)
        self.lora_Bs = nn.ParameterList(nn.Parameter(b.detach()) for b in p.lora_Bs)

    def call(self, function: Callable[..., Any], x: Tensor) -> list[Tensor]:
        seeds = [draw_seed(), draw_seed()] if self.dropout_p > 0 else []
        lists = list(self.weights), [self.bias, None], list(self.lora_As), list(self.lora_Bs)
        return list(function(x, *lists, self.scalings, self.dropout_p, seeds))

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.call(lora_linear_group, x)

    def by_hand(self, x: Tensor) -> list[Tensor]:
        first, second = (
            x @ (w + s * b @ a).T
            for w, s, b, a in zip(
                self.weights, self.scalings, self.lora_Bs, self.lora_As, strict=True
            )
        )
        return [first + self.bias, second]


def inputs(rows: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows), dtype=dtype)


def total(ys: list[Tensor]) -> Tensor:
    return sum((y.square().sum() for y in ys), torch.zeros(()))


def test_compile_fullgraph_forward_and_backward() -> None:
    layer = Group()
    compiled = torch.compile(layer, fullgraph=True)
    for rows in (3, 7, 11):  # the third size must be served by a graph with symbolic sizes
        x = inputs(rows).requires_grad_()
        parameters = (x, *layer.lora_As, *layer.lora_Bs)
        exact = torch.autograd.grad(total(layer.by_hand(x)), parameters)
        ys = compiled(x)
        torch.testing.assert_close(ys, layer.by_hand(x))
        torch.testing.assert_close(torch.autograd.grad(total(ys), parameters), exact)


def test_plain_onnx_export(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    class Raw(Group):
        def forward(self, x: Tensor) -> list[Tensor]:
            return self.call(torch.ops.gauge_ext.lora_linear_group, x)

    layer, path = Raw(dtype=torch.float32).eval(), tmp_path / "layer.onnx"
    example, dynamic = inputs(dtype=torch.float32), ({0: torch.export.Dim("rows")},)
    torch.onnx.export(layer, (example,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    other = inputs(9, torch.float32)
    ys = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    for y, expected in zip(ys, layer.by_hand(other), strict=True):
        np.testing.assert_allclose(y, expected.detach().numpy(), atol=1e-5)


def test_jit_trace_records_ordinary_operators() -> None:
    class Sum(Group):
        def forward(self, x: Tensor) -> Tensor:
            return total(super().forward(x))

    layer = Sum()
    traced = torch.jit.trace(layer, (inputs(),))
    assert "gauge_ext::" not in str(traced.graph)
    torch.testing.assert_close(traced(inputs(9)), total(layer.by_hand(inputs(9))))


def test_torch_func_and_forward_mode() -> None:
    layer, x = Group(), inputs(6)
    actual = torch.func.vmap(torch.func.grad(lambda x: total(layer(x))))(x)
    expected = torch.func.vmap(torch.func.grad(lambda x: total(layer.by_hand(x))))(x)
    torch.testing.assert_close(actual, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [torch.autograd.forward_ad.unpack_dual(y).tangent for y in layer(dual)]
    zero = layer.by_hand(torch.zeros_like(x))
    for tangent, y, constant in zip(tangents, layer.by_hand(torch.ones_like(x)), zero, strict=True):
        torch.testing.assert_close(tangent, y - constant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_masks_again(use_reentrant: bool) -> None:
    layer, x = Group(dropout_p=0.5), inputs(50)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        if checkpointed:
            run = torch.utils.checkpoint.checkpoint
            y = run(lambda x: total(layer(x)), leaf, use_reentrant=use_reentrant)
        else:
            y = total(layer(leaf))
        layer.zero_grad()
        y.backward()
        gradients.append([leaf.grad, *(a.grad for a in layer.lora_As)])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_autocast_computes_the_bases_in_the_lower_precision() -> None:
    p = make(GROUPS[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ys = lora_linear_group(*p.arguments())
    assert [y.dtype for y in ys] == [torch.bfloat16] * 3
    gradients = torch.autograd.grad(ys, p.differentiable, [g.bfloat16() for g in p.grads])
    exact_ys, exact = by_hand(p)
    for actual, expected in zip([*ys, *gradients], [*exact_ys, *exact], strict=True):
        assert_close(actual, expected, 2e-2)
