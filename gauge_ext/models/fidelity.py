"""What a merge keeps of an adapter once the sum is rounded to the weight's dtype.

A bfloat16 weight has 8 bits. An update of half a per cent of the weight is about one unit in the
last place: rounding to nearest keeps some entries and drops others. Rounding by chance keeps all of
it in expectation, at the price of noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn

from gauge_ext import ops
from gauge_ext.adapters import LoRALinear
from gauge_ext.adapters.merging import surely_finite
from gauge_ext.adapters.ownership import is_held_alone
from gauge_ext.errors import AdapterStateError, NonFiniteError, TargetError
from gauge_ext.models.adapted import lora_layers, unwrap

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class LayerFidelity:
    """One layer. D is the update, K = round(W + D) - W what the merged weight has of it.

    Attributes:
        dtype: Of the weight.
        delta: Frobenius norm of D.
        kept: Frobenius norm of K.
        lost: Frobenius norm of D - K.
    """

    dtype: torch.dtype
    delta: float
    kept: float
    lost: float

    @property
    def error(self) -> float:
        """``|D - K| / |D|``: 0 where nothing is lost; 0 for an update of zero."""
        return self.lost / self.delta if self.delta else 0.0

    @property
    def survival(self) -> float:
        """``<K, D> / <D, D>``: the share of the update that survives; 1 for an update of zero."""
        if not self.delta:
            return 1.0
        inner = (self.kept**2 + self.delta**2 - self.lost**2) / 2
        return inner / self.delta**2


@dataclass(frozen=True)
class MergeFidelity:
    """What :func:`merge_fidelity` found.

    Attributes:
        layers: By the path of the layer.
    """

    layers: Mapping[str, LayerFidelity]

    @property
    def total(self) -> LayerFidelity:
        """All layers as one long vector."""
        every = self.layers.values()
        norms = (
            math.hypot(*(getattr(layer, name) for layer in every))
            for name in ("delta", "kept", "lost")
        )
        return LayerFidelity(next(iter(every)).dtype, *norms)

    def table(self) -> Table:
        """Return the figures as a table for a ``rich`` console, the worst layer first."""
        table = Table(title="What a merge keeps of the update", title_justify="left")
        table.add_column("layer")
        for column in ("dtype", "|update|", "survives", "error"):
            table.add_column(column, justify="right")
        worst = sorted(self.layers.items(), key=lambda item: -item[1].error)
        for name, layer in [*worst, ("total", self.total)]:
            if name == "total":
                table.add_section()
            dtype = str(layer.dtype).removeprefix("torch.")
            shown = f"{layer.delta:.3g}", f"{layer.survival:.2%}", f"{layer.error:.2%}"
            table.add_row(name, dtype, *shown)
        return table


def merge_fidelity(model: nn.Module) -> MergeFidelity:
    """Measure what :func:`~gauge_ext.merge` would keep of each layer's update; nothing is changed.

    One pass over each weight, with one weight's memory beside the model.

    Args:
        model: A model with adapters on ``nn.Linear`` layers, not merged.

    Raises:
        AdapterStateError: There are no adapters, or they are merged.
        TargetError: A layer is of another kind, a DoRA, or its branch has a bias.
    """
    found = {}
    for path, layer in linear_layers(model).items():
        weight = layer.weight.detach()
        a, b, scaling = layer.summed_factors()
        (sums,) = ops.merge_into(torch.empty_like(weight), weight, a, b, scaling, fidelity=True)
        found[path] = LayerFidelity(weight.dtype, sums.delta, sums.kept, sums.lost)
    return MergeFidelity(found)


def merge_stochastic(
    model: ModelT, seed: Tensor | None = None, *, keep_base: bool = True
) -> ModelT:
    """Merge as :func:`~gauge_ext.merge` does, rounding each entry up or down by chance.

    The expectation of the merged weight is then the exact sum (Gupta et al., arXiv:1502.02551,
    section 3), however small the update is beside the weight. :func:`~gauge_ext.unmerge` undoes it.

    Args:
        model: A model with adapters on ``nn.Linear`` layers of bfloat16 or float16, not merged.
        seed: ``()`` int64; None draws one from torch's generator.
        keep_base: Keep the old weights for ``unmerge``, at the price of their memory. Without them
            the memory of one layer is enough: all layers are checked first, then one is merged
            after the other, in place where nobody else holds the weight.

    Returns:
        ``model``.

    Raises:
        AdapterStateError: There are no adapters, or they are merged.
        TargetError: A layer is of another kind or dtype, a DoRA, or its branch has a bias.
        NonFiniteError: A sum holds NaN or infinity; nothing is changed.
    """
    layers = linear_layers(model)
    for path, layer in layers.items():
        if layer.weight.dtype not in (torch.bfloat16, torch.float16):
            raise TargetError(
                f"the weight of {path!r} is {layer.weight.dtype}, and rounding by chance is for "
                "bfloat16 and float16.",
                hint="Use gauge_ext.merge(), which loses nothing to speak of there.",
            )
    seed = ops.draw_seed() if seed is None else seed
    # As rows of one tall matrix, so that no two of all weights share the numbers drawn for them.
    firsts = itertools.accumulate((len(layer.weight) for layer in layers.values()), initial=0)
    first = dict(zip(layers, firsts, strict=False))
    outs = {}
    for path, layer in layers.items():
        if not keep_base and surely_finite(layer.weight, *layer.summed_factors()):
            continue
        out = torch.empty_like(layer.weight)
        if not _write(layer, out, seed, first[path]):
            raise NonFiniteError(
                f"{path}: the weight plus its update holds NaN or infinity.",
                hint="Nothing was merged.",
            )
        if keep_base:
            outs[path] = out
    for path, layer in layers.items():
        if keep_base:
            layer.adopt_merged({"weight": outs.pop(path)}, keep_base=True)
        elif is_held_alone(layer, "weight"):
            _write(layer, layer.weight, seed, first[path])
            layer.adopt_in_place()
        else:
            out = torch.empty_like(layer.weight)
            _write(layer, out, seed, first[path])
            layer.adopt_merged({"weight": out}, keep_base=False)
    return model


def _write(layer: LoRALinear, out: Tensor, seed: Tensor, first_row: int) -> bool:
    """Write a layer's sum, rounded by chance, into ``out``; return whether it is finite."""
    weight = layer.weight.detach()
    out = weight if out is layer.weight else out.detach()
    (sums,) = ops.merge_into(out, weight, *layer.summed_factors(), seed=seed, first_row=first_row)
    return sums.finite


def linear_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted ``nn.Linear`` layers by path, where there are no others.

    Raises:
        AdapterStateError: There are none, or some are merged.
        TargetError: A layer is of another kind, a DoRA, or its branch has a bias.
    """
    found = {}
    for path, layer in lora_layers(unwrap(model)).items():
        if not isinstance(layer, LoRALinear):
            raise TargetError(
                f"{path} is a {type(layer).__name__}, and this is for nn.Linear layers.",
                hint="Use gauge_ext.merge(), which takes any layer.",
            )
        if any(s.has_magnitude or s.branch_bias is not None for s, _ in layer.present()):
            raise TargetError(
                f"{path} has a magnitude (DoRA) or a bias of its branch, and this is for adapters "
                "of lora_A and lora_B alone.",
                hint="Use gauge_ext.merge(), which takes any adapter.",
            )
        if layer.merged:
            raise AdapterStateError(
                f"{path!r} is merged already.", hint="Call gauge_ext.unmerge() first."
            )
        found[path] = layer
    if not found:
        raise AdapterStateError(
            "the model has no adapters.",
            hint="Call gauge_ext.attach() or gauge_ext.load_adapter() first.",
        )
    return found
