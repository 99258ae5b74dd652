"""The adapters of a model in a canonical gauge, and what that means for their optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.adapters import Kind
from gauge_ext.adapters.slot import AdapterSlot
from gauge_ext.errors import AdapterStateError, GaugeError, GeometryError, NonFiniteError
from gauge_ext.geometry import LoRAPoint
from gauge_ext.geometry.gauge import GaugeName, to_gauge
from gauge_ext.models.adapted import lora_layers
from gauge_ext.models.roster import adapter_slots, sole_name

# What torch's optimizers keep for a parameter, by how it has to move with the gauge: averages of
# gradients like a gradient, averages of their squares entry by entry in a way of their own.
_FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})
_SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq"})
# What gauge_ext.optim keeps beside those: numbers of rows and columns of X, and what is held in
# orthonormal frames of X. No gauge changes them.
_INVARIANTS = frozenset({"row_sq", "column_sq", "frame", "frame_avg", "frame_sq", "frame_rest"})


@torch.no_grad()
def regauge_model(model: nn.Module, gauge: GaugeName, name: str | None = None) -> dict[str, Tensor]:
    r"""Bring an adapter of a model to a canonical gauge, in place.

    .. math:: B \to B G^{-1}, \quad A \to G A

    for each layer with a G of its own, so that the updates, and with them what the model computes,
    stay the same to the rounding of the factors' dtype. The gauge is that of the effective factor,
    ``scaling * lora_B``; the scaling itself stays, so ``lora_B`` is the gauge's B over the scaling.
    Parameters stay the same objects. All layers change or, on a failure, none.

    A layer whose update has a rank below r is left as it is: no invertible G leads to its gauge,
    and directions in which both factors were zero could never be trained again. That is so before
    training, where lora_B is zero.

    Args:
        model: A model with adapters, merged or not.
        gauge: See :func:`gauge_ext.geometry.gauge.to_gauge`.
        name: Which of several adapters; None: the only one, or the only active one.

    Returns:
        Path of each layer that changed -> its G ``(r, r)`` in float64, which
        :func:`regauge_optimizer_state` needs if training goes on.

    Raises:
        ConfigError: There is no such gauge.
        AdapterStateError: No adapters are attached, none of that name, or several and it is not
            said which.
        NonFiniteError: A factor holds NaN or infinity, or would leave the range of its dtype.
        GeometryError: An adapter is on a grouped convolution or on a bare parameter.
    """
    layers = lora_layers(model)
    slots = adapter_slots(model, sole_name(model, "regauged") if name is None else name)
    found = {}
    for path, slot in slots.items():
        require_one_matrix(path, layers[path].kind, slot.lora_A, slot.lora_B)
        b, a, g, rank = regauge_factors(path, slot.lora_B, slot.lora_A, slot.scaling, gauge)
        if rank == layers[path].rank_of(slot):
            found[path] = (slot, b, a, g)
    for slot, b, a, _ in found.values():
        slot.lora_B.copy_(b)
        slot.lora_A.copy_(a)
    return {path: g for path, (_, _, _, g) in found.items()}


def require_one_matrix(name: str, kind: Kind, lora_A: Tensor, lora_B: Tensor) -> None:
    """Refuse an adapter whose factors are those of many matrices.

    Args:
        name: The layer's path, for messages.
        kind: How the adapter lies in a file.
        lora_A: Its factors, with the kernel of a convolution.
        lora_B: See lora_A.

    Raises:
        GeometryError: It is on a bare parameter, or on a grouped convolution.
    """
    if kind in ("parameter", "tokens"):
        raise GeometryError(
            f"{name}: the adapter on a bare parameter (target_parameters), or on tokens, is no "
            "single product B A, and no point of one bundle."
        )
    rank, columns = lora_A.shape[0], lora_B.shape[1]
    if rank != columns:
        raise GeometryError(
            f"{name}: the adapter on a convolution of {rank // columns} groups is a product B A "
            f"for each group (lora_A has {rank} rows, lora_B {columns} columns), and no point of "
            "one bundle: no spectrum, gauge or distance is defined for it.",
            hint="Leave that layer out; training, saving and merging take it as it is.",
        )


def regauge_factors(
    name: str, lora_B: Tensor, lora_A: Tensor, scaling: float, gauge: GaugeName
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Compute one layer's stored factors in a gauge.

    Args:
        name: The layer's path, for messages.
        lora_B: ``(out, r)``, without the scaling.
        lora_A: ``(r, in)``.
        scaling: s.
        gauge: See :func:`gauge_ext.geometry.gauge.to_gauge`.

    Returns:
        lora_B and lora_A in the gauge and in their own dtypes, G ``(r, r)`` in float64, and the
        rank of the update. Where that is 0, nothing is changed.

    Raises:
        ConfigError: There is no such gauge.
        NonFiniteError: A factor holds NaN or infinity, or would leave the range of its dtype.
    """
    # In float64 from here to the end, so that the scaling costs no rounding of its own.
    # The factors of a convolution are matrices too, with the kernel in the columns of A.
    b, a = lora_B.detach().flatten(1).double(), lora_A.detach().flatten(1).double()
    point = LoRAPoint(b * scaling, a)
    try:
        gauged = to_gauge(point, gauge)
    except GaugeError as error:
        raise type(error)(f"{name}: {error.message}", hint=error.hint) from error
    rank = int(point.numerical_rank())
    if rank == 0:
        return lora_B.detach(), lora_A.detach(), gauged.G, 0
    b = (gauged.point.B / scaling).to(lora_B.dtype).reshape(lora_B.shape)
    a = gauged.point.A.to(lora_A.dtype).reshape(lora_A.shape)
    if not bool(b.isfinite().all() and a.isfinite().all()):
        raise NonFiniteError(
            f"{name}: the factors of the gauge {gauge} exceed the range of {lora_B.dtype}.",
            hint='Choose "balanced", whose entries are the smallest.',
        )
    return b, a, gauged.G, rank


@torch.no_grad()
def regauge_optimizer_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    gauges: Mapping[str, Tensor],
    name: str | None = None,
) -> None:
    r"""Carry an optimizer's state along with :func:`regauge_model`, in place.

    Gradients are covectors: with the factors as above, :math:`g_B \to g_B G^T` and
    :math:`g_A \to G^{-T} g_A`. Averages of gradients (momentum of SGD, first moments of Adam and
    its kin) move in the same way, exactly. Averages of *squared* gradients, entry by entry, have no
    exact rule, since they have forgotten how entries vary together. They are moved as if different
    entries were uncorrelated,

    .. math:: v_B \to v_B (G \circ G)^T, \quad v_A \to (G^{-T} \circ G^{-T}) v_A

    which keeps them positive and is exact for permutations and scales of the r directions. So
    SGD with momentum has the exact state of the new gauge afterwards, and Adam an estimate that its
    next 1 / (1 - beta2) steps replace. (Adam's own steps depend on the gauge in any case.) The
    optimizers of :mod:`gauge_ext.optim` go on exactly as if the gauge had not changed.

    Args:
        optimizer: One of torch's that keeps first and second moments (Adam, AdamW, NAdam, RAdam,
            SGD with momentum), or one of :mod:`gauge_ext.optim`. Parameters that are no adapter's
            are left alone.
        model: The model, already in the new gauge.
        gauges: What :func:`regauge_model` returned. Layers without an entry did not change.
        name: The name that :func:`regauge_model` was given.

    Raises:
        AdapterStateError: The optimizer keeps something else for a factor, or a layer is unknown,
            or a G does not fit. Nothing is changed then.
    """
    slots = adapter_slots(model, sole_name(model, "regauged") if name is None else name)
    moved: list[tuple[Tensor, Tensor]] = []
    for path, g in gauges.items():
        if path not in slots:
            raise AdapterStateError(
                f"a gauge is given for {path!r}, and the model has no adapter there.",
                hint="Pass what regauge() returned for this very model.",
            )
        rank = slots[path].lora_A.shape[0]
        if g.shape != (rank, rank):
            raise AdapterStateError(
                f"the gauge for {path!r} must have shape {(rank, rank)}, got {tuple(g.shape)}."
            )
        moved += _moved(optimizer, path, slots[path], g.double())
    for old, new in moved:
        old.copy_(new)


def _moved(
    optimizer: torch.optim.Optimizer, name: str, slot: AdapterSlot, g: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Pair each tensor of a layer's state with what it becomes."""
    cograde = torch.linalg.inv(g).mT  # G^-T
    pairs = []
    for factor in ("lora_B", "lora_A"):
        state: Mapping[str, Any] = optimizer.state.get(getattr(slot, factor), {})
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or key in _INVARIANTS:
                continue  # a count of steps among them
            if key not in _FIRST_MOMENTS | _SECOND_MOMENTS:
                raise AdapterStateError(
                    f"{type(optimizer).__name__} keeps {key!r} for {name}.{factor}, and there is "
                    "no rule for how that changes with the gauge.",
                    hint="Change the gauge before training starts, or start the optimizer anew.",
                )
            squared = key in _SECOND_MOMENTS
            if factor == "lora_B":
                pairs.append((value, value.double() @ (g.square() if squared else g).mT))
            else:
                pairs.append((value, (cograde.square() if squared else cograde) @ value.double()))
    return pairs
