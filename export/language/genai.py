"""``genai_config.json``: how onnxruntime-genai is told what a graph's inputs and outputs are.

The format is onnxruntime-genai's ("Configuration reference"). It knows models by type; a type that
it does not know by name and that is a plain decoder runs as ``decoder``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gauge_ext.export.language.sampling import Sampling

# Decoder-only types of onnxruntime-genai 0.18 that need nothing but the cache.
_TYPES = frozenset(
    {
        *("gemma", "gemma2", "gemma3_text", "granite", "internlm2", "llama", "mistral"),
        *("nemotron", "olmo", "phi", "phi3", "qwen2", "qwen3", "smollm3"),
    }
)
_SETTINGS = ("eos_token_id", "pad_token_id", "repetition_penalty")
Shape = tuple[int | str, ...]


def genai_config(
    model: nn.Module, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], file: str
) -> dict[str, Any]:
    """The settings for a graph with a key-value cache.

    Args:
        model: The model of transformers that the graph was made from.
        inputs: Name -> shape of the graph's inputs.
        outputs: Name -> shape of its outputs.
        file: The graph's file name.

    Returns:
        What to write as JSON. Greedy search, as that is what can be checked; a context as long as
        the model's positions.
    """
    held: Any = model
    config = held.config.get_text_config()
    settings = getattr(held, "generation_config", None)
    known = {} if settings is None else settings.to_dict()
    sampling = Sampling().updated({k: known.get(k) for k in _SETTINGS}, where="generation_config")
    _, heads, _, size = inputs["past_key_values.0.key"]
    context = getattr(config, "max_position_embeddings", None) or 2048
    ends = list(sampling.eos_token_id)
    return {
        "model": {
            "type": config.model_type if config.model_type in _TYPES else "decoder",
            "vocab_size": config.vocab_size,
            "context_length": context,
            "bos_token_id": getattr(config, "bos_token_id", None) or 0,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": sampling.pad,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file,
                "head_size": size,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    **{
                        name: name
                        for name in ("input_ids", "attention_mask", "position_ids")
                        if name in inputs
                    },
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            # The graph makes the present anew; it does not write into the past's memory.
            "past_present_share_buffer": False,
            "repetition_penalty": sampling.repetition_penalty,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
