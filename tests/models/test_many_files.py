"""Several adapters on one model that are saved, loaded beside each other and swapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from many_cases import CONFIGS, bare, by_hand, randomize, rows, several
from safetensors.torch import load_file
from torch import Tensor, nn

from gauge_ext import _load
from gauge_ext.adapters import LoRAConfig, LoRALinear
from gauge_ext.checkpoint import load_adapter, save_adapter
from gauge_ext.checkpoint.many import load_adapters, save_adapters, swap_adapter
from gauge_ext.errors import AdapterMismatchError, AdapterStateError, ConfigError
from gauge_ext.models import adapter_parameters, attach
from gauge_ext.models.many import delete_adapter
from gauge_ext.models.roster import adapter_names
from gauge_ext.models.working import (
    set_adapters,
    use_adapters,
)


@pytest.fixture
def model() -> nn.Sequential:
    return several()


def test_saved_as_peft_does_and_loaded(model: nn.Sequential, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folders = save_adapters(model, tmp_path / "all")
    assert folders == {
        "default": tmp_path / "all",
        "b": tmp_path / "all" / "b",
        "c": tmp_path / "all" / "c",
    }
    again = load_adapters(bare(), tmp_path / "all")
    assert adapter_names(again) == ("default", "b", "c")
    theirs = peft.PeftModel.from_pretrained(bare(), folders["default"])
    for name in ("b", "c"):
        theirs.load_adapter(folders[name], name)
    for name in CONFIGS:
        expected = by_hand(model, rows(), {name: 1.0})
        theirs.set_adapter(name)
        torch.testing.assert_close(theirs(rows()), expected)
        with use_adapters(again, name):
            torch.testing.assert_close(again(rows()), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapters(bare(), tmp_path / "theirs")
    with use_adapters(ours, "c"):
        torch.testing.assert_close(ours(rows()), by_hand(model, rows(), {"c": 1.0}))


@pytest.mark.skipif(not _load.status().compiled, reason="about graphs around the compiled op")
def test_a_swap_compiles_nothing_and_allocates_nothing(tmp_path: Path) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = bare()
    attach(model, LoRAConfig(rank=6, alpha=3, target_modules=["0", "2"]))
    other = bare()
    attach(other, CONFIGS["default"])  # of rank 4 and another scaling
    randomize(other)
    (folder,) = save_adapters(other, tmp_path / "other").values()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(rows())
    parameters = adapter_parameters(model)
    before = [(p, p.data_ptr()) for p in parameters]
    swap_adapter(model, folder)
    torch.testing.assert_close(compiled(rows()), other(rows()))
    assert len(graphs) == 1
    assert [(p, p.data_ptr()) for p in adapter_parameters(model)] == before
    assert type(model[0]) is LoRALinear
    high = LoRAConfig(rank=7, alpha=3, target_modules=["0", "2"])
    attach(tall := bare(), high)
    save_adapters(tall, tmp_path / "tall")
    with pytest.raises(AdapterMismatchError, match=r"lora_A \(6, 6\).*\(7, 6\).*lower rank"):
        swap_adapter(model, tmp_path / "tall")
    torch.testing.assert_close(model(rows()), other(rows()))


def test_what_is_trained_whole_goes_with_its_adapter(tmp_path: Path) -> None:
    model = attach(bare(), LoRAConfig(target_modules=["0"], modules_to_save=["4"]), "first")
    attach(model, CONFIGS["b"], "b")
    randomize(model)
    save_adapters(model, tmp_path)
    assert {"first", "b"} == {folder.name for folder in tmp_path.iterdir()}
    held = {
        name: set(load_file(tmp_path / name / "adapter_model.safetensors"))
        for name in ("first", "b")
    }
    assert "base_model.model.4.weight" in held["first"]
    assert all(".lora_" in key for key in held["b"])
    own = bare()[4].weight
    assert not torch.equal(model[4].weight, own)
    delete_adapter(model, "first")
    assert torch.equal(model[4].weight, own)
    set_adapters(model, "b")
    torch.testing.assert_close(model(rows()), by_hand(model, rows(), {"b": 1.0}))


def test_loaded_beside_others_under_a_name(model: nn.Sequential, tmp_path: Path) -> None:
    save_adapter(model, tmp_path / "c", name="c")
    expected = by_hand(model, rows(), {"c": 1.0})
    other = attach(bare(), CONFIGS["b"], "b")
    before = other(rows())
    load_adapter(other, tmp_path / "c", name="third")
    assert adapter_names(other) == ("b", "third")
    torch.testing.assert_close(other(rows()), before)
    set_adapters(other, "third")
    torch.testing.assert_close(other(rows()), expected)
    # The values of the one that is there, by its name; without one it must be clear which.
    randomize(other)
    load_adapter(other, tmp_path / "c", name="third")
    torch.testing.assert_close(other(rows()), expected)
    set_adapters(other, ["b", "third"])
    for call in (
        lambda: load_adapter(other, tmp_path / "c"),
        lambda: save_adapter(other, tmp_path / "again"),
    ):
        with pytest.raises(AdapterStateError, match="'b', 'third', and it is not said which"):
            call()
    with pytest.raises(AdapterMismatchError, match="not those of"):
        load_adapter(other, tmp_path / "c", name="b")
    set_adapters(other, "third")
    save_adapter(other, tmp_path / "again")
    again = load_adapter(bare(), tmp_path / "again")
    torch.testing.assert_close(again(rows()), expected)


def test_a_failure_leaves_the_others(model: nn.Sequential, tmp_path: Path) -> None:
    expected, layers = model(rows()), [type(layer) for layer in model]
    wide = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9)).double()
    attach(wide, LoRAConfig(rank=2, target_modules=["0", "2"]))
    save_adapter(wide, tmp_path / "wide")
    with pytest.raises(AdapterMismatchError, match="does not fit"):
        load_adapter(model, tmp_path / "wide", name="wide")
    odd = LoRAConfig(rank=3, init="orthogonal", target_modules=["0", "4"])
    with pytest.raises(ConfigError, match="even rank"):
        attach(model, odd, "odd")
    assert adapter_names(model) == ("default", "b", "c")
    assert [type(layer) for layer in model] == layers
    torch.testing.assert_close(model(rows()), expected)
