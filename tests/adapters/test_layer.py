"""What holds for every kind of layer that carries an adapter."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from layer_cases import CASES, LayerCase
from torch import nn

from gauge_ext import ops
from gauge_ext.adapters import AdaptedLayer, AdapterSpec, adapt, unsupported_reason
from gauge_ext.adapters.registry import VARIANTS
from gauge_ext.errors import AdapterStateError, NonFiniteError, TargetError

every_kind = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# Every kind with every option that it can have.
every_variant = pytest.mark.parametrize(
    ("case", "option"),
    [
        pytest.param(case, dict.fromkeys(fields, True), id=" ".join([case.name, *fields]))
        for case in CASES
        for fields in ((), ("use_dora",), ("lora_bias",))
        if not set(fields) & set(case.without)
    ],
)


ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=ROUNDING[dtype] * max(scale, 1.0)
    )


@every_variant
def test_a_fresh_adapter_changes_nothing(case: LayerCase, option: dict[str, bool]) -> None:
    base = case.make().double()
    x = case.x()
    expected = base(x)
    names = list(base.state_dict())
    weight = base.get_parameter(case.weight_name)
    layer = adapt(base, AdapterSpec(rank=4, **option))
    assert layer is base
    assert isinstance(layer, AdaptedLayer)
    assert layer.get_parameter(case.weight_name) is weight
    assert list(layer.state_dict())[: len(names)] == names
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@every_variant
def test_the_output_is_that_of_the_weight_summed_by_hand(
    case: LayerCase, dtype: torch.dtype, option: dict[str, bool]
) -> None:
    base, layer = case.adapted(dtype, **option)
    x = case.x(dtype)
    actual = layer(x)
    assert actual.dtype == dtype
    expected = case.expected(base, layer)(x.double() if x.is_floating_point() else x)
    close(actual, expected, dtype)
    assert (actual.double() - base(x).double()).abs().max() > 0.05


@every_kind
def test_the_update_is_the_product_by_hand(case: LayerCase) -> None:
    _, layer = case.adapted()
    by_hand = case.product(layer.lora_B.detach(), layer.lora_A.detach()) * layer.scaling
    delta = layer.delta_weight()
    torch.testing.assert_close(delta, by_hand, rtol=1e-12, atol=1e-12)


@every_variant
def test_merged_it_computes_the_same_and_unmerged_it_is_the_same(
    case: LayerCase, dtype: torch.dtype, option: dict[str, bool]
) -> None:
    base, layer = case.adapted(dtype, **option)
    parameters = dict(layer.named_parameters())
    x = case.x(dtype)
    expected = case.expected(base, layer)
    weight = layer.get_parameter(case.weight_name)
    bits = weight.detach().clone()
    layer.merge()
    assert layer.merged
    rounded = expected.get_parameter(case.weight_name).to(dtype)
    # Summed in float32 at least, and rounded once: at most one last place from the exact sum.
    assert torch.equal(weight, bits)
    torch.testing.assert_close(layer.get_parameter(case.weight_name), rounded)
    close(layer(x), expected(x.double() if x.is_floating_point() else x), dtype)
    with pytest.raises(AdapterStateError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert all(p is parameters[name] for name, p in layer.named_parameters())
    assert len(list(layer.parameters())) == len(parameters)
    assert torch.equal(weight, bits)


@every_kind
def test_a_merge_that_is_not_finite_is_refused(case: LayerCase) -> None:
    _, layer = case.adapted()
    with torch.no_grad():
        layer.lora_A.view(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError, match="lora_A holds NaN"):
        layer.merge()
    assert not layer.merged


@every_variant
def test_gradients(
    case: LayerCase, option: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, layer = case.adapted(rank=2, **option)
    x = case.x()
    if layer.has_magnitude:  # the norms are constants to the backward pass: so they are here
        norms = ops.dora_row_norms(*layer.matrices(layer), layer.scaling)
        monkeypatch.setattr(ops, "dora_row_norms", lambda *_: norms)
    parameters = layer.adapter_parameters()

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, tensors, strict=True)), (x,))

    tensors = tuple(parameter.detach().requires_grad_() for parameter in parameters.values())
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@every_kind
def test_dropout_is_there_in_training_alone_and_right_on_average(case: LayerCase) -> None:
    _, layer = case.adapted(dropout=0.5)
    x = case.x()
    layer.eval()
    expected = layer(x).detach()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    with torch.no_grad():
        draws = torch.stack([layer(x) for _ in range(500)])
    spread = draws.std(0) / 500**0.5
    assert ((draws.mean(0) - expected).abs() <= 6 * spread + 1e-9).all()
    assert (spread > 0).any()


@every_variant
def test_off_again_it_is_what_it_was(case: LayerCase, option: dict[str, bool]) -> None:
    base, layer = case.adapted(**option)
    plain = layer.to_base()
    assert plain is layer
    assert type(plain) is type(base)
    assert vars(plain).keys() == vars(base).keys()
    assert list(plain.state_dict()) == list(base.state_dict())
    assert unsupported_reason(plain) is None


@every_kind
def test_copies_and_pickles_stay_adapted(case: LayerCase) -> None:
    _, layer = case.adapted()
    x = case.x()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
        assert type(twin.to_base()) is type(layer).base_class


@every_kind
def test_a_second_adapter_is_refused(case: LayerCase) -> None:
    _, layer = case.adapted()
    with pytest.raises(TargetError, match="has an adapter already"):
        adapt(layer, AdapterSpec())


@every_kind
def test_a_failure_leaves_the_layer_as_it_was(
    case: LayerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = case.make()
    names, kind = list(base.state_dict()), type(base)

    def failing(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(AdaptedLayer, "start_factors", failing)
    for variant in VARIANTS:
        monkeypatch.setattr(variant, "start_factors", failing)
    with pytest.raises(MemoryError):
        adapt(base, AdapterSpec())
    assert type(base) is kind
    assert list(base.state_dict()) == names


@every_kind
def test_a_state_dict_of_the_base_loads_and_one_that_is_merged_does_not(case: LayerCase) -> None:
    _, layer = case.adapted()
    other = case.make().double()
    missing = layer.load_state_dict(other.state_dict(), strict=False).missing_keys
    assert set(missing) == set(layer.adapter_parameters())
    assert torch.equal(layer.get_parameter(case.weight_name), other.get_parameter(case.weight_name))
    layer.merge()
    state = layer.state_dict()
    layer.unmerge()
    with pytest.raises(RuntimeError, match="holds a merged weight"):
        layer.load_state_dict(state)


@every_kind
def test_the_kept_base_moves_along(case: LayerCase) -> None:
    _, layer = case.adapted(torch.float32)
    layer.merge()
    layer.double()
    layer.unmerge()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


@every_kind
def test_without_a_base_there_is_no_way_back(case: LayerCase) -> None:
    _, layer = case.adapted()
    layer.merge(keep_base=False)
    with pytest.raises(AdapterStateError, match="keep_base=False"):
        layer.unmerge()


@every_kind
def test_it_says_what_it_is(case: LayerCase) -> None:
    _, layer = case.adapted()
    if type(layer).__repr__ is nn.Module.__repr__:
        assert "rank=4, scaling=0.7" in repr(layer)
