"""Rows of embeddings: adapted, tied to a head, or trained for single tokens."""

from __future__ import annotations

import torch
from peft_linear import add_linear, add_whole
from row_by_hand import TWO, Row, Tensors, tokens
from torch import Tensor, nn


def add_embedding(model: nn.Module, t: Tensors, s: float) -> None:
    """W + s (B A)ᵀ on each embedding; with DoRA, columns of the length m."""
    for key in [key for key in t if key.endswith(".lora_embedding_A")]:
        path = key.removesuffix(".lora_embedding_A")
        layer = model.get_submodule(path)
        total = layer.weight + s * (t[f"{path}.lora_embedding_B"] @ t[key]).T
        if (m := t.get(f"{path}.lora_magnitude_vector")) is not None:
            total = total * (m / total.norm(dim=0))
        layer.weight = nn.Parameter(total)


def add_tied(model: nn.Module, t: Tensors, s: float) -> None:
    """W + s (B A)ᵀ on the one table of both, whose adapter the file has twice."""
    head, table = "lm_head.lora_", "model.embed_tokens.lora_embedding_"
    assert torch.equal(t[f"{head}A.weight"], t[f"{table}B"].T)
    assert torch.equal(t[f"{head}B.weight"], t[f"{table}A"].T)
    add_embedding(model, t, s)
    add_linear(model, {key: value for key, value in t.items() if not key.startswith(head)}, s)
    model.lm_head.weight = model.model.embed_tokens.weight


TRAINED = [1, 4]


def add_tokens(model: nn.Module, t: Tensors, s: float) -> None:
    """The sum on linear layers; two rows of a table replaced, for every layer that shares it."""
    add_linear(model, t, s)
    for key, rows in t.items():
        if key.endswith(".token_adapter.trainable_tokens_delta"):
            table = model.get_submodule(key.removesuffix(".token_adapter.trainable_tokens_delta"))
            for token, row in zip(TRAINED, rows, strict=True):
                table.weight[token] = row


class Table(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6, padding_idx=0)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.emb(x))


def tied_llama() -> nn.Module:
    """A tiny Llama whose head is its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config)


TABLES = [
    Row("Embedding", Table, tokens(9, 2, 5), {**TWO, "target_modules": ["emb"]}, add_embedding),
    Row(
        "DoRA, Embedding",
        Table,
        tokens(9, 2, 5),
        {**TWO, "target_modules": ["emb"], "use_dora": True},
        add_embedding,
    ),
    Row(
        "trainable_token_indices",
        Table,
        tokens(9, 2, 5),
        {**TWO, "target_modules": ["head"], "trainable_token_indices": {"emb": TRAINED}},
        add_tokens,
    ),
    Row(
        "trainable_token_indices, tied head",
        tied_llama,
        tokens(9, 2, 5),
        {**TWO, "target_modules": ["q_proj"], "trainable_token_indices": TRAINED},
        add_tokens,
    ),
    Row(
        "modules_to_save, ensure_weight_tying",
        tied_llama,
        tokens(9, 2, 5),
        {
            **TWO,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        add_whole,
    ),
    *(
        Row(
            f"{target}, ensure_weight_tying",
            tied_llama,
            tokens(9, 2, 5),
            {**TWO, "target_modules": ["q_proj", target], "ensure_weight_tying": True},
            add_tied,
        )
        for target in ("embed_tokens", "lm_head")
    ),
]
