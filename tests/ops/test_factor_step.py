"""The steps of all layers at once: compiled, in plain torch, and by dense matrices by hand."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from factor_problems import F64, LOOSE, Problem, make, relative
from marks import needs_compiled
from torch import Tensor

from gauge_ext.ops import (
    factor_gradient_norm,
    factor_step,
    gauge_adam_step,
    pair_batches,
    scaled_gd_step,
)


def adam(p: Problem, state: dict[str, list[Tensor]], **options: Any) -> None:
    steps = [3] * len(p.A)
    gauge_adam_step(*p.parts, *state.values(), p.scaling, p.anchors, steps, lr=0.01, **options)


def scaled(p: Problem, state: dict[str, list[Tensor]], **options: Any) -> None:
    scaled_gd_step(
        *p.parts, state["avg_A"], state["avg_B"], p.scaling, p.anchors, lr=0.01, **options
    )


@needs_compiled
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("step", [adam, scaled])
def test_the_kernels_are_the_reference(
    dtype: torch.dtype, step: Any, zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"weight_decay": 0.3, "damping": 1e-3, "grad_scale": 0.7}
    if step is scaled:
        options |= {"momentum": 0.9, "nesterov": True}
    fast, slow = make(dtype, zero=zero), make(dtype, zero=zero)
    fast_state, slow_state = fast.state(), slow.state()
    step(fast, fast_state, **options)
    monkeypatch.setattr(factor_step, "has_kernel", lambda _: False)
    step(slow, slow_state, **options)
    before = make(dtype, zero=zero).updates()
    assert relative(fast.updates(), slow.updates()) < LOOSE[dtype]
    moved = [new - old for new, old in zip(slow.updates(), before, strict=True)]
    same = [new - old for new, old in zip(fast.updates(), before, strict=True)]
    if dtype != torch.bfloat16:
        assert relative(same, moved) < 50 * LOOSE[dtype]
    for name, value in slow_state.items():
        if all(bool(part.any()) for part in value):
            assert relative(fast_state[name], value) < LOOSE[dtype], name


@pytest.mark.parametrize("plain", [False, True])
def test_scaled_gd_moves_x_by_its_projected_gradient(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(factor_step, "has_kernel", lambda _: False)
    p = make(F64)
    old = p.updates()
    lr = 1e-6
    scaled_gd_step(*p.parts, [], [], p.scaling, p.anchors, lr=lr)
    for x, new, g in zip(old, p.updates(), p.dense, strict=True):
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        rank = int((s > 1e-9 * s[0]).sum())
        u, vh = u[:, :rank], vh[:rank]
        want = u @ u.mT @ g + g @ vh.mT @ vh
        assert float(torch.linalg.norm((x - new) / lr - want) / torch.linalg.norm(want)) < 1e-3


@pytest.mark.parametrize("plain", [False, True])
def test_gauge_adams_first_step_divides_rows_and_columns_of_the_projected_gradient(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(factor_step, "has_kernel", lambda _: False)
    p = make(F64)
    old = p.updates()
    state = {name: [torch.zeros_like(t) for t in parts] for name, parts in p.state().items()}
    lr, damping = 1e-6, 0.5
    gauge_adam_step(
        *(*p.parts, *state.values(), p.scaling, p.anchors, [1] * len(p.A)),
        lr=lr,
        eps=0.0,
        damping=damping,
    )
    for i, (x, new, g) in enumerate(zip(old, p.updates(), p.dense, strict=True)):
        r = p.A[i].shape[0]
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
        by_row, by_column = g @ vh.mT, u.mT @ g
        keep = (s**2 / (s**2 + damping))[:, None]
        row_scale = by_row.square().mean(1, keepdim=True).sqrt()
        column_scale = (keep * by_column.square()).mean(0, keepdim=True).sqrt()
        want = by_row / row_scale @ vh + u @ (keep * by_column / column_scale)
        assert float(torch.linalg.norm((x - new) / lr - want) / torch.linalg.norm(want)) < 1e-3


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_with_the_other_anchor_the_step_is_that_of_the_transposes(
    plain: bool, zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(factor_step, "has_kernel", lambda _: False)
    p = make(F64, zero=zero)
    turned = Problem(
        *([t.mT.contiguous() for t in part] for part in (p.B, p.A, p.grad_B, p.grad_A)),
        p.scaling, [], [1] * len(p.A),
    )  # fmt: skip
    state, other = p.state(), p.state()
    # The scaling goes with lora_B, so what belongs to the other factor is in other units.
    swapped = {
        "avg_A": [t.mT.contiguous() * s for t, s in zip(other["avg_B"], p.scaling, strict=True)],
        "avg_B": [t.mT.contiguous() / s for t, s in zip(other["avg_A"], p.scaling, strict=True)],
        "sq_A": other["sq_B"],
        "sq_B": other["sq_A"],
    }
    for one, its in ((p, state), (turned, swapped)):
        adam(one, its, damping=0.02)
        scaled(one, its, damping=0.02, momentum=0.9)
    assert relative([x.mT for x in turned.updates()], p.updates()) < 1e-11


@pytest.mark.parametrize("plain", [False, True])
def test_the_gradient_norm_is_that_of_the_projected_gradient(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(factor_step, "has_kernel", lambda _: False)
    p, damping = make(F64, 1e4), 0.25
    want = 0.0
    for x, g, a in zip(p.updates(), p.dense, p.A, strict=True):
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        u, s, vh = u[:, : len(a)], s[: len(a)], vh[: len(a)]
        keep = (s**2 / (s**2 + damping))[:, None]
        want += float((g @ vh.mT).square().sum() + (keep * (u.mT @ g).square()).sum())
    got = factor_gradient_norm(*p.parts, p.scaling, p.anchors, damping=damping)
    assert got.dtype == F64
    assert float(got) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("plain", [False, True])
def test_the_gradient_norm_is_summed_in_float64(
    plain: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(factor_step, "has_kernel", lambda _: False)
    # Beside 2^28 each of the other squares, 2^-10, is nothing in float32; together they are 20.
    rows = 20481
    a, b = torch.tensor([[1.0, 0.0]], dtype=dtype), torch.ones(rows, 1, dtype=dtype)
    grad = torch.full((rows, 1), 2.0**-5, dtype=dtype)
    grad[0] = 2.0**14
    want = math.fsum(float(g) ** 2 for g in grad.flatten().double())
    got = factor_gradient_norm([a], [b], [torch.zeros_like(a)], [grad], [1.0], [0])
    assert want == 2.0**28 + 20
    assert float(got) == want


@pytest.mark.parametrize("step", [adam, scaled])
def test_a_gauge_of_condition_1e5_does_not_hurt(step: Any) -> None:
    # Rounding the factors and gradients in such a gauge alone costs 1e5 times float64's epsilon and
    # more: in float32 nothing would be left to compare.
    moved = []
    for condition in (1.0, 1e5):
        p = make(F64, condition)
        state = {name: [torch.zeros_like(t) for t in part] for name, part in p.state().items()}
        old = p.updates()
        step(p, state, damping=1e-3)
        moved.append([new - x for new, x in zip(p.updates(), old, strict=True)])
    assert relative(moved[1], moved[0]) < 1e-8


@needs_compiled
def test_opcheck(dtype: torch.dtype) -> None:
    p = make(dtype, shapes=((6, 5, 2), (4, 7, 3)))
    state = p.state()
    ops = torch.ops.gauge_ext
    numbers = (0.01, 0.9, True, 0.1, 1e-3, 0.5)
    torch.library.opcheck(
        ops.scaled_gd_step.default,
        (*p.parts, state["avg_A"], state["avg_B"], p.scaling, p.anchors, *numbers),
    )
    torch.library.opcheck(
        ops.gauge_adam_step.default,
        (
            *p.parts,
            *state.values(),
            p.scaling,
            p.anchors,
            [1, 2],
            0.01,
            0.9,
            0.99,
            1e-8,
            0.1,
            1e-3,
            0.5,
        ),
    )
    torch.library.opcheck(ops.factor_gradient_norm.default, (*p.parts, p.scaling, p.anchors, 1e-3))


@needs_compiled
def test_a_compiled_function_may_hold_a_step() -> None:
    def descend(p: Problem, state: dict[str, list[Tensor]]) -> None:
        torch.ops.gauge_ext.gauge_adam_step(
            *(*p.parts, *state.values(), p.scaling, p.anchors, [1, 2]),
            *(0.01, 0.9, 0.99, 1e-8, 0.1, 1e-3, 1.0),
        )

    p, q = (make(F64, shapes=((6, 5, 2), (4, 7, 3))) for _ in range(2))
    state = q.state()
    torch.compile(
        lambda *parts: torch.ops.gauge_ext.gauge_adam_step(
            *(parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6], parts[7]),
            *(q.scaling, q.anchors, [1, 2], 0.01, 0.9, 0.99, 1e-8, 0.1, 1e-3, 1.0),
        ),
        fullgraph=True,
    )(*q.parts, *state.values())
    descend(p, p.state())
    assert relative(q.updates(), p.updates()) < 1e-15


@pytest.mark.parametrize("plain", [False, True])
def test_a_factor_without_full_rank_is_refused_before_anything_is_written(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(factor_step, "has_kernel", lambda _: False)
    for damage in (lambda p: p.A[1][3].zero_(), lambda p: p.B[2].fill_(torch.nan)):
        p = make(F64)
        damage(p)
        before = copy.deepcopy(p.A), copy.deepcopy(p.B)
        with pytest.raises(RuntimeError, match=r"has a rank below r, or .*NaN"):
            adam(p, p.state())
        for old, new in zip(before, (p.A, p.B), strict=True):
            for x, y in zip(old, new, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@needs_compiled
def test_arguments_that_do_not_fit_are_named() -> None:
    cases: list[tuple[str, Any]] = [
        (r"lora_A\[1\] and lora_B\[1\] must have shapes", lambda p: p.B.reverse()),
        (
            r"grad_A\[0\] must be contiguous and have its factor's shape",
            lambda p: p.grad_A.reverse(),
        ),
        (r"must have one entry for each pair, got 6, 6, 6, 6, 5 and 6", lambda p: p.scaling.pop()),
        (r"scaling\[2\] must be finite and not 0, got 0", lambda p: p.scaling.__setitem__(2, 0.0)),
        (
            r"all factors must have the dtype .* in pair 1",
            lambda p: p.B.__setitem__(1, p.B[1].float()),
        ),
        (
            r"factors of pair 3 must be contiguous",
            lambda p: p.A.__setitem__(3, p.A[3].mT.contiguous().mT),
        ),
    ]
    for message, spoil in cases:
        p = make(F64)
        state = p.state()
        spoil(p)
        with pytest.raises(RuntimeError, match=message):
            scaled_gd_step(*p.parts, [], [], p.scaling, p.anchors, lr=0.1)
    p = make(F64)
    state = p.state()
    with pytest.raises(RuntimeError, match="damping must be at least 0, got -1"):
        adam(p, state, damping=-1.0)
    with pytest.raises(RuntimeError, match=r"lr \* weight_decay must be at most 1, got 2"):
        adam(p, state, weight_decay=200.0)
    state["sq_A"].reverse()
    with pytest.raises(RuntimeError, match=r"sq_A\[0\] must be contiguous, of shape \[29\]"):
        adam(p, state)
    state["sq_A"].pop()
    with pytest.raises(RuntimeError, match="sq_A must have 6 entries, one for each pair, got 5"):
        adam(p, state)


def test_nothing_to_do_is_done() -> None:
    scaled_gd_step([], [], [], [], [], [], [], [], lr=0.1)
    gauge_adam_step([], [], [], [], [], [], [], [], [], [], [], lr=0.1)


@needs_compiled
def test_a_dtype_without_a_kernel_runs_in_plain_torch_and_says_so_once() -> None:
    pair_batches.say_plain.cache_clear()
    p = make(torch.float16, 1.0, shapes=((6, 5, 2),))
    want = make(F64, 1.0, shapes=((6, 5, 2),))
    with pytest.warns(UserWarning, match=r"no compiled optimizer step for torch\.float16 on cpu"):
        scaled(p, p.state())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled(p, p.state())
    scaled(want, want.state())
    scaled(want, want.state())
    assert relative(p.updates(), want.updates()) < 1e-2
