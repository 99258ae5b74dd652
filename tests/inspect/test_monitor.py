"""Records over a training run: motions whose vertical share and drift are known by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gauge_ext
from gauge_ext.errors import AdapterStateError
from gauge_ext.inspect import AdapterMonitor, trainer_callback
from gauge_ext.inspect.monitor import scalars


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10)).double()
    gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=3, alpha=6))
    torch.nn.init.normal_(model[0].lora_B)
    return model


def set_factors(model: nn.Module, b: torch.Tensor, a: torch.Tensor) -> None:
    with torch.no_grad():
        model[0].lora_B.copy_(b)
        model[0].lora_A.copy_(a)


def test_norm_and_change_against_the_dense_update(model: nn.Module) -> None:
    monitor = AdapterMonitor(model)
    before = 2.0 * (model[0].lora_B @ model[0].lora_A).detach().numpy()
    first = monitor.record(0)["0"]
    assert first.norm == pytest.approx(np.linalg.norm(before))
    assert math.isnan(first.change)
    set_factors(model, model[0].lora_B * 1.5, model[0].lora_A)
    second = monitor.record(1)["0"]
    assert second.change == pytest.approx(0.5 / 1.5)
    assert [step for step, _ in monitor.history] == [0, 1]


def test_a_change_of_gauge_alone_is_all_vertical(model: nn.Module) -> None:
    monitor = AdapterMonitor(model)
    monitor.record(0)
    small = 1e-4 * torch.randn(3, 3, dtype=torch.float64)
    g = torch.linalg.matrix_exp(small)
    set_factors(model, model[0].lora_B @ torch.linalg.inv(g), g @ model[0].lora_A)
    record = monitor.record(1)["0"]
    assert record.vertical_share == pytest.approx(1.0, abs=1e-3)
    # The transported frame stays where it was, the stored one moved by g.
    assert record.drift == pytest.approx(float(torch.linalg.svdvals(g).log().abs().max()), rel=1e-6)
    assert record.holonomy == pytest.approx(0.0, abs=1e-10)


def test_scaling_both_factors_alike_is_horizontal(model: nn.Module) -> None:
    monitor = AdapterMonitor(model)
    monitor.record(0)
    set_factors(model, 0.9 * model[0].lora_B, 0.9 * model[0].lora_A)
    record = monitor.record(1)["0"]
    assert record.vertical_share == pytest.approx(0.0, abs=1e-20)
    assert record.drift == pytest.approx(0.0, abs=1e-10)


def test_before_training_there_is_no_frame(model: nn.Module) -> None:
    set_factors(model, torch.zeros(10, 3), model[0].lora_A)
    monitor = AdapterMonitor(model)
    monitor.record(0)
    torch.nn.init.normal_(model[0].lora_B)
    record = monitor.record(1)["0"]
    assert math.isnan(record.vertical_share)
    assert record.drift == 0.0  # a path begins here
    told = scalars({"0": monitor.history[0][1]["0"]})
    assert "adapter/norm/0" in told
    assert not any("drift" in tag for tag in told)


def test_a_jump_begins_a_new_path(model: nn.Module) -> None:
    monitor = AdapterMonitor(model)
    monitor.record(0)
    u, _, vh = torch.linalg.svd(model[0].lora_B @ model[0].lora_A)
    set_factors(model, u[:, 3:6], vh[3:6])  # orthogonal to where it was: no link exists
    assert math.isnan(monitor.record(1)["0"].drift)
    assert monitor.record(2)["0"].drift == 0.0


def test_tags_say_what_is_experimental(model: nn.Module) -> None:
    class Writer:
        def __init__(self) -> None:
            self.rows: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.rows.append((tag, scalar_value, global_step))

    writer, monitor = Writer(), AdapterMonitor(model)
    monitor.log(writer, 3)
    tags = {tag for tag, _, _ in writer.rows}
    assert {"adapter/norm/0", "adapter/experimental_drift/0"} <= tags
    assert {step for _, _, step in writer.rows} == {3}


def test_tensorboard_reads_what_was_logged(model: nn.Module, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    monitor = AdapterMonitor(model)
    with SummaryWriter(str(tmp_path)) as writer:
        monitor.log(writer, 3)
        set_factors(model, model[0].lora_B * 1.5, model[0].lora_A)
        monitor.log(writer, 7)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    told = scalars(monitor.history[1][1])
    assert "adapter/experimental_drift/0" in events.Tags()["scalars"]
    rows = events.Scalars("adapter/norm/0")
    assert [row.step for row in rows] == [3, 7]
    assert rows[1].value == pytest.approx(1.5 * rows[0].value)
    for tag, value in told.items():
        assert events.Scalars(tag)[-1].value == pytest.approx(value, nan_ok=True), tag


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(AdapterStateError, match="no adapters"):
        AdapterMonitor(nn.Linear(2, 2))


def test_the_trainer_logs_records(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.body(x) - labels).square().mean()}

    torch.manual_seed(0)
    task = Task()
    gauge_ext.attach(task, gauge_ext.LoRAConfig(rank=2))
    data = [{"x": torch.randn(6), "labels": torch.randn(6)} for _ in range(16)]
    monitor = AdapterMonitor(task)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", logging_steps=100, use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        task, arguments, train_dataset=data, callbacks=[trainer_callback(monitor, every=2)]
    )
    trainer.train()
    assert [step for step, _ in monitor.history] == [0, 2, 4]
    logged = [row for row in trainer.state.log_history if "adapter/norm/body" in row]
    assert [row["step"] for row in logged] == [0, 2, 4]
    assert logged[-1]["adapter/norm/body"] == monitor.history[-1][1]["body"].norm
