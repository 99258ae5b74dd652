"""``dora_scale`` against ``g ∘ y + b`` and its gradients by hand, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from called_operators import Calls
from closeness import assert_close
from marks import needs_compiled
from torch import Tensor, nn

from gauge_ext.ops import dora_scale, reference

pytestmark = needs_compiled

DTYPES = [
    (torch.float64, torch.float64, 1e-14),
    (torch.float32, torch.float32, 2e-6),
    (torch.float32, torch.float64, 2e-6),
    (torch.bfloat16, torch.float32, 5e-3),
    (torch.bfloat16, torch.bfloat16, 5e-3),
]


class Problem:
    """y (rows, out), the gain g, the bias b, and a gradient of the output."""

    def __init__(
        self,
        rows: int,
        out: int,
        dtype: torch.dtype = torch.float64,
        factors: torch.dtype | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(rows)

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.y = normal(rows, out, dtype=dtype).requires_grad_()
        self.gain = normal(out, dtype=factors or dtype).requires_grad_()
        self.bias = normal(out, dtype=dtype).requires_grad_()
        self.grad = normal(rows, out, dtype=dtype)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.y, self.gain, self.bias

    def by_hand(self) -> list[Tensor]:
        """Return z and the gradients of y, g and b."""
        y, gain, bias = (t.detach().double() for t in self.leaves)
        grad = self.grad.double()
        sums = [sum((row for row in rows), torch.zeros_like(gain)) for rows in (grad * y, grad)]
        return [y @ torch.diag(gain) + bias, grad @ torch.diag(gain), *sums]


@pytest.mark.parametrize(("dtype", "factors", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "out"), [(1, 1), (3, 37), (0, 5), (5000, 64)])
def test_values_and_gradients(
    rows: int, out: int, dtype: torch.dtype, factors: torch.dtype, tolerance: float
) -> None:
    p = Problem(rows, out, dtype, factors)
    z = dora_scale(*p.leaves)
    gradients = torch.autograd.grad(z, p.leaves, p.grad)
    assert [t.dtype for t in (z, *gradients)] == [dtype, dtype, factors, dtype]
    for actual, expected in zip((z, *gradients), p.by_hand(), strict=True):
        assert_close(actual, expected, tolerance)


def test_without_bias_in_any_shape_and_strides() -> None:
    p = Problem(12, 7)
    expected = p.by_hand()[0] - p.bias
    y = p.y.detach()
    assert_close(dora_scale(y, p.gain), expected, 1e-14)
    assert_close(dora_scale(y.view(3, 4, 7), p.gain), expected.view(3, 4, 7), 1e-14)
    assert_close(dora_scale(y[0], p.gain), expected[0], 1e-14)
    assert_close(dora_scale(y.T.contiguous().T, p.gain), expected, 1e-14)
    assert_close(dora_scale(y, p.gain.repeat_interleave(2)[::2]), expected, 1e-14)
    assert dora_scale(y.half(), p.gain.half()).dtype == torch.float16


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_the_gradient_that_is_wanted(wanted: int) -> None:
    p = Problem(9, 21)
    for number, leaf in enumerate(p.leaves):
        leaf.requires_grad_(number == wanted)
    (actual,) = torch.autograd.grad(dora_scale(*p.leaves), p.leaves[wanted], p.grad)
    assert_close(actual, p.by_hand()[1 + wanted], 1e-14)


def test_gradcheck_to_second_order() -> None:
    p = Problem(4, 3)
    assert torch.autograd.gradcheck(dora_scale, p.leaves)
    assert torch.autograd.gradgradcheck(dora_scale, p.leaves)


def test_opcheck() -> None:
    ops, p = torch.ops.gauge_ext, Problem(4, 3)
    torch.library.opcheck(ops.dora_scale.default, p.leaves)
    torch.library.opcheck(ops.dora_scale.default, (p.y, p.gain, None))
    call = (p.grad, p.y.detach(), p.gain.detach())
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.dora_scale_backward.default, (*call, *needs))


def test_what_is_saved_and_called() -> None:
    p = Problem(6, 5, torch.float32)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Calls() as calls:
        z = dora_scale(p.y, p.gain, p.bias.detach())
        assert {t.data_ptr() for t in saved} == {p.y.data_ptr(), p.gain.data_ptr()}
        z.backward(p.grad)
    ours = [name for name in calls.names if "detach" not in name]
    assert ours == ["gauge_ext.dora_scale.default", "gauge_ext.dora_scale_backward.default"]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        saved.clear()
        dora_scale(p.y, p.gain.detach(), p.bias)
    assert p.y.data_ptr() not in {t.data_ptr() for t in saved}


class Layer(nn.Module):
    """What a stranger would write on the op alone."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        p = Problem(1, 5, dtype)
        self.gain, self.bias = nn.Parameter(p.gain.detach()), nn.Parameter(p.bias.detach())

    def forward(self, y: Tensor) -> Tensor:
        return dora_scale(y, self.gain, self.bias)

    def by_hand(self, y: Tensor) -> Tensor:
        return y @ torch.diag(self.gain) + self.bias


def test_compile_fullgraph_forward_and_backward() -> None:
    layer = Layer()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    parameters = (layer.gain, layer.bias)
    for rows in (3, 7, 11):  # the third size must be served by a graph with symbolic sizes
        y = Problem(rows, 5).y
        z, expected = compiled(y), layer.by_hand(y)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(
            torch.autograd.grad(z.square().sum(), (y, *parameters)),
            torch.autograd.grad(expected.square().sum(), (y, *parameters)),
        )


def test_plain_onnx_export(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, path = Layer(torch.float32).eval(), tmp_path / "layer.onnx"
    y = Problem(4, 5, torch.float32).y.detach()
    torch.onnx.export(layer, (y,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (z,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
    np.testing.assert_allclose(z, layer.by_hand(y).detach().numpy(), atol=1e-6)


def test_jit_trace_torch_func_and_dual_numbers() -> None:
    layer, y = Layer(), Problem(4, 5).y.detach()
    traced = torch.jit.trace(layer, (y,))
    assert "gauge_ext::" not in str(traced.graph)
    torch.testing.assert_close(traced(y), layer.by_hand(y))

    def loss(run: Callable[..., Tensor], y: Tensor) -> Tensor:
        return run(y).square().sum()

    actual = torch.func.grad(lambda y: loss(layer, y))(y)
    torch.testing.assert_close(actual, torch.func.grad(lambda y: loss(layer.by_hand, y))(y))
    torch.testing.assert_close(torch.func.vmap(layer)(y), layer.by_hand(y))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(y, torch.ones_like(y))
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(tangent, layer.gain.expand(4, 5))


def test_without_values() -> None:
    p = Problem(4, 3)
    y, gain, bias = (t.detach().to("meta") for t in p.leaves)
    assert dora_scale(y, gain, bias).shape == (4, 3)
    with pytest.raises(RuntimeError, match=r"some are on the meta device.*never loaded"):
        dora_scale(p.y, gain)


def test_the_reference_agrees() -> None:
    p = Problem(6, 5)
    z = reference.dora_scale(*p.leaves)
    gradients = torch.autograd.grad(z, p.leaves, p.grad)
    for actual, expected in zip((z, *gradients), p.by_hand(), strict=True):
        assert_close(actual, expected, 1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": torch.ones(3, 1)}, r"gain must have shape \[out\], got \[3, 1\]"),
        ({"gain": torch.ones(3).int()}, "gain must be floating-point, got Int"),
        ({"y": torch.ones(2, 4)}, r"y must have shape \[\*batch, out\] = \[\*, 3\].*got \[2, 4\]"),
        ({"bias": torch.ones(4)}, r"bias must have shape \[out\] = \[3\], got \[4\]"),
        ({"bias": torch.ones(3).int()}, "bias must be floating-point, got Int"),
    ],
)
def test_wrong_arguments_say_what_was_expected(change: dict[str, Tensor], message: str) -> None:
    arguments = {"y": torch.ones(2, 3), "gain": torch.ones(3), "bias": torch.ones(3)}
    with pytest.raises(RuntimeError, match=message):
        dora_scale(**(arguments | change))
