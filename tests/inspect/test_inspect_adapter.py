"""A saved adapter's inspection, against numpy on the dense updates."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

import gauge_ext
from gauge_ext.errors import AdapterFormatError
from gauge_ext.inspect import SORT_KEYS, inspect_adapter, render

# Two layers of unlike ranks (rank_pattern) and scalings (alpha_pattern).
SHAPES = {"encoder.query": (4, 20, 12), "encoder.value": (2, 20, 30)}
ALPHAS = {"encoder.query": 8.0, "encoder.value": 3.0}


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    factors, tensors = {}, {}
    for name, (rank, inner, outer) in SHAPES.items():
        lora_A = torch.randn(rank, inner, generator=generator)
        lora_B = torch.randn(outer, rank, generator=generator)
        factors[name] = (lora_A, lora_B)
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_B
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["query", "value"],
        "rank_pattern": {"value": 2},
        "alpha_pattern": {"value": 3},
        "base_model_name_or_path": "org/model",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path, factors


def test_every_layer_against_the_dense_update(
    adapter: tuple[Path, dict[str, tuple[Tensor, Tensor]]],
) -> None:
    folder, factors = adapter
    found = inspect_adapter(folder)
    assert {layer.name for layer in found.layers} == set(SHAPES)
    for layer in found.layers:
        rank, inner, outer = SHAPES[layer.name]
        lora_A, lora_B = factors[layer.name]
        scaling = ALPHAS[layer.name] / rank
        delta = scaling * lora_B.double().numpy() @ lora_A.double().numpy()
        sigma = np.linalg.svd(delta, compute_uv=False)[:rank]

        assert (layer.rank, layer.in_features, layer.out_features) == (rank, inner, outer)
        assert layer.alpha == ALPHAS[layer.name]
        assert layer.scaling == pytest.approx(scaling)
        assert layer.parameters == rank * (inner + outer)
        assert layer.nbytes == 4 * rank * (inner + outer)
        assert layer.dtype == "float32"
        np.testing.assert_allclose(layer.spectrum.singular_values, sigma, rtol=1e-10)
        assert layer.spectrum.condition == pytest.approx(sigma[0] / sigma[-1])
        assert layer.spectrum.numerical_rank == rank


def test_totals(adapter: tuple[Path, dict[str, tuple[Tensor, Tensor]]]) -> None:
    folder, factors = adapter
    found = inspect_adapter(folder)
    assert found.parameters == 4 * 32 + 2 * 50
    assert found.nbytes == 4 * found.parameters
    assert found.dtypes == ("float32",)
    assert found.base_model == "org/model"
    squares = 0.0
    for name, (lora_A, lora_B) in factors.items():
        scaling = ALPHAS[name] / SHAPES[name][0]
        squares += float((scaling * lora_B.double() @ lora_A.double()).square().sum())
    assert found.frobenius == pytest.approx(math.sqrt(squares))


def test_the_dictionary_is_json_without_nan(
    adapter: tuple[Path, dict[str, tuple[Tensor, Tensor]]],
) -> None:
    folder, factors = adapter
    # A fresh adapter, B = 0: its condition number is infinite, which JSON cannot say.
    tensors = {}
    for name, (lora_A, lora_B) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros_like(lora_B)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    found = inspect_adapter(folder).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["totals"]["layers"] == 2
    for layer in found["layers"]:
        assert layer["condition"] is None
        assert layer["effective_rank"] == 0.0


def test_progress_names_each_layer(
    adapter: tuple[Path, dict[str, tuple[Tensor, Tensor]]],
) -> None:
    seen: list[tuple[str, float]] = []
    inspect_adapter(adapter[0], progress=lambda said, done: seen.append((said, done)))
    assert [said for said, _ in seen] == [f"inspecting {name}" for name in SHAPES]
    assert [done for _, done in seen] == [0.0, 0.5]


def test_the_table_sorts_and_cuts(
    adapter: tuple[Path, dict[str, tuple[Tensor, Tensor]]],
) -> None:
    found = inspect_adapter(adapter[0])
    for key, value in SORT_KEYS.items():
        console = Console(width=140, file=io.StringIO())
        render(found, console, sort=key, top=1)
        text = console.file.getvalue()
        first, second = sorted(found.layers, key=value, reverse=True)
        assert first.name in text
        assert second.name not in text
        assert "1 more layer" in text
        assert "2 layers" in text
        assert found.sha256 in text


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=str(tmp_path)):
        inspect_adapter(tmp_path)


def test_other_kinds_of_layers_and_what_is_beside_their_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Embedding(7, 4))
    model.append(torch.nn.Linear(4, 6))
    changes = {"target_modules": ["0", "1"], "modules_to_save": ["2"]}
    gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=2, alpha=4, **changes))
    for layer in gauge_ext.models.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_A)
        torch.nn.init.normal_(layer.lora_B)
    gauge_ext.save_adapter(model, tmp_path)
    found = inspect_adapter(tmp_path)
    assert ["2" in told for told in found.notes] == [True]
    kernel, table = (model[i] for i in (0, 1))
    dense = (
        2.0 * kernel.lora_B.flatten(1) @ kernel.lora_A.flatten(1),
        2.0 * table.lora_B @ table.lora_A,
    )
    for layer, delta in zip(found.layers, dense, strict=True):
        sigma = np.linalg.svd(delta.detach().double().numpy(), compute_uv=False)[:2]
        np.testing.assert_allclose(layer.spectrum.singular_values, sigma, rtol=1e-5)
        assert (layer.out_features, layer.in_features) == tuple(delta.shape)
