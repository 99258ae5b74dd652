"""recompute_inputs: whole models train as before and keep hardly more than the frozen base."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping

import pytest
import torch
from kept_bytes import bytes_left
from torch import Tensor, nn

import gauge_ext
from gauge_ext.errors import AdapterStateError
from gauge_ext.models import group_shared_inputs, lora_layers, recompute_inputs
from gauge_ext.models.many import add_adapter

transformers = pytest.importorskip("transformers")

RANK, ITEM = 2, 8
SHAPE = (2, 5)
TOKENS = torch.randint(50, SHAPE, generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert() -> nn.Module:
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**SIZES, **dropouts, intermediate_size=24)
    return transformers.BertModel(config, add_pooling_layer=False)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=24)
    return transformers.LlamaModel(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_inner=24)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    return transformers.GPT2Model(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "llama": llama, "gpt2": gpt2}


def adapted(name: str = "llama", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = gauge_ext.LoRAConfig(rank=RANK, dropout=dropout)
    model = gauge_ext.attach(MODELS[name]().double(), config)
    for parameter in gauge_ext.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    return model.train()


def output(model: nn.Module) -> Tensor:
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    hidden: Tensor = model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return hidden


def step(model: nn.Module) -> Mapping[str, Tensor]:
    torch.manual_seed(7)
    model.zero_grad()
    output(model).square().sum().backward()
    named = gauge_ext.named_adapter_parameters(model)
    return {n: p.grad.clone() for n, p in named if p.grad is not None}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_gradients_are_equal(name: str, dropout: float, grouped: bool) -> None:
    model = adapted(name, dropout)
    expected = step(model)
    if grouped:
        assert bool(group_shared_inputs(model)) == (name != "gpt2")
    assert set(recompute_inputs(model)) == set(lora_layers(model))
    found = step(model)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_each_layer_keeps_its_narrow_product_and_seed(name: str, dropout: float) -> None:
    frozen = MODELS[name]().double().requires_grad_(False)
    base = bytes_left(lambda: output(frozen))
    model = adapted(name, dropout)
    kept = bytes_left(lambda: output(model))
    layers = recompute_inputs(model)
    hidden, seed = SHAPE[0] * SHAPE[1] * RANK * ITEM, 8 if dropout else 0
    assert bytes_left(lambda: output(model)) - base == len(layers) * (hidden + seed)
    recompute_inputs(model, enable=False)
    assert bytes_left(lambda: output(model)) == kept
    assert kept - base > 3 * len(layers) * hidden


def test_several_adapters_at_a_time() -> None:
    model = adapted("bert")
    add_adapter(model, gauge_ext.LoRAConfig(rank=1, use_dora=True), "second")
    gauge_ext.set_adapters(model, ["default", "second"])
    expected = step(model)
    recompute_inputs(model)
    torch.testing.assert_close(step(model), expected)


class InBits(nn.Module):
    """A linear layer as a library with a format of its own might have it."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inner, out
        self.register_buffer("codes", torch.randint(-8, 8, (out, inner), dtype=torch.int8))

    def dequantize(self) -> Tensor:
        return self.codes.double() / 8

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dequantize().T


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_quantized_layers(dropout: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16).double(), InBits(16, 8))
    config = gauge_ext.LoRAConfig(
        rank=RANK, dropout=dropout, target_modules=["1"], adapter_dtype=torch.float64
    )
    gauge_ext.attach(model, config).train()
    h = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)

    def run() -> tuple[int, Tensor]:
        kept = bytes_left(lambda: model(h))
        torch.manual_seed(3)
        return kept, torch.autograd.grad(model(h).square().sum(), h)[0]

    kept, expected = run()
    assert recompute_inputs(model) == ("1",)
    less, found = run()
    torch.testing.assert_close(found, expected)
    assert kept - less == 6 * 16 * ITEM


def test_copies_and_pickles_stay_so_and_detached_layers_do_not() -> None:
    model = adapted("bert")
    recompute_inputs(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.recomputes_input for layer in lora_layers(twin).values())
    layers = list(lora_layers(model).values())
    gauge_ext.detach(model)
    assert not any("recomputes_input" in vars(layer) for layer in layers)


def test_a_model_without_adapted_linear_layers_is_refused() -> None:
    with pytest.raises(AdapterStateError, match="no linear layer of the model has an adapter"):
        recompute_inputs(bert())
    embedding = nn.Sequential(nn.Embedding(5, 4))
    gauge_ext.attach(embedding, gauge_ext.LoRAConfig(rank=2, target_modules=["0"]))
    with pytest.raises(AdapterStateError, match=r"Call gauge_ext\.attach"):
        recompute_inputs(embedding)
