"""Whole adapters: PEFT writes them, we combine them, PEFT reads the result; sums by hand."""

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

from gauge_ext.checkpoint import LoRAPair, assemble, load_adapter, read_adapter
from gauge_ext.errors import AdapterMismatchError, ConfigError, GeometryError, WriteError
from gauge_ext.merging import combine
from gauge_ext.merging.recipe import MEANS

peft = pytest.importorskip("peft", minversion="0.21")

Make = Callable[..., Path]

# PEFT's fields of three adapters, and the scaling of each module by hand
KINDS: dict[str, tuple[dict[str, Any], Callable[[str], float]]] = {
    "plain": ({"r": 4, "lora_alpha": 10, "target_modules": ["query", "value"]}, lambda _: 2.5),
    "rslora": (
        {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["query", "value"]},
        lambda _: 3 / math.sqrt(2),
    ),
    "patterns": (
        {
            "r": 3,
            "lora_alpha": 6,
            "target_modules": ["query", "intermediate.dense"],
            "rank_pattern": {"query": 5},
            "alpha_pattern": {"layer.1.intermediate.dense": 1},
        },
        lambda name: (1 / 3 if "1.inter" in name else 2.0) if "dense" in name else 6 / 5,
    ),
}
WEIGHTS = {"plain": 0.5, "rslora": -0.75, "patterns": 1.25}


def make_all(model: nn.Module, make: Make) -> dict[str, Path]:
    return {name: make(model, name=name, **fields) for name, (fields, _) in KINDS.items()}


def updates_by_hand(folder: Path, scaling: Callable[[str], float]) -> dict[str, Tensor]:
    """s·B·A of each module, straight from the file."""
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            path = key.removesuffix(".lora_A.weight")
            a, b = tensors[key].double(), tensors[f"{path}.lora_B.weight"].double()
            name = path.removeprefix("base_model.model.")
            found[name] = scaling(name) * (b @ a)
    return found


def sum_by_hand(folders: dict[str, Path], weights: dict[str, float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for kind, folder in folders.items():
        for name, update in updates_by_hand(folder, KINDS[kind][1]).items():
            total[name] = total.get(name, torch.zeros_like(update)) + weights[kind] * update
    return total


def with_updates(model: nn.Module, updates: dict[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(model)
    for name, update in updates.items():
        layer = twin.get_submodule(name)
        layer.weight = nn.Parameter((layer.weight.double() + update).float(), requires_grad=False)
    return twin


def hidden(model: nn.Module, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(token_ids).last_hidden_state


def test_adapters_of_different_ranks_and_scalings_add_up(
    bert: nn.Module, token_ids: Tensor, make_peft_adapter: Make, tmp_path: Path
) -> None:
    folders = make_all(bert, make_peft_adapter)
    combined = combine([read_adapter(f) for f in folders.values()], list(WEIGHTS.values()))
    expected_updates = sum_by_hand(folders, WEIGHTS)
    assert [layer.name for layer in combined.layers] == sorted(expected_updates)
    for layer in combined.layers:
        expected = expected_updates[layer.name]
        assert layer.shape == tuple(expected.shape)
        assert layer.deviation < 1e-6
        assert math.isclose(layer.norm, float(expected.norm()), rel_tol=1e-5)
        assert layer.rank <= sum(layer.ranks)
    combined.save(tmp_path / "combined")
    expected = hidden(with_updates(bert, expected_updates), token_ids)
    assert (expected - hidden(bert, token_ids)).abs().max() > 0.05

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bert), tmp_path / "combined")
    torch.testing.assert_close(hidden(theirs, token_ids), expected, rtol=1e-4, atol=1e-4)
    load_adapter(bert, tmp_path / "combined")
    torch.testing.assert_close(hidden(bert, token_ids), expected, rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_what_was_combined(
    bert: nn.Module, make_peft_adapter: Make, tmp_path: Path
) -> None:
    folders = make_all(bert, make_peft_adapter)
    combined = combine([read_adapter(f) for f in folders.values()], [1.0, 1.0, 1.0], rank=3)
    assert combined.save(tmp_path / "new" / "combined") == tmp_path / "new" / "combined"
    saved = read_adapter(tmp_path / "new" / "combined")
    assert saved.sha256 == combined.checkpoint.sha256
    for layer in combined.layers:
        assert saved.config.scaling_for(layer.name) == 1.0
        assert saved.config.rank_for(layer.name) == layer.rank == 3


def regauge(folder: Path, condition: float) -> None:
    """Put every module of a saved adapter into another gauge, on disk."""
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        r = tensors[key].shape[0]
        q, p = (
            torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
            for _ in range(2)
        )
        half = 0.5 * math.log10(condition)
        gauge = q @ torch.diag(torch.logspace(-half, half, r, dtype=torch.float64)) @ p
        tensors[other] = (tensors[other].double() @ gauge.inverse()).float().contiguous()
        tensors[key] = (gauge @ tensors[key].double()).float()
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["exact", *MEANS])
def test_an_adapter_and_its_regauged_copy_average_to_themselves_and_not_in_pefts_linear(
    method: str, bert: nn.Module, make_peft_adapter: Make
) -> None:
    fields, scaling = KINDS["plain"]
    first = make_peft_adapter(bert, name="first", **fields)
    second = make_peft_adapter(bert, name="second", **fields)
    for file in first.iterdir():
        (second / file.name).write_bytes(file.read_bytes())
    regauge(second, 30.0)
    expected = updates_by_hand(first, scaling)

    def error(updates: dict[str, Tensor]) -> float:
        gap = math.hypot(*(float((updates[n] - x).norm()) for n, x in expected.items()))
        return gap / math.hypot(*(float(x.norm()) for x in expected.values()))

    ours = combine([read_adapter(first), read_adapter(second)], [0.5, 0.5], method=method)
    tensors = ours.checkpoint.tensors
    assert error({n: p.lora_B.double() @ p.lora_A.double() for n, p in tensors.items()}) < 1e-5
    assert ours.deviation < 1e-5

    model = peft.PeftModel.from_pretrained(copy.deepcopy(bert), first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    for kind, least, most in (("svd", 0.0, 1e-4), ("linear", 0.5, math.inf)):
        model.add_weighted_adapter(["first", "second"], [0.5, 0.5], kind, combination_type=kind)
        theirs = {
            name: model.base_model.model.get_submodule(name).get_delta_weight(kind).double()
            for name in expected
        }
        assert least <= error(theirs) <= most


def test_a_rank_gives_what_pefts_svd_gives(bert: nn.Module, make_peft_adapter: Make) -> None:
    fields, _ = KINDS["plain"]
    folders = [make_peft_adapter(bert, name=name, **fields) for name in ("first", "second")]
    model = peft.PeftModel.from_pretrained(copy.deepcopy(bert), folders[0], adapter_name="first")
    model.load_adapter(folders[1], adapter_name="second")
    model.add_weighted_adapter(
        ["first", "second"], [0.3, 0.9], "both", combination_type="svd", svd_rank=3
    )
    ours = combine([read_adapter(folder) for folder in folders], [0.3, 0.9], rank=3)
    for name, pair in ours.checkpoint.tensors.items():
        theirs = model.base_model.model.get_submodule(name).get_delta_weight("both")
        torch.testing.assert_close(pair.lora_B @ pair.lora_A, theirs, rtol=1e-4, atol=1e-5)


def test_one_adapter_is_compressed(bert: nn.Module, make_peft_adapter: Make) -> None:
    folder = make_peft_adapter(bert, **KINDS["plain"][0])
    found = combine([read_adapter(folder)], [1.0], energy=0.6)
    for name, update in updates_by_hand(folder, KINDS["plain"][1]).items():
        squares = torch.linalg.svdvals(update).square()
        layer = next(layer for layer in found.layers if layer.name == name)
        kept = squares[: layer.rank].sum() / squares.sum()
        assert float(kept) >= 0.6
        assert math.isclose(layer.deviation, math.sqrt(1 - float(kept)), rel_tol=1e-4)
    total = math.hypot(*(layer.norm for layer in found.layers))
    assert math.isclose(found.norm, total)
    assert 0.0 < found.deviation < math.sqrt(0.4) + 1e-6


@pytest.mark.parametrize("method", ["ties", "dare_ties", "knots"])
def test_sparse_merges_write_adapters(
    method: str, bert: nn.Module, make_peft_adapter: Make, tmp_path: Path
) -> None:
    folders = make_all(bert, make_peft_adapter)
    adapters = [read_adapter(folder) for folder in folders.values()]
    found = combine(adapters, [1.0, 0.5, 0.5], method=method, density=0.5, rank=4, seed=1)
    again = combine(adapters, [1.0, 0.5, 0.5], method=method, density=0.5, rank=4, seed=1)
    assert found.checkpoint.sha256 == again.checkpoint.sha256
    found.save(tmp_path / "merged")
    load_adapter(bert, tmp_path / "merged")
    report = found.to_dict()
    assert report["method"] == method
    assert 0.0 < report["totals"]["deviation"] < 2.0
    json.dumps(report, allow_nan=False)


def test_a_mean_needs_every_module_in_every_adapter(
    bert: nn.Module, make_peft_adapter: Make
) -> None:
    folders = make_all(bert, make_peft_adapter)
    adapters = [read_adapter(folders["plain"]), read_adapter(folders["patterns"])]
    with pytest.raises(AdapterMismatchError, match=r"no factors in adapter 2 .*'bures'"):
        combine(adapters, [0.5, 0.5], method="bures")


def test_unrelated_adapters_have_no_mean(bert: nn.Module, make_peft_adapter: Make) -> None:
    fields, _ = KINDS["plain"]
    folders = [make_peft_adapter(bert, name=n, **{**fields, "r": 1}) for n in ("one", "two")]
    with pytest.raises(GeometryError, match=r"^encoder\.\S+: adapters 1 and 2 are aligned to"):
        combine([read_adapter(f) for f in folders], [0.5, 0.5], method="bures", min_alignment=0.99)


def pair(m: int, n: int, r: int, dtype: torch.dtype = torch.float32) -> LoRAPair:
    return LoRAPair(lora_A=torch.randn(r, n, dtype=dtype), lora_B=torch.randn(m, r, dtype=dtype))


def test_adapters_of_different_shapes_are_refused() -> None:
    first = assemble({"a.query": pair(6, 5, 2)})
    second = assemble({"a.query": pair(6, 4, 2)})
    with pytest.raises(AdapterMismatchError, match=r"'a.query' .*\(6, 5\).*\(6, 4\)"):
        combine([first, second], [1.0, 1.0])


def test_adapters_of_different_bases_are_combined_with_a_warning() -> None:
    first = assemble({"a.query": pair(6, 5, 2)})
    second = assemble({"a.query": pair(6, 5, 2)})
    named = [
        dataclasses.replace(
            adapter, config=dataclasses.replace(adapter.config, base_model_name_or_path=base)
        )
        for adapter, base in ((first, "org/one"), (second, "org/two"))
    ]
    with pytest.warns(UserWarning, match="org/one, org/two"):
        found = combine(named, [1.0, 1.0])
    assert found.checkpoint.config.base_model_name_or_path is None
    # One that says nothing contradicts nobody.
    combine([named[0], second], [1.0, 1.0])


def test_notes_are_kept_where_all_agree() -> None:
    adapter = assemble({"a.query": pair(6, 5, 2)})
    config = dataclasses.replace(
        adapter.config,
        task_type="CAUSAL_LM",
        base_model_name_or_path="org/one",
        dropout=0.1,
        extra={"revision": "main", "inference_mode": True},
    )
    first = dataclasses.replace(adapter, config=config)
    second = dataclasses.replace(
        adapter, config=dataclasses.replace(config, dropout=0.2, extra={"revision": "main"})
    )
    found = combine([first, second], [1.0, 1.0]).checkpoint.config
    assert (found.task_type, found.base_model_name_or_path) == ("CAUSAL_LM", "org/one")
    assert found.extra == {"revision": "main"}
    assert found.dropout == 0.0


def test_half_precision_is_combined_in_double() -> None:
    torch.manual_seed(1)
    pairs = [pair(40, 30, 3, torch.bfloat16) for _ in range(2)]
    found = combine([assemble({"q.x": p}, scaling=1.7) for p in pairs], [0.4, 0.6])
    result = found.checkpoint.tensors["q.x"]
    assert result.lora_A.dtype == result.lora_B.dtype == torch.bfloat16
    expected = sum(
        w * 1.7 * (p.lora_B.double() @ p.lora_A.double())
        for w, p in zip((0.4, 0.6), pairs, strict=True)
    )
    gap = result.lora_B.double() @ result.lora_A.double() - expected
    assert float(gap.norm() / expected.norm()) < 5e-3


def test_dora_is_refused(bert: nn.Module, make_peft_adapter: Make) -> None:
    folder = make_peft_adapter(bert, **KINDS["plain"][0], use_dora=True)
    adapter = read_adapter(folder)
    with pytest.raises(ConfigError, match="to be combined must have two matrices.*lora_magnitude"):
        combine([adapter], [1.0])


def test_progress_names_each_module() -> None:
    adapter = assemble({"a.query": pair(6, 5, 2), "b.query": pair(6, 5, 2)})
    told: list[tuple[str, float]] = []
    combine([adapter], [1.0], progress=lambda *step: told.append(step))
    assert told == [("combining a.query", 0.0), ("combining b.query", 0.5)]


def test_a_folder_that_cannot_be_written_is_an_error_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    found = combine([assemble({"a.query": pair(6, 5, 2)})], [1.0])
    with pytest.raises(WriteError):
        found.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
