"""Pairs are found by themselves, and what is no pair goes to AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_problems import model, train
from torch import nn

from gauge_ext.errors import ConfigError
from gauge_ext.optim import create_optimizer, factor_pairs, lora_plus_groups


def test_pairs_are_found_with_their_scaling_and_place() -> None:
    net = model(alpha=12.0)
    pairs = factor_pairs(net)
    assert [pair.name for pair in pairs] == ["0", "2"]
    assert all(pair.scaling == 3.0 for pair in pairs)
    assert pairs[1].lora_A is net[2].lora_A
    net[0].lora_A.requires_grad_(False)
    assert [pair.name for pair in factor_pairs(net)] == ["2"]
    optimizer = create_optimizer(net, "gauge_adam", lr=0.01)
    assert optimizer.param_groups[1]["params"] == [net[0].lora_B]  # by AdamW


def test_pairs_of_peft_are_found() -> None:
    peft = pytest.importorskip("peft")
    net: Any = nn.ModuleDict(
        {"e": nn.Embedding(11, 6), "c": nn.Conv2d(3, 4, 3), "l": nn.Linear(6, 5)}
    )
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["e", "c", "l"])
    net = peft.inject_adapter_in_model(config, net)
    pairs = factor_pairs(net)
    assert [pair.name for pair in pairs] == ["e.default", "c.default", "l.default"]
    assert [tuple(pair.lora_A.shape) for pair in pairs] == [(2, 11), (2, 3, 3, 3), (2, 6)]
    assert all(pair.scaling == 3.0 for pair in pairs)
    optimizer = create_optimizer(net, "gauge_adam", lr=0.05)
    x, image = torch.randint(11, (8,)), torch.randn(2, 3, 5, 5)
    assert not pairs[0].lora_A.any()  # PEFT starts embeddings the other way round
    net["l"](net["e"](x)).square().mean().backward()
    net["c"](image).square().mean().backward()
    optimizer.step()
    assert all(bool((p.lora_B.flatten(1) @ p.lora_A.flatten(1)).any()) for p in pairs)


def test_a_shared_factor_has_no_gauge_of_its_own() -> None:
    net = model()
    net[2].lora_B = nn.Parameter(torch.zeros(6, 4).double())
    net.add_module("again", model()[2])
    net.again.lora_A = net[2].lora_A
    with pytest.raises(ConfigError, match="'again' shares a factor with '2'"):
        factor_pairs(net)


def test_lora_plus_gives_the_other_factor_its_own_rate() -> None:
    net = model()
    net[2].bias.requires_grad_(True)
    groups = lora_plus_groups(net, 0.01, ratio=4.0, weight_decay=0.1)
    assert [group["lr"] for group in groups] == [0.01, 0.04, 0.01]
    assert [len(group["params"]) for group in groups] == [2, 2, 1]
    optimizer = create_optimizer(net, "lora_plus", lr=0.01, ratio=4.0)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[1]["lr"] == 0.04
    losses = train(net, optimizer, 40)
    assert losses[-1] < losses[0]
    with pytest.raises(ConfigError, match="ratio must be above 0, got 0"):
        lora_plus_groups(net, 0.01, ratio=0.0)


def test_what_cannot_be_made_is_said() -> None:
    net = model()
    with pytest.raises(ConfigError, match="there is no optimizer 'muon'; there are gauge_adam"):
        create_optimizer(net, "muon", lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="scaled_gd does not take these options: .*betas"):
        create_optimizer(net, "scaled_gd", lr=0.1, betas=(0.9, 0.99))
    for name in ("adamw", "gauge_adam", "lora_plus"):
        with pytest.raises(ConfigError, match="nothing to train"):
            create_optimizer(nn.ReLU(), name, lr=0.1)  # type: ignore[arg-type]


def test_it_trains_inside_transformers_trainer(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from gauge_ext import LoRAConfig, attach

    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    net = transformers.BertForSequenceClassification(config)
    attach(net, LoRAConfig(rank=2, target_modules=["query", "value"]))
    net.classifier.requires_grad_(True)
    optimizer = create_optimizer(net, "gauge_adam", lr=0.01)
    data = [{"input_ids": torch.arange(6) + i % 5, "labels": i % 2} for i in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_strategy="no",
        max_grad_norm=0.0, dataloader_pin_memory=False,
    )  # fmt: skip
    before = [pair.lora_B.detach().clone() for pair in factor_pairs(net)]
    trainer = transformers.Trainer(
        model=net, args=arguments, train_dataset=data, optimizers=(optimizer, None)
    )
    trainer.train()
    after = [pair.lora_B for pair in factor_pairs(net)]
    assert all(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
