"""Groups by name are those that a sample shows, and change no result."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gauge_ext
from gauge_ext.models import group_shared_inputs
from gauge_ext.models.families import sibling_groups

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
FEW = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
FEW |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
FEW |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1}
FEW |= {"eos_token_id": 2, "decoder_start_token_id": 1}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
T5 |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
VIT |= {"intermediate_size": 24, "patch_size": 4}

TOKENS = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(0))
WORDS = {"input_ids": TOKENS}
PAIRS = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
PIXELS = {"pixel_values": torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
HEARING = {"num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 8}
MELS = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
SOUNDS = {"input_features": MELS, "decoder_input_ids": TOKENS}

# (class, config, numbers, inputs, sizes of the groups)
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor], list[int]]] = {
    "bert": ("BertModel", "BertConfig", {**SIZES, "num_attention_heads": 2}, WORDS, [3]),
    "roberta": ("RobertaModel", "RobertaConfig", {**SIZES, "num_attention_heads": 2}, WORDS, [3]),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
        WORDS,
        [3],
    ),
    "llama": ("LlamaModel", "LlamaConfig", GROUPED, WORDS, [2, 3]),
    "qwen2": ("Qwen2Model", "Qwen2Config", GROUPED, WORDS, [2, 3]),
    "mistral": ("MistralModel", "MistralConfig", GROUPED, WORDS, [2, 3]),
    "gemma": ("GemmaModel", "GemmaConfig", {**GROUPED, "head_dim": 4}, WORDS, [2, 3]),
    "phi": ("PhiModel", "PhiConfig", {**SIZES, "num_attention_heads": 2}, WORDS, [3]),
    "vit": ("ViTModel", "ViTConfig", VIT, PIXELS, [3]),
    "t5": ("T5Model", "T5Config", T5, PAIRS, [2, 2, 2, 3, 3]),
    "bart": ("BartModel", "BartConfig", FEW, PAIRS, [2, 3, 3]),
    "whisper": ("WhisperModel", "WhisperConfig", {**FEW, **HEARING}, SOUNDS, [2, 3, 3]),
}


def build(name: str) -> nn.Module:
    model, config, numbers, _, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**numbers)).double().eval()
    gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=2))
    for parameter in gauge_ext.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    return model


def step(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    y = model(**inputs).last_hidden_state
    parameters = gauge_ext.adapter_parameters(model)
    grads = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
    return y.detach(), [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("name", MODELS)
def test_names_say_what_a_sample_shows(name: str) -> None:
    model, (*_, inputs, sizes) = build(name), MODELS[name]
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    expected = step(model, inputs)
    named = group_shared_inputs(model)
    assert sorted(map(len, named)) == sizes
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no work in vain
        torch.testing.assert_close(step(model, inputs), expected, rtol=1e-10, atol=1e-12)
    watched = group_shared_inputs(model, inputs)
    assert sorted(map(sorted, named)) == sorted(map(sorted, watched))


def test_only_siblings_are_grouped_and_the_query_of_cross_attention_is_not() -> None:
    assert sibling_groups(["a.q_proj", "b.k_proj", "a.v_proj", "a.o_proj", "b.up_proj"]) == [
        ("a.q_proj", "a.v_proj")
    ]
    assert sibling_groups(["x.encoder_attn.q_proj", "x.encoder_attn.v_proj"]) == []
    diffusers = [f"{block}.to_{name}" for block in ("attn1", "attn2") for name in "qkv"]
    assert sibling_groups(diffusers) == [tuple(diffusers[:3]), tuple(diffusers[4:])]
    assert sibling_groups(["v", "w3", "q", "w1"]) == [("q", "v"), ("w1", "w3")]


def test_layers_that_differ_in_what_a_group_shares_stay_apart() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.q_proj(x) * self.k_proj(y)

    names = ["q_proj", "k_proj"]
    model = gauge_ext.attach(Crossed(), gauge_ext.LoRAConfig(rank=2, target_modules=names))
    assert group_shared_inputs(model) == ()
