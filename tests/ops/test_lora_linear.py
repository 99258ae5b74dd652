"""The compiled ``lora_linear`` against formulas written out in float64."""

import pytest
import torch
from closeness import assert_close
from linear_problems import DTYPES, SIZES, Problem, by_hand, make
from marks import needs_compiled
from torch import Tensor

from gauge_ext.ops import draw_seed, lora_linear, reference

pytestmark = needs_compiled


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("dtype", "adapter_dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    tolerance: float,
    dropout_p: float,
) -> None:
    p = make(sizes, dtype, adapter_dtype)
    seed = torch.tensor(1234567890123456789)
    mask = reference.dropout_mask(sizes[0], sizes[1], dropout_p, seed)
    arguments = (p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling, dropout_p, seed)
    y = lora_linear(*arguments)
    gradients = torch.autograd.grad(y, p.differentiable, p.grad)
    assert y.dtype == dtype
    assert [g.dtype for g in gradients] == [dtype, adapter_dtype, adapter_dtype]
    for actual, expected in zip((y, *gradients), by_hand(p, mask), strict=True):
        assert_close(actual, expected, tolerance)
    with torch.no_grad():
        assert_close(lora_linear(*arguments), by_hand(p, mask)[0], tolerance)


def check_every_value() -> None:
    """What the test above does, without pytest, for processes that take other paths."""
    torch.set_num_threads(2)
    for sizes in SIZES:
        for dtype, adapter_dtype, tolerance in DTYPES:
            for dropout_p in (0.0, 0.1):
                test_values_and_gradients(sizes, dtype, adapter_dtype, tolerance, dropout_p)
    test_float32_adapters_keep_their_precision_on_a_bfloat16_base()
    test_batch_dimensions_strides_and_no_bias()
    test_the_mask_is_the_references()


def test_float32_adapters_keep_their_precision_on_a_bfloat16_base() -> None:
    p = make((64, 256, 192, 8), torch.bfloat16, torch.float32)
    y = lora_linear(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling)
    _, grad_A, grad_B = torch.autograd.grad(y, p.differentiable, p.grad)
    _, _, expected_A, expected_B = by_hand(p)
    assert_close(grad_A, expected_A, 2e-6)
    assert_close(grad_B, expected_B, 2e-6)


def test_batch_dimensions_strides_and_no_bias() -> None:
    p = make((24, 20, 12, 3))
    x = p.x.detach().view(4, 6, 20).transpose(0, 1).requires_grad_()
    weight = p.weight.T.contiguous().T
    lora_B = p.lora_B.detach().T.contiguous().T.requires_grad_()
    y = lora_linear(x, weight, None, p.lora_A, lora_B, p.scaling)
    grad = p.grad.view(4, 6, 12).transpose(0, 1)
    gradients = torch.autograd.grad(y, (x, p.lora_A, lora_B), grad)
    expected = by_hand(p)
    assert_close(y.transpose(0, 1).reshape(24, 12) + p.bias, expected[0], 1e-13)
    assert_close(gradients[0].transpose(0, 1).reshape(24, 20), expected[1], 1e-13)
    assert_close(gradients[1], expected[2], 1e-13)
    assert_close(gradients[2], expected[3], 1e-13)
    vector = lora_linear(p.x[0], p.weight, p.bias, p.lora_A, p.lora_B, p.scaling)
    assert_close(vector, expected[0][0], 1e-13)


def test_gradients_of_an_unfrozen_base() -> None:
    p = make((9, 8, 6, 2))
    weight, bias = p.weight.requires_grad_(), p.bias.requires_grad_()
    y = lora_linear(p.x, weight, bias, p.lora_A, p.lora_B, p.scaling)
    grad_weight, grad_bias = torch.autograd.grad(y, (weight, bias), p.grad)
    assert_close(grad_weight, p.grad.T @ p.x.detach(), 1e-13)
    assert_close(grad_bias, p.grad.sum(0), 1e-13)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_that_are_wanted(wanted: tuple[int, ...]) -> None:
    p = make((9, 8, 6, 2))
    for index, tensor in enumerate(p.differentiable):
        tensor.requires_grad_(index in wanted)
    y = lora_linear(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling)
    inputs = [p.differentiable[index] for index in wanted]
    for index, actual in zip(wanted, torch.autograd.grad(y, inputs, p.grad), strict=True):
        assert_close(actual, by_hand(p)[1 + index], 1e-13)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_to_second_order(dropout_p: float) -> None:
    p = make((3, 4, 5, 2))
    seed = torch.tensor(5)
    inputs = (p.x, p.weight.requires_grad_(), p.bias.requires_grad_(), p.lora_A, p.lora_B)

    def function(*tensors: Tensor) -> Tensor:
        return lora_linear(*tensors, p.scaling, dropout_p, seed)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opcheck(dtype: torch.dtype, dropout_p: float) -> None:
    p = make((6, 4, 5, 2), dtype)
    seed = torch.tensor(5)
    ops = torch.ops.gauge_ext
    call = (p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling, dropout_p, seed)
    torch.library.opcheck(ops.lora_linear.default, call)
    with torch.no_grad():
        _, hidden = ops.lora_linear_forward(*call)
    plain = [t.detach() if isinstance(t, Tensor) else t for t in call]
    torch.library.opcheck(ops.lora_linear_forward.default, tuple(plain))
    x, weight, _, lora_A, lora_B = plain[:5]
    backward = (p.grad, x, weight, lora_A, lora_B, hidden, p.scaling, dropout_p, seed)
    torch.library.opcheck(ops.lora_linear_backward.default, (*backward, True, True, True))
    torch.library.opcheck(ops.lora_linear_backward.default, (*backward, False, True, False))
    torch.library.opcheck(ops.dropout_mask.default, (x, 0.4, seed))


def test_the_mask_is_the_references() -> None:
    for columns in (5, 128, 300):
        x, seed = torch.zeros(70, columns, dtype=torch.float64), torch.tensor(-99)
        mask = torch.ops.gauge_ext.dropout_mask(x, 0.3, seed)
        assert torch.equal(mask, reference.dropout_mask(70, columns, 0.3, seed))


def test_nothing_is_saved_but_x_and_the_hidden_product() -> None:
    p = make((16, 32, 24, 4), torch.float32)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling, 0.1, draw_seed())
    parameters = {t.data_ptr() for t in (p.weight, p.lora_A, p.lora_B)}
    kept = [t for t in saved if t.data_ptr() not in parameters]
    assert sorted(t.numel() for t in kept) == [1, 16 * 4, 16 * 32]  # seed, hidden, x
    assert any(t.data_ptr() == p.x.data_ptr() for t in kept)


def test_the_same_seed_gives_the_same_bits() -> None:
    p = make((130, 200, 120, 8), torch.float32)
    seed = draw_seed()

    def run() -> tuple[Tensor, ...]:
        y = lora_linear(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling, 0.2, seed)
        return (y, *torch.autograd.grad(y, p.differentiable, p.grad))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        for actual, expected in zip(run(), by_hand(p, mask=_mask(p, 0.2, seed)), strict=True):
            assert_close(actual, expected, 2e-6)
    finally:
        torch.set_num_threads(threads)


def _mask(p: Problem, dropout_p: float, seed: Tensor) -> Tensor:
    return reference.dropout_mask(p.x.shape[0], p.x.shape[1], dropout_p, seed)


def test_seeds_follow_the_generator() -> None:
    torch.manual_seed(3)
    first, second = draw_seed(), draw_seed()
    torch.manual_seed(3)
    assert torch.equal(draw_seed(), first)
    assert not torch.equal(first, second)


def test_autocast_computes_the_base_in_the_lower_precision() -> None:
    p = make((8, 16, 12, 2), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, p.differentiable, p.grad.bfloat16())
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    for actual, expected in zip((y, *gradients), by_hand(p), strict=True):
        assert_close(actual, expected, 2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 5)}, r"x must have shape \[\*batch, in\] = \[\*, 4\].*got \[2, 5\]"),
        ({"weight": torch.ones(3)}, r"weight must have shape \[out, in\], got \[3\]"),
        ({"bias": torch.ones(4)}, r"bias must have shape \[out\] = \[3\], got \[4\]"),
        (
            {"lora_A": torch.ones(2, 5)},
            r"lora_A must have shape \[r, in\] = \[2, 4\], got \[2, 5\]",
        ),
        ({"lora_B": torch.ones(3, 1)}, r"lora_B must have shape \[out, r\] = \[3, 2\]"),
        ({"weight": torch.ones(3, 4).double()}, "weight must have x's dtype, Float, got Double"),
        ({"lora_A": torch.ones(2, 4).bfloat16()}, "lora_A must have x's dtype, Float, or float32"),
        ({"lora_B": torch.ones(3, 2).double()}, "lora_B must have lora_A's dtype, Float"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], got 1.5"),
        ({"dropout_p": 0.5, "seed": None}, "seed must be a 0-dim int64 tensor"),
        ({"dropout_p": 0.5, "seed": torch.ones(2)}, "seed must be a 0-dim int64 tensor, got Float"),
    ],
)
def test_wrong_arguments_say_what_was_expected(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.ones(2, 4),
        "weight": torch.ones(3, 4),
        "bias": torch.ones(3),
        "lora_A": torch.ones(2, 4),
        "lora_B": torch.ones(3, 2),
        "scaling": 1.0,
        "dropout_p": 0.0,
        "seed": torch.tensor(1),
    }
    with pytest.raises(RuntimeError, match=message):
        lora_linear(**(arguments | change))  # type: ignore[arg-type]


def test_float16_on_the_cpu_is_refused_with_the_mend() -> None:
    half = [torch.ones(shape, dtype=torch.float16) for shape in ((2, 4), (3, 4), (3,))]
    with pytest.raises(RuntimeError, match=r"float32, float64 or bfloat16 on the CPU.*\.float\(\)"):
        lora_linear(*half, torch.ones(2, 4), torch.ones(3, 2), 1.0)
