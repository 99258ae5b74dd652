"""Adapters on every linear layer of tiny models of transformers, to PEFT and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gauge_ext
from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint import load_adapter, save_adapter
from gauge_ext.models import attach, attachment, lora_layers, merge

transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", minversion="0.21")

TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 1}


def _words() -> dict[str, Tensor]:
    ids = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids}


def _pairs() -> dict[str, Tensor]:
    return {**_words(), "decoder_input_ids": _words()["input_ids"][:, :4]}


def _pixels() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}


def _sound() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sound = torch.randn(1, 8, 20, generator=generator)
    return {"input_features": sound, "decoder_input_ids": _words()["input_ids"][:1, :4]}


# Name -> the class of the model, its config, its inputs.
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "Bert": ("BertForSequenceClassification", TEXT, _words),
    "Roberta": ("RobertaForMaskedLM", {**TEXT, "max_position_embeddings": 40}, _words),
    "GPT2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 32,
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 16,
            "initializer_range": 0.3,
        },
        _words,
    ),
    "Llama": ("LlamaForCausalLM", GROUPED, _words),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED, _words),
    "Mistral": ("MistralForCausalLM", GROUPED, _words),
    "Gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 8}, _words),
    "Phi": ("PhiForCausalLM", TEXT, _words),
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        _pairs,
    ),
    "ViT": (
        "ViTForImageClassification",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "initializer_range": 0.3,
        },
        _pixels,
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 32,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 12,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "init_std": 0.3,
        },
        _sound,
    ),
    "Mixtral": (
        "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
        _words,
    ),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    kind, options, inputs = MODELS[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**options)).eval(), inputs()


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


pytestmark = [
    pytest.mark.parametrize("name", MODELS),
    # PEFT on fan_in_fan_out, transformers on models that are made from nothing.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # PEFT's own rewriting of Mixtral's targets.
    pytest.mark.filterwarnings(r"ignore:The following \w+_pattern keys:RuntimeWarning"),
]


def test_attached_trained_saved_and_read_by_peft(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    base = copy.deepcopy(model)
    with torch.no_grad():
        plain = logits(model, inputs)
    attach(model, LoRAConfig(rank=2, alpha=4, task_type=None))
    torch.testing.assert_close(logits(model, inputs), plain, rtol=1e-5, atol=1e-5)
    for parameter in gauge_ext.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    model.train()
    logits(model, inputs).square().mean().backward()
    model.eval()
    # Every adapter is on the way from the inputs to the loss.
    idle = [n for n, p in gauge_ext.named_adapter_parameters(model) if p.grad is None]
    assert not idle
    with torch.no_grad():
        expected = logits(model, inputs)
        assert (expected - plain).abs().max() > 1e-3
        save_adapter(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(logits(theirs, inputs), expected, rtol=1e-4, atol=1e-4)
        merge(model)
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_peft_adapts_the_same_layers_and_we_read_it(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.3)
        expected = logits(theirs, inputs)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    ours, _ = build(name)
    # PEFT takes Mixtral's stacked experts for linear layers, which "all-linear" here leaves out.
    attach(ours, LoRAConfig(rank=2, target_parameters=config.target_parameters or None))
    assert set(lora_layers(ours)) == set(lora_layers(model)), attachment(ours).skipped
