"""Adapters with whole modules of their own, to PEFT and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_rows import ROWS
from safetensors.torch import load_file
from torch import nn

from gauge_ext import LoRAConfig, attach, set_adapters
from gauge_ext.checkpoint.many import load_adapters, save_adapters
from gauge_ext.errors import AdapterStateError
from gauge_ext.models import adapter_parameters
from gauge_ext.models.working import disable_adapters

peft = pytest.importorskip("peft", minversion="0.21")

SAVED = {"default": ["head"], "b": ["head"], "c": None}


def base() -> nn.Module:
    return next(row for row in ROWS if row.name == "modules_to_save").base()


def inputs() -> torch.Tensor:
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def randomize(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.4)


def same_files(first: Path, second: Path) -> bool:
    one, other = (load_file(at / "adapter_model.safetensors") for at in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def with_peft() -> nn.Module:
    """PEFT's model with all three, and random numbers in all their parameters."""
    configs = {
        name: peft.LoraConfig(r=2, lora_alpha=6, target_modules=["up"], modules_to_save=saved)
        for name, saved in SAVED.items()
    }
    model = peft.get_peft_model(base(), configs["default"])
    for name in ("b", "c"):
        model.add_adapter(name, configs[name])
    own = ("lora_A", "lora_B", "modules_to_save")
    randomize([p for name, p in model.named_parameters() if any(part in name for part in own)])
    return model.eval()


def test_peft_writes_and_we_read(tmp_path: Path) -> None:
    theirs = with_peft()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapters(base(), tmp_path / "theirs")
    for name in SAVED:
        theirs.set_adapter(name)
        set_adapters(ours, name)
        assert (theirs(inputs()) - base()(inputs())).abs().max() > 0.01
        torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=0, atol=1e-12)
    with theirs.disable_adapter(), disable_adapters(ours):
        torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=0, atol=1e-12)
    # Both refuse two with the module, and both take one with it and one without.
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        theirs.base_model.set_adapter(["default", "b"])
    with pytest.raises(AdapterStateError, match="'head' can be that of one adapter at a time"):
        set_adapters(ours, ["default", "b"])
    theirs.base_model.set_adapter(["b", "c"])
    set_adapters(ours, ["b", "c"])
    torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=0, atol=1e-12)
    written = save_adapters(ours, tmp_path / "ours")
    for name, folder in written.items():
        at = tmp_path / "theirs" / ("" if name == "default" else name)
        assert same_files(at, folder)


def test_we_write_and_peft_reads(tmp_path: Path) -> None:
    ours = base()
    for name, saved in SAVED.items():
        fields = {"rank": 2, "alpha": 6.0, "target_modules": ["up"], "modules_to_save": saved}
        attach(ours, LoRAConfig(**fields), name)
    randomize(adapter_parameters(ours))
    written = save_adapters(ours, tmp_path)
    # In another order: which was first on the model says nothing of the files.
    theirs = peft.PeftModel.from_pretrained(base(), written["c"], "c").eval()
    for name in ("b", "default"):
        theirs.load_adapter(written[name], name)
    for name in SAVED:
        theirs.set_adapter(name)
        set_adapters(ours, name)
        torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=0, atol=1e-12)
