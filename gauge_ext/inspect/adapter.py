"""A saved adapter, inspected layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gauge_ext.checkpoint import AdapterCheckpoint, read_adapter
from gauge_ext.checkpoint.gauges import adapter_points
from gauge_ext.checkpoint.weights import Weights
from gauge_ext.inspect.against_base import BaseShare, base_shares
from gauge_ext.inspect.compare import Comparison, compare
from gauge_ext.inspect.factors import FactorBalance, factor_balance
from gauge_ext.inspect.precision import RoundingErrors, rounding_errors
from gauge_ext.inspect.readers import Finding, find_misreadings
from gauge_ext.inspect.spectrum import Spectrum, delta_spectrum

#: Losses for which the ranks that are needed are listed.
PRUNING_LOSSES = (0.01, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class LayerInspection:
    """One adapted layer: ``delta_weight = scaling * lora_B @ lora_A``, of shape (out, in).

    Attributes:
        name: The module's path in the model.
        in_features: Width of the layer's input.
        out_features: Width of its output.
        rank: r, as stored.
        alpha: The numerator of the scaling.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        parameters: Numbers stored, r * (in + out).
        nbytes: Bytes stored.
        dtype: What the factors are stored in, such as ``float32``.
        spectrum: The singular values of delta_weight.
        balance: How the stored factors share it; this depends on the gauge.
        rounding: What fewer bits would cost, by format and gauge.
        base: How it compares with the base's weight; None where no base was given.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    scaling: float
    parameters: int
    nbytes: int
    dtype: str
    spectrum: Spectrum
    balance: FactorBalance
    rounding: tuple[RoundingErrors, ...]
    base: BaseShare | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what is infinite or undefined becomes None."""
        return {
            "name": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "alpha": self.alpha,
            "scaling": self.scaling,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtype": self.dtype,
            "frobenius": self.spectrum.frobenius,
            "sigma_max": self.spectrum.largest,
            "effective_rank": self.spectrum.effective_rank,
            "stable_rank": self.spectrum.stable_rank,
            "numerical_rank": self.spectrum.numerical_rank,
            "condition": _finite(self.spectrum.condition),
            "singular_values": list(self.spectrum.singular_values),
            "ranks_within_loss": {
                str(loss): self.spectrum.rank_within(loss) for loss in PRUNING_LOSSES
            },
            "balance": _plain(asdict(self.balance)),
            "rounding_errors": {
                row.format: _plain(dict(row.errors)) | {"best": row.best} for row in self.rounding
            },
            "base": None if self.base is None else _plain(asdict(self.base)),
        }


@dataclass(frozen=True)
class AdapterInspection:
    """A saved adapter: its layers in the file's order, and what they add up to.

    Attributes:
        path: Where it was read from.
        sha256: The adapter's digest, as exported models carry it.
        base_model: ``base_model_name_or_path`` of its config, if any.
        layers: One entry an adapted layer.
        comparisons: One entry for each other adapter that was given.
        findings: What readers of the file would refuse or misread.
        notes: What the adapter does beside scaling * lora_B @ lora_A, which is all that the numbers
            are about.
    """

    path: Path
    sha256: str
    base_model: str | None
    layers: tuple[LayerInspection, ...]
    comparisons: tuple[Comparison, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Numbers stored in all layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes stored in all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that occur, in alphabetical order."""
        return tuple(sorted({layer.dtype for layer in self.layers}))

    @property
    def frobenius(self) -> float:
        """The norm of all updates taken together: sqrt(sum of ||delta_weight||_F^2)."""
        return math.hypot(*(layer.spectrum.frobenius for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "base_model": self.base_model,
            "totals": {
                "layers": len(self.layers),
                "parameters": self.parameters,
                "bytes": self.nbytes,
                "dtypes": list(self.dtypes),
                "frobenius": self.frobenius,
            },
            "layers": [layer.to_dict() for layer in self.layers],
            "comparisons": [
                {
                    **_plain(asdict(other)),
                    "layers": [_plain(asdict(layer)) for layer in other.layers],
                    "duplicate": other.duplicate,
                }
                for other in self.comparisons
            ],
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
        }

    def rounding(self, format_name: str) -> Mapping[str, float]:
        r"""Return the error of all layers together in one format, by gauge.

        .. math:: \sqrt{\sum_l \|X_l' - X_l\|_F^2 / \sum_l \|X_l\|_F^2}

        Args:
            format_name: A key of :data:`gauge_ext.inspect.FORMATS`.
        """
        totals: dict[str, float] = {}
        for layer in self.layers:
            row = next(row for row in layer.rounding if row.format == format_name)
            for gauge, error in row.errors.items():
                totals[gauge] = math.hypot(totals.get(gauge, 0.0), error * layer.spectrum.frobenius)
        return {g: total / self.frobenius if total else 0.0 for g, total in totals.items()}


def inspect_adapter(
    path: str | Path,
    *,
    base: Weights | nn.Module | str | os.PathLike[str] | None = None,
    others: Sequence[AdapterCheckpoint | str | os.PathLike[str]] = (),
    readers: Sequence[str] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> AdapterInspection:
    """Read a saved adapter and describe what it does to each layer.

    No delta_weight is formed: see :func:`gauge_ext.inspect.spectrum.delta_spectrum`.

    Args:
        path: The adapter's folder, in the PEFT format.
        base: The model that it was trained on, to compare weights with: see
            :func:`gauge_ext.inspect.base_shares`.
        others: Other adapters for the same base, or their folders, to compare with.
        readers: Whose reading of the file to judge, keys of :data:`gauge_ext.inspect.READERS`;
            None for all.
        progress: Called as ``progress(what is being done, fraction done)``.

    Raises:
        AdapterFormatError: A folder holds no adapter that can be read.
        NonFiniteError: A factor holds NaN or infinity.
        AdapterMismatchError: The base, or another adapter, does not fit.
        ConfigError: The base cannot be read, or a reader is unknown.
    """
    checkpoint = read_adapter(path)
    points = adapter_points(checkpoint)
    ranks = [pair.lora_A.shape[0] for pair in checkpoint.tensors.values()]
    findings = find_misreadings(checkpoint.raw_config, ranks, readers)
    comparisons = tuple(
        compare(points, adapter_points(other), str(getattr(other, "path", other)))
        for other in others
    )
    shares = {} if base is None else base_shares(points, base, progress=progress)
    layers = []
    for done, (name, pair) in enumerate(checkpoint.tensors.items()):
        if progress is not None:
            progress(f"inspecting {name}", done / len(checkpoint.tensors))
        scaling = checkpoint.config.scaling_for(name)
        # The kernel of a convolution is as wide as all that it multiplies.
        factors = (pair.lora_A.flatten(1), pair.lora_B.flatten(1))
        layers.append(
            LayerInspection(
                name=name,
                in_features=factors[0].shape[1],
                out_features=pair.lora_B.shape[0],
                rank=pair.lora_A.shape[0],
                alpha=checkpoint.config.alpha_for(name),
                scaling=scaling,
                parameters=sum(factor.numel() for factor in factors),
                nbytes=sum(factor.nbytes for factor in factors),
                dtype="/".join(sorted({str(factor.dtype).split(".")[1] for factor in factors})),
                spectrum=delta_spectrum(*factors, scaling),
                balance=factor_balance(points[name]),
                rounding=rounding_errors(points[name]),
                base=shares.get(name),
            )
        )
    return AdapterInspection(
        path=Path(checkpoint.path),
        sha256=checkpoint.sha256,
        base_model=checkpoint.config.base_model_name_or_path,
        layers=tuple(layers),
        comparisons=comparisons,
        findings=findings,
        notes=_notes(checkpoint.raw_config),
    )


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if config.get("use_dora"):
        notes.append("DoRA scales each row of W + ΔW to a trained length, which is not in ΔW.")
    if saved := config.get("modules_to_save"):
        notes.append(f"Trained whole, and not in ΔW: {', '.join(map(str, saved))}.")
    if config.get("lora_bias") or config.get("bias") not in (None, "none"):
        notes.append("Biases were trained too, and are not in ΔW.")
    return tuple(notes)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _finite(v) if isinstance(v, float) else v for k, v in values.items()}
