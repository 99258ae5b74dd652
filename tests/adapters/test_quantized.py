"""Adapters on weights in few bits: torchao's, bitsandbytes', and those of a module of one's own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gauge_ext
from gauge_ext import LoRAConfig
from gauge_ext.adapters import unsupported_reason
from gauge_ext.errors import AdapterStateError, NonFiniteError

IN, OUT, RANK = 64, 96, 4


class EightBits(nn.Module):
    """A linear layer of one's own, with a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def dequantize(self) -> Tensor:
        return self.codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(), self.bias)


def own(linear: nn.Linear) -> nn.Module:
    return EightBits(linear)


def _torchao(linear: nn.Linear, bits: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao tells of kernels that its wheel lacks
        quantization = pytest.importorskip("torchao.quantization")
        if bits == 8:
            config = quantization.Int8WeightOnlyConfig()
        else:
            group = quantization.PerGroup(32)
            config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)
        quantization.quantize_(linear, config)
    return linear


def int8(linear: nn.Linear) -> nn.Module:
    return _torchao(linear, 8)


def int4(linear: nn.Linear) -> nn.Module:
    return _torchao(linear, 4)


def nf4(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


KINDS = (own, int8, int4, nf4)
Make = Callable[[nn.Linear], nn.Module]


def decoded(layer: nn.Module) -> Tensor:
    """The weight of a quantized layer, told by the library that made it."""
    if isinstance(layer, EightBits):
        return layer.dequantize()
    weight: Any = layer.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize()


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__)
def base(request: pytest.FixtureRequest) -> nn.Sequential:
    """A model with one quantized layer at "0"."""
    return nn.Sequential(request.param(nn.Linear(IN, OUT)))


def factors(layer: Any, names: tuple[str, ...] = ("lora_A", "lora_B")) -> list[Tensor]:
    with torch.no_grad():
        for name in names:
            getattr(layer, name).normal_(std=0.3)
    return [getattr(layer, name).detach() for name in names]


def test_forward_and_backward_are_those_of_the_decoded_weight(base: nn.Sequential) -> None:
    x = torch.randn(5, 7, IN, requires_grad=True)
    weight, bias, before = decoded(base[0]), base[0].bias.detach(), base(x).detach()
    gauge_ext.attach(base, LoRAConfig(rank=RANK, alpha=8, target_modules=["0"]))
    torch.testing.assert_close(base(x), before, rtol=0, atol=0)
    a, b = factors(base[0])
    y = base(x)
    total = weight.double() + 2.0 * b.double() @ a.double()
    torch.testing.assert_close(y, F.linear(x.double(), total, bias.double()).float())
    gradient = torch.randn_like(y)
    y.backward(gradient)
    # torchao and bitsandbytes round the gradient of x no further than float32.
    torch.testing.assert_close(x.grad, (gradient.double() @ total).float(), rtol=1e-4, atol=1e-4)
    rows, grads = x.detach().flatten(0, 1), gradient.flatten(0, 1)
    torch.testing.assert_close(base[0].lora_A.grad, 2.0 * (grads @ b).mT @ rows)
    torch.testing.assert_close(base[0].lora_B.grad, 2.0 * grads.mT @ (rows @ a.mT))
    trained = [name for name, p in base.named_parameters() if p.requires_grad]
    assert trained == ["0.lora_A", "0.lora_B"]


@pytest.mark.filterwarnings("ignore:<enum 'KernelPreference'>")
def test_compiled_it_is_the_same(base: nn.Sequential) -> None:
    x = torch.randn(5, IN)
    weight, bias = decoded(base[0]), base[0].bias.detach()
    gauge_ext.attach(base, LoRAConfig(rank=RANK, alpha=8, target_modules=["0"]))
    a, b = factors(base[0])
    expected = x @ (weight + 2.0 * b @ a).mT + bias
    torch._dynamo.reset()
    y = torch.compile(base)(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_activations_on_float32_factors() -> None:
    linear = nn.Linear(IN, OUT)
    model = nn.Sequential(own(linear))
    for name in ("scale", "bias"):
        tensor = getattr(model[0], name)
        tensor.data = tensor.data.to(torch.bfloat16)
    x = torch.randn(5, IN, dtype=torch.bfloat16)
    plain = model(x).detach()
    config = LoRAConfig(RANK, alpha=8, target_modules=["0"], adapter_dtype=torch.float32)
    gauge_ext.attach(model, config)
    a, b = factors(model[0])
    y = model(x)
    assert y.dtype == torch.bfloat16
    expected = plain.double() + 2.0 * x.double() @ a.double().mT @ b.double().mT
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("make", [int8, int4, nf4])
def test_an_onnx_file_has_the_decoded_weight_with_the_update(make: Make, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from gauge_ext.export import export_onnx

    model, x = nn.Sequential(make(nn.Linear(IN, OUT))), torch.randn(5, IN)
    weight, bias = decoded(model[0]), model[0].bias.detach()
    gauge_ext.attach(model, LoRAConfig(rank=RANK, alpha=8, target_modules=["0"]))
    a, b = factors(model[0])
    export_onnx(model.eval(), (x,), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = x @ (weight + 2.0 * b @ a).mT + bias
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-4)


def test_a_bias_of_the_branch(base: nn.Sequential) -> None:
    x = torch.randn(5, IN)
    weight, bias = decoded(base[0]), base[0].bias.detach()
    gauge_ext.attach(base, LoRAConfig(rank=RANK, alpha=8, target_modules=["0"], lora_bias=True))
    a, b, shift = factors(base[0], ("lora_A", "lora_B", "lora_bias"))
    expected = x @ (weight + 2.0 * b @ a).mT + 2.0 * shift + bias
    torch.testing.assert_close(base(x), expected, rtol=1e-4, atol=1e-4)


def test_dora(base: nn.Sequential) -> None:
    x = torch.randn(5, IN)
    weight, bias = decoded(base[0]), base[0].bias.detach()
    gauge_ext.attach(base, LoRAConfig(rank=RANK, alpha=8, target_modules=["0"], use_dora=True))
    torch.testing.assert_close(base[0].lora_magnitude, weight.norm(dim=1))
    a, b, m = factors(base[0], ("lora_A", "lora_B", "lora_magnitude"))
    total = weight + 2.0 * b @ a
    expected = (m / total.norm(dim=1)) * (x @ total.mT) + bias
    torch.testing.assert_close(base(x), expected, rtol=1e-4, atol=1e-4)


def test_dropout_is_on_the_branch_alone(base: nn.Sequential) -> None:
    x = torch.ones(4000, IN)
    plain = base(x).detach()
    config = LoRAConfig(rank=RANK, target_modules=["0"], dropout=0.5)
    gauge_ext.attach(base, config)
    a, b = factors(base[0])
    update = base[0].scaling * (x[:1] @ a.mT) @ b.mT
    got = base.train()(x) - plain
    assert not torch.allclose(got[0], got[1])
    error = (got.mean(0) - update[0]).norm() / update.norm()
    assert error < 0.2
    torch.testing.assert_close(
        base.eval()(x) - plain, update.expand_as(plain), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("make", [int8, int4, nf4])
def test_a_merge_is_floating_point_and_unmerge_gives_the_bits_back(make: Make) -> None:
    model = nn.Sequential(make(nn.Linear(IN, OUT)))
    held, weight, x = model[0].weight, decoded(model[0]), torch.randn(5, IN)
    gauge_ext.attach(model, LoRAConfig(rank=RANK, alpha=8, target_modules=["0"]))
    a, b = factors(model[0])
    before = model(x).detach()
    total = (weight.double() + 2.0 * b.double() @ a.double()).float()
    gauge_ext.merge(model)
    assert type(model[0].weight) is nn.Parameter
    torch.testing.assert_close(model[0].weight, total, check_dtype=True)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    gauge_ext.unmerge(model)
    assert model[0].weight is held
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    twin = gauge_ext.models.merged_copy(model)
    assert type(twin[0]) is nn.Linear
    torch.testing.assert_close(twin(x), F.linear(x, total, model[0].bias))
    torch.testing.assert_close(twin[0].weight, total)
    assert set(vars(twin[0])) == set(vars(nn.Linear(1, 1)))
    gauge_ext.merge(model)
    model.to("cpu")  # the kept bits move along
    gauge_ext.unmerge(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    gauge_ext.detach(model)
    torch.testing.assert_close(decoded(model[0]), weight, rtol=0, atol=0)
    assert "LoRA" not in type(model[0]).__name__


def test_a_merge_is_checked(base: nn.Sequential) -> None:
    gauge_ext.attach(base, LoRAConfig(rank=RANK, target_modules=["0"]))
    with torch.no_grad():
        base[0].lora_A.fill_(float("inf"))
        base[0].lora_B.fill_(1.0)
    expected = AdapterStateError if isinstance(base[0], EightBits) else NonFiniteError
    with pytest.raises(expected):
        gauge_ext.merge(base)
    assert not base[0].merged


def test_a_module_of_ones_own_has_no_place_for_a_merge() -> None:
    model = nn.Sequential(own(nn.Linear(IN, OUT)))
    gauge_ext.attach(model, LoRAConfig(rank=RANK, target_modules=["0"]))
    with pytest.raises(AdapterStateError, match="EightBits keeps no weight"):
        gauge_ext.merge(model)


def test_a_wrong_dequantize_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(own(nn.Linear(IN, OUT)))
    monkeypatch.setattr(EightBits, "dequantize", lambda self: self.codes)
    with pytest.raises(
        AdapterStateError, match=r"floating-point weight \(96, 64\), got torch.int8"
    ):
        gauge_ext.attach(model, LoRAConfig(rank=RANK, target_modules=["0"]))
    assert type(model[0]) is EightBits


def test_all_linear_means_quantized_layers_too(base: nn.Sequential) -> None:
    assert unsupported_reason(base[0]) is None
    model = nn.Sequential(base[0], nn.ReLU(), nn.Linear(OUT, 3))
    gauge_ext.attach(model, LoRAConfig(rank=RANK, target_modules="all-linear"))
    assert [n for n, _ in model.named_parameters() if n.endswith("lora_A")] == [
        "0.lora_A",
        "2.lora_A",
    ]


def test_copies_and_files(base: nn.Sequential, tmp_path: Path) -> None:
    bare, x = copy.deepcopy(base), torch.randn(5, IN)
    gauge_ext.attach(base, LoRAConfig(rank=RANK, target_modules=["0"]))
    factors(base[0])
    before = base(x).detach()
    torch.testing.assert_close(copy.deepcopy(base)(x), before, rtol=0, atol=0)
    gauge_ext.save_adapter(base, tmp_path / "adapter")
    gauge_ext.load_adapter(bare, tmp_path / "adapter")
    torch.testing.assert_close(bare(x), before, rtol=0, atol=0)


def test_peft_reads_the_same_adapter_on_bitsandbytes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nf4(nn.Linear(IN, OUT)))
    bare, x = copy.deepcopy(model), torch.randn(5, IN)
    gauge_ext.attach(model, LoRAConfig(rank=RANK, alpha=8, target_modules=["0"]))
    factors(model[0])
    gauge_ext.save_adapter(model, tmp_path / "adapter")
    bare.is_loaded_in_4bit = True  # what transformers leaves on a model that it loads so
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "adapter")
    assert "bnb" in type(theirs.base_model.model[0]).__module__
    torch.testing.assert_close(theirs(x), model(x))
