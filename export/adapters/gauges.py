"""Which of the factors with the same update are stored, and what storing them loses."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gauge_ext.export.adapters.codes import decode, encode
from gauge_ext.export.adapters.table import AdapterTable

Factors = dict[str, tuple[NDArray[Any], NDArray[Any]]]  # lora_A (r, in), scaling * lora_B (out, r)
AdapterGauge = Literal["auto", "trained", "balanced", "equal_energy"]
GAUGES: tuple[AdapterGauge, ...] = get_args(AdapterGauge)


def choose_gauge(
    factors: Factors, table: AdapterTable, gauge: AdapterGauge
) -> tuple[Factors, dict[str, str], dict[str, dict[str, float]]]:
    """The factors in the gauge asked for, or in the best of all; what each gauge would lose."""
    names: list[str] = [g for g in GAUGES if g != "auto"] if gauge == "auto" else [gauge]
    candidates = {name: _in_gauge(factors, name) for name in names}
    losses = {
        name: {module: _loss(factors[module], pair, table) for module, pair in candidate.items()}
        for name, candidate in candidates.items()
    }
    chosen = {m: min(names, key=lambda name: losses[name][m]) for m in factors}
    return {m: candidates[g][m] for m, g in chosen.items()}, chosen, losses


def _in_gauge(factors: Factors, gauge: str) -> Factors:
    if gauge == "trained":
        return factors
    import torch

    from gauge_ext.geometry import LoRAPoint, to_gauge

    changed = {}
    for name, (a, b) in factors.items():
        point = LoRAPoint(torch.from_numpy(b).double(), torch.from_numpy(a).double())
        # Another name than a gauge's is refused there.
        moved = to_gauge(point, gauge).point  # type: ignore[arg-type]
        changed[name] = (moved.A.numpy(), moved.B.numpy())
    return changed


def _loss(
    exact: tuple[NDArray[Any], NDArray[Any]],
    pair: tuple[NDArray[Any], NDArray[Any]],
    table: AdapterTable,
) -> float:
    """``||B' A' - B A|| / ||B A||`` without forming a product of (out, in)."""
    a, b = (matrix.astype(np.float64) for matrix in exact)
    a2 = decode(*encode(pair[0].T, table.precision, 1), 1).T
    b2 = decode(*encode(pair[1].T, table.precision, 0), 0).T
    if not (np.isfinite(a2).all() and np.isfinite(b2).all()):
        return float("inf")  # beyond float16
    error = _norm(np.concatenate((b2, -b), axis=1), np.concatenate((a2, a)))
    norm = _norm(b, a)
    return error / norm if norm > 0.0 else 0.0


def _norm(b: NDArray[np.float64], a: NDArray[np.float64]) -> float:
    """The Frobenius norm of b a, by the triangular factors of both."""
    left, right = np.linalg.qr(b)[1], np.linalg.qr(a.T)[1]
    return float(np.linalg.norm(left @ right.T))
