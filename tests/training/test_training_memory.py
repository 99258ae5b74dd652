"""What saves memory or time in training, on whole models: the gradients stay what they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import gauge_ext


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).double()
    gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=2, alpha=4, dropout=0.2))
    for name, parameter in gauge_ext.named_adapter_parameters(model):
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model.train()


IDS = torch.arange(24).reshape(2, 12)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {}
    for name, parameter in gauge_ext.named_adapter_parameters(model):
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_masks(llama: nn.Module, reentrant: bool) -> None:
    plain = copy.deepcopy(llama)
    # transformers 5.24 renamed it.
    old = llama.gradient_checkpointing_enable
    enable = getattr(llama, "activation_checkpointing_enable", old)
    enable({"use_reentrant": reentrant})
    llama.enable_input_require_grads()  # the embeddings are frozen, and reentrant asks for a path
    losses, found = [], []
    for model in (plain, llama):
        torch.manual_seed(5)
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.detach())
        found.append(gradients(model, loss))
    assert torch.equal(*losses)
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-12, atol=1e-14)


def test_a_whole_model_compiles_without_a_break(
    llama: nn.Module, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for layer in gauge_ext.models.lora_layers(llama).values():
        layer.dropout_p = 0.0
    plain = copy.deepcopy(llama)
    torch._dynamo.reset()
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    expected = gradients(plain, plain(IDS, labels=IDS).loss)
    found = gradients(llama, compiled(IDS, labels=IDS).loss)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(IDS, labels=IDS)


def test_accelerate_trains_what_a_plain_loop_does(llama: nn.Module) -> None:
    from accelerate import Accelerator

    for layer in gauge_ext.models.lora_layers(llama).values():
        layer.dropout_p = 0.0
    plain = copy.deepcopy(llama)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(gauge_ext.adapter_parameters(llama), lr=0.1)
    prepared, optimizer = accelerator.prepare(llama, optimizer)
    for part in IDS.split(1):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(part, labels=part).loss)
            optimizer.step()
            optimizer.zero_grad()

    by_hand = torch.optim.SGD(gauge_ext.adapter_parameters(plain), lr=0.1)
    sum(plain(part, labels=part).loss / 2 for part in IDS.split(1)).backward()
    by_hand.step()
    unwrapped = accelerator.unwrap_model(prepared)
    for name, parameter in gauge_ext.named_adapter_parameters(plain):
        torch.testing.assert_close(unwrapped.get_parameter(name), parameter)


def test_adapters_on_the_meta_device_take_their_weights_later(llama: nn.Module) -> None:
    expected = llama.eval()(IDS).logits
    with torch.device("meta"):
        empty = LlamaForCausalLM(llama.config)
    gauge_ext.attach(empty, gauge_ext.LoRAConfig(rank=2, alpha=4, dropout=0.2))
    assert all(parameter.is_meta for parameter in gauge_ext.adapter_parameters(empty))
    empty.load_state_dict(llama.state_dict(), assign=True)
    # Not a parameter, so no state dict has it.
    empty.model.rotary_emb = llama.model.rotary_emb
    torch.testing.assert_close(empty.eval()(IDS).logits, expected)
