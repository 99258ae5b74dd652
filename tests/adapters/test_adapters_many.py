"""Several adapters on one layer of each kind, held against weights summed by hand in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from layer_cases import CASES, LayerCase
from torch import Tensor, nn

from gauge_ext import _load
from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint.many import load_adapters, save_adapters, swap_adapter
from gauge_ext.errors import AdapterMismatchError, AdapterStateError, ConfigError
from gauge_ext.models import adapter_parameters, attach, detach, merge, merged_copy, unmerge
from gauge_ext.models.many import delete_adapter, rename_adapter
from gauge_ext.models.roster import adapter_names, adapter_slots
from gauge_ext.models.working import adapter_rows, disable_adapters, set_adapters, use_adapters

# Ranks that two groups divide.
NUMBERS = {"first": (2, 3.0), "second": (4, 1.0), "third": (2, -1.0)}
ROWS = ["second", None, "first", "third", "second"]


class Model(nn.Module):
    """One layer under a name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def config(name: str, **changes: object) -> LoRAConfig:
    rank, alpha = NUMBERS[name]
    return LoRAConfig(rank=rank, alpha=alpha, target_modules=["layer"], **changes)


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.5)


def build(case: LayerCase, **options: bool) -> tuple[nn.Module, Model]:
    """The bare layer, and a model of it with an adapter of each name; ``third`` is always plain."""
    torch.manual_seed(0)
    base = case.make().double()
    model = Model(copy.deepcopy(base)).eval()
    for name in NUMBERS:
        attach(model, config(name, **(options if name != "third" else {})), name)
    randomize(model)
    return base, model


def by_hand(
    case: LayerCase, base: nn.Module, model: Model, x: Tensor, weights: Mapping[str, float]
) -> Tensor:
    slots = [(adapter_slots(model, name)["layer"], weight) for name, weight in weights.items()]
    return case.expected_sum(base, slots)(x).detach()


def samples(case: LayerCase, count: int) -> Tensor:
    """A batch of inputs as those of the case."""
    x = case.x()
    if not x.is_floating_point():
        return torch.randint(1, 7, (count, 3))
    kernel = getattr(case.make(), "kernel_size", None)
    own = 1 + len(kernel) if kernel is not None else min(x.dim(), 2)
    return torch.randn(count, *x.shape[-own:], dtype=x.dtype)


every_variant = pytest.mark.parametrize(
    ("case", "option"),
    [
        pytest.param(case, dict.fromkeys(fields, True), id=" ".join([case.name, *fields]))
        for case in CASES
        for fields in ((), ("use_dora",), ("lora_bias",))
        if not set(fields) & set(case.without)
    ],
)
every_kind = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SUMS = (
    {"first": 1.0},
    {"second": 1.0},
    {"second": -0.5},
    {"first": 0.3, "second": 2.0, "third": 1.0},
    {},
)


@every_variant
def test_alone_together_and_disabled(case: LayerCase, option: dict[str, bool]) -> None:
    base, model = build(case, **option)
    x = case.x()
    torch.testing.assert_close(model(x), by_hand(case, base, model, x, {"first": 1.0}))
    for weights in SUMS:
        expected = by_hand(case, base, model, x, weights)
        with use_adapters(model, weights):
            torch.testing.assert_close(model(x), expected)
            with disable_adapters(model):
                torch.testing.assert_close(model(x), base(x))
            torch.testing.assert_close(model(x), expected)
    assert set(base.state_dict()) | set(model.layer.trained()) | {
        f"slots.{name}.{key}"
        for name in ("second", "third")
        for key in adapter_slots(model, name)["layer"].trained()
    } == set(model.layer.state_dict())


@every_variant
def test_merge_and_unmerge(case: LayerCase, option: dict[str, bool]) -> None:
    base, model = build(case, **option)
    x = case.x()
    for weights in SUMS:
        set_adapters(model, weights)
        expected, bits = model(x), model.layer.weight
        torch.testing.assert_close(merged_copy(model)(x), expected)
        merge(model)
        torch.testing.assert_close(model(x), by_hand(case, base, model, x, weights))
        unmerge(model)
        assert model.layer.weight is bits
        assert torch.equal(model(x), expected)
    detach(model)
    assert type(model.layer) is type(base)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in model.layer.state_dict().items())


@every_variant
def test_each_row_its_own(case: LayerCase, option: dict[str, bool]) -> None:
    base, model = build(case, **option)
    x = samples(case, len(ROWS))
    with adapter_rows(model, ROWS):
        y = model(x)
        y.square().sum().backward()
    for place, name in enumerate(ROWS):
        row = by_hand(case, base, model, x[place : place + 1], {} if name is None else {name: 1.0})
        torch.testing.assert_close(y[place : place + 1], row)
    gradients = [p.grad.clone() for p in adapter_parameters(model)]
    for parameter in adapter_parameters(model):
        parameter.grad = None
    for name in NUMBERS:
        with use_adapters(model, name):
            model(x[torch.tensor([n == name for n in ROWS])]).square().sum().backward()
    for parameter, gradient in zip(adapter_parameters(model), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    with adapter_rows(model, [None] * len(ROWS)):
        torch.testing.assert_close(model(x), base(x))
    torch.testing.assert_close(model(x), by_hand(case, base, model, x, {"first": 1.0}))
    with pytest.raises((ConfigError, RuntimeError)), adapter_rows(model, ["first"] * 4):
        model(x)


@every_kind
def test_rename_delete_copy(case: LayerCase) -> None:
    base, model = build(case)
    x = case.x()
    expected = {name: by_hand(case, base, model, x, {name: 1.0}) for name in NUMBERS}
    kept = adapter_slots(model, "second")["layer"].lora_A
    rename_adapter(model, "second", "other")
    assert adapter_slots(model, "other")["layer"].lora_A is kept
    set_adapters(model, "other")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected["second"])
        delete_adapter(twin, "other")
        torch.testing.assert_close(twin(x), base(x))
    delete_adapter(model, "first")
    assert adapter_names(model) == ("other", "third")
    assert model.layer.lora_A is kept
    torch.testing.assert_close(model(x), expected["second"])
    delete_adapter(model, "other")
    with use_adapters(model, "third"):
        torch.testing.assert_close(model(x), expected["third"])
    assert not any(".slots" in key for key in model.state_dict())


@every_variant
def test_saved_and_loaded(case: LayerCase, option: dict[str, bool], tmp_path: Path) -> None:
    base, model = build(case, **option)
    x = case.x()
    again = load_adapters(Model(copy.deepcopy(base)).eval(), save_adapters(model, tmp_path))
    for name in NUMBERS:
        with use_adapters(again, name):
            torch.testing.assert_close(again(x), by_hand(case, base, model, x, {name: 1.0}))


# Where PEFT computes the sum: not with circular or reflected padding, nor for a sample without a
# batch, nor with a bias of the branch where the base has none.
@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((name, {}) for name in ("linear", "Conv1D", "embedding", "conv1d, strided", "conv3d")),
        *((name, {"use_dora": True}) for name in ("linear", "embedding", "conv3d")),
        *((name, {"lora_bias": True}) for name in ("linear", "Conv1D", "conv3d")),
    ],
)
def test_read_by_peft(name: str, option: dict[str, bool], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    (case,) = (case for case in CASES if case.name == name)
    base, model = build(case, **option)
    x = case.x()
    folders = save_adapters(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        Model(copy.deepcopy(base)), folders["first"], "first", autocast_adapter_dtype=False
    )
    for other in ("second", "third"):
        theirs.load_adapter(folders[other], other, autocast_adapter_dtype=False)
    theirs.eval()
    for other in NUMBERS:
        theirs.set_adapter(other)
        torch.testing.assert_close(theirs(x), by_hand(case, base, model, x, {other: 1.0}))


@every_kind
def test_every_adapter_has_its_own_dropout(case: LayerCase) -> None:
    torch.manual_seed(0)
    model = Model(case.make().double())
    for name, dropout in (("first", 0.5), ("second", 0.9), ("third", 0.5)):
        attach(model, config(name, dropout=dropout), name)
    randomize(model)
    set_adapters(model, list(NUMBERS))
    x = case.x()
    expected = model.eval()(x)
    model.train()
    torch.manual_seed(1)
    first = model(x)
    assert not torch.equal(model(x), first)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    # Where an adapter's B is zero it adds nothing, whatever is dropped: so each p is its own.
    mean = torch.stack([model(x).detach() for _ in range(4000)]).mean(0)
    spread = torch.stack([model(x).detach() for _ in range(200)]).std(0)
    assert bool(((mean - expected).abs() <= 6 * spread / 4000**0.5 + 1e-12).all())
    with (
        pytest.raises(AdapterStateError, match="no dropout in training"),
        adapter_rows(model, ["first"] * 3),
    ):
        model(samples(case, 3))


@every_variant
def test_swap(case: LayerCase, option: dict[str, bool], tmp_path: Path) -> None:
    base, model = build(case, **option)
    x = case.x()
    low = Model(copy.deepcopy(base)).eval()
    rank = NUMBERS["first"][0]
    attach(low, LoRAConfig(rank=rank, alpha=5.0, target_modules=["layer"], **option), "low")
    randomize(low)
    save_adapters(low, tmp_path)
    expected = low(x)
    before = [(p, p.data_ptr()) for p in adapter_parameters(model)]
    swap_adapter(model, tmp_path / "low", "second")
    assert [(p, p.data_ptr()) for p in adapter_parameters(model)] == before
    with use_adapters(model, "second"):
        torch.testing.assert_close(model(x), expected)
    if option:
        with pytest.raises(AdapterMismatchError, match="consists of lora_A, lora_B; "):
            swap_adapter(model, tmp_path / "low", "third")
    high = Model(copy.deepcopy(base))
    attach(high, LoRAConfig(rank=6, target_modules=["layer"], **option), "high")
    save_adapters(high, tmp_path)
    with pytest.raises(AdapterMismatchError, match="not a higher one"):
        swap_adapter(model, tmp_path / "high", "second")


# Dynamo itself looks at the .grad of an output, where it comes to the hook after the forward.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.skipif(not _load.status().compiled, reason="about graphs around the compiled op")
@pytest.mark.parametrize("name", ["Conv1D", "embedding", "conv2d, two groups"])
@pytest.mark.parametrize("active", [["second"], ["first", "second", "third"]])
def test_compiled_once(name: str, active: list[str], tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == name)
    base, model = build(case)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    low = Model(copy.deepcopy(base))
    attach(low, config("first"), "low")
    randomize(low)
    save_adapters(low, tmp_path)
    set_adapters(model, active)
    torch._dynamo.reset()
    compiled, x = torch.compile(model, backend=backend, fullgraph=True), case.x()
    torch.testing.assert_close(compiled(x), model(x))
    before = model(x)
    swap_adapter(model, tmp_path / "low", "second")
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(model(x), before)
    assert len(graphs) == 1
