"""Starts of adapters that need data: from inputs, from gradients, from what a base lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from gauge_ext.adapters import AdaptedLayer
from gauge_ext.errors import AdapterMismatchError, AdapterStateError, ConfigError
from gauge_ext.models.adapted import lora_layers
from gauge_ext.models.roster import require_one

Batch = Any


@torch.no_grad()
def start_from_inputs(
    model: nn.Module, batches: Iterable[Batch], run: Callable[[nn.Module, Batch], object]
) -> dict[str, float]:
    r"""Start lora_A in the directions that a layer's inputs vary most in (EVA, arXiv:2410.07170).

    A becomes the first r right singular vectors of the layer's inputs X, the first eigenvectors of
    :math:`X^T X`, which is summed over all batches; B stays zero, so nothing changes yet. The
    redistribution of ranks between layers that EVA adds is not done: ranks are the config's.

    Args:
        model: A model with fresh adapters on linear layers.
        batches: Some hundreds of inputs are enough.
        run: Calls the model on a batch, such as ``lambda model, batch: model(**batch)``.

    Returns:
        Path of each layer -> the share of its inputs' squared norm that lies in A's row space.

    Raises:
        AdapterStateError: There are no adapters on linear layers, or one is not fresh.
        ConfigError: No batch reached a layer.
    """
    layers = _linear_layers(model)
    moments: dict[str, Tensor] = {}

    def gather(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            moments[name] = moments.get(name, 0.0) + (x.mT @ x).double()

        return hook

    hooks = [layer.register_forward_pre_hook(gather(name)) for name, layer in layers.items()]
    training = model.training
    try:
        model.eval()
        for batch in batches:
            run(model, batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    _require_all(layers, moments, "inputs")
    shares = {}
    for name, layer in layers.items():
        values, vectors = torch.linalg.eigh(moments[name])
        values = values.flip(0).clamp_min(0.0)
        layer.lora_A.copy_(vectors.mT.flip(0)[: layer.rank])
        total = float(values.sum())
        shares[name] = float(values[: layer.rank].sum()) / total if total else 0.0
    return shares


def start_from_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    gamma: float = 16.0,
) -> None:
    r"""Start where the first step goes as that of full training would (LoRA-GA).

    Of the gradient G of the loss in W, with :math:`G = U S V^T`, A takes the right singular vectors
    r + 1 to 2 r and B the left ones 1 to r, all of length :math:`\sqrt[4]{out} / \sqrt\gamma`
    (arXiv:2407.05000, algorithm 1). Their product at the start counts as constant (see
    :mod:`gauge_ext.adapters.inits`), so the model computes what it did.

    Args:
        model: A model with fresh adapters on linear layers, in any mode.
        batches: What the gradient is averaged over.
        loss: Returns the loss of a batch.
        gamma: The paper's scale, above 0.

    Raises:
        AdapterStateError: There are no adapters on linear layers, or one is not fresh.
        ConfigError: No gradient reached a layer, a rank is above half of a side of its weight, or
            gamma is not positive.
    """
    if not gamma > 0.0:
        raise ConfigError(f"gamma must be above 0, got {gamma}.")
    layers = _linear_layers(model)
    weights = {name: cast("nn.Parameter", layer.base_weight) for name, layer in layers.items()}
    for name, layer in layers.items():
        if 2 * layer.rank > min(weights[name].shape):
            raise ConfigError(
                f"{name} has rank {layer.rank}, and LoRA-GA takes 2 r directions of a gradient of "
                f"shape {tuple(weights[name].shape)}."
            )
    gradients: dict[str, Tensor] = {}
    trainable = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            found = torch.autograd.grad(
                loss(model, batch), list(weights.values()), allow_unused=True
            )
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                    gradients[name] = gradients.get(name, 0.0) + wide
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(trainable[name])
    _require_all(layers, gradients, "gradients")
    with torch.no_grad():
        for name, layer in layers.items():
            gradient = gradients[name].mT if layer.output_axis else gradients[name]
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            r, size = layer.rank, u.shape[0] ** 0.25 / gamma**0.5
            layer.start_at(vh[r : 2 * r] * size, u[:, :r] * size)


@torch.no_grad()
def start_from_residual(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, float]:
    r"""Start at the best approximation of what the base lost, as by quantization (LoftQ).

    .. math:: s\,B A = \mathrm{SVD}_r(W^* - W)

    with the weight W that the model has and the one :math:`W^*` that it should have. Here the
    start is meant to change something: it brings the model nearer to the unquantized one. It is one
    step of arXiv:2310.08659 for a quantization that is done already.

    Args:
        model: A model with fresh adapters on linear layers.
        weights: Path of each adapted layer -> :math:`W^*`, in the layout of its weight.

    Returns:
        Path of the layer -> share of :math:`\|W^* - W\|_F^2` that is not made up for.

    Raises:
        AdapterStateError: There are no adapters on linear layers, or one is not fresh.
        AdapterMismatchError: A weight is missing or has another shape.
    """
    layers = _linear_layers(model)
    left = {}
    for name, layer in layers.items():
        here = layer.mergeable_weight()
        if name not in weights or weights[name].shape != here.shape:
            got = tuple(weights[name].shape) if name in weights else "none"
            raise AdapterMismatchError(
                f"the weight for {name!r} must have shape {tuple(here.shape)}, got {got}."
            )
    for name, layer in layers.items():
        here = layer.mergeable_weight().double()
        gap = weights[name].to(here.device).double() - here
        u, s, vh = torch.linalg.svd(gap.mT if layer.output_axis else gap, full_matrices=False)
        rank = min(layer.rank, s.shape[0])
        root = (s[:rank] / abs(layer.scaling)).sqrt()
        layer.lora_A[:rank].copy_(root[:, None] * vh[:rank])
        layer.lora_B[:, :rank].copy_((u[:, :rank] * root) * (1 if layer.scaling > 0 else -1))
        total = float(s.square().sum())
        left[name] = float(s[rank:].square().sum()) / total if total else 0.0
    return left


def _linear_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    layers = {name: layer for name, layer in lora_layers(model).items() if type(layer).is_linear}
    if not layers:
        raise AdapterStateError(
            "the model has no adapters on linear layers.", hint="Call gauge_ext.attach() first."
        )
    require_one(model, "a start from data")
    for name, layer in layers.items():
        if layer.merged or bool(layer.lora_B.count_nonzero()):
            raise AdapterStateError(
                f"the adapter at {name!r} is not fresh: it is merged, or lora_B is not zero.",
                hint='Attach it with init="kaiming" first, and start it before training.',
            )
    return layers


def _require_all(
    layers: Mapping[str, AdaptedLayer], found: Mapping[str, Tensor], what: str
) -> None:
    if lacking := [name for name in layers if name not in found]:
        raise ConfigError(
            f"no {what} reached {len(lacking)} adapted layers, such as {lacking[0]!r}.",
            hint="Give at least one batch that runs through the whole model.",
        )
