"""Which modules can carry a LoRA adapter."""

from __future__ import annotations

from torch import nn

from gauge_ext.adapters.dtypes import FLOAT_DTYPES


def unsupported_reason(module: nn.Module) -> str | None:
    """Say why no adapter can be put on ``module``, or return None where it can.

    An adapter works by exchanging ``forward``, so the module must be one whose forward is called
    and is that of ``nn.Linear``, on a plain floating-point weight.
    """
    kind = type(module)
    if kind is not nn.Linear:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not isinstance(module, nn.Linear):
            return f"it is a {name}, and only nn.Linear is supported"
        if "lora_A" in module._parameters:
            return "it has an adapter already"
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads the weight of its out_proj and never calls it"
        return f"{name} is a subclass of nn.Linear, which may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced on the object (by accelerate's hooks, perhaps)"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a plain parameter (reparametrised or pruned)"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {weight.dtype}, and only floating-point weights are supported"
    return None
