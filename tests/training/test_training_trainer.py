"""transformers' Trainer on a model with adapters: against a loop written by hand, and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import gauge_ext
from gauge_ext.errors import AdapterFormatError, AdapterStateError
from gauge_ext.training import AdapterCheckpoints


class AdapterTrainer(AdapterCheckpoints, Trainer):
    pass


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    return gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=2, alpha=8, dropout=0.1))


@pytest.fixture
def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(50, (7,), generator=generator),
            "attention_mask": torch.ones(7, dtype=torch.int64),
            "labels": torch.randint(2, (), generator=generator),
        }
        for _ in range(16)
    ]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return TrainingArguments(**{**settings, **changes})


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in gauge_ext.named_adapter_parameters(model)}


def without_dropout(model: nn.Module) -> nn.Module:
    for layer in gauge_ext.models.lora_layers(model).values():
        layer.dropout_p = 0.0
    return model


def test_accumulated_steps_equal_a_loop_over_all_rows(
    model: nn.Module, rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    by_hand = copy.deepcopy(without_dropout(model.double()))
    # Eight times two rows are all there are, so the order of rows cannot matter.
    settings = arguments(tmp_path, gradient_accumulation_steps=8, max_steps=3, save_strategy="no")
    trainer = AdapterTrainer(model, settings, train_dataset=rows)
    # BERT takes any keyword and ignores the count of items, so the Trainer would not divide by 8.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()

    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    optimizer = torch.optim.AdamW(gauge_ext.adapter_parameters(by_hand), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        logits = by_hand(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        nn.functional.cross_entropy(logits, batch["labels"]).backward()
        optimizer.step()
    for name, parameter in by_hand.named_parameters():
        trained = model.get_parameter(name)
        torch.testing.assert_close(trained, parameter, rtol=1e-8, atol=1e-10)


def test_checkpoints_hold_the_adapter_alone(
    model: nn.Module, rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    trainer = AdapterTrainer(model, arguments(tmp_path), train_dataset=rows)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert {key.split(".")[-2] for key in saved} == {"lora_A", "lora_B"}
    assert not list(tmp_path.rglob("model.safetensors"))
    for name, value in factors(model).items():
        assert torch.equal(saved[f"base_model.model.{name}.weight"], value)


def test_a_resumed_run_equals_an_uninterrupted_one(
    model: nn.Module, rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    fresh = copy.deepcopy(model)
    straight = AdapterTrainer(model, arguments(tmp_path), train_dataset=rows)
    straight.train()
    resumed = AdapterTrainer(fresh, arguments(tmp_path / "again"), train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for name, value in factors(model).items():
        assert torch.equal(factors(fresh)[name], value), name


def test_the_best_adapter_is_loaded_at_the_end(
    model: nn.Module, rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    settings = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", learning_rate=0.3,
    )  # fmt: skip
    trainer = AdapterTrainer(model, settings, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors")
    for name, value in factors(model).items():
        assert torch.equal(best[f"base_model.model.{name}.weight"], value)


def test_an_own_loss_and_bfloat16_autocast(
    model: nn.Module, rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    class Smoothed(AdapterTrainer):
        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any
        ) -> Tensor:
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)

    seen = set()
    layer = next(iter(gauge_ext.models.lora_layers(model).values()))
    layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    before = factors(model)
    settings = arguments(tmp_path, bf16=True, save_strategy="no")
    Smoothed(model, settings, train_dataset=rows).train()
    assert seen == {torch.bfloat16}
    after = factors(model)
    assert all(value.dtype == torch.float32 for value in after.values())
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_a_folder_without_an_adapter_is_refused(
    model: nn.Module, rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    trainer = AdapterTrainer(model, arguments(tmp_path), train_dataset=rows)
    with pytest.raises(AdapterFormatError, match="adapter_config.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    trainer = AdapterTrainer(nn.Linear(2, 2), arguments(tmp_path))
    with pytest.raises(AdapterStateError, match="no adapters"):
        trainer.save_model()
