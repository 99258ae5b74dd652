"""The seed's fibre bundle: rank-one fibres behind gates, and the full matrices of its listing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gauge_fields import DTYPES, SEEDS, SeedBase
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gauge_ext import LoRAFiberBundle
from gauge_ext.adapters import FullFiberBundle
from gauge_ext.errors import AdapterStateError, ConfigError, NonFiniteError, TargetError
from gauge_ext.models import merged_copy

TIGHT = {torch.float64: 1e-12, torch.float32: 1e-5}
SHAPES = st.tuples(st.integers(4, 20), st.integers(4, 20), st.integers(1, 4))


def trained(
    m: int, n: int, rank: int, dtype: torch.dtype = torch.float64, scaling: float = 1.0
) -> LoRAFiberBundle:
    bundle = LoRAFiberBundle(nn.Linear(n, m, dtype=dtype), rank, scaling=scaling)
    nn.init.normal_(bundle.frame)
    nn.init.normal_(bundle.coframe)
    nn.init.uniform_(bundle.gates, 0.5, 2.0)
    return bundle


def update(bundle: LoRAFiberBundle) -> Tensor:
    """S sum_i gamma_i b_i a_i^T in float64, by hand."""
    b, gates, a = (p.detach().double() for p in (bundle.frame, bundle.gates, bundle.coframe))
    return bundle.scaling * torch.einsum("mi,i,in->mn", b, gates, a)


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def test_the_seeds_own_use_of_it() -> None:
    base_model = SeedBase(16)
    bundle = LoRAFiberBundle(base_model, fiber_dim=8)
    x = torch.randn(4, 16)
    assert torch.equal(bundle(x), base_model(x))
    assert len(bundle.fibers) == bundle.fiber_dim == 8
    nn.init.normal_(bundle.frame)
    outputs = [fiber(x) for fiber in bundle.fibers]
    torch.testing.assert_close(
        bundle(x), base_model(x) + torch.sum(torch.stack(outputs), dim=0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("scaling", [1.0, -0.5])
def test_the_output_is_that_of_the_weight_plus_the_gated_fibres(
    dtype: torch.dtype, scaling: float
) -> None:
    bundle = trained(5, 9, 3, dtype, scaling)
    base = bundle.base_model
    x = torch.randn(2, 4, 9, dtype=dtype)
    weight = base.weight.double() + update(bundle)
    expected = (x.double() @ weight.T + base.bias.double()).to(dtype)
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(bundle(x), expected, rtol=close, atol=close)
    total = torch.stack([fiber(x).double() for fiber in bundle.fibers]).sum(0)
    assert error(total, x.double() @ update(bundle).T) <= max(close, 1e-12) * 10


@settings(max_examples=15)
@given(SHAPES, SEEDS, DTYPES, st.sampled_from([1.0, -0.5]))
def test_the_gradient_of_a_gate_is_the_first_order_effect_of_its_fibre(
    shape, seed, dtype, scaling
) -> None:
    torch.manual_seed(seed)
    m, n, rank = shape
    bundle = trained(m, n, rank, dtype, scaling)
    bundle.gauge_fix("svd")
    x, coefficients = torch.randn(6, n, dtype=dtype), torch.randn(6, m, dtype=dtype)
    (bundle(x) * coefficients).sum().backward()
    g = coefficients.double().T @ x.double()  # the gradient by the weight
    u, s, vh = torch.linalg.svd(update(bundle))
    k = min(m, n, rank)
    by_triples = s[:k] * (u[:, :k] * (g @ vh[:k].mT)).sum(0)
    gates = bundle.gates.grad.double()
    size = float(by_triples.norm())
    assert float((gates[:k] - by_triples).norm()) <= TIGHT[dtype] * size
    by_frame = (bundle.frame.grad * bundle.frame.detach()).sum(0).double()
    by_coframe = (bundle.coframe.grad * bundle.coframe.detach()).sum(1).double()
    assert float((gates - by_frame).norm()) <= TIGHT[dtype] * size
    assert float((gates - by_coframe).norm()) <= TIGHT[dtype] * size
    torch.testing.assert_close(bundle.importance(), bundle.gates.grad.abs())


@settings(max_examples=15)
@given(SHAPES, SEEDS, st.data())
def test_pruning_is_the_best_approximation_of_that_rank(shape, seed, data) -> None:
    torch.manual_seed(seed)
    bundle = trained(*shape, scaling=-0.5)
    keep = data.draw(st.integers(1, shape[2]))
    before = update(bundle)
    u, s, vh = torch.linalg.svd(before, full_matrices=False)
    relative = bundle.prune(keep)
    assert bundle.fiber_dim == len(bundle.fibers) == keep
    assert error(update(bundle), (u[:, :keep] * s[:keep]) @ vh[:keep]) <= 1e-9
    assert relative == pytest.approx(float(s[keep:].norm() / s.norm()), rel=1e-9, abs=1e-9)
    norms = torch.tensor([fiber.norm() for fiber in bundle.fibers], dtype=torch.float64)
    torch.testing.assert_close(norms, s[:keep])
    assert torch.equal(bundle.gates.detach(), torch.ones(keep, dtype=torch.float64))
    assert all(p.requires_grad for p in (bundle.gates, bundle.frame, bundle.coframe))


def test_pruning_by_energy_keeps_the_fewest_that_reach_it() -> None:
    s = torch.tensor([4.0, 2.0, 2.0, 1.0], dtype=torch.float64)  # shares of 25: 16, 4, 4, 1
    u, v = (torch.linalg.qr(torch.randn(size, 4, dtype=torch.float64))[0] for size in (9, 7))
    for energy, expected in ((0.1, 1), (0.64, 1), (0.65, 2), (0.96, 3), (1.0, 4)):
        bundle = trained(9, 7, 4)
        with torch.no_grad():
            bundle.frame.copy_(u * s)
            bundle.coframe.copy_(v.mT)
            bundle.gates.fill_(1.0)
        bundle.prune(energy=energy)
        assert bundle.fiber_dim == expected
    untrained = LoRAFiberBundle(nn.Linear(5, 5), 3)
    assert untrained.prune(energy=0.9) == 0.0
    assert LoRAFiberBundle(nn.Linear(5, 5), 3).prune(2) == 0.0


@settings(max_examples=10)
@given(SHAPES, SEEDS, st.sampled_from(["svd", "balanced", "equal_energy", "left", "pivot"]))
def test_a_change_of_gauge_changes_no_output_of_the_bundle(shape, seed, name) -> None:
    torch.manual_seed(seed)
    bundle = trained(*shape)
    before, names = update(bundle), {k: id(p) for k, p in bundle.named_parameters()}
    bundle.gauge_fix(name)
    assert error(update(bundle), before) <= 1e-11
    assert {k: id(p) for k, p in bundle.named_parameters()} == names


def test_single_fibres_depend_on_the_gauge_and_their_sum_does_not() -> None:
    bundle = trained(9, 7, 3)
    bundle.gauge_fix("svd")
    before, point = update(bundle), bundle.point()
    norms = sorted(fiber.norm() for fiber in bundle.fibers)
    permutation = torch.eye(3, dtype=torch.float64)[[2, 0, 1]] * torch.tensor([2.0, -3.0, 0.5])
    bundle.assign(point.act(permutation))
    assert sorted(fiber.norm() for fiber in bundle.fibers) == pytest.approx(norms)
    bundle.assign(point.act(torch.randn(3, 3, dtype=torch.float64)))
    assert error(update(bundle), before) <= 1e-10
    assert sorted(fiber.norm() for fiber in bundle.fibers) != pytest.approx(norms, rel=0.01)


def test_merging_is_by_hand_and_drops_the_fibres() -> None:
    bundle = trained(5, 9, 3, torch.float32, 0.5)
    plain = bundle.merge()
    assert type(plain) is nn.Linear
    expected = (bundle.base_model.weight.double() + update(bundle)).float()
    torch.testing.assert_close(plain.weight, expected, rtol=1e-6, atol=1e-6)
    x = torch.randn(4, 9)
    torch.testing.assert_close(merged_copy(nn.Sequential(bundle))(x), plain(x))


def test_bundles_export_to_onnx_merged(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from gauge_ext.export import export_onnx

    model = nn.Sequential(
        trained(4, 6, 3, torch.float32), FullFiberBundle(nn.Linear(4, 5), fiber_dim=2)
    )
    for fiber in model[1].fibers:
        nn.init.normal_(fiber.weight)
    path = tmp_path / "bundles.onnx"
    report = export_onnx(model, (torch.randn(2, 6),), path)
    assert report.validation.passed
    found = {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for tensor in onnx.load(path).graph.initializer
    }
    assert set(found) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    total = sum(fiber.weight.detach().double() for fiber in model[1].fibers)
    for place, delta in (("0", update(model[0])), ("1", total)):
        weight = model.get_submodule(place).base_model.weight
        assert error(found[f"{place}.weight"], weight.double() + delta) <= 1e-6


def test_the_seeds_full_matrix_fibres_are_one_matrix() -> None:
    base = nn.Linear(7, 5, dtype=torch.float64)
    bundle = FullFiberBundle(base, fiber_dim=4)
    x = torch.randn(3, 7, dtype=torch.float64)
    assert torch.equal(bundle(x), base(x))
    for fiber in bundle.fibers:
        nn.init.normal_(fiber.weight)
    one = bundle.collapse()
    assert sum(p.numel() for p in one.parameters()) * 4 == sum(
        p.numel() for p in bundle.fibers.parameters()
    )
    torch.testing.assert_close(bundle(x), base(x) + one(x))
    bundle(x).square().sum().backward()
    gradients = [fiber.weight.grad for fiber in bundle.fibers]
    assert all(torch.equal(g, gradients[0]) for g in gradients)
    plain = bundle.to_linear()
    torch.testing.assert_close(plain(x), bundle(x))


def test_full_fibres_give_the_nearest_bundle_of_rank_one_fibres() -> None:
    full = FullFiberBundle(nn.Linear(7, 5, dtype=torch.float64), fiber_dim=2)
    assert float(full.to_bundle(3).delta_weight().norm()) == 0.0
    for fiber in full.fibers:
        nn.init.normal_(fiber.weight)
    total = sum(fiber.weight.detach() for fiber in full.fibers)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    bundle = full.to_bundle(3)
    assert error(update(bundle), (u[:, :3] * s[:3]) @ vh[:3]) <= 1e-9
    assert error(update(full.to_bundle(5)), total) <= 1e-12
    assert error(update(full.to_bundle(6)), total) <= 1e-12


def test_what_a_bundle_cannot_use_is_refused_by_name() -> None:
    bundle = trained(5, 5, 3)
    with pytest.raises(AdapterStateError, match="no gradient"):
        bundle.importance()
    for arguments in ({}, {"keep": 1, "energy": 0.5}):
        with pytest.raises(ConfigError, match="keep or energy"):
            bundle.prune(**arguments)
    for keep in (0, 4):
        with pytest.raises(ConfigError, match="between 1 and 3"):
            bundle.prune(keep)
    with pytest.raises(ConfigError, match="energy must lie"):
        bundle.prune(energy=1.5)
    with torch.no_grad():
        bundle.frame[0, 0] = torch.inf
    with pytest.raises(NonFiniteError):
        bundle.prune(1)
    assert bundle.fiber_dim == 3
    for kind in (LoRAFiberBundle, FullFiberBundle):
        with pytest.raises(ConfigError, match="whole number of at least 1"):
            kind(nn.Linear(5, 5), 0)
        with pytest.raises(TargetError, match="neither"):
            kind(nn.ReLU(), 3)
