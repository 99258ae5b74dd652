"""Trainer checkpoints that hold the adapters and nothing of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gauge_ext.checkpoint import load_adapter, save_adapter
from gauge_ext.errors import AdapterStateError


class AdapterCheckpoints:
    """A mixin for ``transformers.Trainer`` and its kin: checkpoints hold the adapters alone.

    Put it before the trainer's class; the model must have adapters (:func:`gauge_ext.attach`)::

        class AdapterTrainer(AdapterCheckpoints, Trainer):
            pass

    ``save_model`` and every ``checkpoint-N`` then write the adapter in PEFT's format, beside the
    optimizer's and the scheduler's state as ever, and ``resume_from_checkpoint`` and
    ``load_best_model_at_end`` read it back, exactly. The whole model is never written: at rank 8 a
    checkpoint has about a hundredth of its size.

    Raises:
        AdapterStateError: On saving: the model has no adapters, or the run is sharded by FSDP or
            DeepSpeed, whose own checkpoints are needed.
        AdapterMismatchError: On resuming: the checkpoint's adapter is for other layers or ranks.
        AdapterFormatError: On resuming: the folder holds no adapter that can be read.
    """

    model: nn.Module
    args: Any
    state: Any
    processing_class: Any

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if any(getattr(self, f"is_{kind}_enabled", False) for kind in ("fsdp", "deepspeed")):
            raise AdapterStateError(
                "a sharded model's adapters lie in pieces on all processes.",
                hint="Save with the sharding library, and the adapter after training with "
                "gauge_ext.save_adapter on the gathered model.",
            )
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        save_adapter(self.model, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_adapter(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapter(self.model, self.state.best_model_checkpoint)
