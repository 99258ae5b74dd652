"""Where the hidden spaces of the usual transformers are, by the names of their layers."""

from __future__ import annotations

from gauge_ext.checkpoint.weights import Weights
from gauge_ext.geometry.hidden_space import HiddenSpace

# Ends of paths: the layers before an elementwise activation, and the one after it.
_UNITS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("intermediate.dense",), "output.dense"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("lin1",), "lin2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("w1", "w3"), "w2"),
)
# The layer that makes the values of attention, and the one that reads what attention made of them.
_VALUES = (
    ("v_proj", "o_proj"),
    ("v_proj", "out_proj"),
    ("self.value", "output.dense"),
    ("v_lin", "out_lin"),
    ("v", "o"),
)
_HEADS = ("num_key_value_heads", "num_attention_heads", "n_heads", "num_heads")


def hidden_spaces(weights: Weights) -> list[HiddenSpace]:
    """Find the hidden units of MLPs and the value heads of attention.

    By the names that transformers gives the layers of the Llama, BERT, OPT, T5, NeoX and Mixtral
    families and of those that follow them; other models need their structure spelled out. Queries
    and keys are left out: rotary positions leave no rotation of them free.

    Args:
        weights: The model's. The number of heads comes from its config; without one, values are
            left out.

    Returns:
        The spaces, of which no two share a layer; none for a model of another make.
    """
    modules = {
        key.removesuffix(".weight")
        for key, shape in weights.shapes.items()
        if key.endswith(".weight") and len(shape) == 2
    }
    config = weights.config.get("text_config", weights.config)
    heads = next((int(config[key]) for key in _HEADS if config.get(key)), None)
    taken: set[str] = set()
    spaces = []

    def add(space: HiddenSpace) -> None:
        layers = {*space.writers, *space.readers}
        if layers <= modules and not layers & taken and _fits(weights, space):
            taken.update(layers)
            spaces.append(space)

    for name in sorted(modules):
        for writers, reader in _UNITS:
            if (stem := _stem(name, reader)) is not None:
                add(HiddenSpace(tuple(stem + writer for writer in writers), (name,)))
        for writer, reader in _VALUES if heads is not None else ():
            if (stem := _stem(name, reader)) is not None:
                add(HiddenSpace((stem + writer,), (name,), "rotation", heads or 1))
    return spaces


def _stem(name: str, end: str) -> str | None:
    """Return what comes before ``end`` in a path that ends with it, or None."""
    return name.removesuffix(end) if name == end or name.endswith(f".{end}") else None


def _fits(weights: Weights, space: HiddenSpace) -> bool:
    """Whether the widths of the layers are multiples of one width in so many heads."""
    widths = [weights.shapes[f"{layer}.weight"][0] for layer in space.writers]
    widths += [weights.shapes[f"{layer}.weight"][1] for layer in space.readers]
    least = min(widths)
    same = least > 0 and all(width % least == 0 for width in widths)
    return same and least % space.heads == 0 and (space.kind == "rotation" or len(set(widths)) == 1)
