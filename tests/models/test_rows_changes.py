"""What changes on a model while rows have adapters of their own counts from the next call on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from many_cases import CONFIGS, bare, by_hand, rows, several
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gauge_ext.models.many import add_adapter, delete_adapter, rename_adapter
from gauge_ext.models.roster import adapter_slots
from gauge_ext.models.working import adapter_rows

NAMES = ("b", None, "c", "c", "b", None, "c")


@pytest.fixture
def model() -> nn.Sequential:
    return several()


def expected(model: nn.Module, names: Sequence[str | None], x: Tensor) -> Tensor:
    each = zip(names, x.split(1), strict=True)
    return torch.cat([by_hand(model, row, {name: 1.0} if name else {}) for name, row in each])


def new_values(tensor: Tensor) -> Tensor:
    return torch.randn_like(tensor)


def replace(model: nn.Module) -> None:
    """Give every adapter other Parameter objects."""
    for name in ("b", "c"):
        for slot in adapter_slots(model, name).values():
            for key in ("lora_A", "lora_B"):
                setattr(slot, key, nn.Parameter(new_values(slot.get_parameter(key).detach())))


def new_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = new_values(parameter.data)


def assign_states(model: nn.Module) -> None:
    other = {
        name: new_values(value) if "lora_" in name else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(other, assign=True)


def drop_the_first(model: nn.Module) -> None:
    """Delete the adapter that lies in the layers themselves: another takes its place there."""
    delete_adapter(model, "default")
    replace(model)


def add_another(model: nn.Module) -> None:
    add_adapter(model, CONFIGS["b"], "new")
    replace(model)


@pytest.mark.parametrize(
    "change",
    [replace, new_data, assign_states, drop_the_first, add_another],
    ids=lambda f: f.__name__,
)
def test_changes_between_calls(model: nn.Sequential, change: Callable[[nn.Module], None]) -> None:
    x = rows()
    with adapter_rows(model, NAMES):
        torch.testing.assert_close(model(x), expected(model, NAMES, x))
        before = model(x)
        change(model)
        y = model(x)
        torch.testing.assert_close(y, expected(model, NAMES, x))
        assert not torch.allclose(y, before)
        y.square().sum().backward()
    for name in ("b", "c"):
        for slot in adapter_slots(model, name).values():
            for parameter in slot.trained().values():
                assert parameter.grad is not None
                assert bool(parameter.grad.any())


def test_names_between_batches(model: nn.Sequential) -> None:
    x = rows()
    with adapter_rows(model, NAMES):
        before = model(x)
    rename_adapter(model, "b", "z")
    rename_adapter(model, "c", "b")
    renamed = [{"b": "z", "c": "b"}.get(name or "") for name in NAMES]
    with adapter_rows(model, renamed):
        torch.testing.assert_close(model(x), before)


def test_numbers_between_calls(model: nn.Sequential) -> None:
    """A scale that is set, and a start that is kept, from which the update is nothing at first."""
    x = rows()
    double = copy.deepcopy(model)
    with adapter_rows(model, NAMES):
        before = model(x)
        for slot in adapter_slots(model, "c").values():
            slot.scaling *= 2.0
        for slot in adapter_slots(double, "c").values():
            slot.get_parameter("lora_B").data.mul_(2.0)
        y = model(x)
        torch.testing.assert_close(y, expected(double, NAMES, x))
        assert not torch.allclose(y, before)
        for name in ("b", "c"):
            for slot in adapter_slots(model, name).values():
                slot.keep_start()
        torch.testing.assert_close(model(x), bare()(x))


def test_the_dtype_between_calls(model: nn.Sequential) -> None:
    x = rows()
    with adapter_rows(model, NAMES):
        before = model(x)
        y = model.float()(x.float())
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, before.float(), rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2.0 * value


def test_factors_that_are_computed(model: nn.Sequential) -> None:
    """torch.nn.utils.parametrize takes the parameter out of the module; gradients reach it."""
    x = rows()
    double = copy.deepcopy(model)
    for slot in adapter_slots(double, "b").values():
        slot.get_parameter("lora_A").data.mul_(2.0)
    with adapter_rows(model, NAMES):
        before = model(x)
        (slot,) = adapter_slots(model, "b").values()
        parametrize.register_parametrization(slot, "lora_A", Twice())
        y = model(x)
        torch.testing.assert_close(y, expected(double, NAMES, x))
        y.sum().backward()
        grad = slot.parametrizations.lora_A.original.grad  # type: ignore[union-attr]
        assert bool(grad.any())
        parametrize.remove_parametrizations(slot, "lora_A", leave_parametrized=False)
        torch.testing.assert_close(model(x), before)


def test_tensors_in_place_of_the_parameters(model: nn.Sequential) -> None:
    x, other = rows(), copy.deepcopy(model)
    new_data(other)
    values = {name: p.detach().clone() for name, p in other.named_parameters()}
    leaf = values["0.slots.c.lora_B"].requires_grad_()
    with adapter_rows(model, NAMES):
        before = model(x)
        y = torch.func.functional_call(model, values, (x,))
        torch.testing.assert_close(y, expected(other, NAMES, x))
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert bool(grad.any())
        torch.testing.assert_close(model(x), before)
