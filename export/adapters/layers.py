"""Copies of a model whose layers are taught to take the factors of an adapter, or have none.

Where the update is added was chosen by trial: before the bias, onnxruntime makes the same fused
kernels of the rest as without it, so that a base without an adapter is the plain graph's bit for
bit, at every optimization level; only where torch writes one Gemm (two axes, a bias) does it have
to come after.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext.adapters import LoRAConfig, WrappedAdapter
from gauge_ext.errors import AdapterStateError, ConfigError, ExportError, TargetError
from gauge_ext.export.adapters.table import AdapterInput
from gauge_ext.models import (
    adapter_names,
    attached_modules,
    detach,
    find_targets,
    lora_layers,
)
from gauge_ext.models.adapted import every_parameter, unwrap
from gauge_ext.models.roster import require_one

# Of the factors that are traced; it leaves no trace in the graph.
_RANK = 2
_COMPUTE = {torch.float32: "float32", torch.float16: "float16"}
_MERGE_HINT = "Export with mode='merged', or with adapters on other layers only."


class _LinearWithInputs(nn.Linear):
    """``x W^T + (x A) B + b``, with A ``(in, r)`` and B ``(r, out)``."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        update = (input @ self.lora_A) @ self.lora_B
        if self.bias is None or input.dim() == 2:
            return F.linear(input, self.weight, self.bias) + update
        return F.linear(input, self.weight) + update + self.bias


class _Conv1DMixin:
    """The same for transformers' Conv1D, whose weight is ``(in, out)`` and whose sum is a Gemm."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        # That of the Conv1D, which comes behind this class in the order of the bases.
        plain: Tensor = super().forward(input)  # type: ignore[misc]
        return plain + (input @ self.lora_A) @ self.lora_B


@dataclass(frozen=True)
class Opened:
    """A copy of a model whose layers are ready for :mod:`graph` to open.

    Attributes:
        base: The bare copy, without adapters.
        model: The copy to trace; it shares the parameters of ``base``.
        inputs: Path of the layer -> what its inputs will be.
        compute: The dtype of the layers.
    """

    base: nn.Module
    model: nn.Module
    inputs: dict[str, AdapterInput]
    compute: str


def open_layers(model: nn.Module, targets: str | Sequence[str] | None) -> Opened:
    """Copies a model without its adapters and teaches its layers to take factors.

    Args:
        model: A model with adapters or without.
        targets: Which layers, as ``target_modules`` of :class:`~gauge_ext.LoRAConfig`; None for
            those that have an adapter.

    Raises:
        ConfigError: there are neither targets nor adapters.
        AdapterStateError: the adapters are merged.
        TargetError: a layer is none that can take factors as inputs, or has an adapter and is no
            target.
        ExportError: an adapter is no plain pair of factors, or the dtype is none that this is
            for.
    """
    source = unwrap(model)
    layers = lora_layers(source)
    _refuse_other_adapters(source)
    base = bare_copy(source)
    if targets is None:
        if not layers:
            raise ConfigError(
                "mode='adapters' needs to know which layers take an adapter: the model has none, "
                "and adapter_targets is not given.",
                hint="Load an adapter first, or give adapter_targets, such as ['query', 'value'] "
                "or 'all-linear'.",
            )
        chosen = list(layers)
    else:
        chosen = list(find_targets(base, LoRAConfig(target_modules=targets)).layers)
    if left_out := [name for name in layers if name not in chosen]:
        raise TargetError(
            f"adapter_targets leaves out {len(left_out)} layers that have an adapter, the first "
            f"of them {left_out[0]!r}.",
            hint="Name them too, or detach the adapter.",
        )
    opened = _twin(base)
    inputs = {}
    for index, name in enumerate(chosen):
        layer = opened.get_submodule(name)
        sizes = _teach(name, layer)
        inputs[name] = AdapterInput(name, *sizes, rank=f"r{index}")
    dtypes = {str(base.get_submodule(name).weight.dtype) for name in chosen}
    compute = base.get_submodule(chosen[0]).weight.dtype
    if len(dtypes) > 1 or compute not in _COMPUTE:
        raise ExportError(
            f"mode='adapters' takes layers in float32 or float16, got {', '.join(sorted(dtypes))}.",
            hint="Convert a copy of the model first: model.float().",
        )
    assert isinstance(compute, torch.dtype)
    return Opened(base, opened, inputs, _COMPUTE[compute])


def _teach(name: str, layer: nn.Module) -> tuple[int, int]:
    """Exchanges a bare layer's class in place; returns its in and out sizes."""
    kind = type(layer)
    if kind is nn.Linear:
        layer.__class__ = _LinearWithInputs
        weight: Any = layer.weight
        outer, inner = weight.shape
    elif kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        layer.__class__ = type("_Conv1DWithInputs", (_Conv1DMixin, kind), {})
        weight = layer.weight
        inner, outer = weight.shape
    else:
        raise TargetError(
            f"mode='adapters' takes adapters on nn.Linear and transformers' Conv1D, and {name!r} "
            f"is {kind.__module__}.{kind.__qualname__}.",
            hint=_MERGE_HINT,
        )
    layer.lora_A = nn.Parameter(weight.new_zeros(inner, _RANK))
    layer.lora_B = nn.Parameter(weight.new_zeros(_RANK, outer))
    return int(inner), int(outer)


def _refuse_other_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, WrappedAdapter):
            raise ExportError(
                f"mode='adapters' takes plain LoRA adapters, and {name or 'the model'!r} is a "
                f"{type(module).__name__}.",
                hint=_MERGE_HINT,
            )
    if adapter_names(model):
        require_one(model, "mode='adapters'")
    for name, layer in lora_layers(model).items():
        if layer.merged:
            raise AdapterStateError(
                f"the adapter of {name!r} is merged, and mode='adapters' needs the base apart.",
                hint="Call gauge_ext.unmerge() first.",
            )
        others = {
            key
            for key in layer.state_dict()
            if key.startswith("lora_") and key not in {"lora_A", "lora_B"}
        }
        if others:
            raise ExportError(
                f"the adapter of {name!r} has {', '.join(sorted(others))} beside its two factors, "
                "so it is no sum of the base and a low-rank update that inputs could carry.",
                hint=_MERGE_HINT,
            )


def bare_copy(model: nn.Module) -> nn.Module:
    """A copy without adapters, in eval mode, that shares the base's storage."""
    bare = _twin(model)
    for owner in attached_modules(bare):
        detach(owner)
    return bare.eval()


def _twin(model: nn.Module) -> nn.Module:
    """A copy whose parameters are objects of their own on the same storage."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        for p in every_parameter(model)
        if type(p) is nn.Parameter
    }
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise AdapterStateError(
            f"this {type(model).__name__} cannot be copied: {error}",
            hint="It holds an object that copy.deepcopy refuses; take that off the model first.",
        ) from error


def with_factors(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy of an adapted model with other factors in place of its own.

    Args:
        model: A model with adapters.
        factors: Path of a layer -> lora_A ``(r, in)`` and *scaling times* lora_B ``(out, r)``;
            layers that are not among them keep theirs.
    """
    twin = _twin(unwrap(model)).eval()
    layers = lora_layers(twin)
    for name, (a, b) in factors.items():
        layer = layers[name]
        layer.lora_A = nn.Parameter(a.to(layer.lora_A), requires_grad=False)
        layer.lora_B = nn.Parameter(b.to(layer.lora_B) / layer.scaling, requires_grad=False)
    return twin
