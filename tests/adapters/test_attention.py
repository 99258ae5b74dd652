"""Attention with adapters against torch's own attention on the weights summed by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gauge_ext
from gauge_ext.adapters import AdapterSpec, LoRAConfig, adapt, unsupported_reason
from gauge_ext.errors import TargetError
from gauge_ext.models import attach, detach, lora_layers, merge, merged_copy, unmerge


class Model(nn.Module):
    """One attention, called with whatever it is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **options)
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            if (bias := getattr(self.attn, name)) is not None:
                nn.init.normal_(bias)

    def forward(self, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return self.attn(*args, **kwargs)


def adapted(model: nn.Module, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """The model with random adapters, and a plain copy with the weights summed by hand."""
    expected = copy.deepcopy(model)
    attach(model, LoRAConfig(rank=3, alpha=2, target_modules=["attn"], **fields))
    for parameter in gauge_ext.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    layers = lora_layers(model)
    assert list(layers) == ["attn", "attn.out_proj"]
    with torch.no_grad():
        for weight, layer in zip(
            (expected.attn.in_proj_weight, expected.attn.out_proj.weight),
            layers.values(),
            strict=True,
        ):
            weight += 2 / 3 * torch.einsum("or,ri->oi", layer.lora_B, layer.lora_A)
    return model.eval(), expected.eval()


def same(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def tensors(*shape: int, count: int = 1) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("inputs", ["self", "memory", "three", "unbatched"])
def test_every_form_of_call(options: dict[str, bool], need_weights: bool, inputs: str) -> None:
    model, expected = adapted(Model(**options).double())
    if inputs == "self":
        (x,) = tensors(4, 4, 8)
        args = (x, x, x)
    elif inputs == "memory":
        query, memory = tensors(4, 4, 8, count=2)
        args = (query, memory, memory)
    elif inputs == "three":
        args = tuple(tensors(4, 4, 8, count=3))
    else:
        args = tuple(tensors(4, 8, count=3))
    padding = torch.zeros(*(() if inputs == "unbatched" else (4,)), 4, dtype=torch.bool)
    padding[..., -1] = True
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    added = torch.randn(2 if inputs == "unbatched" else 8, 4, 4, dtype=torch.float64)
    # With the hint, torch drops the mask that it is given and hides added keys too.
    longer = options.get("add_bias_kv") or options.get("add_zero_attn")
    with torch.no_grad():
        for more in (
            {},
            {"key_padding_mask": padding},
            {"attn_mask": causal, "is_causal": not longer},
            {"attn_mask": added},
            {"attn_mask": causal, "key_padding_mask": padding, "average_attn_weights": False},
        ):
            found = model(*args, need_weights=need_weights, **more)
            same(found, expected(*args, need_weights=need_weights, **more))


def test_the_base_is_never_written_in_training() -> None:
    model = Model().double()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    model, _ = adapted(model, dropout=0.1)
    optimizer = torch.optim.SGD(gauge_ext.adapter_parameters(model), 0.1)
    (x,) = tensors(5, 2, 8)
    for _ in range(2):
        model.train()(x, x, x)[0].square().sum().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in gauge_ext.adapter_parameters(model))
    detach(model)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())
    assert type(model.attn) is nn.MultiheadAttention


def test_gradients_are_those_of_the_summed_weights() -> None:
    model, _ = adapted(Model().double())
    (x,) = tensors(3, 1, 8)
    names = [name for name, _ in gauge_ext.named_adapter_parameters(model)]

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x, x, x))[
            0
        ]

    values = [p.detach().requires_grad_() for p in gauge_ext.adapter_parameters(model)]
    assert torch.autograd.gradcheck(run, values)


def test_merged_unmerged_and_copied() -> None:
    model, expected = adapted(Model(batch_first=True).double())
    (x,) = tensors(2, 5, 8)
    base = model.attn.in_proj_weight
    with torch.no_grad():
        wanted = expected(x, x, x)
        same(merged_copy(model)(x, x, x), wanted)
        same(merge(model)(x, x, x), wanted)
        unmerge(model)
        assert model.attn.in_proj_weight is base
        same(model(x, x, x), wanted)


def test_torchs_fused_encoder_does_not_overlook_it() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    (x,) = tensors(2, 5, 8)
    with torch.no_grad():
        before = model(x)
        attach(model, LoRAConfig(rank=2, target_modules=["self_attn"]))
        torch.testing.assert_close(model(x), before)
        for parameter in gauge_ext.adapter_parameters(model):
            nn.init.normal_(parameter, std=0.5)
        changed = model(x)
        assert (changed - before).abs().max() > 0.05
        torch.testing.assert_close(merged_copy(model)(x), changed)
        torch.testing.assert_close(detach(model)(x), before)


def test_dropout_is_there_in_training_alone() -> None:
    model, expected = adapted(Model().double(), dropout=0.5)
    (x,) = tensors(4, 2, 8)
    same(model(x, x, x), expected(x, x, x))
    model.train()
    assert not torch.equal(model(x, x, x)[0], model(x, x, x)[0])


def test_what_it_cannot_be() -> None:
    reason = unsupported_reason(nn.MultiheadAttention(8, 2, kdim=4))
    assert reason is not None
    assert "its key or value has another size" in reason
    with pytest.raises(TargetError, match="plain adapters only, without use_dora"):
        adapt(nn.MultiheadAttention(8, 2), AdapterSpec(use_dora=True))
    model = Model()
    with pytest.raises(TargetError, match="reads the weight of its out_proj"):
        attach(model, LoRAConfig(target_modules=["out_proj"]))
    model, _ = adapted(model.double())
    (x,) = tensors(4, 2, 8)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        model(x, x, x, is_causal=True)
