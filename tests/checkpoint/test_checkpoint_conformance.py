"""Every row with PEFT and with ours from the same numbers, both against the sum by hand.

The oracle is not PEFT: where PEFT computes something else, the row says what, and the test that it
still does.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft_rows import ROWS
from row_by_hand import Row, run
from torch import nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint import adapter_sha256, load_adapter, read_adapter, save_adapter
from gauge_ext.models import adapter_parameters, attach, detach, merge, merged_copy, unmerge

peft = pytest.importorskip("peft", minversion="0.21")

pytestmark = [
    pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name),
    # torchao's notes on its own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
    # PEFT's notes on its own workings: fan_in_fan_out, embeddings, a bias that cannot be merged.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # PEFT holds patterns against modules alone, though it heeds them for parameters.
    pytest.mark.filterwarnings(r"ignore:The following \w+_pattern keys:RuntimeWarning"),
]


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.normal_(std=0.4)
    return model.eval()


def with_peft(row: Row, folder: Path) -> nn.Module:
    fields: dict[str, Any] = copy.deepcopy(row.fields)
    model = randomized(peft.get_peft_model(row.base(), peft.LoraConfig(**fields)))
    model.save_pretrained(folder)
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "adapter_config.json").read_text())
    for name in ("target_modules", "modules_to_save", "target_parameters"):  # sets, in PEFT
        found[name] = sorted(found[name]) if isinstance(found[name], list) else found[name]
    return found


def test_peft_writes_and_we_read(row: Row, tmp_path: Path) -> None:
    theirs = with_peft(row, tmp_path / "theirs")
    base, inputs = row.base(), row.inputs()
    expected = run(row.expected(base, tensors_of(tmp_path / "theirs")), inputs)
    plain = run(base, inputs)
    assert (expected - plain).abs().max() > 0.01
    model = load_adapter(row.base(), tmp_path / "theirs")
    torch.testing.assert_close(run(model, inputs), expected, rtol=0, atol=row.tolerance)
    if row.peft_is.startswith("fails"):
        with pytest.raises(RuntimeError):
            run(theirs, inputs)
    elif row.peft_is:
        assert (run(theirs, inputs) - expected).abs().max() > 1e-3
    else:
        torch.testing.assert_close(run(theirs, inputs), expected, rtol=0, atol=row.tolerance)
    # Merged, copied, unmerged and taken off.
    torch.testing.assert_close(
        run(merged_copy(model), inputs), expected, rtol=0, atol=row.tolerance
    )
    merge(model)
    torch.testing.assert_close(run(model, inputs), expected, rtol=0, atol=row.tolerance)
    torch.testing.assert_close(run(detach(unmerge(model)), inputs), plain, rtol=0, atol=0)


def test_we_write_what_peft_writes(row: Row, tmp_path: Path) -> None:
    with_peft(row, tmp_path / "theirs")
    model = load_adapter(row.base(), tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    theirs, ours = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert torch.equal(ours[key], value), key
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    assert adapter_sha256(model) == read_adapter(tmp_path / "ours").sha256


def test_we_write_and_peft_reads(row: Row, tmp_path: Path) -> None:
    model = randomized(attach(row.base(), LoRAConfig(**row.our_fields())))
    assert all(p.requires_grad for p in adapter_parameters(model))
    save_adapter(model, tmp_path)
    inputs = row.inputs()
    expected = run(row.expected(row.base(), tensors_of(tmp_path)), inputs)
    torch.testing.assert_close(run(model, inputs), expected, rtol=0, atol=row.tolerance)
    theirs = peft.PeftModel.from_pretrained(row.base(), tmp_path).eval()
    if not row.peft_is:
        torch.testing.assert_close(run(theirs, inputs), expected, rtol=0, atol=row.tolerance)
