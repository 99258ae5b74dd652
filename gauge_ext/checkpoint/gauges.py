"""Gauges and fingerprints of whole adapters: on a model, in memory, or in a folder."""

from __future__ import annotations

import dataclasses
import os
from typing import overload

import torch
from torch import Tensor, nn

from gauge_ext.checkpoint.digest import adapter_digest
from gauge_ext.checkpoint.format import LoRAPair, turned
from gauge_ext.checkpoint.on_model import adapter_parts
from gauge_ext.checkpoint.read import AdapterCheckpoint, read_adapter
from gauge_ext.checkpoint.tied import tied_pairs
from gauge_ext.geometry import LoRAPoint
from gauge_ext.geometry.equal_energy import quantisation_factor
from gauge_ext.geometry.fingerprint import Fingerprint, fingerprint_points
from gauge_ext.geometry.gauge import GaugeName
from gauge_ext.models.regauge import regauge_factors, regauge_model, require_one_matrix

Saved = AdapterCheckpoint | str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class LayerRegauging:
    """What a change of gauge did to one layer.

    Attributes:
        name: The module's path.
        rank: r.
        change: The distance of the updates before and after, over the norm of the update: the
            rounding of the stored factors; 0 for an update of zeros.
        factor_before: See :func:`gauge_ext.geometry.equal_energy.quantisation_factor`.
        factor_after: The same in the new gauge.
    """

    name: str
    rank: int
    change: float
    factor_before: float
    factor_after: float


@overload
def regauge(model_or_adapter: nn.Module, gauge: GaugeName) -> dict[str, Tensor]: ...
@overload
def regauge(model_or_adapter: Saved, gauge: GaugeName) -> AdapterCheckpoint: ...


def regauge(
    model_or_adapter: nn.Module | Saved, gauge: GaugeName
) -> dict[str, Tensor] | AdapterCheckpoint:
    """Bring an adapter to a canonical gauge; what it computes stays the same, to rounding.

    Args:
        model_or_adapter: A model with adapters, which is changed in place; or a saved adapter, as
            :func:`~gauge_ext.checkpoint.read_adapter` returned it or as the folder to read, which
            stays as it is.
        gauge: ``svd``, ``balanced``, ``equal_energy``, ``left`` or ``pivot``, see
            :func:`gauge_ext.geometry.gauge.to_gauge`.

    Returns:
        For a model: the G of each layer, see :func:`gauge_ext.models.regauge.regauge_model`, where
        the exceptions are named too. For a saved adapter: the new one in memory, with the config
        and the scalings of the old; :func:`~gauge_ext.checkpoint.write_adapter` saves it. Layers
        whose update is zero are left as they are.
    """
    if isinstance(model_or_adapter, nn.Module):
        return regauge_model(model_or_adapter, gauge)
    checkpoint = _checkpoint(model_or_adapter)
    config = checkpoint.config
    tensors = {}
    for name, pair in checkpoint.tensors.items():
        require_one_matrix(name, pair.kind, pair.lora_A, pair.lora_B)
        scaling = config.scaling_for(name)
        b, a, _, _ = regauge_factors(name, pair.lora_B, pair.lora_A, scaling, gauge)
        tensors[name] = dataclasses.replace(pair, lora_A=a, lora_B=b)
    for head, table in tied_pairs(config, checkpoint.tensors).items():
        tensors[head] = turned(tensors[table])
    digest = adapter_digest(config, tensors, checkpoint.whole)
    return dataclasses.replace(checkpoint, tensors=tensors, sha256=digest)


def regauging_report(
    before: AdapterCheckpoint, after: AdapterCheckpoint
) -> tuple[LayerRegauging, ...]:
    """Compare an adapter with what :func:`regauge` made of it, layer by layer.

    No update is formed: the distance is the norm of [B', -B] [A'; A].
    """
    layers = []
    old, new = adapter_points(before), adapter_points(after)
    for name, x in old.items():
        y = new[name]
        norm = float(x.singular_values().norm())
        difference = LoRAPoint(torch.cat((y.B, -x.B), -1), torch.cat((y.A, x.A), -2))
        distance = float(difference.singular_values().norm())
        layers.append(
            LayerRegauging(
                name=name,
                rank=x.rank,
                change=distance / norm if norm > 0.0 else 0.0,
                factor_before=float(quantisation_factor(x)),
                factor_after=float(quantisation_factor(y)),
            )
        )
    return tuple(layers)


def fingerprint(adapter: nn.Module | Saved, *, size: int = 16) -> Fingerprint:
    """Sketch an adapter so that copies are found in whatever gauge, dtype or scaling they are kept.

    ``fingerprint(x).key`` is a text to look up, ``fingerprint(x).distance(fingerprint(y))`` and
    ``.cosine`` compare what two adapters do. (``AdapterCheckpoint.sha256`` is about bytes.)

    Args:
        adapter: A model with adapters, a saved adapter, or the folder of one.
        size: See :func:`gauge_ext.geometry.fingerprint.fingerprint_points`, as for what is raised.
    """
    return fingerprint_points(adapter_points(adapter), size=size)


def adapter_points(adapter: nn.Module | Saved) -> dict[str, LoRAPoint]:
    """Return the effective factors ``(scaling * lora_B, lora_A)`` by module, in float64.

    Args:
        adapter: A model with adapters, of which the only one or the only active one is taken, a
            saved adapter, or the folder of one.

    Raises:
        AdapterStateError: The model has no adapters, or several and not one of them is active.
        AdapterFormatError: The folder holds no adapter that can be read.
    """
    if isinstance(adapter, nn.Module):
        _, parts = adapter_parts(adapter, None, "looked at")
        return {name: _point(name, part.pair, part.scaling) for name, part in parts.items()}
    checkpoint = _checkpoint(adapter)
    return {
        name: _point(name, pair, checkpoint.config.scaling_for(name))
        for name, pair in checkpoint.tensors.items()
    }


def _point(name: str, pair: LoRAPair, scaling: float) -> LoRAPoint:
    require_one_matrix(name, pair.kind, pair.lora_A, pair.lora_B)
    b, a = pair.lora_B.detach().flatten(1).double(), pair.lora_A.detach().flatten(1).double()
    return LoRAPoint(b * scaling, a)


def _checkpoint(adapter: Saved) -> AdapterCheckpoint:
    return adapter if isinstance(adapter, AdapterCheckpoint) else read_adapter(adapter)
