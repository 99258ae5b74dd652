"""``lora_linear`` under torch.compile, torch.export, ONNX export, torch.func and checkpointing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import needs_compiled
from torch import Tensor, nn

from gauge_ext.ops import (
    dora_row_norms,
    dora_scale,
    draw_seed,
    lora_embedding,
    lora_gather,
    lora_linear,
    lora_linear_group,
    reference,
)

pytestmark = needs_compiled

SCALING = 0.5


class Layer(nn.Module):
    """A layer as a stranger would write it, on the op alone."""

    def __init__(self, dropout_p: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        self.weight = nn.Parameter(normal(5, 4), requires_grad=False)
        self.bias = nn.Parameter(normal(5), requires_grad=False)
        self.lora_A = nn.Parameter(normal(2, 4))
        self.lora_B = nn.Parameter(normal(5, 2))
        self.dropout_p = dropout_p

    def forward(self, x: Tensor) -> Tensor:
        seed = draw_seed() if self.dropout_p > 0 else None
        lora = (self.lora_A, self.lora_B, SCALING, self.dropout_p, seed)
        return lora_linear(x, self.weight, self.bias, *lora)

    def by_hand(self, x: Tensor) -> Tensor:
        merged = self.weight + SCALING * self.lora_B @ self.lora_A
        return x @ merged.T + self.bias


def inputs(rows: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows), dtype=dtype)


def test_compile_fullgraph_forward_and_backward() -> None:
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True)
    for rows in (3, 7, 11):  # the third size must be served by a graph with symbolic sizes
        x = inputs(rows).requires_grad_()
        expected = layer.by_hand(x)
        parameters = (x, layer.lora_A, layer.lora_B)
        exact = torch.autograd.grad(expected.square().sum(), parameters)
        y = compiled(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), parameters), exact)


def test_compile_keeps_the_compiled_op() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    x = inputs().requires_grad_()
    torch.compile(Layer(), fullgraph=True, backend=aot_autograd(fw_compiler=backend))(x)
    assert "gauge_ext.lora_linear_forward.default" in seen


def _linear(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return lora_linear(x, weight, None, lora_A, lora_B, SCALING)


def _group(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return lora_linear_group(x, [weight], [None], [lora_A], [lora_B], [SCALING], 0.0, [])[0]


def _gather(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    index = torch.zeros(len(x), dtype=torch.int64)
    return lora_gather(x, weight, None, [lora_A], [lora_B], [SCALING], index)


def _embedding(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    # Of the table Wᵀ every token once: Wᵀ + s·(B A)ᵀ, (in, out)
    ids = torch.arange(weight.shape[1])
    return x @ lora_embedding(ids, weight.mT, lora_A, lora_B, SCALING)


def _norms(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    total = weight + SCALING * lora_B @ lora_A
    norms = dora_row_norms(weight, lora_A, lora_B, SCALING)
    lengths = torch.linalg.vector_norm(total, dim=1)
    return x @ total.mT * (norms / lengths)


def _dora(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    total = weight + SCALING * lora_B @ lora_A
    norms = torch.linalg.vector_norm(total, dim=1)
    return dora_scale(x @ (total / norms.unsqueeze(1)).mT, norms)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("lora_linear", _linear),
        ("lora_linear_group", _group),
        ("lora_gather", _gather),
        ("lora_embedding", _embedding),
        ("dora_scale", _dora),
        ("dora_row_norms", _norms),
    ],
)
def test_compiled_without_gradients_where_ci_is_set(
    name: str, call: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor refuses there what has a decomposition, unless it was told of it before."""
    from torch._inductor.lowering import lowerings
    from torch._inductor.utils import fresh_cache

    monkeypatch.setenv("CI", "1")
    op = getattr(torch.ops.gauge_ext, name).default
    lowerings.pop(op, None)
    torch._dynamo.reset()
    layer, x = Layer(), inputs()
    with torch.no_grad(), fresh_cache():
        y = torch.compile(call, fullgraph=True)(x, layer.weight, layer.lora_A, layer.lora_B)
        torch.testing.assert_close(y, layer.by_hand(x) - layer.bias)
    assert op in lowerings


def test_compile_with_dropout_draws_a_new_mask_each_step() -> None:
    compiled = torch.compile(Layer(dropout_p=0.5), fullgraph=True)
    x = inputs(64)
    torch.manual_seed(0)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(0)
    again = compiled(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("strict", [True, False])
def test_export_round_trip(tmp_path: Path, strict: bool) -> None:
    layer = Layer()
    rows = torch.export.Dim("rows")
    program = torch.export.export(layer, (inputs(),), dynamic_shapes=({0: rows},), strict=strict)
    assert "gauge_ext.lora_linear.default" in [str(node.target) for node in program.graph.nodes]
    torch.export.save(program, tmp_path / "layer.pt2")
    module = torch.export.load(tmp_path / "layer.pt2").module()
    torch.testing.assert_close(module(inputs(9)), layer.by_hand(inputs(9)))


@pytest.mark.parametrize("raw", [False, True])
def test_plain_onnx_export(tmp_path: Path, raw: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    class Raw(Layer):
        def forward(self, x: Tensor) -> Tensor:
            lora = (self.lora_A, self.lora_B, SCALING)
            return torch.ops.gauge_ext.lora_linear(x, self.weight, self.bias, *lora)

    layer = (Raw if raw else Layer)(dtype=torch.float32).eval()
    path = tmp_path / "layer.onnx"
    example = inputs(dtype=torch.float32)
    dynamic = ({0: torch.export.Dim("rows")},)
    torch.onnx.export(layer, (example,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    other = inputs(9, torch.float32)
    (y,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    np.testing.assert_allclose(y, layer.by_hand(other).detach().numpy(), atol=1e-5)


def test_jit_trace_records_ordinary_operators() -> None:
    layer = Layer()
    traced = torch.jit.trace(layer, (inputs(),))
    assert "gauge_ext::" not in str(traced.graph)
    torch.testing.assert_close(traced(inputs(9)), layer.by_hand(inputs(9)))


def test_torch_func_transforms() -> None:
    layer = Layer()
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    def loss_by_hand(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        p = parameters
        merged = p["weight"] + SCALING * p["lora_B"] @ p["lora_A"]
        return (x @ merged.T + p["bias"]).square().sum()

    x = inputs(6)
    actual = torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(actual, torch.func.grad(loss_by_hand)(parameters, x))
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    expected = torch.func.vmap(torch.func.grad(loss_by_hand), (None, 0))(parameters, x)
    torch.testing.assert_close(per_sample, expected)
    tangent = torch.ones_like(x)
    _, directional = torch.func.jvp(lambda x: loss(parameters, x), (x,), (tangent,))
    _, exact = torch.func.jvp(lambda x: loss_by_hand(parameters, x), (x,), (tangent,))
    torch.testing.assert_close(directional, exact)
    hessian = torch.func.hessian(loss, argnums=1)(parameters, x[:1])
    torch.testing.assert_close(hessian, torch.func.hessian(loss_by_hand, 1)(parameters, x[:1]))


def test_forward_mode_dual_numbers() -> None:
    layer, x = Layer(), inputs()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(tangent, layer.by_hand(torch.ones_like(x)) - layer.bias)


def test_activation_checkpointing_draws_the_same_mask_again() -> None:
    layer, x = Layer(dropout_p=0.5), inputs(50)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(layer, leaf, use_reentrant=False)
        else:
            y = layer(leaf)
        gradients.append(torch.autograd.grad(y.square().sum(), (leaf, layer.lora_A)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_the_reference_agrees_under_vmap_with_dropout() -> None:
    layer, x, seed = Layer(), inputs(6), torch.tensor(3)

    def run(function: Callable[..., Tensor], rows: Tensor) -> Tensor:
        lora = (layer.lora_A, layer.lora_B, SCALING, 0.5, seed)
        return function(rows, layer.weight, layer.bias, *lora)

    batched = torch.func.vmap(lambda rows: run(lora_linear, rows))(x.view(3, 2, 4))
    each = torch.stack([run(reference.lora_linear, rows) for rows in x.view(3, 2, 4)])
    torch.testing.assert_close(batched, each)
