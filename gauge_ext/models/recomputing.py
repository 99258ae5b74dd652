"""Trading a little time for memory: inputs of adapted layers computed again for backward."""

from __future__ import annotations

from torch import nn

from gauge_ext.adapters.lora import LoRALinear
from gauge_ext.adapters.quantized import LoRAQuantized
from gauge_ext.adapters.transposed import LoRATransposed
from gauge_ext.errors import AdapterStateError
from gauge_ext.models.adapted import lora_layers


def recompute_inputs(model: nn.Module, enable: bool = True) -> tuple[str, ...]:
    r"""Compute the inputs of adapted linear layers again for backward, instead of keeping them.

    An adapter needs its layer's input x for the gradient of A,
    :math:`\partial L / \partial A = s\,(\partial L / \partial y\, B)^T (x \circ M)`; the frozen
    layer by itself keeps nothing. Where x came of a norm, an activation or a product of elements
    (LayerNorm, RMSNorm written out as in transformers, GELU, SiLU, a gate, also through a view or a
    cast), autograd keeps what x was computed from anyway, and x is made from it again, by a pass or
    two over x and no product of matrices; the seed of a dropout mask is kept as ever. That is most
    of what adapters keep in a transformer. It is less than activation checkpointing saves, which
    runs whole layers twice. Gradients are those of a kept x up to rounding.

    An x that came of something else is kept as usual: attention's output, which attention itself
    keeps, the model's own input, a sum, a LayerNorm with its weight in half precision on the CPU,
    which autograd keeps too little of. So is every x while others decide what is kept: under
    activation checkpointing, ``save_on_cpu`` and other ``saved_tensors_hooks``, in compiled code,
    where torch decides itself what to compute again, and in ``torch.func``.

    Copies and pickles of the model stay so; :func:`gauge_ext.detach` ends it.

    Args:
        model: A model with adapters.
        enable: False: inputs are kept again.

    Returns:
        The paths of the layers that this was said to: all adapted linear ones, grouped or not,
        quantized or not.

    Raises:
        AdapterStateError: No linear layer of the model has an adapter.
    """
    kinds = LoRALinear | LoRATransposed | LoRAQuantized
    layers = {path: x for path, x in lora_layers(model).items() if isinstance(x, kinds)}
    if not layers:
        raise AdapterStateError(
            "no linear layer of the model has an adapter, so no input is kept for one.",
            hint="Call gauge_ext.attach() or gauge_ext.load_adapter() first.",
        )
    for layer in layers.values():
        layer.recomputes_input = enable
    return tuple(layers)
