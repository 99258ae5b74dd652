"""Language models of transformers, random, of one or two layers and width 16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gauge_ext

VOCABULARY = 50
END, PAD = 7, 0
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # With the usual 0.02 a narrow model attends evenly, and repeats one token.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": PAD,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "initializer_factor": 3.0,
}
_WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 40,
    "init_std": 0.4,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "suppress_tokens": None,
    "begin_suppress_tokens": [3],
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "init_std": 0.4,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": END,
    "forced_eos_token_id": None,
    "pad_token_id": PAD,
}
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_SIZES, "num_hidden_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _SIZES),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_SIZES, "sliding_window": 6}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_SIZES, "head_dim": 6}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **{k: _SIZES[k] for k in ("vocab_size", "initializer_range")},
            **{k: _SIZES[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 4,
            "n_positions": 64,
        },
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    ),
}
_TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "v", "wi"],
    "bart": ["q_proj", "v_proj", "fc1"],
    "whisper": ["k_proj", "v_proj", "fc1"],
}
MakeModel = Callable[[str], nn.Module]


def build(kind: str) -> nn.Module:
    """A model in evaluation mode, the same for the same kind."""
    import transformers

    model_class, config_class, fields = _KINDS[kind]
    torch.manual_seed(0)
    built: nn.Module = getattr(transformers, model_class)(
        getattr(transformers, config_class)(**fields)
    )
    return built.eval()


def adapter_targets(kind: str) -> list[str]:
    """The layers that :func:`adapter_folder` adapts."""
    return _TARGETS.get(kind, ["q_proj", "v_proj", "down_proj"])


def adapter_folder(
    kind: str,
    attach: Callable[..., nn.Module],
    folder: Path,
    seed: int,
    rank: int = 3,
    alpha: float = 6.0,
) -> nn.Module:
    """A saved adapter, random, and the plain model with W + s·B·A from the file's factors."""
    torch.manual_seed(seed)
    model = attach(build(kind), target_modules=adapter_targets(kind), rank=rank, alpha=alpha)
    gauge_ext.save_adapter(model, folder)
    plain = build(kind)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            update = (alpha / rank) * layer.lora_B.double() @ layer.lora_A.double()
            weight = plain.get_submodule(name).weight
            if kind == "gpt2":  # Conv1D keeps its weight transposed
                update = update.T
            weight.data = (weight.double() + update).float()
    return plain
