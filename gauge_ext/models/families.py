"""Sibling layers that read one tensor in the common families of models, known by their names."""

from __future__ import annotations

from collections.abc import Iterable

# The names of siblings in the order in which the models call them. In attention the first is the
# query's, which in cross-attention reads another tensor than the rest.
_ATTENTION = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, Phi, BART, Whisper, CLIP
    ("query", "key", "value"),  # BERT, RoBERTa, ViT
    ("q", "k", "v"),  # T5
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("to_q", "to_k", "to_v"),  # diffusers
)
_GATED = (
    ("gate_proj", "up_proj"),  # Llama and its kin
    ("wi_0", "wi_1"),  # T5 v1.1
    ("w1", "w3"),  # Mixtral's experts, the first Llama
)
_CROSS = ("encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "attn2")


def sibling_groups(paths: Iterable[str]) -> list[tuple[str, ...]]:
    """Return which of the layers at ``paths`` read one tensor, as far as their names say it.

    Args:
        paths: Paths of layers in a model.

    Returns:
        Two paths or more each, in the order in which the models call them.
    """
    names_of: dict[str, set[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        names_of.setdefault(parent, set()).add(name)
    groups = []
    for parent, names in names_of.items():
        crossed = any(part in _CROSS for part in parent.split("."))
        attention = [family[1:] if crossed else family for family in _ATTENTION]
        for family in (*attention, *_GATED):
            present = [name for name in family if name in names]
            if len(present) > 1:
                groups.append(tuple(f"{parent}.{name}" if parent else name for name in present))
    return groups
