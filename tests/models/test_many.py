"""Several adapters on one model, each output held against weights merged by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gauge_ext import _load
from gauge_ext.adapters import LoRAConfig, LoRALinear
from gauge_ext.checkpoint import load_adapter, save_adapter
from gauge_ext.checkpoint.many import load_adapters, save_adapters, swap_adapter
from gauge_ext.errors import AdapterMismatchError, AdapterStateError, ConfigError, TargetError
from gauge_ext.models import adapter_parameters, attach, detach, merge, merged_copy, unmerge
from gauge_ext.models.many import add_adapter, delete_adapter, rename_adapter
from gauge_ext.models.roster import adapter_names, adapter_slots
from gauge_ext.models.working import (
    active_adapters,
    adapter_rows,
    disable_adapters,
    set_adapters,
    use_adapters,
)

CONFIGS = {
    "default": LoRAConfig(rank=4, alpha=8, target_modules=["0", "2"]),
    "b": LoRAConfig(rank=2, alpha=1, target_modules=["2"]),
    "c": LoRAConfig(rank=3, alpha=9, target_modules=["0", "4"]),
}


def bare() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5, bias=False)
    return nn.Sequential(*layers).double()


def randomize(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.5)


@pytest.fixture
def model() -> nn.Sequential:
    found = bare()
    attach(found, CONFIGS["default"])
    add_adapter(found, CONFIGS["b"], "b")
    add_adapter(found, CONFIGS["c"], "c")
    randomize(found)
    return found


def by_hand(model: nn.Module, x: Tensor, weights: Mapping[str, float]) -> Tensor:
    """Run the bare model with W + sum of w s B A put into its weights."""
    plain = bare()
    for name, weight in weights.items():
        for path, holder in adapter_slots(model, name).items():
            config = CONFIGS[name]
            scale = weight * config.alpha / config.rank
            update = scale * holder.get_parameter("lora_B") @ holder.get_parameter("lora_A")
            layer = plain.get_submodule(path)
            layer.weight = nn.Parameter(layer.weight + update.detach())  # type: ignore[operator]
    return plain(x).detach()


def rows(count: int = 7) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(
    "weights",
    [{"default": 1.0}, {"b": 1.0}, {"c": -0.5}, {"default": 0.3, "b": 2.0, "c": 1.0}, {}],
)
def test_active_adapters_by_hand(model: nn.Sequential, weights: dict[str, float]) -> None:
    assert adapter_names(model) == ("default", "b", "c")
    assert active_adapters(model) == {"default": 1.0}
    set_adapters(model, weights)
    assert active_adapters(model) == weights
    torch.testing.assert_close(model(rows()), by_hand(model, rows(), weights))
    merge(model)
    torch.testing.assert_close(model(rows()), by_hand(model, rows(), weights))
    unmerge(model)
    torch.testing.assert_close(merged_copy(model)(rows()), by_hand(model, rows(), weights))


def test_contexts_nest_and_restore(model: nn.Sequential) -> None:
    expected = {name: by_hand(model, rows(), {name: 1.0}) for name in CONFIGS}
    with use_adapters(model, "b"):
        torch.testing.assert_close(model(rows()), expected["b"])
        with disable_adapters(model):
            torch.testing.assert_close(model(rows()), bare()(rows()))
        with pytest.raises(ZeroDivisionError), disable_adapters(model):
            raise ZeroDivisionError
        torch.testing.assert_close(model(rows()), expected["b"])
    torch.testing.assert_close(model(rows()), expected["default"])


def test_the_base_alone_of_a_model_with_one_adapter() -> None:
    model = bare()
    attach(model, CONFIGS["default"])
    randomize(model)
    before = model(rows())
    with disable_adapters(model):
        torch.testing.assert_close(model(rows()), bare()(rows()))
    torch.testing.assert_close(model(rows()), before)
    assert set(model.state_dict()) == {
        *bare().state_dict(),
        *(f"{path}.{factor}" for path in "02" for factor in ("lora_A", "lora_B")),
    }


@pytest.mark.parametrize(
    "names",
    [["b", None, "c", "default", "b", "c", None], ["c"] * 7, [None] * 7, ["b", "default"] * 3],
)
def test_an_adapter_for_each_row(model: nn.Sequential, names: Sequence[str | None]) -> None:
    x = rows(len(names))
    with adapter_rows(model, names):
        y = model(x)
        if y.requires_grad:
            y.square().sum().backward()
    each = [
        by_hand(model, x[i : i + 1], {} if name is None else {name: 1.0})
        for i, name in enumerate(names)
    ]
    torch.testing.assert_close(y, torch.cat(each))
    gradients = [None if p.grad is None else p.grad.clone() for p in adapter_parameters(model)]
    for parameter in adapter_parameters(model):
        parameter.grad = None
    # The same sum, one adapter after the other.
    for name in dict.fromkeys(names):
        own = torch.tensor([other == name for other in names])
        with use_adapters(model, () if name is None else name):
            part = model(x[own]).square().sum()
        if part.requires_grad:
            part.backward()
    for parameter, gradient in zip(adapter_parameters(model), gradients, strict=True):
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        actual = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(model(rows()), by_hand(model, rows(), {"default": 1.0}))


def test_rows_of_samples_with_many_tokens(model: nn.Sequential) -> None:
    x = rows(12).view(3, 4, 6)
    with adapter_rows(model, ["c", None, "b"]):
        y = model(x)
    for i, weights in enumerate([{"c": 1.0}, {}, {"b": 1.0}]):
        torch.testing.assert_close(y[i], by_hand(model, x[i], weights))


def test_gradients_reach_the_active_adapters_alone(model: nn.Sequential) -> None:
    set_adapters(model, {"b": 1.0, "c": 0.5})
    model(rows()).sum().backward()
    for name in CONFIGS:
        factors = [
            p
            for holder in adapter_slots(model, name).values()
            for p in (holder.get_parameter("lora_A"), holder.get_parameter("lora_B"))
        ]
        assert all((p.grad is not None) == (name != "default") for p in factors)


def test_delete_and_rename(model: nn.Sequential) -> None:
    expected = {name: by_hand(model, rows(), {name: 1.0}) for name in CONFIGS}
    kept = dict(adapter_slots(model, "c"))
    rename_adapter(model, "c", "d")
    assert adapter_names(model) == ("default", "b", "d")
    assert {k: v.get_parameter("lora_A") for k, v in adapter_slots(model, "d").items()} == {
        k: v.get_parameter("lora_A") for k, v in kept.items()
    }
    delete_adapter(model, "default")
    assert active_adapters(model) == {}
    torch.testing.assert_close(model(rows()), bare()(rows()))
    for name, old in (("b", "b"), ("d", "c")):
        with use_adapters(model, name):
            torch.testing.assert_close(model(rows()), expected[old])
    delete_adapter(model, "b")
    assert type(model[2]) is nn.Linear
    assert [type(model[i]).__name__ for i in (0, 4)] == ["LoRALinear"] * 2
    with pytest.raises(AdapterStateError, match="'d' is the only adapter"):
        delete_adapter(model, "d")


def test_detach_leaves_the_bare_model(model: nn.Sequential) -> None:
    bits = bare().state_dict()
    detach(model)
    assert [type(layer) for layer in model] == [type(layer) for layer in bare()]
    assert set(model.state_dict()) == set(bits)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    attach(model, CONFIGS["b"])
    assert adapter_names(model) == ("default",)


def test_copies_and_pickles(model: nn.Sequential) -> None:
    set_adapters(model, {"b": 0.5, "c": 1.0})
    expected = model(rows())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert adapter_names(twin) == ("default", "b", "c")
        torch.testing.assert_close(twin(rows()), expected)
        set_adapters(twin, "default")
        delete_adapter(twin, "c")
    torch.testing.assert_close(model(rows()), expected)
    assert adapter_names(model) == ("default", "b", "c")
    fresh = bare()
    attach(fresh, CONFIGS["default"])
    for name in ("b", "c"):
        add_adapter(fresh, CONFIGS[name], name)
    fresh.load_state_dict(model.state_dict())
    set_adapters(fresh, {"b": 0.5, "c": 1.0})
    torch.testing.assert_close(fresh(rows()), expected)


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


def test_dropout_of_several_in_training() -> None:
    model = bare()
    attach(model, LoRAConfig(rank=2, dropout=0.5, target_modules=["0"]))
    add_adapter(model, LoRAConfig(rank=2, dropout=0.25, target_modules=["0"]), "b")
    randomize(model)
    model.train()
    torch.manual_seed(0)
    first = model(rows())
    torch.manual_seed(0)
    assert torch.equal(model(rows()), first)
    assert not torch.equal(model(rows()), first)
    with (
        pytest.raises(AdapterStateError, match="no dropout in training"),
        adapter_rows(model, ["b"] * 7),
    ):
        model(rows())


def test_what_is_refused(model: nn.Sequential) -> None:
    with pytest.raises(AdapterStateError, match=r"no adapter 'z'.*'default', 'b', 'c'"):
        set_adapters(model, "z")
    with pytest.raises(AdapterStateError, match="an adapter 'b' already"):
        add_adapter(model, CONFIGS["b"], "b")
    for name in ("", "a.b", "a/b", "keys"):
        with pytest.raises(ConfigError, match="an adapter"):
            add_adapter(model, CONFIGS["b"], name)
    with pytest.raises(ConfigError, match="weight of 'b' must be a finite number, got nan"):
        set_adapters(model, {"b": float("nan")})
    with pytest.raises(TargetError, match="matches no module"):
        add_adapter(model, LoRAConfig(target_modules=["nowhere"]), "z")
    assert adapter_names(model) == ("default", "b", "c")
    merge(model)
    for call in (
        lambda: set_adapters(model, "b"),
        lambda: add_adapter(model, CONFIGS["b"], "z"),
        lambda: delete_adapter(model, "b"),
    ):
        with pytest.raises(AdapterStateError, match="merged"):
            call()


def test_the_first_adapter_under_a_name_of_its_own() -> None:
    model = add_adapter(bare(), CONFIGS["c"], "mine")
    assert adapter_names(model) == ("mine",)
    assert active_adapters(model) == {"mine": 1.0}


@pytest.mark.parametrize(
    "changes",
    [{"bias": "all"}, {"bias": "lora_only"}],
)
def test_biases_are_the_first_adapters(changes: dict[str, object]) -> None:
    model = attach(bare(), CONFIGS["default"])
    expected = model(rows())
    special = LoRAConfig(rank=2, target_modules=["0", "2"], **changes)
    with pytest.raises(ConfigError, match="is for the first adapter on a model"):
        add_adapter(model, special, "b")
    assert adapter_names(model) == ("default",)
    assert torch.equal(model(rows()), expected)


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
