"""Which variant stands in for which class of layers: one line a variant."""

from __future__ import annotations

from torch import nn

from gauge_ext.adapters.attention import LoRAMultiheadAttention, LoRAOutProjection
from gauge_ext.adapters.conv import LoRAConv
from gauge_ext.adapters.embedding import LoRAEmbedding
from gauge_ext.adapters.layer import AdaptedLayer
from gauge_ext.adapters.lora import LoRALinear
from gauge_ext.adapters.many import DEFAULT
from gauge_ext.adapters.quantized import LoRAQuantized
from gauge_ext.adapters.spec import AdapterSpec
from gauge_ext.adapters.transposed import LoRATransposed
from gauge_ext.errors import TargetError

# The first that matches: a quantized weight may lie in an nn.Linear.
VARIANTS: tuple[type[AdaptedLayer], ...] = (
    LoRAQuantized,
    LoRALinear,
    LoRATransposed,
    LoRAEmbedding,
    LoRAConv,
    LoRAMultiheadAttention,
    LoRAOutProjection,
)


def variant_for(module: nn.Module) -> type[AdaptedLayer] | None:
    """Return the variant that stands in for ``module``, or can, if there is one."""
    if isinstance(module, AdaptedLayer):
        return next((variant for variant in VARIANTS if isinstance(module, variant)), None)
    return next((variant for variant in VARIANTS if variant.matches(module)), None)


def adapt(module: nn.Module, spec: AdapterSpec, name: str = DEFAULT) -> AdaptedLayer:
    """Turn ``module`` itself into an adapted layer of its kind and return it.

    Args:
        module: A layer of one of the kinds above.
        spec: Rank, scaling and the like.
        name: What the adapter is called.

    Raises:
        TargetError: It cannot carry the adapter; the message says why.
    """
    variant = variant_for(module)
    if variant is None or isinstance(module, AdaptedLayer):
        raise TargetError(f"an adapter cannot be put on this layer: {unsupported_reason(module)}.")
    return variant.adapt(module, spec, name)


def unsupported_reason(module: nn.Module) -> str | None:
    """Say why no adapter can be put on ``module``, or return None where it can.

    An adapter works by exchanging ``forward``, so the module must be one whose forward is called
    and is that of a class in :data:`VARIANTS`, on a floating-point or a quantized weight.
    """
    if isinstance(module, AdaptedLayer):
        return "it has an adapter already"
    if LoRAQuantized.matches(module):
        return LoRAQuantized.reason_against(module)
    if isinstance(module, nn.Linear):
        return LoRALinear.reason_against(module)
    if (variant := variant_for(module)) is not None:
        return variant.reason_against(module)
    kind = type(module)
    supported = [f"nn.{base.__name__}" for v in VARIANTS[:-1] for base in v.bases]
    return (
        f"it is a {kind.__module__}.{kind.__qualname__}, and supported are {', '.join(supported)} "
        "transformers' Conv1D, and modules with in_features, out_features and dequantize()"
    )
