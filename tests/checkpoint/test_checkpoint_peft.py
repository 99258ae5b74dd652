"""PEFT writes and we read; we write and PEFT reads; the outputs are those computed by hand."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint import load_adapter, read_adapter, save_adapter
from gauge_ext.errors import AdapterFormatError, ConfigError
from gauge_ext.models import adapter_parameters, attach, detach, lora_layers, merge

peft = pytest.importorskip("peft", minversion="0.21")

Hand = Callable[..., nn.Module]
Make = Callable[..., Path]


def rank_of(name: str) -> int:
    return 4 if "query" in name else 2 if name.endswith("layer.1.output.dense") else 8


def alpha_of(name: str) -> float:
    return 5.0 if "key" in name else 16.0


# name -> (PEFT's fields, the scaling of each module by hand)
CASES: dict[str, tuple[dict[str, Any], Callable[[str], float]]] = {
    "plain": ({"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}, lambda _: 2.0),
    "rslora": (
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["query", "dense"]},
        lambda _: 3.0,
    ),
    "patterns": (
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["query", "key", "dense"],
            "exclude_modules": ["pooler.dense"],
            "rank_pattern": {"query": 4, r"layer\.1\.output\.dense": 2},
            "alpha_pattern": {".*key": 5},
        },
        lambda name: alpha_of(name) / rank_of(name),
    ),
    "patterns with rslora": (
        {
            "r": 8,
            "lora_alpha": 16,
            "use_rslora": True,
            "target_modules": r".*\.(query|key|dense)",
            "rank_pattern": {"query": 4, "layer.1.output.dense": 2},
            "alpha_pattern": {".*key": 5},
        },
        lambda name: alpha_of(name) / math.sqrt(rank_of(name)),
    ),
    "expression": (
        {"r": 2, "lora_alpha": 3, "target_modules": r"encoder\.layer\.1\..*\.(query|dense)"},
        lambda _: 1.5,
    ),
    "all-linear": ({"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}, lambda _: 1.5),
    "layers": (
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["query", "dense"],
            "layers_to_transform": [1],
            "layers_pattern": "layer",
            "exclude_modules": ["pooler.dense"],
        },
        lambda _: 1.5,
    ),
    "inits": (
        {"r": 2, "lora_alpha": 3, "target_modules": ["query"], "init_lora_weights": "orthogonal"},
        lambda _: 1.5,
    ),
    "task": (
        {"r": 2, "lora_alpha": 3, "target_modules": ["key"], "task_type": "FEATURE_EXTRACTION"},
        lambda _: 1.5,
    ),
}


def hidden(model: nn.Module, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(token_ids).last_hidden_state


@pytest.mark.parametrize("case", CASES)
def test_peft_writes_and_we_read(
    case: str, bert: nn.Module, token_ids: Tensor, make_peft_adapter: Make, merge_by_hand: Hand
) -> None:
    fields, scaling = CASES[case]
    folder = make_peft_adapter(bert, **fields)
    expected = hidden(merge_by_hand(bert, folder, scaling), token_ids)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bert), folder).eval()
    torch.testing.assert_close(hidden(theirs, token_ids), expected, rtol=1e-5, atol=1e-5)
    before = hidden(bert, token_ids)
    load_adapter(bert, folder)
    assert (hidden(bert, token_ids) - before).abs().max() > 0.05
    torch.testing.assert_close(hidden(bert, token_ids), expected, rtol=1e-5, atol=1e-5)
    merge(bert)
    torch.testing.assert_close(hidden(bert, token_ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_we_write_and_peft_reads(
    case: str, bert: nn.Module, token_ids: Tensor, merge_by_hand: Hand, tmp_path: Path
) -> None:
    fields, scaling = CASES[case]
    names = {"r": "rank", "lora_alpha": "alpha"}
    ours = {names.get(name, name): value for name, value in fields.items()}
    ours.pop("init_lora_weights", None)
    base = copy.deepcopy(bert)
    attach(bert, LoRAConfig(**ours))
    for parameter in adapter_parameters(bert):
        nn.init.normal_(parameter, std=0.3)
    save_adapter(bert, tmp_path)
    expected = hidden(merge_by_hand(base, tmp_path, scaling), token_ids)
    torch.testing.assert_close(hidden(bert, token_ids), expected, rtol=1e-5, atol=1e-5)
    # PEFT warns of fields that it does not know and of weights that are missing.
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(hidden(theirs, token_ids), expected, rtol=1e-5, atol=1e-5)
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert adapted == set(lora_layers(bert))
    torch.testing.assert_close(
        hidden(theirs.merge_and_unload(), token_ids), expected, rtol=1e-5, atol=1e-5
    )


def test_the_same_adapter_is_the_same_file(bert: nn.Module, tmp_path: Path) -> None:
    """Ours and PEFT's files hold the same keys, dtypes, metadata and config fields."""
    theirs = peft.get_peft_model(
        copy.deepcopy(bert), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query"])
    )
    theirs.save_pretrained(tmp_path / "theirs")
    attach(bert, LoRAConfig(rank=4, alpha=8, target_modules=["query"]))
    save_adapter(bert, tmp_path / "ours")
    described = []
    for name in ("theirs", "ours"):
        folder = tmp_path / name
        with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            described.append(
                (
                    file.metadata(),
                    {key: (t.shape, t.dtype) for key, t in tensors.items()},
                    json.loads((folder / "adapter_config.json").read_text()),
                    sorted(p.name for p in folder.iterdir()),
                )
            )
    assert described[0] == described[1]


def test_a_bfloat16_base_with_float32_adapters(
    bert: nn.Module, token_ids: Tensor, make_peft_adapter: Make, merge_by_hand: Hand, tmp_path: Path
) -> None:
    bert = bert.to(torch.bfloat16)
    folder = make_peft_adapter(bert, r=4, lora_alpha=8, target_modules=["query", "dense"])
    stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}
    load_adapter(bert, folder)
    exact = merge_by_hand(copy.deepcopy(bert).float(), folder, 2.0)
    expected = hidden(exact, token_ids)
    theirs = hidden(
        peft.PeftModel.from_pretrained(detached(bert), folder).eval(), token_ids
    ).float()
    ours = hidden(bert, token_ids).float()
    noise = (theirs - expected).abs().max()
    assert (ours - expected).abs().max() <= 1.5 * noise + 1e-2
    save_adapter(bert, tmp_path / "again")
    again = safetensors.torch.load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], stored[key]) for key in stored)
    merge(bert)
    by_hand = merge_by_hand(detached(bert), folder, 2.0)
    for name, layer in lora_layers(bert).items():
        # By hand it is summed in float64; at a tie of the two roundings one unit may differ.
        expected_weight = by_hand.get_submodule(name).weight
        unequal = layer.weight != expected_weight
        assert unequal.float().mean() < 1e-3


def detached(model: nn.Module) -> nn.Module:
    from gauge_ext.models import detach

    return detach(copy.deepcopy(model))


def test_a_bfloat16_file_is_widened_exactly(
    bert: nn.Module, make_peft_adapter: Make, token_ids: Tensor, merge_by_hand: Hand
) -> None:
    folder = make_peft_adapter(bert, r=4, lora_alpha=8, target_modules=["query"])
    file = folder / "adapter_model.safetensors"
    stored = {k: t.to(torch.bfloat16) for k, t in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(stored, file)
    expected = hidden(merge_by_hand(bert, folder, 2.0), token_ids)
    load_adapter(bert, folder)
    assert {p.dtype for p in adapter_parameters(bert)} == {torch.float32}
    torch.testing.assert_close(hidden(bert, token_ids), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_with_a_name_lies_in_a_subfolder(
    bert: nn.Module, token_ids: Tensor, make_peft_adapter: Make, merge_by_hand: Hand
) -> None:
    folder = make_peft_adapter(bert, adapter_name="summer", r=4, target_modules=["query"])
    with pytest.raises(AdapterFormatError) as caught:
        load_adapter(bert, folder)
    assert f"There are adapters below it: {folder / 'summer'}." in str(caught.value)
    expected = hidden(merge_by_hand(bert, folder / "summer", 2.0), token_ids)
    load_adapter(bert, folder / "summer")
    torch.testing.assert_close(hidden(bert, token_ids), expected, rtol=1e-5, atol=1e-5)


def test_keys_without_the_prefix_are_read(
    bert: nn.Module, token_ids: Tensor, make_peft_adapter: Make, merge_by_hand: Hand
) -> None:
    folder = make_peft_adapter(bert, r=4, lora_alpha=4, target_modules=["query"])
    expected = hidden(merge_by_hand(bert, folder, 1.0), token_ids)
    file = folder / "adapter_model.safetensors"
    stored = safetensors.torch.load_file(file)
    safetensors.torch.save_file(
        {key.removeprefix("base_model.model."): t for key, t in stored.items()}, file
    )
    load_adapter(bert, folder)
    torch.testing.assert_close(hidden(bert, token_ids), expected, rtol=1e-5, atol=1e-5)


def test_a_causal_model_with_a_tied_head(
    llama: nn.Module, token_ids: Tensor, make_peft_adapter: Make, merge_by_hand: Hand
) -> None:
    folder = make_peft_adapter(
        llama, r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    by_hand = merge_by_hand(llama, folder, 2.0)
    load_adapter(llama, folder)
    with torch.no_grad():
        expected = by_hand(token_ids).logits
        torch.testing.assert_close(llama(token_ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_really_writes_and_we_lack_is_refused_by_name(
    bert: nn.Module, make_peft_adapter: Make, fields: dict[str, Any], words: str
) -> None:
    folder = make_peft_adapter(bert, r=2, target_modules=["query"], **fields)
    with pytest.raises(ConfigError) as caught:
        read_adapter(folder)
    assert words in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of what is tested here
def test_a_tied_embedding_is_adapted_alone_and_saved_along(
    llama: nn.Module, token_ids: Tensor, make_peft_adapter: Make, tmp_path: Path
) -> None:
    folder = make_peft_adapter(llama, r=2, lora_alpha=3, target_modules=["q_proj", "embed_tokens"])
    base = copy.deepcopy(llama)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()
    load_adapter(llama, folder)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(llama(token_ids).logits, theirs(token_ids).logits)
        merge(llama)
        torch.testing.assert_close(llama(token_ids).logits, theirs(token_ids).logits)
    # The head keeps the base's table, as long as the embedding is another one.
    assert torch.equal(llama.lm_head.weight, base.lm_head.weight)
    save_adapter(llama, tmp_path / "again")
    written, read = (
        safetensors.torch.load_file(path / "adapter_model.safetensors")
        for path in (tmp_path / "again", folder)
    )
    assert written.keys() == read.keys()
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in read)
    assert all(torch.equal(written[key], read[key]) for key in read)
    detach(llama)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


def test_every_field_that_peft_writes_by_default_is_read(
    bert: nn.Module, make_peft_adapter: Make
) -> None:
    folder = make_peft_adapter(bert, target_modules=["query"])
    raw = read_adapter(folder).raw_config
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert raw.keys() == fields - {"runtime_config"}
