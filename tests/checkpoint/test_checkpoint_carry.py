"""Whole adapters along a path of checkpoints and between bases, judged by what models compute."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gauge_ext import load_adapter
from gauge_ext.checkpoint import (
    AdapterCheckpoint,
    LoRAPair,
    assemble,
    describe_pairs,
    lift_adapters,
    move_adapter,
    read_adapter,
    rebase_adapter,
    write_adapter,
)
from gauge_ext.checkpoint.structure import hidden_spaces
from gauge_ext.checkpoint.weights import StateWeights, open_weights
from gauge_ext.errors import AdapterFormatError, AdapterMismatchError, ConfigError, GeometryError
from gauge_ext.geometry import HiddenSpace

MakePeftAdapter = Callable[..., Path]


def permuted(model: nn.Module) -> nn.Module:
    """A Llama that computes the same, with hidden units permuted and value heads rotated."""
    twin = copy.deepcopy(model)
    config = twin.config
    size = config.hidden_size // config.num_attention_heads
    copies = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in twin.model.layers:
            order = torch.randperm(config.intermediate_size)
            for name in ("gate_proj", "up_proj"):
                getattr(layer.mlp, name).weight.copy_(getattr(layer.mlp, name).weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
            turns = [
                torch.linalg.qr(torch.randn(size, size)).Q
                for _ in range(config.num_key_value_heads)
            ]
            layer.self_attn.v_proj.weight.copy_(
                torch.block_diag(*turns) @ layer.self_attn.v_proj.weight
            )
            shared = torch.block_diag(*(turn for turn in turns for _ in range(copies)))
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight @ shared.T)
    return twin


def put(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("where", ["memory", "folders"])
def test_an_adapter_moved_to_a_reparametrised_base_computes_the_same(
    llama: nn.Module,
    token_ids: Tensor,
    make_peft_adapter: MakePeftAdapter,
    tmp_path: Path,
    where: str,
) -> None:
    folder = make_peft_adapter(llama, r=3, lora_alpha=5, target_modules="all-linear")
    twin = permuted(llama)
    adapter = read_adapter(folder)
    if where == "folders":
        moved, fits = move_adapter(adapter, put(llama, tmp_path / "a"), put(twin, tmp_path / "b"))
    else:
        moved, fits = move_adapter(adapter, llama, twin)
    assert len(fits) == 4
    assert all(fit.after < 1e-3 < 0.1 < fit.before for fit in fits)
    assert moved.config == adapter.config
    write_adapter(moved.config, moved.tensors, tmp_path / "moved")
    with torch.no_grad():
        torch.testing.assert_close(
            twin(token_ids).logits, llama(token_ids).logits, rtol=1e-4, atol=1e-4
        )
        base = llama(token_ids).logits
        expected = load_adapter(copy.deepcopy(llama), folder)(token_ids).logits
        there = load_adapter(copy.deepcopy(twin), tmp_path / "moved")(token_ids).logits
        unmoved = load_adapter(copy.deepcopy(twin), folder)(token_ids).logits
    effect = (expected - base).norm()
    assert (there - expected).norm() < 1e-4 * effect
    assert (unmoved - expected).norm() > 0.1 * effect


def test_the_hidden_spaces_of_the_usual_models(llama: nn.Module, bert: nn.Module) -> None:
    found = hidden_spaces(open_weights(llama))
    stem = "model.layers.0."
    assert (
        HiddenSpace((f"{stem}mlp.gate_proj", f"{stem}mlp.up_proj"), (f"{stem}mlp.down_proj",))
        in found
    )
    assert (
        HiddenSpace((f"{stem}self_attn.v_proj",), (f"{stem}self_attn.o_proj",), "rotation", 1)
        in found
    )
    assert len(found) == 4
    found = hidden_spaces(open_weights(bert))
    stem = "encoder.layer.1."
    assert HiddenSpace((f"{stem}intermediate.dense",), (f"{stem}output.dense",)) in found
    assert (
        HiddenSpace(
            (f"{stem}attention.self.value",), (f"{stem}attention.output.dense",), "rotation", 2
        )
        in found
    )
    assert len(found) == 4
    assert hidden_spaces(StateWeights(bert.state_dict())) == [
        space for space in found if space.kind == "permutation"
    ]


def test_a_model_of_another_make_needs_its_structure(mlp: nn.Module, tmp_path: Path) -> None:
    adapter = _adapter(mlp)
    with pytest.raises(ConfigError, match="no hidden space is known"):
        move_adapter(adapter, mlp, mlp)
    twin = copy.deepcopy(mlp)
    order = torch.randperm(20)
    with torch.no_grad():
        twin.up.weight.copy_(mlp.up.weight[order])
        twin.up.bias.copy_(mlp.up.bias[order])
        twin.block["down"].weight.copy_(mlp.block["down"].weight[:, order])
    moved, _ = move_adapter(adapter, mlp, twin, [HiddenSpace(("up",), ("block.down",))])
    assert torch.equal(moved.tensors["up"].lora_B, adapter.tensors["up"].lora_B[order])
    assert torch.equal(
        moved.tensors["block.down"].lora_A, adapter.tensors["block.down"].lora_A[:, order]
    )
    assert moved.sha256 != adapter.sha256
    with pytest.raises(GeometryError, match="cosine"):
        move_adapter(adapter, mlp, type(mlp)(), [HiddenSpace(("up",), ("block.down",))])


def _adapter(model: nn.Module, rank: int = 2, seed: int = 0) -> AdapterCheckpoint:
    """An adapter on all layers of an MLP, with scaling 1.5."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoRAPair(
            torch.randn(rank, part.in_features, generator=generator),
            torch.randn(part.out_features, rank, generator=generator),
        )
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear)
    }
    return assemble(pairs, scaling=1.5)


def product(adapter: AdapterCheckpoint, name: str) -> Tensor:
    pair = adapter.tensors[name]
    s = adapter.config.scaling_for(name)
    return s * pair.lora_B.double() @ pair.lora_A.double()


def test_another_model_is_refused(mlp: nn.Module, bert: nn.Module) -> None:
    adapter = _adapter(mlp)
    for run in (move_adapter, rebase_adapter):
        with pytest.raises(AdapterMismatchError, match="2 of the adapter's 2 modules"):
            run(adapter, bert, bert)
        with pytest.raises(AdapterMismatchError, match="has shape"):
            run(adapter, type(mlp)(hidden=30), mlp)
    with pytest.raises(AdapterMismatchError, match="no weight of"):
        rebase_adapter(adapter, mlp, bert)


def test_rebase_keeps_what_base_and_adapter_computed(mlp: nn.Module, tmp_path: Path) -> None:
    adapter = _adapter(mlp)
    new = copy.deepcopy(mlp)
    with torch.no_grad():
        new.up.weight += 0.1 * torch.randn(20, 1) @ torch.randn(1, 12)
    rebased, lost = rebase_adapter(adapter, mlp, new, rank=3)
    assert all(share < 1e-9 for share in lost.values())
    write_adapter(rebased.config, rebased.tensors, tmp_path / "rebased")
    x = torch.randn(4, 12)
    write_adapter(adapter.config, adapter.tensors, tmp_path / "adapter")
    torch.testing.assert_close(
        load_adapter(new, tmp_path / "rebased")(x),
        load_adapter(copy.deepcopy(mlp), tmp_path / "adapter")(x),
        rtol=1e-4,
        atol=1e-4,
    )


def test_rebase_onto_the_merged_base_leaves_nothing(mlp: nn.Module) -> None:
    mlp = mlp.double()
    adapter = _adapter(mlp)
    zero = {n: LoRAPair(p.lora_A * 0, p.lora_B) for n, p in adapter.tensors.items()}
    with pytest.raises(AdapterMismatchError, match="nothing is left to add"):
        rebase_adapter(assemble(zero), mlp, mlp)


def test_lifted_checkpoints_compute_the_same_in_one_frame(mlp: nn.Module) -> None:
    start = _adapter(mlp)
    step = _adapter(mlp, seed=1)
    path = []
    for k in range(5):
        pairs = {}
        for name, pair in start.tensors.items():
            gauge = torch.randn(2, 2) + 2 * torch.eye(2)
            b = pair.lora_B + 0.05 * k * step.tensors[name].lora_B
            a = pair.lora_A + 0.05 * k * step.tensors[name].lora_A
            pairs[name] = LoRAPair(gauge @ a, b @ torch.linalg.inv(gauge)) if k else pair
        path.append(assemble(pairs, scaling=1.5))
    lifted = lift_adapters(path)
    for before, after in zip(path, lifted, strict=True):
        assert after.config == before.config
        for name in before.tensors:
            torch.testing.assert_close(
                product(after, name), product(before, name), rtol=1e-4, atol=1e-4
            )
            drift = after.tensors[name].lora_A - start.tensors[name].lora_A
            assert drift.norm() < 0.5 * start.tensors[name].lora_A.norm()
    assert lift_adapters([]) == []


def test_a_path_needs_the_same_modules(mlp: nn.Module) -> None:
    adapter = _adapter(mlp)
    part = assemble({"up": adapter.tensors["up"]})
    with pytest.raises(AdapterMismatchError, match=r"'block\.down'"):
        lift_adapters([adapter, part])


def test_the_config_of_bare_factors_means_exactly_them(mlp: nn.Module) -> None:
    pairs = {
        name: LoRAPair(torch.ones(rank, 4), torch.ones(6, rank))
        for name, rank in {"a.up": 2, "b.up": 2, "b.down": 3, "x.b.down": 5}.items()
    }
    config = describe_pairs(pairs, scaling=0.5)
    assert config.rank == 2
    for name, pair in pairs.items():
        assert config.rank_for(name) == pair.lora_A.shape[0]
        assert config.scaling_for(name) == 0.5
    modules = [*pairs, "a.down", "a.side", "ab.up"]
    config = describe_pairs(pairs, modules=modules)
    assert {name for name in modules if config.selects(name)} == set(pairs)
    del pairs["x.b.down"], pairs["b.down"]
    assert describe_pairs(pairs, modules=[*pairs, "c.down"]).target_modules == ("up",)
    assert describe_pairs(pairs).target_modules == ("a.up", "b.up")
    single = describe_pairs({"up": pairs["a.up"]}, modules=["up", "b.up"])
    assert [name for name in ("up", "b.up") if single.selects(name)] == ["up"]
    assert not describe_pairs({"up": pairs["a.up"]}).selects("b.up")
    with pytest.raises(AdapterFormatError, match="at least one module"):
        describe_pairs({})
    like = dataclasses.replace(_adapter(mlp).config, task_type="CAUSAL_LM", use_rslora=True)
    assert describe_pairs(pairs, like=like).task_type == "CAUSAL_LM"
    assert describe_pairs(pairs, like=like).scaling_for("a.up") == 1.0
