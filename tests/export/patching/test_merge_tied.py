"""Folders of models whose head is tied to the embedding."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from merged_folders import tensors_of

import gauge_ext
from gauge_ext.errors import AdapterMismatchError
from gauge_ext.export import merge_checkpoint

transformers = pytest.importorskip("transformers")


def test_a_tied_head(base, llama, adapted, tmp_path):
    adapter = tmp_path / "head"
    gauge_ext.save_adapter(adapted(llama, target_modules=["lm_head", "q_proj"]), adapter)
    with pytest.raises(AdapterMismatchError, match=r"'lm_head'.*ties its output.*tie_word"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    single = tmp_path / "stored_twice"
    single.mkdir()
    shutil.copy(base / "config.json", single)
    tensors = tensors_of(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, single / "model.safetensors")
    with pytest.raises(
        AdapterMismatchError, match=r"'lm_head'.*without the merged weight.*tie_word"
    ):
        merge_checkpoint(single, adapter, tmp_path / "out")


@pytest.mark.parametrize("twice", [False, True], ids=["stored once", "stored twice"])
def test_an_adapter_that_ties_a_head_is_merged_once(twice, base, llama, adapted, tmp_path):
    fields = {"rank": 3, "alpha": 6.0, "ensure_weight_tying": True}
    model = gauge_ext.attach(
        llama, gauge_ext.LoRAConfig(target_modules=["embed_tokens", "q_proj"], **fields)
    )
    for parameter in gauge_ext.adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    adapter, before = gauge_ext.save_adapter(model, tmp_path / "tied"), tensors_of(base)
    if twice:
        shutil.rmtree(base)
        base.mkdir()
        llama.config.save_pretrained(base)
        copied = {**before, "lm_head.weight": before["model.embed_tokens.weight"].clone()}
        safetensors.torch.save_file(copied, base / "model.safetensors")
    own = model.model.embed_tokens
    expected = before["model.embed_tokens.weight"].double()
    expected += 2.0 * (own.lora_B.double() @ own.lora_A.double()).T.detach()
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    merged = {name for name in report.merged if "q_proj" not in name}
    named = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if twice else set())
    assert merged == named
    found = tensors_of(tmp_path / "out")
    for name in named:
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    # Beside one that changes the embedding alone, they would come apart.
    other = attached_to_the_table(adapted, llama, tmp_path / "other")
    with pytest.raises(AdapterMismatchError, match="ties (its output|to its (out|in)put)"):
        merge_checkpoint(base, [(adapter, 1.0), (other, 1.0)], tmp_path / "both")


def attached_to_the_table(adapted: Any, llama: torch.nn.Module, folder: Path) -> Path:
    gauge_ext.detach(llama)
    return gauge_ext.save_adapter(adapted(llama, target_modules=["embed_tokens"]), folder)
