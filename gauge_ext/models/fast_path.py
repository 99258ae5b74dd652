"""Torch's fused encoder layers read the weights of their linear layers and never call them.

``nn.TransformerEncoderLayer`` in evaluation hands ``linear1.weight`` and ``linear2.weight`` to one
fused kernel, so an adapter on them would have no effect, without a word, though it was trained
with effect (training takes the other path). ``nn.TransformerEncoder`` packs its input for that
kernel. Both are switched to their ordinary path, by the attributes that they themselves ask.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# (path of the module, attribute, value before)
Switch = tuple[str, str, object]

_OFF: tuple[tuple[type[nn.Module], str, object], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def suspend(model: nn.Module, adapted: Iterable[str]) -> tuple[Switch, ...]:
    """Switch off the fused path of every encoder that holds an adapted layer.

    Args:
        model: The model.
        adapted: Paths of the adapted layers.

    Returns:
        What was switched, for :func:`restore`.
    """
    adapted = list(adapted)
    switches: list[Switch] = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for kind, attribute, off in _OFF:
            if isinstance(module, kind) and any(name.startswith(prefix) for name in adapted):
                switches.append((path, attribute, getattr(module, attribute)))
                setattr(module, attribute, off)
    return tuple(switches)


def restore(model: nn.Module, switches: Iterable[Switch]) -> None:
    """Put back what :func:`suspend` switched off."""
    # The last first: an encoder may have been switched twice, for two adapters.
    for path, attribute, before in reversed([*switches]):
        setattr(model.get_submodule(path), attribute, before)
