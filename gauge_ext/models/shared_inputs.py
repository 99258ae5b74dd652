"""Finding the adapted layers of a model that read one tensor, and computing them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRALinear
from gauge_ext.adapters.shared_input import SharedInput
from gauge_ext.errors import AdapterStateError, ConfigError
from gauge_ext.models.adapted import lora_layers, unwrap
from gauge_ext.models.families import sibling_groups

Sample = Tensor | tuple[Any, ...] | Mapping[str, Any]


def group_shared_inputs(
    model: nn.Module, sample_inputs: Sample | None = None
) -> tuple[tuple[str, ...], ...]:
    """Compute adapted layers together that read the very same tensor: q, k and v, gate and up.

    With a sample the model is called once on it, in evaluation and without gradients. Plain
    :class:`~gauge_ext.LoRALinear` layers with the same parent and the same dropout that were
    called once, with the same tensor object, become a group. Without a sample the names say it, in
    models that call these layers as Llama, Qwen, Mistral, Gemma, Phi, BERT, ViT, T5, BART, Whisper
    and diffusers do (``q_proj, k_proj, v_proj``; ``gate_proj, up_proj``; ``query, key, value``; of
    cross-attention key and value). From then on the first of a group that is called computes all
    (:func:`gauge_ext.ops.lora_linear_group`): x is kept once, and its
    gradient is made once instead of being made by each layer and added up. Outputs and gradients
    are equal to the former ones up to rounding, dropout masks included, as long as nothing else
    draws random numbers between the layers of a group and, where names decide, the model calls them
    in the order of the names. That a layer gets another tensor after all is noticed: it then
    computes its own output, and a warning tells of the work that was in vain.

    A group's layers run one by one while the model is compiled, exported or traced, in inference
    mode, while one is merged or has a forward pre-hook, and when several adapters are there. Copies
    and pickles of the model are ungrouped. The layers of a group are one node of the graph:
    backward through one of them alone frees what the others kept, unless ``retain_graph`` is set.

    Args:
        model: A model with adapters, as it is trained.
        sample_inputs: What the model is called with: a tensor, a tuple of positional arguments, or
            a mapping of keyword arguments; None: the model is not called, and names decide.

    Returns:
        The paths of the layers of each group, in the order of their calls; none where the names
        are of no family that is known. Former groups are gone.

    Raises:
        AdapterStateError: The model has no adapters.
        ConfigError: ``sample_inputs`` is none of these, or the model calls none of its adapted
            layers with it.
    """
    inner = unwrap(model)
    layers = lora_layers(inner)
    if not layers:
        raise AdapterStateError(
            "the model has no adapters, so there is nothing to group.",
            hint="Call gauge_ext.attach() or gauge_ext.load_adapter() first.",
        )
    require_sample("sample_inputs", sample_inputs)
    ungroup(inner)
    plain = {path: layer for path, layer in layers.items() if type(layer) is LoRALinear}
    if sample_inputs is None:
        groups = _named_groups(plain)
    else:
        groups = _watched_groups(inner, plain, sample_inputs)
    for paths in groups:
        group = SharedInput([plain[path] for path in paths], paths)
        for path in paths:
            plain[path].shared_input = group
    return groups


def require_sample(argument: str, sample: object) -> None:
    """Refuse what a model cannot be called with.

    Raises:
        ConfigError: It is neither a tensor, a tuple, a mapping nor None.
    """
    if not isinstance(sample, Tensor | tuple | Mapping | None):
        raise ConfigError(
            f"{argument} must be a tensor, a tuple of arguments, a mapping of keyword arguments or "
            f"None, got a {type(sample).__name__}."
        )


def shared_input_groups(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the paths of the layers that are computed together, see :func:`group_shared_inputs`.

    Returns:
        One entry for each group, in the order of the model; none where nothing is grouped.
    """
    groups: dict[int, list[str]] = {}
    for path, layer in lora_layers(model).items():
        if isinstance(layer, LoRALinear) and layer.shared_input is not None:
            groups.setdefault(id(layer.shared_input), []).append(path)
    return tuple(map(tuple, groups.values()))


def ungroup(model: nn.Module) -> None:
    """Undo :func:`group_shared_inputs`: every layer computes its own output again."""
    for layer in lora_layers(model).values():
        if isinstance(layer, LoRALinear):
            layer.shared_input = None


def _watched_groups(
    model: nn.Module,
    layers: Mapping[str, LoRALinear],
    sample: Sample,
) -> tuple[tuple[str, ...], ...]:
    """Return the groups of layers that were called with one tensor."""
    read = _inputs_read(model, layers, sample)
    if not read:
        raise ConfigError(
            "the model calls none of its plain adapted nn.Linear layers with sample_inputs."
        )
    found: dict[tuple[str, int, float], list[str]] = {}
    for path, xs in read.items():
        if len(xs) == 1 and layers[path].is_plain:
            key = (path.rpartition(".")[0], id(xs[0]), layers[path].dropout_p)
            found.setdefault(key, []).append(path)
    return tuple(tuple(paths) for paths in found.values() if len(paths) > 1)


def _named_groups(layers: Mapping[str, LoRALinear]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of layers that read one tensor by their names, alike in what must be."""
    groups = []
    for siblings in sibling_groups(path for path, layer in layers.items() if layer.is_plain):
        found: dict[tuple[int, float], list[str]] = {}
        for path in siblings:
            layer = layers[path]
            found.setdefault((layer.in_features, layer.dropout_p), []).append(path)
        groups += [tuple(paths) for paths in found.values() if len(paths) > 1]
    return tuple(groups)


def _inputs_read(
    model: nn.Module,
    layers: Mapping[str, LoRALinear],
    sample: Sample,
) -> dict[str, list[Tensor]]:
    """Return what each layer was called with, in the order of the first calls."""
    read: dict[str, list[Tensor]] = {}  # holds the tensors, so that no two share an id

    def reader(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read.setdefault(path, []).append(args[0] if args else kwargs["input"])

        return hook

    hooks = [
        layer.register_forward_pre_hook(reader(path), with_kwargs=True)
        for path, layer in layers.items()
    ]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            if isinstance(sample, Mapping):
                model(**sample)
            elif isinstance(sample, tuple):
                model(*sample)
            else:
                model(sample)
    finally:
        for module, was in training.items():
            module.training = was
        for handle in hooks:
            handle.remove()
    return read
