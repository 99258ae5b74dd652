"""The digest changes with what an adapter computes, and with nothing else."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint import (
    LoRAPair,
    adapter_digest,
    adapter_sha256,
    load_adapter,
    read_adapter,
    save_adapter,
)
from gauge_ext.errors import AdapterStateError
from gauge_ext.models import adapter_parameters, attach, detach, merge

CONFIG = LoRAConfig(rank=2, alpha=4, target_modules=["q", "v"])


def pairs(dtype: torch.dtype = torch.float32) -> dict[str, LoRAPair]:
    def factors(scale: int) -> LoRAPair:
        a = torch.arange(6, dtype=dtype).reshape(2, 3) * scale
        return LoRAPair(a, torch.arange(8, dtype=dtype).reshape(4, 2) - scale)

    return {"a.q": factors(1), "a.v": factors(3)}


def test_by_hand() -> None:
    digest = hashlib.sha256()
    for name, pair in pairs().items():
        digest.update(name.encode() + b"\0" + (2.0).hex().encode() + b"\0")
        for factor in (pair.lora_A, pair.lora_B):
            digest.update(str(tuple(factor.shape)).encode() + b"\0")
            digest.update(struct.pack(f"<{factor.numel()}d", *factor.flatten().tolist()))
    assert adapter_digest(CONFIG, pairs()) == digest.hexdigest()


def test_what_matters_changes_it() -> None:
    reference = adapter_digest(CONFIG, pairs())
    moved = pairs()
    moved["a.v"].lora_B[3, 1] += 1e-6
    swapped = {"a.q": pairs()["a.v"], "a.v": pairs()["a.q"]}
    reshaped = pairs()
    reshaped["a.q"] = LoRAPair(
        reshaped["a.q"].lora_A.reshape(3, 2), reshaped["a.q"].lora_B.reshape(2, 4)
    )
    others = {
        adapter_digest(CONFIG, moved),
        adapter_digest(CONFIG, swapped),
        adapter_digest(CONFIG, reshaped),
        adapter_digest(CONFIG, {"a.q": pairs()["a.q"]}),
        adapter_digest(replace(CONFIG, alpha=5.0), pairs()),
        adapter_digest(replace(CONFIG, use_rslora=True), pairs()),
        adapter_digest(replace(CONFIG, alpha_pattern={"a.v": 5.0}), pairs()),
        reference,
    }
    assert len(others) == 8


def test_what_does_not_matter_leaves_it() -> None:
    reference = adapter_digest(CONFIG, pairs())
    backwards = dict(reversed(pairs().items()))
    for config, tensors in (
        (CONFIG, backwards),
        (CONFIG, pairs(torch.bfloat16)),  # these values are exact in every dtype
        (CONFIG, pairs(torch.float64)),
        (replace(CONFIG, dropout=0.1, task_type="CAUSAL_LM", extra={"x": 1}), pairs()),
        (replace(CONFIG, target_modules=".*"), pairs()),
        (CONFIG, {n: LoRAPair(p.lora_A.T.contiguous().T, p.lora_B) for n, p in pairs().items()}),
    ):
        assert adapter_digest(config, tensors) == reference


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_model_and_folder_agree(mlp: nn.Module, tmp_path: Path, stored: torch.dtype) -> None:
    attach(mlp, LoRAConfig(rank=3, alpha=5, use_rslora=True, adapter_dtype=stored))
    for parameter in adapter_parameters(mlp):
        nn.init.normal_(parameter)
    expected = adapter_sha256(mlp)
    save_adapter(mlp, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").sha256 == expected
    merge(mlp)
    assert adapter_sha256(mlp) == expected
    detach(mlp)
    # bfloat16 factors are widened to float32 here, which changes no value.
    load_adapter(mlp, tmp_path / "adapter")
    assert adapter_sha256(mlp) == expected


def test_a_model_without_adapters_has_none(mlp: nn.Module) -> None:
    with pytest.raises(AdapterStateError, match="no adapters are attached"):
        adapter_sha256(mlp)


def test_of_a_pipeline_it_is_that_of_the_part_the_adapter_is_saved_from(tmp_path: Path) -> None:
    encoder = nn.Sequential(nn.Linear(3, 4))
    attach(encoder, LoRAConfig(rank=2))
    pipeline = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(4, 2)})
    save_adapter(encoder, tmp_path / "adapter")
    assert adapter_sha256(pipeline) == read_adapter(tmp_path / "adapter").sha256
