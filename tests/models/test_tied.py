"""An adapter on an embedding and its tied output layer, against one table with the update in it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.adapters.tied import TiedLinear
from gauge_ext.errors import TargetError
from gauge_ext.models import (
    adapter_config,
    adapter_parameters,
    attach,
    attachment,
    detach,
    merge,
    merged_copy,
    named_adapter_parameters,
    regauge_model,
    unmerge,
)
from gauge_ext.models.many import delete_adapter, rename_adapter
from gauge_ext.models.merge import merge_and_unload
from gauge_ext.models.roster import adapter_slots
from gauge_ext.models.working import adapter_rows, disable_adapters, set_adapters
from gauge_ext.optim import GaugeAdam, factor_pairs

IDS = torch.tensor([[5, 1, 0, 2], [5, 1, 3, 2], [3, 2, 2, 6]])


class Base(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.up = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=bias)
        self.head.weight = self.emb.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.up(self.emb(x))))
        return found


def config(*targets: str, **fields: object) -> LoRAConfig:
    named = {"rank": 2, "alpha": 6.0, "target_modules": targets, "ensure_weight_tying": True}
    return LoRAConfig(**named | fields)


def randomize(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.5)


def by_hand(model: nn.Module, weights: dict[str, float], *, bias: bool = False) -> Base:
    """The bare model with W + sum of w s (B A)ᵀ as the one table, and its other layer likewise."""
    plain = Base(bias)
    for name, weight in weights.items():
        for path, slot in adapter_slots(model, name).items():
            update = slot.lora_B.detach() @ slot.lora_A.detach()
            layer = plain.get_submodule(path)
            with torch.no_grad():
                layer.weight += weight * slot.scaling * (update.T if path == "emb" else update)
    return plain


@pytest.fixture(params=[False, True], ids=["bare", "biased"])
def bias(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize("targets", [["emb"], ["head"], ["head", "up", "emb"]], ids=str)
def test_by_hand(targets: list[str], bias: bool) -> None:
    base = Base(bias)
    model, table = attach(Base(bias), config(*targets)), base.emb.weight.detach().clone()
    torch.testing.assert_close(model(IDS), base(IDS))  # a fresh adapter changes nothing
    own = model.emb.weight
    assert adapter_config(model).target_modules == tuple(
        dict.fromkeys(("up", "emb") if "up" in targets else ("emb",))
    )
    assert list(attachment(model).names) == (["emb", "up"] if "up" in targets else ["emb"])
    assert not any(name.startswith("head") for name, _ in named_adapter_parameters(model))
    randomize(model)
    plain = by_hand(model, {"default": 1.0}, bias=bias)
    expected = plain(IDS)
    torch.testing.assert_close(model(IDS), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.head.source is twin.emb
        torch.testing.assert_close(twin(IDS), expected)
    for merged in (merged_copy(model), merge_and_unload(copy.deepcopy(model))):
        assert type(merged.head) is nn.Linear
        assert merged.head.weight is merged.emb.weight
        torch.testing.assert_close(merged.emb.weight, plain.emb.weight)
        torch.testing.assert_close(merged(IDS), expected)
    merge(model)
    assert model.head.weight is model.emb.weight is not own
    torch.testing.assert_close(model(IDS), expected)
    unmerge(model)
    assert model.head.weight is model.emb.weight is own
    with disable_adapters(model):
        torch.testing.assert_close(model(IDS), base(IDS))
    detach(model)
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.emb.weight is own
    assert torch.equal(own, table)
    assert not [name for name in vars(model.emb) if "head" in name]
    torch.testing.assert_close(model(IDS), base(IDS))


def test_gradients_are_of_both_ends() -> None:
    model = attach(Base(True), config("emb"))
    randomize(model)
    a, b = (model.emb.get_parameter(f"lora_{x}").detach().clone().requires_grad_() for x in "AB")
    table = model.emb.weight.detach() + 3.0 * (b @ a).T
    up = Base(True).up
    hidden = torch.tanh(up(table[IDS]))
    (hidden @ table.T + model.head.bias.detach()).square().sum().backward()
    model(IDS).square().sum().backward()
    torch.testing.assert_close(model.emb.lora_A.grad, a.grad)
    torch.testing.assert_close(model.emb.lora_B.grad, b.grad)
    assert model.emb.weight.grad is None


def test_dropout_is_of_the_inputs_of_each() -> None:
    model = attach(Base(), config("emb", dropout=0.5))
    randomize(model)
    x = torch.randn(2000, 4, dtype=torch.float64)
    update = 3.0 * (model.emb.lora_B @ model.emb.lora_A).T
    with torch.no_grad():
        drawn = [model.head(x) for _ in range(2)]
        assert not torch.equal(*drawn)
        found = (drawn[0] - x @ model.emb.weight.T) @ torch.linalg.pinv(update.T)
        # What is left of x is twice x or nothing, up to the rank of the update.
        mean = (found - x @ update.T @ torch.linalg.pinv(update.T)).mean(0)
        assert mean.abs().max() < 0.2
        assert torch.equal(model.eval().head(x), model.head(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = attach(Base(), config("emb", "up"))
    randomize(model)
    expected = by_hand(model, {"default": 1.0})(IDS)
    y = model.to(dtype)(IDS)
    assert y.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 0.3
    assert (y.double() - expected).abs().max() < bound * expected.abs().max()


def several() -> nn.Module:
    model = Base()
    for name, targets in (("a", ["emb", "up"]), ("b", ["up"]), ("c", ["head"])):
        attach(model, config(*targets, alpha={"a": 6.0, "b": 2.0, "c": 4.0}[name]), name)
    randomize(model)
    return model


@pytest.mark.parametrize(
    "weights", [{"a": 1.0}, {"c": -0.5}, {"b": 1.0}, {"a": 0.5, "b": 1.0, "c": 2.0}, {}], ids=str
)
def test_several(weights: dict[str, float]) -> None:
    model = several()
    set_adapters(model, weights)
    torch.testing.assert_close(model(IDS), by_hand(model, weights)(IDS))
    merged = merged_copy(model)
    assert merged.head.weight is merged.emb.weight
    torch.testing.assert_close(merged(IDS), by_hand(model, weights)(IDS))


def test_samples_of_several() -> None:
    model, names = several(), ["c", None, "a"]
    alone = [by_hand(model, {} if n is None else {n: 1.0})(IDS[i]) for i, n in enumerate(names)]
    with adapter_rows(model, names):
        torch.testing.assert_close(model(IDS), torch.stack(alone))
    rename_adapter(model, "c", "d")
    set_adapters(model, "d")
    expected = by_hand(model, {"d": 1.0})(IDS)
    torch.testing.assert_close(model(IDS), expected)
    delete_adapter(model, "a")
    set_adapters(model, "d")
    torch.testing.assert_close(model(IDS), by_hand(model, {"d": 1.0})(IDS))
    torch.testing.assert_close(model(IDS), expected)
    delete_adapter(model, "d")
    assert type(model.head) is nn.Linear
    assert type(model.emb) is nn.Embedding


def test_compiled_and_trained() -> None:
    torch._dynamo.reset()
    model = attach(Base(), config("emb", "up"))
    randomize(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), by_hand(model, {"default": 1.0})(IDS))
    optimizer = GaugeAdam(factor_pairs(model), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    before = model(IDS)
    assert set(regauge_model(model, "balanced")) == {"emb", "up"}
    torch.testing.assert_close(model(IDS), before)


def test_onnx_has_one_table(tmp_path: Path) -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from gauge_ext.export import export_onnx

    model = attach(Base(), config("emb", "up"))
    randomize(model)
    expected = by_hand(model, {"default": 1.0})(IDS)
    path = tmp_path / "m.onnx"
    export_onnx(model.float().eval(), (IDS,), path)
    (found,) = ort.InferenceSession(str(path)).run(
        None, {ort.InferenceSession(str(path)).get_inputs()[0].name: IDS.numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(found).double(), expected, rtol=1e-4, atol=1e-4)
    sizes = [list(t.dims) for t in onnx.load(path).graph.initializer]
    assert sizes.count([7, 4]) == 1
    assert [4, 7] not in sizes


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(7, 4), nn.Linear(4, 7)
        if kind == "tables":
            self.second = nn.Embedding(7, 4)
        if kind == "lines":
            self.first = nn.Linear(4, 7)
        self.second.weight = self.first.weight


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (Odd("tables"), {}, "'first' would untie it from 'second': .*these are Embedding 'first'"),
        (Odd("lines"), {}, "'first' would untie it from 'second': .*these are Linear 'first'"),
        (Odd(""), {"use_dora": True}, "'first' would untie .*: DoRA would train lengths"),
        (Odd(""), {"rank_pattern": {"second": 3}}, "'first' would untie .*different ranks"),
        (Odd(""), {"modules_to_save": ["second"]}, "'first' would untie .*has it trained whole"),
    ],
    ids=["tables", "lines", "dora", "ranks", "whole"],
)
def test_what_cannot_be_tied(model: nn.Module, fields: dict[str, object], message: str) -> None:
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TargetError, match=f"adapter on {message}"):
        attach(model, config("first", **fields))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_further_adapters_are_tied_alike() -> None:
    model = attach(Base(), config("emb"), "a")
    with pytest.raises(
        TargetError, match="adapters 'a' on 'emb' are tied .*'b' is to be otherwise"
    ):
        attach(model, config("emb", ensure_weight_tying=False), "b")
    for fields in ({"ensure_weight_tying": False}, {}):
        with pytest.raises(TargetError, match="'a'"):
            attach(model, config("up", modules_to_save=["head"], **fields), "b")
    with pytest.raises(TargetError, match="in 'a' it has the adapter of the embedding"):
        attach(model, config("head", ensure_weight_tying=False), "b")
    assert isinstance(model.head, TiedLinear)
    other = attach(Base(), config("emb", ensure_weight_tying=False), "a")
    with pytest.raises(TargetError, match="adapters 'a' on 'emb' are not tied"):
        attach(other, config("emb"), "b")
    assert type(other.head) is nn.Linear
