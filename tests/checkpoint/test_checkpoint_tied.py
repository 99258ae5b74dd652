"""Files of adapters that an embedding and its output layer share (``ensure_weight_tying``)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft_tables import tied_llama
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig, LoRALinear
from gauge_ext.adapters.embedding import LoRAEmbedding
from gauge_ext.adapters.tied import TiedLinear
from gauge_ext.checkpoint import (
    adapter_sha256,
    load_adapter,
    read_adapter,
    regauge,
    save_adapter,
    write_adapter,
)
from gauge_ext.checkpoint.many import load_adapters, save_adapters, swap_adapter
from gauge_ext.errors import AdapterMismatchError, TargetError
from gauge_ext.models import adapter_parameters, attach, merge
from gauge_ext.models.working import set_adapters

IDS = torch.arange(9).view(3, 3)
HEAD, TABLE = "lm_head", "model.embed_tokens"


def base() -> nn.Module:
    torch.manual_seed(0)
    return tied_llama().double().eval()


def adapted(*targets: str, seed: int = 1, **fields: object) -> nn.Module:
    named = {"rank": 2, "alpha": 6.0, "target_modules": targets, "ensure_weight_tying": True}
    model = attach(base(), LoRAConfig(**named | fields))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.4)
    return model


def by_hand(model: nn.Module, scaling: float = 3.0) -> Tensor:
    """The base with the update of the table in the one weight of both."""
    plain, own = base(), model.get_submodule(TABLE)
    with torch.no_grad():
        plain.model.embed_tokens.weight += scaling * (own.lora_B @ own.lora_A).T
        for path, layer in model.named_modules():
            if isinstance(layer, LoRALinear):
                plain.get_submodule(path).weight += scaling * layer.lora_B @ layer.lora_A
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    return plain(IDS).logits


@pytest.mark.parametrize("portable", [False, True], ids=["as it is", "portable"])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"]], ids=str)
def test_both_libraries_read_it(targets: list[str], portable: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(*targets)
    expected = by_hand(model)
    save_adapter(model, tmp_path, portable=portable)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    of_head = {key for key in tensors if f".{HEAD}.lora" in key}
    assert len(of_head) == 2
    ours = load_adapter(base(), tmp_path)
    assert isinstance(ours.lm_head, TiedLinear)
    torch.testing.assert_close(ours(IDS).logits, expected)
    merge(ours)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    torch.testing.assert_close(ours(IDS).logits, expected)
    if not portable:
        assert adapter_sha256(model) == adapter_sha256(ours) == read_adapter(tmp_path).sha256
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of save_embedding_layers, and of torch's views
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
        torch.testing.assert_close(theirs(IDS).logits, expected)


class Named(nn.Module):
    """Tied layers under names that PEFT does not know."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.up, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        self.out.weight = self.emb.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(torch.tanh(self.up(self.emb(x))))
        return found


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
def test_peft_gets_both_where_it_ties_nothing_itself(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = LoRAConfig(rank=2, target_modules=["out", "up"], ensure_weight_tying=True)
    model = attach(Named(), config)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.4)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(written["target_modules"]) == {"emb", "up", "out"}
    theirs = peft.PeftModel.from_pretrained(Named(), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS), model(IDS))
    ours = load_adapter(Named(), tmp_path)
    assert isinstance(ours.out, TiedLinear)
    torch.testing.assert_close(ours(IDS), model(IDS))


def test_a_base_that_is_not_tied_gets_two_adapters(tmp_path: Path) -> None:
    model = adapted("embed_tokens")
    save_adapter(model, tmp_path, save_embedding_layers=False)
    untied = base()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    load_adapter(untied, tmp_path)
    assert type(untied.lm_head).__name__ == "LoRALinear"
    torch.testing.assert_close(untied(IDS).logits, by_hand(model))


def test_other_factors_at_the_other_end_are_refused(tmp_path: Path) -> None:
    save_adapter(adapted("embed_tokens"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[f"base_model.model.{HEAD}.lora_A.weight"][0, 0] += 1.0
    safetensors.torch.save_file(tensors, file)
    model = base()
    with pytest.raises(AdapterMismatchError, match=r"for 'lm_head' is not that of 'model\.embed_"):
        load_adapter(model, tmp_path)
    assert type(model.lm_head) is nn.Linear
    text = (tmp_path / "adapter_config.json").read_text()
    # As two, whose targets have to be named both.
    said = json.loads(text) | {"ensure_weight_tying": False}
    said["target_modules"] = ["embed_tokens", "lm_head"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    assert type(load_adapter(model, tmp_path).lm_head).__name__ == "LoRALinear"


def test_values_exchanged_in_place_and_several(tmp_path: Path) -> None:
    first, second = adapted("embed_tokens", "q_proj"), adapted("lm_head", "q_proj", seed=2)
    for name, model in (("first", first), ("second", second)):
        save_adapter(model, tmp_path / name)
    expected = by_hand(second)
    swap_adapter(first, tmp_path / "second")
    torch.testing.assert_close(first(IDS).logits, expected)
    load_adapter(first, tmp_path / "first")  # onto the adapter that is there
    several = load_adapters(base(), {name: tmp_path / name for name in ("first", "second")})
    set_adapters(several, "second")
    torch.testing.assert_close(several(IDS).logits, expected)
    again = load_adapters(base(), save_adapters(several, tmp_path / "both"))
    set_adapters(again, "second")
    torch.testing.assert_close(again(IDS).logits, expected)
    untied = adapted("embed_tokens", seed=3, ensure_weight_tying=False)
    with pytest.raises(TargetError, match="are not tied"):
        load_adapter(untied, tmp_path / "second", name="second")
    assert isinstance(untied.model.embed_tokens, LoRAEmbedding)
    assert untied.model.embed_tokens.names == ("default",)


def test_a_gauge_keeps_them_one(tmp_path: Path) -> None:
    model = adapted("embed_tokens", "q_proj")
    save_adapter(model, tmp_path / "before")
    found = regauge(tmp_path / "before", "svd")
    write_adapter(found.config, found.tensors, tmp_path / "after")
    again = load_adapter(base(), tmp_path / "after")
    assert isinstance(again.lm_head, TiedLinear)
    assert not torch.equal(again.model.embed_tokens.lora_A, model.model.embed_tokens.lora_A)
    torch.testing.assert_close(again(IDS).logits, by_hand(model))
