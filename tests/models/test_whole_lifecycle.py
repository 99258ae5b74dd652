"""Copies of whole modules that are copied, pickled, renamed, merged, saved, swapped, taken off."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from whole_cases import SAVED, Base, by_hand, config, inputs, randomize, several

from gauge_ext.adapters.whole import WholeModule
from gauge_ext.checkpoint import adapter_sha256, load_adapter, read_adapter, save_adapter
from gauge_ext.checkpoint.many import load_adapters, save_adapters, swap_adapter
from gauge_ext.errors import AdapterMismatchError, AdapterStateError
from gauge_ext.models import (
    attach,
    detach,
    merge,
    merge_and_unload,
    merged_copy,
    unmerge,
    whole_parameters,
)
from gauge_ext.models.many import delete_adapter, rename_adapter
from gauge_ext.models.working import (
    disable_adapters,
    set_adapters,
    use_adapters,
)


@pytest.fixture
def model() -> nn.Module:
    return several()


def twins(model: nn.Module) -> list[nn.Module]:
    """Copies of all kinds."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]


def test_copies_and_pickles(model: nn.Module) -> None:
    set_adapters(model, "b")
    for twin in twins(model):
        assert twin.head.weight is not model.head.weight
        for name in ("b", "a", "c"):
            set_adapters(twin, name)
            torch.testing.assert_close(twin(inputs()), by_hand(model, {name: 1.0}))
        detach(twin)
        assert torch.equal(twin(inputs()), Base()(inputs()))
        assert type(twin.head) is nn.Linear
    assert model(inputs()).requires_grad


def test_detach_leaves_no_trace() -> None:
    model = Base()
    own, parameters = {n: set(vars(m)) for n, m in model.named_modules()}, dict(model.state_dict())
    objects = dict(model.named_parameters())
    model.mid.weight.requires_grad_(False)
    for name in SAVED:
        attach(model, config(name), name)
    randomize(model)
    set_adapters(model, "b")
    detach(model)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == own
    assert all(p is objects[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(parameters)
    assert not any(isinstance(module, WholeModule) for module in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["mid.weight"]


def test_deleted_and_renamed(model: nn.Module) -> None:
    expected = {name: by_hand(model, {name: 1.0}) for name in SAVED}
    kept = whole_parameters(model, "b")
    set_adapters(model, "b")
    delete_adapter(model, "a")  # which was the first: the next one's copies take its place
    rename_adapter(model, "b", "other")
    assert whole_parameters(model, "other").keys() == kept.keys()
    assert all(p is kept[name] for name, p in whole_parameters(model, "other").items())
    assert "head.slots.b.weight" not in model.state_dict()
    torch.testing.assert_close(model(inputs()), expected["b"])
    set_adapters(model, "c")
    torch.testing.assert_close(model(inputs()), expected["c"])
    delete_adapter(model, "other")
    assert type(model.head) is type(model.mid) is nn.Linear
    torch.testing.assert_close(model(inputs()), expected["c"])
    attach(model, config("a"), "a")  # on from the base
    assert torch.equal(model.head.weight, Base().head.weight)


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("unload", [merged_copy, merge_and_unload])
def test_merged(model: nn.Module, name: str, unload: Callable[[nn.Module], nn.Module]) -> None:
    set_adapters(model, name)
    expected = by_hand(model, {name: 1.0})
    merge(model)
    torch.testing.assert_close(model(inputs()), expected)
    unmerge(model)
    plain = unload(model)
    torch.testing.assert_close(plain(inputs()), expected)
    assert list(plain.state_dict()) == list(Base().state_dict())
    assert {type(module) for module in plain.children()} == {nn.Linear, nn.Tanh}
    if plain is model:
        assert all(parameter.requires_grad for parameter in plain.parameters())


def test_moved_with_the_model(model: nn.Module) -> None:
    model.float()
    assert {p.dtype for p in (*model.parameters(), *model.head._own.values())} == {torch.float32}
    with disable_adapters(model):
        torch.testing.assert_close(model(inputs().float()), Base().float()(inputs().float()))
    detach(model.bfloat16())
    assert model.head.weight.dtype == torch.bfloat16


def test_data_parallel_copies_only_the_first(model: nn.Module) -> None:
    assert model.head._replicate_for_data_parallel() is not model.head
    set_adapters(model, "b")
    with pytest.raises(AdapterStateError, match="DataParallel copies the modules of 'a' alone"):
        model.head._replicate_for_data_parallel()


def test_files(model: nn.Module, tmp_path: Path) -> None:
    written = save_adapters(model, tmp_path / "all")
    for name, folder in written.items():
        read = read_adapter(folder)
        assert read.sha256 == adapter_sha256(model, name)
        assert read.whole.keys() == whole_parameters(model, name).keys()
    other = load_adapters(Base(), {name: written[name] for name in ("c", "b", "a")})
    for name in SAVED:
        set_adapters(other, name)
        torch.testing.assert_close(other(inputs()), by_hand(model, {name: 1.0}))
    # A file that does not fit leaves nothing behind.
    wide = Base()
    wide.head = nn.Linear(8, 6).double()
    attach(wide, config("c"), "c")
    with pytest.raises(AdapterMismatchError, match=r"'head\.\w+' of shape"):
        load_adapter(wide, written["a"], name="a")
    assert type(wide.head) is nn.Linear


def test_swapped_in_place(model: nn.Module, tmp_path: Path) -> None:
    save_adapters(model, tmp_path)
    before, objects = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    other = copy.deepcopy(model)
    randomize(other)
    save_adapter(other, tmp_path / "new", name="b")
    set_adapters(model, "b")
    swap_adapter(model, tmp_path / "new", "b")
    torch.testing.assert_close(model(inputs()), by_hand(other, {"b": 1.0}))
    for name in ("a", "c"):
        with use_adapters(model, name):
            torch.testing.assert_close(model(inputs()), by_hand(model, {name: 1.0}))
    swap_adapter(model, tmp_path / "b", "b")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(p is objects[name] for name, p in model.named_parameters())
    # Copies that the file lacks, and copies for which there is no place.
    with pytest.raises(AdapterMismatchError, match=r"lacks 1 .*by the adapter 'b': 'mid.weight'"):
        swap_adapter(model, tmp_path / "a", "b")
    with pytest.raises(AdapterMismatchError, match="values of its own for the base's 'mid.weight'"):
        swap_adapter(model, tmp_path / "b", "a")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
