"""Several adapters where the weight is not a layer's own: attention, experts, few bits, tokens.

The oracle is the model with ``W + sum of w s B A`` put into its weights by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint.many import load_adapters, save_adapters, swap_adapter
from gauge_ext.errors import AdapterStateError
from gauge_ext.export.metadata import base_sha256
from gauge_ext.models import adapter_parameters, attach, detach, merge, unmerge
from gauge_ext.models.many import delete_adapter, rename_adapter
from gauge_ext.models.roster import adapter_names, adapter_slots
from gauge_ext.models.working import adapter_rows, disable_adapters, set_adapters, use_adapters

NUMBERS = {"first": (2, 3.0), "second": (4, 1.0), "third": (1, -2.0)}
SUMS = ({"first": 1.0}, {"second": 0.5}, {"first": -1.0, "second": 2.0, "third": 1.0}, {})


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attn(self.up(x), x, x)
        return y


class Experts(nn.Module):
    """Three experts, called on all inputs, and a router of two sides."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 4, 7) if is_transposed else torch.randn(3, 7, 4))
        self.router = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        up = self.up if self.is_transposed else self.up.mT
        return torch.einsum("ne,nei->ni", x @ self.router.T, torch.tanh(x @ up).transpose(0, 1))


class Mixture(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.experts = Experts(is_transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.lin(x))


class Codes(nn.Module):
    """A linear layer of whole numbers and one scale."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("codes", torch.randint(-7, 8, (outputs, inputs), dtype=torch.int8))
        self.bias = nn.Parameter(torch.randn(outputs))

    def dequantize(self) -> Tensor:
        return self.codes.double() * 0.1

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(), self.bias)


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Codes(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


TARGETS: dict[
    str, tuple[Callable[[], nn.Module], dict[str, dict[str, object]], tuple[int, ...]]
] = {
    # Name -> the model; what each adapter is on; a batch of inputs.
    "attention": (
        Attention,
        {
            "first": {"target_modules": ["attn"]},
            "second": {"target_modules": ["attn", "up"]},
            "third": {"target_modules": ["up"]},
        },
        (5, 3, 8),
    ),
    **{
        f"experts{', transposed' * transposed}": (
            lambda transposed=transposed: Mixture(transposed),
            {
                "first": {"target_modules": ["lin"], "target_parameters": ["experts.up"]},
                "second": {"target_modules": [], "target_parameters": ["up", "router"]},
                "third": {"target_modules": ["lin"]},
            },
            (5, 4),
        )
        for transposed in (False, True)
    },
    "quantized": (
        Quantized,
        {
            "first": {"target_modules": ["up", "down"]},
            "second": {"target_modules": ["up"], "use_dora": True},
            "third": {"target_modules": ["up"], "lora_bias": True},
        },
        (5, 4),
    ),
}


def bare(name: str) -> nn.Module:
    torch.manual_seed(0)
    return TARGETS[name][0]().double().eval()


def config(name: str, adapter: str) -> LoRAConfig:
    rank, alpha = NUMBERS[adapter]
    return LoRAConfig(rank=rank, alpha=alpha, **TARGETS[name][1][adapter])


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.5)


def build(name: str) -> nn.Module:
    model = bare(name)
    for adapter in NUMBERS:
        attach(model, config(name, adapter), adapter)
    randomize(model)
    return model


def inputs(name: str) -> Tensor:
    shape = TARGETS[name][2]
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def products(path: str, a: Tensor, b: Tensor, own: Tensor) -> Tensor:
    """B A in the layout of the weight at ``path``, summed expert by expert."""
    if own.dim() == 2:
        return b @ a
    count = own.shape[0]
    each = [b[:, e::count] @ a.view(count, -1, a.shape[1])[e] for e in range(count)]
    return torch.stack([d if d.shape == own.shape[1:] else d.T for d in each])


def weights_of(plain: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the name of the weight that the adapter at ``path`` is on."""
    holder, _, last = path.rpartition(".")
    if last.startswith("lora_"):
        return plain.get_submodule(holder), last.removeprefix("lora_")
    module = plain.get_submodule(path)
    return module, "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"


def by_hand(name: str, model: nn.Module, weights: Mapping[str, float]) -> Tensor:
    plain = bare(name)
    for path, module in list(plain.named_modules()):
        if isinstance(module, Codes):  # the same numbers, without codes
            linear = nn.Linear(module.in_features, module.out_features).double()
            linear.weight, linear.bias = nn.Parameter(module.dequantize()), module.bias
            setattr(plain, path, linear)
    own = {key: value.detach().clone() for key, value in plain.named_parameters()}
    with torch.no_grad():
        for adapter, number in weights.items():
            for path, slot in adapter_slots(model, adapter).items():
                module, key = weights_of(plain, path)
                (before,) = (
                    own[at] for at, p in plain.named_parameters() if p is getattr(module, key)
                )
                alone = before + slot.scaling * products(path, slot.lora_A, slot.lora_B, before)
                if "lora_magnitude" in slot.trained():
                    alone *= (slot.lora_magnitude / alone.norm(dim=1))[:, None]
                getattr(module, key).add_(number * (alone - before))
                if "lora_bias" in slot.trained():
                    module.bias += number * slot.scaling * slot.lora_bias
    return plain(inputs(name)).detach()


@pytest.fixture(params=TARGETS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_sums_disabled_deleted(name: str) -> None:
    model, x = build(name), inputs(name)
    assert adapter_names(model) == tuple(NUMBERS)
    torch.testing.assert_close(model(x), by_hand(name, model, {"first": 1.0}))
    for weights in SUMS:
        with use_adapters(model, weights):
            torch.testing.assert_close(model(x), by_hand(name, model, weights))
            with disable_adapters(model):
                torch.testing.assert_close(model(x), bare(name)(x))
    expected = {adapter: by_hand(name, model, {adapter: 1.0}) for adapter in NUMBERS}
    rename_adapter(model, "second", "other")
    delete_adapter(model, "first")
    torch.testing.assert_close(model(x), bare(name)(x))
    for adapter, old in (("other", "second"), ("third", "third")):
        with use_adapters(model, adapter):
            torch.testing.assert_close(model(x), expected[old])
    delete_adapter(model, "third")
    detach(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in bare(name).modules()]
    torch.testing.assert_close(model(x), bare(name)(x), rtol=0, atol=0)


def test_merge(name: str) -> None:
    model, x = build(name), inputs(name)
    for weights in SUMS:
        set_adapters(model, weights)
        expected = model(x)
        if name == "quantized":
            with pytest.raises(AdapterStateError, match="keeps no weight"):
                merge(model)
            continue
        merge(model)
        torch.testing.assert_close(model(x), expected)
        unmerge(model)
        assert torch.equal(model(x), expected)


def test_files_and_swap(name: str, tmp_path: Path) -> None:
    model, x = build(name), inputs(name)
    folders = save_adapters(model, tmp_path)
    again = load_adapters(bare(name), folders)
    for adapter in NUMBERS:
        with use_adapters(again, adapter):
            torch.testing.assert_close(again(x), by_hand(name, model, {adapter: 1.0}))
    randomize(again)
    kept = {adapter: by_hand(name, again, {adapter: 1.0}) for adapter in NUMBERS}
    swap_adapter(again, folders["second"], "second")
    for adapter in NUMBERS:
        with use_adapters(again, adapter):
            source = by_hand(name, model, {"second": 1.0}) if adapter == "second" else kept[adapter]
            torch.testing.assert_close(again(x), source)


def test_experts_read_by_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, x = build("experts"), inputs("experts")
    folders = save_adapters(model, tmp_path)
    for adapter in NUMBERS:  # one at a time: PEFT takes one adapter with target_parameters
        theirs = peft.PeftModel.from_pretrained(bare("experts"), folders[adapter]).eval()
        torch.testing.assert_close(theirs(x), by_hand("experts", model, {adapter: 1.0}))


def test_rows(name: str) -> None:
    model, x = build(name), inputs(name)
    rows = ["third", None, "third", None, "third"]
    if name == "quantized":
        rows = ["second", None, "first", "third", "second"]
    with adapter_rows(model, rows):
        y = model(x)
    alone = {row: by_hand(name, model, {} if row is None else {row: 1.0}) for row in set(rows)}
    if name == "attention":  # the first dimension of ``up`` is the sequence, as torch has it
        with adapter_rows(model, rows):
            torch.testing.assert_close(model.up(x)[0], _up(model, x)[0])
    else:
        torch.testing.assert_close(y, torch.stack([alone[r][i] for i, r in enumerate(rows)]))
    if name != "quantized":
        refused = r"at '(attn|experts\.lora_up)', which 'second' adapts: .*as in PEFT"
        with (
            pytest.raises(AdapterStateError, match=refused),
            adapter_rows(model, ["second"] * 5),
        ):
            model(x)
    torch.testing.assert_close(model(x), by_hand(name, model, {"first": 1.0}))


def _up(model: nn.Module, x: Tensor) -> Tensor:
    slot = adapter_slots(model, "third")["up"]
    weight = model.up.weight + slot.scaling * slot.lora_B @ slot.lora_A
    return F.linear(x, weight, model.up.bias)


def test_trained_tokens_are_of_their_adapter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).double()
    plain, ids = copy.deepcopy(model), torch.arange(7)
    attach(model, LoRAConfig(target_modules=["1"], trainable_token_indices={"0": [2, 5]}), "first")
    attach(model, LoRAConfig(rank=2, alpha=4, target_modules=["1"]), "second")
    randomize(model)
    slot = adapter_slots(model, "second")["1"]
    expected = copy.deepcopy(plain)
    with torch.no_grad():
        expected[1].weight += 2.0 * slot.lora_B @ slot.lora_A
    set_adapters(model, "second")
    torch.testing.assert_close(model(ids), expected(ids))
    set_adapters(model, ())
    torch.testing.assert_close(model(ids), plain(ids))
    tokens = adapter_slots(model, "first")["0.token_adapter"].trainable_tokens_delta
    first = adapter_slots(model, "first")["1"]
    with torch.no_grad():
        expected = copy.deepcopy(plain)
        expected[0].weight[[2, 5]] += 0.25 * (tokens - plain[0].weight[[2, 5]])
        expected[1].weight += 0.25 * first.scaling * first.lora_B @ first.lora_A
    set_adapters(model, {"first": 0.25})
    torch.testing.assert_close(model(ids), expected(ids))
    merge(model)
    torch.testing.assert_close(model(ids), expected(ids))


def test_the_base_is_told_by_its_own_weights(name: str) -> None:
    expected = base_sha256(bare(name))
    assert base_sha256(build(name)) == expected
