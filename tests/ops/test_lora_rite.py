"""LoRA-RITE's step: compiled, in plain torch, and by dense matrices by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from factor_problems import F64, SHAPES, Problem, make, relative
from marks import needs_compiled
from torch import Tensor

from gauge_ext.ops import RiteState, lora_rite_step, pair_batches

WIDE = (*SHAPES, (90, 100, 70), (6, 5, 2), (33, 31, 16))
OPTIONS = {"lr": 0.01, "weight_decay": 0.3, "damping": 1e-3, "grad_scale": 0.7}
plain_or_not = pytest.mark.parametrize("plain", [False, True])


def start(p: Problem) -> RiteState[list[Tensor]]:
    dtype = F64 if p.A[0].dtype == F64 else torch.float32

    def zeros(shape: Any, kind: torch.dtype) -> list[Tensor]:
        return [torch.zeros(shape(a, b), dtype=kind) for a, b in zip(p.A, p.B, strict=True)]

    panels = [zeros(shape, dtype) for shape in (lambda a, _: a.shape, lambda _, b: b.mT.shape)]
    squares = [zeros(lambda a, _: (len(a), len(a)), F64) for _ in range(3)]
    again = copy.deepcopy(panels)
    return RiteState(panels[0], panels[1], again[0], again[1], *squares)


def take(p: Problem, state: RiteState[list[Tensor]], step: int = 1, **options: Any) -> None:
    lora_rite_step(*p.parts, state, p.scaling, p.anchors, [step] * len(p.A), **options)


def in_plain_torch(monkeypatch: pytest.MonkeyPatch, plain: bool = True) -> None:
    if plain:
        monkeypatch.setattr(pair_batches, "has_kernel", lambda *_: False)


def draw_gradients(p: Problem, seed: int) -> None:
    """Gradients of another loss that is linear in X, at where the factors are now."""
    generator = torch.Generator().manual_seed(seed)
    for i, (a, b, s) in enumerate(zip(p.A, p.B, p.scaling, strict=True)):
        g = torch.randn(b.shape[0], a.shape[1], generator=generator, dtype=F64)
        p.dense[i] = g
        p.grad_A[i] = (s * b.double().mT @ g).to(a.dtype)
        p.grad_B[i] = (s * g @ a.double().mT).to(a.dtype)


@needs_compiled
@pytest.mark.parametrize("anchor", [0, 1])
@pytest.mark.parametrize("zero", [False, True])
def test_the_kernels_are_the_reference(
    dtype: torch.dtype, zero: bool, anchor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerance = {F64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 1e-2}[dtype]
    fast = make(dtype, zero=zero and anchor == 0, shapes=WIDE)
    fast.anchors = [anchor] * len(WIDE)
    if zero and anchor == 1:
        for a in fast.A:
            a.zero_()
    slow = copy.deepcopy(fast)
    fast_state, slow_state = start(fast), start(slow)
    for step in range(1, 5):
        draw_gradients(slow, step)
        fast.grad_A, fast.grad_B = copy.deepcopy((slow.grad_A, slow.grad_B))
        take(fast, fast_state, step, **OPTIONS)
        with monkeypatch.context() as patched:
            in_plain_torch(patched)
            take(slow, slow_state, step, **OPTIONS)
        assert relative(fast.updates(), slow.updates()) < tolerance
        # The next step from one place, so that rounding does not grow from step to step.
        for part, of in zip(
            (fast.A, fast.B, *fast_state), (slow.A, slow.B, *slow_state), strict=True
        ):
            for i, (mine, theirs) in enumerate(zip(part, of, strict=True)):
                scale = 1 + float(theirs.double().norm())
                error = float((mine.double() - theirs.double()).norm()) / scale
                assert error < 10 * tolerance, (step, WIDE[i])
                mine.copy_(theirs)


@plain_or_not
def test_the_first_step_is_along_polar_factors_of_the_projected_gradient(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_plain_torch(monkeypatch, plain)
    p, damping, lr = make(F64), 0.5, 1e-6
    old = p.updates()
    take(p, start(p), lr=lr, eps=0.0, damping=damping)

    def polar(x: Tensor) -> Tensor:
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        return left @ right

    for i, (x, new, g) in enumerate(zip(old, p.updates(), p.dense, strict=True)):
        m, n, r = *x.shape, p.A[i].shape[0]
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
        keep = (s**2 / (s**2 + damping)).sqrt()[:, None]
        by_row, by_column = polar(g @ vh.mT), polar(keep * (u.mT @ g))
        want = m**0.5 * by_row @ vh + n**0.5 * u @ (keep**3 * by_column)
        assert float(torch.linalg.norm((x - new) / lr - want) / torch.linalg.norm(want)) < 1e-3


def by_the_paper(p: Problem, i: int, gradients: list[Tensor], lr: float) -> Tensor:
    """X after steps of the paper's formula: QR frames, no damping, no escaped mass."""
    b, a = p.scaling[i] * p.B[i].clone(), p.A[i].clone()
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for t, g in enumerate(gradients, 1):
        (u, r_b), (v, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
        moves = {}
        for name, grad, frame, r in (("b", g @ a.mT, v, r_a), ("a", g.mT @ b, u, r_b)):
            hat = grad @ torch.linalg.inv(r)
            old_frame, moment, square = kept.get(
                name, (frame, torch.zeros_like(hat), torch.zeros_like(r))
            )
            turn = frame.mT @ old_frame
            square = beta2 * turn @ square @ turn.mT + (1 - beta2) * hat.mT @ hat / len(hat)
            values, vectors = torch.linalg.eigh(square / (1 - beta2**t))
            root = vectors / (values.clamp_min(0).sqrt() + eps) @ vectors.mT
            moment = beta1 * moment @ turn.mT + (1 - beta1) * hat @ root
            kept[name] = (frame, moment, square)
            moves[name] = lr * moment / (1 - beta1**t) @ torch.linalg.inv(r).mT
        b, a = b - moves["b"], a - moves["a"].mT
    return b @ a


@plain_or_not
def test_without_damping_it_is_the_papers_formula(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_plain_torch(monkeypatch, plain)
    shapes = ((37, 29, 5), (64, 48, 8), (12, 9, 1))
    p = make(F64, 3.0, shapes=shapes)
    begin, state, lr = copy.deepcopy(p), start(p), 0.01
    gradients = []
    for step in range(1, 6):
        draw_gradients(p, step)
        gradients.append(list(p.dense))
        take(p, state, step, lr=lr)
    for i, x in enumerate(p.updates()):
        want = by_the_paper(begin, i, [g[i] for g in gradients], lr)
        moved = want - begin.updates()[i]
        assert float((x - want).norm() / moved.norm()) < 1e-8


@plain_or_not
def test_with_the_other_anchor_the_step_is_that_of_the_transposes(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_plain_torch(monkeypatch, plain)
    p = make(F64, zero=True)
    turned = Problem(
        *([t.mT.contiguous() for t in part] for part in (p.B, p.A, p.grad_B, p.grad_A)),
        p.scaling, [], [1] * len(p.A),
    )  # fmt: skip
    state, other = start(p), start(turned)
    for step in range(1, 4):
        take(p, state, step, lr=0.01, damping=0.02)
        take(turned, other, step, lr=0.01, damping=0.02)
        assert relative([x.mT for x in turned.updates()], p.updates()) < 1e-9


@pytest.mark.parametrize("condition", [1.0, 1e5])
def test_a_gauge_of_condition_1e5_does_not_hurt(condition: float) -> None:
    moved = []
    for gauge in (1.0, condition):
        p = make(F64, gauge)
        state, old = start(p), p.updates()
        for step in range(1, 4):
            take(p, state, step, lr=0.01, damping=1e-3)
        moved.append([new - x for new, x in zip(p.updates(), old, strict=True)])
    assert relative(moved[1], moved[0]) < 1e-6


@needs_compiled
def test_directions_without_a_gradient_are_not_magnified() -> None:
    # Three rows of B have gradients in three directions of six, and A has none where B is zero: the
    # rest is float32's rounding, of which every instruction set makes another. Measured: .009 with
    # AVX2, .014 without fused multiply-adds, and without damping 9e3 and 2e7 times the step.
    errors = {}
    for damping in (1e-3, 0.0):
        exact, rounded = (make(dtype, 1.0, shapes=((3, 40, 6),)) for dtype in (F64, torch.float32))
        old = copy.deepcopy((exact.A[0], exact.B[0]))
        for p in (exact, rounded):
            take(p, start(p), lr=0.1, damping=damping)
        errors[damping] = [
            float((got.double() - want).norm() / (want - was).norm())
            for was, want, got in zip(
                old, (exact.A[0], exact.B[0]), (rounded.A[0], rounded.B[0]), strict=True
            )
        ]
    assert max(errors[1e-3]) < 2e-2
    assert max(errors[0.0]) > 1e2


@needs_compiled
def test_threads_do_not_matter() -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            p = make(torch.float32, shapes=WIDE)
            state = start(p)
            take(p, state, **OPTIONS)
            take(p, state, 2, **OPTIONS)
            results.append(p.A + p.B)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@needs_compiled
def test_opcheck(dtype: torch.dtype) -> None:
    p = make(dtype, shapes=((6, 5, 2), (4, 7, 3)))
    state = start(p)
    torch.library.opcheck(
        torch.ops.gauge_ext.lora_rite_step.default,
        (*p.parts, *state, p.scaling, p.anchors, [1, 1], 0.01, 0.9, 0.99, 1e-8, 0.1, 1e-3, 0.5),
    )


@plain_or_not
def test_what_has_no_step_is_refused_before_anything_is_written(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_plain_torch(monkeypatch, plain)
    cases: list[tuple[Any, str]] = [
        (lambda p: p.A[1][3].zero_(), "has a rank below r"),
        (lambda p: p.B[2].fill_(torch.nan), "has a rank below r, or .*NaN"),
        (lambda p: p.grad_A[2].fill_(torch.inf), "grad_A or grad_B .*holds NaN or infinity"),
        (lambda p: p.grad_B[4][0].fill_(torch.nan), "grad_A or grad_B .*holds NaN or infinity"),
    ]
    for damage, message in cases:
        p = make(F64)
        state = start(p)
        damage(p)
        before = copy.deepcopy((p.A, p.B, *state))
        with pytest.raises(RuntimeError, match=message):
            take(p, state, lr=0.1)
        for old, new in zip(before, (p.A, p.B, *state), strict=True):
            for x, y in zip(old, new, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@needs_compiled
def test_arguments_that_do_not_fit_are_named() -> None:
    p = make(F64)
    state = start(p)
    with pytest.raises(RuntimeError, match="steps must have 6 entries, one for each pair, got 1"):
        lora_rite_step(*p.parts, state, p.scaling, p.anchors, [1], lr=0.1)
    for name in state._fields:
        broken = state._replace(**{name: [t.mT[:, :0] for t in getattr(state, name)]})
        with pytest.raises(RuntimeError, match=rf"{name}\[0\] must be contiguous, of shape \["):
            take(p, broken, lr=0.1)
        broken = state._replace(**{name: []})
        with pytest.raises(RuntimeError, match=f"{name} must have 6 entries, one for each"):
            take(p, broken, lr=0.1)
    wrong = state._replace(sq_A=[t.float() for t in state.sq_A])
    with pytest.raises(RuntimeError, match=r"sq_A\[0\] must be .* and Double, got .* and Float"):
        take(p, wrong, lr=0.1)


def test_nothing_to_do_is_done() -> None:
    lora_rite_step([], [], [], [], RiteState([], [], [], [], [], [], []), [], [], [], lr=0.1)
