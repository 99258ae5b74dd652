"""Attention whose key and value have sizes of their own: adapters on its four weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gauge_ext
from gauge_ext import LoRAConfig, detach, disable_adapters, merge, merge_and_unload, unmerge
from gauge_ext.errors import TargetError
from gauge_ext.models import lora_layers, merged_copy

NAMES = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
CONFIG = LoRAConfig(
    rank=2, alpha=6, target_modules=[], target_parameters=[f"attention.{name}" for name in NAMES]
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, value)[0]


def place(name: str) -> str:
    """The path of the adapter on a parameter."""
    holder, _, last = name.rpartition(".")
    return f"{holder}.lora_{last}" if holder else f"lora_{last}"


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(2, size, width).double() for size, width in ((3, 8), (4, 6), (4, 5)))


def adapted() -> tuple[Model, Model]:
    """A model with random adapters, and its base with ``W + s B A`` put in by hand."""
    torch.manual_seed(0)
    model = Model().double()
    twin = copy.deepcopy(model)
    gauge_ext.attach(model, CONFIG)
    with torch.no_grad():
        for name in NAMES:
            adapter = model.attention.get_submodule(place(name))
            adapter.lora_A.normal_()
            adapter.lora_B.normal_()
            update = 3.0 * adapter.lora_B @ adapter.lora_A
            twin.attention.get_parameter(name).add_(update)
    return model, twin


@pytest.mark.parametrize("training", [True, False])
def test_each_update_once(training: bool) -> None:
    model, twin = adapted()
    expected = twin.train(training)(*inputs())
    torch.testing.assert_close(model.train(training)(*inputs()), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(*inputs()), expected.detach())
    torch.testing.assert_close(merged_copy(model)(*inputs()), expected)
    model(*inputs()).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"attention.{place(n)}.lora_{f}" for n in NAMES for f in "AB"}


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, twin = adapted()
    gauge_ext.save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(0)
    fresh = gauge_ext.load_adapter(Model().double(), tmp_path / "adapter")
    torch.testing.assert_close(fresh(*inputs()), twin(*inputs()))


def test_merged_unmerged_detached_copied() -> None:
    model, twin = adapted()
    out = model.attention.out_proj
    base, expected = out._parameters["weight"], twin(*inputs())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    merge(model)
    torch.testing.assert_close(model(*inputs()), expected)
    torch.testing.assert_close(out.weight, twin.attention.out_proj.weight)
    unmerge(model)
    assert out._parameters["weight"] is base
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    for twin_of_it in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin_of_it(*inputs()), expected)
    torch.manual_seed(0)
    plain = Model().double()
    with disable_adapters(model):
        torch.testing.assert_close(model(*inputs()), plain(*inputs()))
    torch.testing.assert_close(merge_and_unload(copy.deepcopy(model))(*inputs()), expected)
    detach(model)
    assert type(out) is type(twin.attention.out_proj)
    assert out.weight is base


def test_out_proj_alone_of_an_attention_with_one_size() -> None:
    """torch's fused encoder reads the weight from yet further outside, and gets the sum too."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).double().eval()
    twin = copy.deepcopy(model)
    names = ["self_attn.out_proj.weight"]
    gauge_ext.attach(model, LoRAConfig(rank=2, alpha=6, target_modules=[], target_parameters=names))
    for parameter in gauge_ext.adapter_parameters(model):
        nn.init.normal_(parameter)
    (adapter,) = lora_layers(model).values()
    with torch.no_grad():
        update = 3.0 * adapter.lora_B @ adapter.lora_A
        twin.layers[0].self_attn.out_proj.weight += update
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(model.train()(x).shape, x.shape)


def test_compiled() -> None:
    model, twin = adapted()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), twin(*inputs()))


def test_the_module_of_them_all_is_refused() -> None:
    with pytest.raises(TargetError, match=r"q_proj_weight.*out_proj\.weight"):
        gauge_ext.attach(Model(), LoRAConfig(rank=2, target_modules=["attention"]))
