"""A saved adapter, inspected layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gauge_ext.checkpoint import read_adapter
from gauge_ext.inspect.spectrum import Spectrum, delta_spectrum


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

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; an infinite condition number becomes None."""
        condition = self.spectrum.condition
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
            "condition": condition if math.isfinite(condition) else None,
            "singular_values": list(self.spectrum.singular_values),
        }


@dataclass(frozen=True)
class AdapterInspection:
    """A saved adapter: its layers in the file's order, and what they add up to.

    Attributes:
        path: Where it was read from.
        sha256: The adapter's digest, as exported models carry it.
        base_model: ``base_model_name_or_path`` of its config, if any.
        layers: One entry an adapted layer.
    """

    path: Path
    sha256: str
    base_model: str | None
    layers: tuple[LayerInspection, ...]

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
        }


def inspect_adapter(
    path: str | Path, *, progress: Callable[[str, float], None] | None = None
) -> AdapterInspection:
    """Read a saved adapter and describe what it does to each layer.

    The base model is not needed, and no delta_weight is formed: see
    :func:`gauge_ext.inspect.spectrum.delta_spectrum`.

    Args:
        path: The adapter's folder, in the PEFT format.
        progress: Called as ``progress(what is being done, fraction done)``.

    Raises:
        AdapterFormatError: The folder holds no adapter that can be read.
        NonFiniteError: A factor holds NaN or infinity.
    """
    checkpoint = read_adapter(path)
    layers = []
    for done, (name, pair) in enumerate(checkpoint.tensors.items()):
        if progress is not None:
            progress(f"inspecting {name}", done / len(checkpoint.tensors))
        scaling = checkpoint.config.scaling_for(name)
        factors = (pair.lora_A, pair.lora_B)
        layers.append(
            LayerInspection(
                name=name,
                in_features=pair.lora_A.shape[1],
                out_features=pair.lora_B.shape[0],
                rank=pair.lora_A.shape[0],
                alpha=checkpoint.config.alpha_for(name),
                scaling=scaling,
                parameters=sum(factor.numel() for factor in factors),
                nbytes=sum(factor.nbytes for factor in factors),
                dtype="/".join(sorted({str(factor.dtype).split(".")[1] for factor in factors})),
                spectrum=delta_spectrum(*factors, scaling),
            )
        )
    return AdapterInspection(
        path=Path(checkpoint.path),
        sha256=checkpoint.sha256,
        base_model=checkpoint.config.base_model_name_or_path,
        layers=tuple(layers),
    )
