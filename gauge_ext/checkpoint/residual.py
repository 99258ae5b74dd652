"""What a merge rounds away, as an adapter of small rank for the merged model."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint.assembly import assemble
from gauge_ext.checkpoint.describing import plain_paths
from gauge_ext.checkpoint.format import LoRAPair
from gauge_ext.checkpoint.read import AdapterCheckpoint
from gauge_ext.checkpoint.write import write_adapter
from gauge_ext.errors import AdapterStateError
from gauge_ext.geometry.low_rank import RowBlocks, nearest_low_rank
from gauge_ext.models.adapted import attached_modules, attachment, unwrap
from gauge_ext.models.fidelity import LayerFidelity, MergeFidelity, linear_layers
from gauge_ext.models.merge import merge, naming


@dataclass(frozen=True)
class MergeResidual:
    """What a merge lost, and the adapter that gives some of it back.

    Attributes:
        adapter: For the merged model, with scaling 1; None where the merge was exact.
        without: What the merged weights have of the update.
        restored: What they have of it with the adapter beside them.
    """

    adapter: AdapterCheckpoint | None
    without: MergeFidelity
    restored: MergeFidelity

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the adapter in PEFT's format; see :func:`~gauge_ext.checkpoint.write_adapter`.

        Raises:
            AdapterStateError: The merge was exact, so there is none.
        """
        if self.adapter is None:
            raise AdapterStateError("the merge lost nothing, so there is no residual to save.")
        return write_adapter(self.adapter.config, self.adapter.tensors, path)

    def table(self) -> Table:
        """Return the errors of the update as a table for a ``rich`` console, the worst first."""
        table = Table(title="Error of the update after the merge", title_justify="left")
        table.add_column("layer")
        for column in ("rank", "merged alone", "with the residual"):
            table.add_column(column, justify="right")
        tensors = {} if self.adapter is None else self.adapter.tensors
        worst = sorted(self.without.layers.items(), key=lambda item: -item[1].error)
        for name, layer in [*worst, ("total", self.without.total)]:
            if name == "total":
                table.add_section()
            other = self.restored.total if name == "total" else self.restored.layers[name]
            rank = str(tensors[name].rank) if name in tensors else ""
            table.add_row(name, rank, f"{layer.error:.2%}", f"{other.error:.2%}")
        return table


@torch.no_grad()
def merge_with_residual(
    model: nn.Module, rank: int, *, keep_base: bool = True, seed: int = 0
) -> MergeResidual:
    r"""Merge as :func:`~gauge_ext.merge` does, and return what it rounded away as an adapter.

    Of the loss :math:`E = W + D - \mathrm{round}(W + D)` of each layer it is the nearest matrix of
    rank r (:func:`~gauge_ext.geometry.low_rank.nearest_low_rank`, in float64, one layer after the
    other). Where the update is small beside the weight's last bit, E is nearly D, and little rank
    gives most of it back; where it is large, E is noise, and no small rank does. The report says
    which it is.

    Args:
        model: A model with adapters on ``nn.Linear`` layers, not merged.
        rank: r, the largest rank of a layer's residual.
        keep_base: Keep the old weights for :func:`~gauge_ext.unmerge`, as in ``merge``.
        seed: Of the sketch.

    Returns:
        The adapter, for a model with the merged weights, and both errors.

    Raises:
        ConfigError: ``rank`` is not a number of at least 1.
        AdapterStateError: There are no adapters, or they are merged.
        TargetError: A layer is of another kind, a DoRA, or its branch has a bias.
        NonFiniteError: A weight, a factor or a sum holds NaN or infinity. Nothing is changed then.
    """
    tensors: dict[str, LoRAPair] = {}
    without: dict[str, LayerFidelity] = {}
    restored: dict[str, LayerFidelity] = {}
    for path, layer in linear_layers(model).items():
        with naming(path, layer):
            merged = layer.merged_weight()
        loss = _Loss(layer.weight.detach(), merged, *layer.summed_factors())
        found = nearest_low_rank(loss.blocks, rank, seed=seed)
        pair = None
        if found is not None:
            wide = torch.float64 if merged.dtype == torch.float64 else torch.float32
            point = found.point.to(wide)
            pair = tensors[path] = LoRAPair(point.A, point.B)
        without[path], restored[path] = loss.fidelity(None), loss.fidelity(pair)
    adapter = assemble(tensors, like=_like(model), modules=plain_paths(model)) if tensors else None
    merge(model, keep_base=keep_base)
    return MergeResidual(adapter, MergeFidelity(without), MergeFidelity(restored))


def _like(model: nn.Module) -> LoRAConfig:
    """Return a config with the notes of the model's own: its task and its base."""
    for module in attached_modules(unwrap(model)):
        own = attachment(module).config
        return LoRAConfig(
            task_type=own.task_type, base_model_name_or_path=own.base_model_name_or_path
        )
    return LoRAConfig()


@dataclass(frozen=True, eq=False)
class _Loss:
    """One layer: W, round(W + D), and D = s B A, in blocks of rows."""

    weight: Tensor
    merged: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def delta(self, start: int, stop: int) -> Tensor:
        """Rows of D, in float64."""
        return self.scaling * (self.lora_B[start:stop].double() @ self.lora_A.double())

    def kept(self, start: int, stop: int) -> Tensor:
        """Rows of round(W + D) - W, in float64."""
        return self.merged[start:stop].double() - self.weight[start:stop].double()

    @property
    def blocks(self) -> RowBlocks:
        """E = D - K."""
        shape = self.weight.shape[0], self.weight.shape[1]
        return RowBlocks(
            shape, lambda start, stop: self.delta(start, stop) - self.kept(start, stop)
        )

    def fidelity(self, pair: LoRAPair | None) -> LayerFidelity:
        """What the merged weight has of D, with a pair's product beside it or without."""
        squares = [0.0, 0.0, 0.0]
        for start, lost in self.blocks.blocks():
            stop = start + lost.shape[0]
            delta, kept = self.delta(start, stop), self.kept(start, stop)
            if pair is not None:
                kept = kept + pair.lora_B[start:stop].double() @ pair.lora_A.double()
            for i, part in enumerate((delta, kept, delta - kept)):
                squares[i] += float(part.square().sum())
        return LayerFidelity(self.weight.dtype, *map(math.sqrt, squares))
