"""The merge of a plain matrix in one pass: against W + s·B·A by hand in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from called_operators import Calls
from torch import Tensor, nn

from gauge_ext import _load
from gauge_ext.adapters import AdapterSpec, LoRALinear, adapt
from gauge_ext.errors import NonFiniteError

compiled = pytest.mark.skipif(
    not _load.status().compiled, reason="counts the compiled ops; nothing compiled is loaded"
)

ROWS, COLUMNS, RANK, SCALING = 67, 45, 5, 0.7
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear(
    dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype | None = None, **spec: object
) -> LoRALinear:
    torch.manual_seed(0)
    base = nn.Linear(COLUMNS, ROWS, dtype=dtype)
    fields = {"rank": RANK, "scaling": SCALING, "dtype": adapter_dtype} | spec
    layer = adapt(base, AdapterSpec(**fields))  # type: ignore[arg-type]
    assert isinstance(layer, LoRALinear)
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter)
    return layer


def by_hand(layer: LoRALinear) -> Tensor:
    b, a = layer.lora_B.detach().double(), layer.lora_A.detach().double()
    update = torch.einsum("or,ri->oi", b, a)
    return layer.weight.detach().double() + layer.scaling * update


def assert_rounded_once(merged: Tensor, exact: Tensor) -> None:
    # Half a unit in the last place, and what the summing in float32 or float64 adds; where W and
    # the update cancel, that is an error of the terms and not of the small sum.
    summing = 8 * torch.finfo(torch.float64 if merged.dtype == torch.float64 else torch.float32).eps
    bound = exact.abs() * torch.finfo(merged.dtype).eps / 2 + summing * exact.abs().clamp_min(1.0)
    assert ((merged.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_entry_is_rounded_once(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    layer = linear(dtype, adapter_dtype)
    exact, bits = by_hand(layer), layer.weight.detach().clone()
    base = layer.weight
    layer.merge()
    assert layer.weight.dtype == dtype
    assert layer.weight.is_contiguous()
    assert_rounded_once(layer.weight.detach(), exact)
    layer.unmerge()
    assert layer.weight is base
    assert torch.equal(base, bits)


@pytest.mark.parametrize("layout", ["rows apart", "flipped"])
def test_any_layout_of_the_weight(layout: str) -> None:
    layer = linear()
    weight = layer.weight.detach()
    if layout == "flipped":
        layer.weight = nn.Parameter(weight.t().contiguous().t())
    else:
        layer.weight = nn.Parameter(torch.cat([weight, weight], 1)[:, :COLUMNS])
    assert not layer.weight.is_contiguous()
    assert_rounded_once(layer.merged_weight(), by_hand(layer))


def test_a_weight_of_strides_without_one() -> None:
    layer = linear()
    layer.weight = nn.Parameter(torch.randn(2 * ROWS, 2 * COLUMNS)[::2, ::2])
    assert_rounded_once(layer.merged_weight(), by_hand(layer))


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_one_row_or_column(shape: tuple[int, int]) -> None:
    layer = adapt(nn.Linear(shape[1], shape[0]), AdapterSpec(rank=1, scaling=SCALING))
    assert isinstance(layer, LoRALinear)
    nn.init.normal_(layer.lora_B)
    assert_rounded_once(layer.merged_weight(), by_hand(layer))


def test_an_update_that_counts_from_a_start() -> None:
    layer = linear(init="olora")
    b, a = layer.lora_B.detach().double(), layer.lora_A.detach().double()
    start = layer.lora_B0.detach().double() @ layer.lora_A0.detach().double()
    exact = layer.weight.detach().double() + layer.scaling * (b @ a - start)
    assert_rounded_once(layer.merged_weight(), exact)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_part_that_is_not_finite_is_named(name: str, bad: float) -> None:
    layer = linear(torch.bfloat16)
    with torch.no_grad():
        layer.get_parameter(name)[-1, -1] = bad
    with pytest.raises(NonFiniteError, match=f"{name} holds NaN or infinity"):
        layer.merge()
    assert not layer.merged
    layer.merge(safe=False)
    assert not layer.weight.isfinite().all()


def test_a_sum_beyond_the_range_is_refused() -> None:
    layer = linear(torch.float16)
    with torch.no_grad():
        layer.lora_B[3, 0], layer.lora_A[0, 2] = 400.0, 400.0
    with pytest.raises(NonFiniteError, match=r"exceeds the range of torch\.float16"):
        layer.merge()


@compiled
def test_a_plain_matrix_takes_one_operator_and_others_what_they_need() -> None:
    def called(layer: LoRALinear) -> list[str]:
        with Calls() as calls:
            layer.merge()
        return [name for name in calls.names if "gauge_ext" in name or "mm" in name]

    one = ["gauge_ext.merge_out.default"]
    assert called(linear()) == one
    assert called(linear(torch.bfloat16)) == one
    # Summed in float64, which the kernel does for a float64 weight alone.
    assert called(linear(torch.float32, torch.float64)) == ["aten.mm.default"]
    assert "gauge_ext.merge_out.default" not in called(linear(use_dora=True))


def test_a_copy_merges_alike() -> None:
    layer = linear()
    assert torch.equal(copy.deepcopy(layer).merged_weight(), layer.merged_weight())
