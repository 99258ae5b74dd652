"""The adapted layer: its numbers by hand, its merging bit for bit, and life among torch's tools."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext.adapters import LoRALinear
from gauge_ext.errors import AdapterStateError, ConfigError, NonFiniteError, TargetError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def adapted(
    fan_in: int = 6,
    fan_out: int = 4,
    *,
    bias: bool = True,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> LoRALinear:
    """A layer whose two factors both matter."""
    linear = nn.Linear(fan_in, fan_out, bias, dtype=dtype)
    layer = LoRALinear.from_linear(linear, **{"rank": 3, "scaling": 0.5, **options})
    nn.init.normal_(layer.lora_B)
    return layer


def weight_by_hand(layer: LoRALinear) -> Tensor:
    """``W + s·B·A`` in float64."""
    b, a = layer.lora_B.detach().double(), layer.lora_A.detach().double()
    return layer.weight.detach().double() + layer.scaling * (b @ a)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,)])
def test_forward_by_hand(dtype: torch.dtype, bias: bool, batch: tuple[int, ...]) -> None:
    layer = adapted(bias=bias, dtype=dtype)
    x = torch.randn(*batch, 6, dtype=dtype)
    y = layer(x)
    expected = x.double() @ weight_by_hand(layer).T
    if bias:
        expected = expected + layer.bias.detach().double()
    assert y.dtype is dtype
    assert y.shape == (*batch, 4)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_backward_by_hand(dtype: torch.dtype) -> None:
    layer = adapted(dtype=dtype)
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    g = torch.randn(5, 4, dtype=dtype)
    layer(x).backward(g)
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    gd, xd = g.double(), x.detach().double()
    tolerance = TOLERANCE[dtype]
    for got, expected in (
        (layer.lora_A.grad, 0.5 * (gd @ b).T @ xd),
        (layer.lora_B.grad, 0.5 * gd.T @ (xd @ a.T)),
        (x.grad, gd @ weight_by_hand(layer)),
    ):
        assert got is not None
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    assert layer.weight.grad is None


def test_a_half_precision_base_gets_float32_factors_and_others_their_own() -> None:
    for base, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        layer = LoRALinear.from_linear(nn.Linear(4, 3, dtype=base))
        assert layer.lora_A.dtype is layer.lora_B.dtype is expected
    layer = LoRALinear.from_linear(nn.Linear(4, 3, dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert layer.lora_A.dtype is torch.bfloat16


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_fresh_adapter_changes_nothing(init: Any) -> None:
    linear = nn.Linear(300, 200)
    x = torch.randn(7, 300)
    before = linear(x)
    layer = LoRALinear.from_linear(linear, rank=16, scaling=3.0, init=init)
    assert not layer.lora_B.any()
    assert not layer.delta_weight().any()
    # The kernels sum a product of few rows in an order of their own: the rounding may differ.
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)
    a = layer.lora_A.detach()
    if init == "gaussian":
        assert abs(a.std().item() - 1 / 16) < 0.1 / 16
        assert abs(a.mean().item()) < 0.02 / 16
    else:
        bound = 300**-0.5
        assert 0.99 * bound < a.abs().max() <= bound
        assert abs(a.std().item() - bound / 3**0.5) < 0.05 * bound


def test_it_is_the_same_object_with_the_same_names() -> None:
    linear = nn.Linear(4, 3)
    weight, bias = linear.weight, linear.bias
    bias.requires_grad_(False)
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    layer = LoRALinear.from_linear(linear, rank=2)
    assert layer is linear
    assert isinstance(layer, nn.Linear)
    assert layer.weight is weight
    assert layer.bias is bias
    assert (weight.requires_grad, bias.requires_grad) == (True, False)
    assert layer.lora_A.requires_grad
    assert layer.lora_B.requires_grad
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    layer(torch.zeros(1, 4))
    assert calls == [1]
    assert layer.rank == 2
    assert repr(layer).endswith("bias=True, rank=2, scaling=1, dropout=0)")
    back = layer.to_base()
    assert back is linear
    assert type(back) is nn.Linear
    assert list(back.state_dict()) == ["weight", "bias"]
    assert set(vars(back)) == set(vars(nn.Linear(4, 3)))


def test_it_can_be_made_directly() -> None:
    layer = LoRALinear(4, 3, bias=False, rank=2, scaling=1.5, dropout=0.25, dtype=torch.bfloat16)
    assert layer.lora_A.shape == (2, 4)
    assert layer.lora_B.shape == (3, 2)
    assert layer.lora_A.dtype is torch.float32
    assert (layer.scaling, layer.dropout_p, layer.merged, layer.bias) == (1.5, 0.25, False, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must lie in [0, 1), got 1.0"),
        ({"dropout": float("nan")}, "dropout must lie"),
        ({"scaling": float("inf")}, "scaling must be a finite number, got inf"),
    ],
)
def test_a_failed_adoption_leaves_a_plain_layer(options: dict[str, Any], words: str) -> None:
    linear = nn.Linear(4, 3)
    with pytest.raises(ConfigError) as caught:
        LoRALinear.from_linear(linear, **options)
    assert words in str(caught.value)
    assert type(linear) is nn.Linear
    assert list(linear.state_dict()) == ["weight", "bias"]


def test_what_cannot_carry_an_adapter_is_refused() -> None:
    with pytest.raises(TargetError, match=r"nn\.MultiheadAttention reads the weight"):
        LoRALinear.from_linear(nn.MultiheadAttention(4, 2).out_proj)
    with pytest.raises(TargetError, match="it has an adapter already"):
        LoRALinear.from_linear(adapted())


# Merging


def test_merging_rounds_once(dtype: torch.dtype) -> None:
    layer = adapted(33, 17, dtype=dtype, rank=5)
    exact = weight_by_hand(layer)
    layer.merge()
    assert layer.weight.dtype is dtype
    # Half a unit in the last place of W's dtype, and the noise of the float32 sum before it.
    eps = torch.finfo(dtype).eps
    noise = 8 * (torch.finfo(torch.float32).eps if dtype is not torch.float64 else eps)
    error = (layer.weight.detach().double() - exact).abs()
    assert bool((error <= exact.abs() * (eps / 2) * (1 + 1e-3) + noise).all())


def test_merging_in_bfloat16_is_the_float32_sum_rounded() -> None:
    layer = adapted(64, 48, dtype=torch.bfloat16)
    delta = layer.lora_B.detach() @ layer.lora_A.detach() * layer.scaling
    expected = (layer.weight.detach().float() + delta).to(torch.bfloat16)
    layer.merge()
    assert torch.equal(layer.weight.detach(), expected)


def test_unmerging_gives_the_very_parameter_back(dtype: torch.dtype) -> None:
    layer = adapted(dtype=dtype)
    layer.weight.requires_grad_(False)
    weight, bits = layer.weight, layer.weight.detach().clone()
    for _ in range(10):
        layer.merge()
        assert layer.weight is not weight
        assert layer.merged
        assert layer.can_unmerge
        assert layer.kept_parameters["weight"] is weight
        assert not layer.weight.requires_grad
        assert torch.equal(weight, bits)
        layer.unmerge()
        assert not layer.merged
        assert not layer.kept_parameters
    assert layer.weight is weight
    assert torch.equal(weight, bits)


def test_a_merged_layer_computes_the_same(dtype: torch.dtype) -> None:
    layer = adapted(dtype=dtype)
    x = torch.randn(5, 6, dtype=dtype)
    before = layer(x)
    layer.merge()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(layer(x), before, rtol=tolerance, atol=tolerance)
    assert repr(layer).endswith("dropout=0, merged)")


@given(
    fan_in=st.integers(1, 9),
    fan_out=st.integers(1, 9),
    rank=st.integers(1, 12),
    rows=st.integers(0, 5),
    scaling=st.floats(-4, 4),
    bias=st.booleans(),
)
def test_merged_and_unmerged_agree_for_every_shape(
    fan_in: int, fan_out: int, rank: int, rows: int, scaling: float, bias: bool
) -> None:
    layer = adapted(fan_in, fan_out, bias=bias, dtype=torch.float64, rank=rank, scaling=scaling)
    x = torch.randn(rows, fan_in, dtype=torch.float64)
    expected = F.linear(x, weight_by_hand(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(
        layer.delta_weight(), scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    )
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


def test_delta_weight_is_accumulated_in_a_wide_dtype() -> None:
    layer = adapted(dtype=torch.bfloat16)
    layer.to(torch.bfloat16)
    assert layer.lora_A.dtype is torch.bfloat16
    delta = layer.delta_weight()
    assert delta.dtype is torch.float32
    assert not delta.requires_grad
    expected = 0.5 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    torch.testing.assert_close(delta.double(), expected, rtol=1e-5, atol=1e-6)
    assert adapted(dtype=torch.float64).delta_weight().dtype is torch.float64


def test_tied_weights_stay_as_they_are() -> None:
    embedding, linear = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    linear.weight = embedding.weight
    layer = LoRALinear.from_linear(linear)
    nn.init.normal_(layer.lora_B)
    bits = embedding.weight.detach().clone()
    layer.merge()
    assert torch.equal(embedding.weight, bits)
    assert not torch.equal(layer.weight, bits)
    layer.unmerge()
    assert layer.weight is embedding.weight


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors() -> None:
    layer = adapted()
    with pytest.raises(AdapterStateError, match="is not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(AdapterStateError, match=r"merged already.*unmerge\(\) first"):
        layer.merge()
    layer.unmerge()
    layer.merge(keep_base=False)
    assert not layer.can_unmerge
    with pytest.raises(AdapterStateError, match="keep_base=False"):
        layer.unmerge()


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_merged(name: str, value: float) -> None:
    layer = adapted()
    with torch.no_grad():
        getattr(layer, name)[1, 2] = value
    weight = layer.weight
    with pytest.raises(NonFiniteError, match=f"{name} holds NaN or infinity"):
        layer.merge()
    assert layer.weight is weight
    assert not layer.merged
    layer.merge(safe=False)
    assert not layer.weight.isfinite().all()


def test_a_sum_out_of_range_is_not_merged() -> None:
    layer = adapted(dtype=torch.float16)
    with torch.no_grad():
        layer.lora_A.fill_(300.0)
        layer.lora_B.fill_(300.0)
    with pytest.raises(NonFiniteError, match=r"exceeds the range of torch\.float16"):
        layer.merge()
    assert not layer.merged


# Dropout


def test_dropout_is_for_training_alone_and_follows_the_seed() -> None:
    layer = adapted(64, 32, dropout=0.5)
    x = torch.randn(9, 64)
    layer.eval()
    exact = layer(x)
    torch.testing.assert_close(exact, F.linear(x, weight_by_hand(layer).float(), layer.bias))
    layer.train()
    torch.manual_seed(3)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(second, first)
    assert not torch.allclose(first, exact)
    layer.dropout_p = 0.0
    torch.testing.assert_close(layer(x), exact)


def test_dropout_keeps_the_expectation_and_spares_the_base() -> None:
    layer = adapted(16, 8, dropout=0.3, dtype=torch.float64)
    x = torch.randn(1, 16, dtype=torch.float64)
    # Many equal rows have masks of their own, so their mean tends to the value without dropout.
    mean = layer(x.expand(20000, 16)).mean(0)
    torch.testing.assert_close(
        mean, (x @ weight_by_hand(layer).T + layer.bias)[0], rtol=0, atol=0.1
    )
    nn.init.zeros_(layer.lora_B)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def branch_identity(layer: LoRALinear, x: Tensor, y: Tensor, g: Tensor) -> None:
    """Check gradients against the very mask that made ``y``.

    The branch is linear in A and in B, so by Euler's identity <dA, A> = <dB, B> = <g, y - base>:
    it holds only if the backward pass sees the mask of the forward pass.
    """
    base = F.linear(x, layer.weight, layer.bias).detach()
    expected = (g * (y.detach() - base)).sum()
    y.backward(g)
    for factor in (layer.lora_A, layer.lora_B):
        assert factor.grad is not None
        torch.testing.assert_close((factor.grad * factor.detach()).sum(), expected)
        factor.grad = None


def test_backward_sees_the_mask_of_the_forward() -> None:
    layer = adapted(64, 32, dropout=0.5, dtype=torch.float64)
    x = torch.randn(9, 64, dtype=torch.float64)
    g = torch.randn(9, 32, dtype=torch.float64)
    branch_identity(layer, x, layer(x), g)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_mask(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = adapted(64, 32, dropout=0.5, dtype=torch.float64)
    x = torch.randn(9, 64, dtype=torch.float64, requires_grad=True)
    g = torch.randn(9, 32, dtype=torch.float64)
    branch_identity(layer, x, checkpoint(layer, x, use_reentrant=reentrant), g)


# Copies, files, conversions


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(merged: bool, way: str) -> None:
    layer = adapted(dropout=0.1).eval()
    x = torch.randn(5, 6)
    unmerged_output = layer(x)
    base_bits = layer.weight.detach().clone()
    if merged:
        layer.merge()
    expected = layer(x)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is LoRALinear
    assert torch.equal(twin(x), expected)
    assert (twin.merged, twin.scaling, twin.dropout_p) == (merged, 0.5, 0.1)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), expected)
    if merged:
        twin.unmerge()
        assert torch.equal(twin.weight, base_bits)
        layer.unmerge()
    assert torch.equal(layer(x), unmerged_output)


def test_state_dicts_of_the_base_and_of_the_layer_load() -> None:
    layer, other = adapted(), adapted()
    x = torch.randn(5, 6)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    base = nn.Linear(6, 4)
    result = other.load_state_dict(base.state_dict(), strict=False)
    assert result.missing_keys == ["lora_A", "lora_B"]
    assert torch.equal(other.weight, base.weight)
    assert torch.equal(other.lora_A, layer.lora_A)


@pytest.mark.parametrize("source_merged", [False, True])
@pytest.mark.parametrize("target_merged", [False, True])
@pytest.mark.parametrize("through_file", [False, True])
def test_a_merged_weight_is_never_counted_twice(
    source_merged: bool, target_merged: bool, through_file: bool
) -> None:
    source, target = nn.Sequential(adapted()), nn.Sequential(adapted())
    if source_merged:
        source[0].merge()
    if target_merged:
        target[0].merge()
    state = source.state_dict()
    if through_file:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer)
    if not source_merged and not target_merged:
        target.load_state_dict(state)
        return
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(RuntimeError, match=r"'0' holds a merged weight; call gauge_ext\.unmerge"):
        target.load_state_dict(state)
    after = target.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    # A state dict that says nothing of this layer concerns it not.
    target.load_state_dict({}, strict=False)


def test_conversion_takes_the_kept_base_along() -> None:
    layer = adapted()
    bits = layer.weight.detach().clone()
    layer.merge()
    layer.to(torch.float64)
    assert layer.weight.dtype is layer.lora_A.dtype is torch.float64
    layer.unmerge()
    assert layer.weight.dtype is torch.float64
    assert torch.equal(layer.weight, bits.double())
    layer.merge()
    layer.to("meta")
    layer.unmerge()
    assert layer.weight.is_meta


def test_conversion_of_a_tied_kept_base_keeps_the_tie() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    layer = LoRALinear.from_linear(model["head"])
    layer.merge()
    model.to(torch.bfloat16)
    layer.unmerge()
    assert layer.weight is model["embedding"].weight
    assert layer.weight.dtype is torch.bfloat16


# torch's tools


@pytest.mark.parametrize("target", ["lora_A", "weight"])
def test_parametrised_and_pruned_factors_count(target: str) -> None:
    from torch.nn.utils import prune

    x = torch.randn(5, 6, dtype=torch.float64)
    pruned = adapted(dtype=torch.float64)
    prune.l1_unstructured(pruned, target, amount=3)
    torch.testing.assert_close(pruned(x), F.linear(x, weight_by_hand(pruned), pruned.bias))

    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer = adapted(dtype=torch.float64)
    before = getattr(layer, target).detach().clone()
    nn.utils.parametrize.register_parametrization(layer, target, Twice())
    assert torch.equal(getattr(layer, target), 2 * before)
    torch.testing.assert_close(layer(x), F.linear(x, weight_by_hand(layer), layer.bias))


def test_functional_call_uses_the_tensors_that_it_is_given() -> None:
    layer = adapted(dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    a = torch.randn_like(layer.lora_A)
    y = torch.func.functional_call(layer, {"lora_A": a}, x)
    expected = layer.weight + 0.5 * layer.lora_B @ a
    torch.testing.assert_close(y, F.linear(x, expected, layer.bias))


def test_autocast_gives_the_dtype_that_a_plain_layer_gives() -> None:
    layer = adapted()
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        plain = nn.Linear(6, 4)(x)
    assert y.dtype is plain.dtype is torch.bfloat16
    expected = F.linear(x, weight_by_hand(layer).float(), layer.bias)
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2)


def test_compiled_it_is_one_graph_through_merging_and_training() -> None:
    layer = adapted(64, 32, dropout=0.5, dtype=torch.float64)
    x = torch.randn(9, 64, dtype=torch.float64)
    g = torch.randn(9, 32, dtype=torch.float64)
    branch_identity(layer, x, torch.compile(layer, fullgraph=True)(x), g)
    layer.eval()
    # What is traced again when the layer changes is not the C++ compiler's matter, which is slow.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = F.linear(x, weight_by_hand(layer), layer.bias)
    torch.testing.assert_close(compiled(x), expected)
    layer.merge()
    torch.testing.assert_close(compiled(x), expected)
    layer.unmerge()
    torch.testing.assert_close(compiled(x), expected)


def test_exported_it_keeps_its_names() -> None:
    layer = adapted().eval()
    x = torch.randn(5, 6)
    program = torch.export.export(layer, (x,))
    assert sorted(program.state_dict) == ["bias", "lora_A", "lora_B", "weight"]
    torch.testing.assert_close(program.module()(x), layer(x))
