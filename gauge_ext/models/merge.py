"""Adapter and base as one weight, and back: all layers of a model, or none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from gauge_ext.adapters import AdaptedLayer, WrappedAdapter
from gauge_ext.adapters.whole import whole_modules
from gauge_ext.errors import AdapterStateError, NonFiniteError
from gauge_ext.models.adapted import (
    attached_modules,
    attachment,
    every_parameter,
    lora_layers,
    unwrap,
)
from gauge_ext.models.attach import forget

ModelT = TypeVar("ModelT", bound=nn.Module)

_NOTHING = "Nothing was merged."


def merge(model: ModelT, *, safe: bool = True, keep_base: bool = True) -> ModelT:
    """Put every adapter into its layer's weight: ``W + scaling * lora_B @ lora_A``, rounded once.

    Each weight becomes a new Parameter; the old ones are never written to, so tied embeddings and
    other models that share them stay as they are. On a failure nothing is changed.

    Without the old weights the memory of one layer is enough: all layers are checked first, then
    one is merged after the other, and a weight that nobody else holds is written to in place. An
    interruption from outside (a signal, no memory left) leaves the layers before it merged and
    those after it as they were; :func:`merge_and_unload` goes on from there.

    Args:
        model: A model with adapters.
        safe: Refuse NaN and infinity.
        keep_base: Keep the old weights for :func:`unmerge`, at the price of their memory.

    Returns:
        ``model``.

    Raises:
        NonFiniteError: A weight, a factor or a sum holds NaN or infinity; the message names it.
        AdapterStateError: There are no adapters, or some are merged already.
    """
    layers = _adapted(model)
    if done := [name for name, layer in layers.items() if layer.merged]:
        raise AdapterStateError(
            f"{len(done)} of {len(layers)} adapted layers are merged already, the first of them "
            f"{done[0]!r}.",
            hint="Call gauge_ext.unmerge() first.",
        )
    _merge_layers(layers, safe=safe, keep_base=keep_base)
    return model


def unmerge(model: ModelT) -> ModelT:
    """Put the base weights back: the very Parameters that :func:`merge` took out, bit for bit.

    Returns:
        ``model``.

    Raises:
        AdapterStateError: No adapter is merged, or a base was not kept; nothing is changed then.
    """
    merged = {name: layer for name, layer in _adapted(model).items() if layer.merged}
    if not merged:
        raise AdapterStateError("the model is not merged.", hint="Call gauge_ext.merge() first.")
    if lost := [name for name, layer in merged.items() if not layer.can_unmerge]:
        raise AdapterStateError(
            f"the base weight of {lost[0]!r} was not kept (keep_base=False), so the model cannot "
            "be unmerged.",
            hint="Load the base again.",
        )
    for layer in merged.values():
        layer.unmerge()
    return model


def merge_and_unload(model: nn.Module, *, safe: bool = True) -> nn.Module:
    """Merge for good, in the memory of one layer, and leave plain layers without a trace.

    As :func:`merge` with ``keep_base=False``, for layers that are merged already too. What was
    trained whole (``modules_to_save`` of the active adapter, biases, tokens) stays as it was
    trained; parameters require gradients as they did before :func:`~gauge_ext.attach`. An adapter
    that holds its base as a submodule is replaced by that base, merged; where the base cannot take
    the update, it stays.

    Args:
        model: A model, with adapters or without.
        safe: Refuse NaN and infinity.

    Returns:
        ``model``, without the wrapper that ``torch.compile`` made; the base, merged, where it is
        such an adapter itself.

    Raises:
        NonFiniteError: A weight, a factor or a sum holds NaN or infinity; nothing is changed.
        AdapterStateError: A layer is of a kind that cannot be merged; nothing is changed.
    """
    inner = unwrap(model)
    for path, module in _wrapped(inner).items():
        with naming(path, module):
            module.merged_weight(safe=safe)
    flags = [(module, attachment(module).trainable) for module in attached_modules(inner)]
    plain = _unload(inner, safe=safe)
    for part, trainable in flags:
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(name in trainable)
    return plain


def is_merged(model: nn.Module) -> bool:
    """Say whether any adapter of ``model`` is merged."""
    return any(layer.merged for layer in lora_layers(model).values())


def merged_copy(model: nn.Module) -> nn.Module:
    """Return a copy with the adapters merged and gone; ``model`` is untouched.

    The adapted layers of the copy are plain layers. An adapter that holds its base as a
    submodule (:class:`~gauge_ext.adapters.WrappedAdapter`) is replaced by that base, merged; where
    the base cannot take the update, the adapter stays. Parameters that no adapter changes share
    their storage with those of ``model``; they are objects of their own, so converting or freezing
    the copy leaves ``model`` alone, but writing to their elements does not. Buffers are copied. A
    model without adapters is copied in the same way.

    Raises:
        NonFiniteError: A weight, a factor or a sum holds NaN or infinity; the message names it.
        AdapterStateError: The model holds something that cannot be copied.
    """
    inner = unwrap(model)
    memo: dict[int, object] = {}
    for parameter in every_parameter(inner):
        # A subclass (quantised, distributed) knows best itself how it is copied.
        if type(parameter) is nn.Parameter:
            shared = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            memo[id(parameter)] = shared
    try:
        twin = copy.deepcopy(inner, memo)
    except (RuntimeError, TypeError) as error:
        raise AdapterStateError(
            f"this {type(inner).__name__} cannot be copied: {error}",
            hint="It holds an object that copy.deepcopy refuses; take that off the model first.",
        ) from error
    return _unload(twin, safe=True)


def _unload(model: nn.Module, *, safe: bool) -> nn.Module:
    """Merge what is not merged yet, and make all layers plain ones."""
    layers = lora_layers(model)
    unmerged = {name: layer for name, layer in layers.items() if not layer.merged}
    _merge_layers(unmerged, safe=safe, keep_base=False)
    for layer in layers.values():
        layer.to_base()
    for saved in whole_modules(model).values():
        saved.keep_working()
    forget(model)
    # In place of each wrapped adapter the merged base, wherever the model holds it.
    plain: dict[nn.Module, nn.Module] = {}
    for path, module in _wrapped(model).items():
        with naming(path, module):
            plain[module] = module.to_linear(safe=safe).train(module.training)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in plain:
                parent._modules[name] = plain[child]
    return plain.get(model, model)


def _wrapped(model: nn.Module) -> dict[str, WrappedAdapter]:
    """The adapters that hold their base as a submodule and can be merged into it, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, WrappedAdapter) and module.unmergeable_reason() is None
    }


@contextmanager
def naming(path: str, module: nn.Module) -> Iterator[None]:
    """Say in which layer it was, if something is not finite, and that nothing was merged."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{path or type(module).__name__}: {error.message}", hint=_NOTHING
        ) from error


def _adapted(model: nn.Module) -> dict[str, AdaptedLayer]:
    layers = lora_layers(model)
    if not layers:
        if any(isinstance(module, WrappedAdapter) for module in model.modules()):
            raise AdapterStateError(
                "the model's adapters hold their base as a submodule, so there is no layer to "
                "merge them into in place.",
                hint="Call gauge_ext.models.merged_copy(), or to_linear() on each of them.",
            )
        raise AdapterStateError(
            "the model has no adapters.",
            hint="Call gauge_ext.attach() or gauge_ext.load_adapter() first.",
        )
    return layers


def _merge_layers(layers: dict[str, AdaptedLayer], *, safe: bool, keep_base: bool) -> None:
    if not keep_base:
        for name, layer in layers.items():
            with naming(name, layer):
                layer.check_merge(safe=safe)
        for layer in layers.values():
            layer.merge_for_good()
        return
    merged = {}
    for name, layer in layers.items():
        with naming(name, layer):
            merged[name] = layer.merged_parameters(safe=safe)
    for name, layer in layers.items():
        layer.adopt_merged(merged[name], keep_base=True)
