"""Samples with trained tokens of their own adapters, against a table for each, by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gauge_ext.adapters import LoRAConfig
from gauge_ext.adapters.tokens import TrainedTokens
from gauge_ext.errors import AdapterStateError, ConfigError
from gauge_ext.models import adapter_parameters, attach
from gauge_ext.models.roster import adapter_slots
from gauge_ext.models.working import adapter_rows, disable_adapters

# "b" shares the token 5 with "a"; "d" trains none.
TOKENS = {"a": [5, 2], "b": [1, 5, 0], "c": [3], "d": None}
NAMES = ["b", None, "a", "d", "c", "a"]
IDS = torch.tensor([[5, 1, 0, 2], [5, 1, 3, 2], [5, 2, 2, 6], [3, 5, 1, 4], [3, 0, 3, 5]])
IDS = torch.cat([IDS, IDS[:1].flip(1)])


class Scaled(nn.Embedding):
    """An embedding of which nothing is known but that it is one, as Gemma's."""

    def forward(self, ids: Tensor) -> Tensor:
        return 3.0 * super().forward(ids)


# A tied head with a bias, or without; what the embedding is, and its options.
KINDS = {
    "plain": (nn.Embedding, {}, False),
    "tied": (nn.Embedding, {}, True),
    "padded": (nn.Embedding, {"padding_idx": 5}, True),
    "counted": (nn.Embedding, {"scale_grad_by_freq": True}, False),
    "scaled": (Scaled, {}, True),
}


class Base(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        embedding, options, tied = KINDS[kind]
        self.emb, self.up, self.head = embedding(7, 4, **options), nn.Linear(4, 4), nn.Linear(4, 7)
        if tied:
            self.head.weight = self.emb.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.up(self.emb(x))))
        return found


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str) -> Base:
    found = Base(kind)
    for name, tokens in TOKENS.items():
        wanted = tokens and {"emb": tokens}
        fields = {"target_modules": ["up"], "trainable_token_indices": wanted}
        attach(found, LoRAConfig(rank=2, alpha=6, **fields), name)
    with torch.no_grad():
        for parameter in adapter_parameters(found):
            parameter.normal_(std=0.5)
    return found


def leaves(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The tensors of each adapter, apart from the model's."""
    return {
        name: {
            f"{path}.{key}": value.detach().clone().requires_grad_()
            for path, slot in adapter_slots(model, name).items()
            for key, value in slot.trained().items()
        }
        for name in TOKENS
    }


def alone(kind: str, name: str | None, tensors: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """What all samples give with one adapter, by the formulas of the layers."""
    base = Base(kind)
    table, update = base.emb.weight.detach(), 0.0
    if name is not None:
        own = tensors[name]
        update = 3.0 * own["up.lora_B"] @ own["up.lora_A"]
        if TOKENS[name]:
            place = torch.tensor(TOKENS[name])
            table = table.index_copy(0, place, own["emb.token_adapter.trainable_tokens_delta"])
    _, options, tied = KINDS[kind]
    x = nn.functional.embedding(IDS, table, **options) * (3.0 if kind == "scaled" else 1.0)
    hidden = torch.tanh(nn.functional.linear(x, base.up.weight + update, base.up.bias))
    head = table if tied else base.head.weight
    return nn.functional.linear(hidden, head, base.head.bias)


def by_hand(
    kind: str, tensors: Mapping[str, Mapping[str, Tensor]], names: list[str | None] = NAMES
) -> Tensor:
    found = {name: alone(kind, name, tensors) for name in dict.fromkeys(names)}
    return torch.stack([found[name][i] for i, name in enumerate(names)])


@pytest.mark.parametrize("names", [NAMES, ["a"] * 6, [None] * 5 + ["b"], ["d", "c"] * 3], ids=str)
def test_each_sample_has_its_own(kind: str, model: Base, names: list[str | None]) -> None:
    tensors, usual = leaves(model), model(IDS)
    with adapter_rows(model, names), torch.no_grad():
        torch.testing.assert_close(model(IDS), by_hand(kind, tensors, names))
        torch.testing.assert_close(copy.deepcopy(model)(IDS), usual)
        with disable_adapters(model):
            torch.testing.assert_close(model(IDS), by_hand(kind, tensors, [None] * 6))
    called = [name or "__base__" for name in names]
    found = model(IDS, adapter_names=called)
    torch.testing.assert_close(found, by_hand(kind, tensors, names))
    torch.testing.assert_close(model(IDS), usual)


def test_gradients(kind: str, model: Base) -> None:
    # Each sample has a loss of its own, so that gradients of another would be seen. An embedding
    # whose gradients are by counts counts the samples of one adapter: here all are of one.
    names = ["b"] * 6 if kind == "counted" else NAMES
    weights, tensors = torch.linspace(-1, 2, 6).double()[:, None, None], leaves(model)
    (by_hand(kind, tensors, names).square() * weights).sum().backward()
    with adapter_rows(model, names):
        (model(IDS).square() * weights).sum().backward()
    for name in TOKENS:
        for path, slot in adapter_slots(model, name).items():
            for key, value in slot.trained().items():
                want = tensors[name][f"{path}.{key}"].grad
                got = value.grad
                if want is None:
                    assert got is None or not got.any()
                else:
                    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["counted"])
def test_counts_are_of_the_samples_of_an_adapter(kind: str, model: Base) -> None:
    path = "emb.token_adapter.trainable_tokens_delta"
    with adapter_rows(model, NAMES):
        model.emb(IDS).sum().backward()
    for name, tokens in TOKENS.items():
        rows = [i for i, other in enumerate(NAMES) if other == name]
        for row, token in enumerate(tokens or ()):
            grad = adapter_slots(model, name)[path.rpartition(".")[0]].trainable_tokens_delta.grad
            there = float((IDS[rows] == token).any())
            assert grad[row].tolist() == [there] * 4


def test_compiled(kind: str, model: Base) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for names in (NAMES, ["a"] * 6):
        with adapter_rows(model, names), torch.no_grad():
            torch.testing.assert_close(compiled(IDS), by_hand(kind, leaves(model), names))


class Copies(TorchDispatchMode):
    """How often a table is copied."""

    count = 0

    # The signature is torch's, which has no types.
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket is torch.ops.aten.index_copy
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("kind", "copies"), [("tied", 0), ("padded", 0), ("scaled", 3)])
def test_no_table_is_copied_where_it_is_known_what_is_done(model: Base, copies: int) -> None:
    with adapter_rows(model, NAMES), Copies() as seen:
        model(IDS)
    assert seen.count == copies  # three of the adapters train tokens
    with adapter_rows(model, ["a"] * 6), Copies() as seen:
        model(IDS)
    assert seen.count == 2  # one at each end


@pytest.mark.parametrize("kind", ["tied"])
def test_dtypes_and_shapes(kind: str, model: Base) -> None:
    model.emb.weight.data = model.emb.weight.to(torch.bfloat16)
    model.head.weight, model.head.bias.data = model.emb.weight, model.head.bias.to(torch.bfloat16)
    table = model.emb.weight.detach()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    with adapter_rows(model, NAMES):
        rows, logits = model.emb(IDS[:, 0]), model.head(x)
    assert rows.dtype == logits.dtype == torch.bfloat16
    for i, name in enumerate(NAMES):
        own = table.clone()
        if TOKENS.get(name or "d"):
            slot = adapter_slots(model, name)["emb.token_adapter"]
            own[TOKENS[name]] = slot.trainable_tokens_delta.detach().to(torch.bfloat16)
        assert torch.equal(rows[i], own[IDS[i, 0]])
        torch.testing.assert_close(logits[i], nn.functional.linear(x[i], own, model.head.bias))


@pytest.mark.parametrize("kind", ["tied"])
def test_what_cannot_tell_samples_apart(model: Base) -> None:
    tokens = model.emb.token_adapter
    assert isinstance(tokens, TrainedTokens)
    with adapter_rows(model, NAMES):
        with pytest.raises(ConfigError, match=r"for 6 samples, and 'emb.token_adapter' got .*\(4,"):
            model.emb(IDS[0])
        with pytest.raises(AdapterStateError, match="'weight' of 'emb.token_adapter' was read"):
            tokens()
