"""trainable_token_indices of several adapters on one model: each has rows of its own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint import adapter_sha256, load_adapter, read_adapter, save_adapter
from gauge_ext.checkpoint.many import load_adapters, save_adapters, swap_adapter
from gauge_ext.errors import AdapterMismatchError, TargetError
from gauge_ext.models import (
    adapter_parameters,
    attach,
    detach,
    merge,
    merged_copy,
    unmerge,
    whole_parameters,
)
from gauge_ext.models.many import delete_adapter, rename_adapter
from gauge_ext.models.working import disable_adapters, set_adapters

# "b" shares the token 5 with "a", "c" none with either, "d" trains none.
TOKENS = {"a": [5, 2], "b": [1, 5, 0], "c": [3], "d": None}


class Base(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.up = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.emb.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.up(self.emb(x))))
        return found


def config(tokens: list[int] | None, **fields: object) -> LoRAConfig:
    named = {"rank": 2, "alpha": 6.0, "target_modules": ["up"]} | fields
    return LoRAConfig(**named, trainable_token_indices=tokens and {"emb": tokens})


@pytest.fixture(params=[False, True], ids=["apart", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def model(tied: bool) -> nn.Module:
    found = Base(tied)
    for name, tokens in TOKENS.items():
        attach(found, config(tokens), name)
    randomize(found)
    return found


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.5)


def ids() -> Tensor:
    return torch.arange(7)[None]


def by_hand(model: nn.Module, tied: bool, weights: dict[str, float]) -> Tensor:
    plain, own, tensors = Base(tied), Base(tied).emb.weight.detach(), model.state_dict()
    with torch.no_grad():
        for name, weight in weights.items():
            within = "" if name == "a" else f"slots.{name}."
            product = tensors[f"up.{within}lora_B"] @ tensors[f"up.{within}lora_A"]
            plain.up.weight += weight * 3.0 * product
            for row, token in enumerate(TOKENS[name] or ()):
                rows = tensors[f"emb.token_adapter.{within}trainable_tokens_delta"]
                plain.emb.weight[token] += weight * (rows[row] - own[token])
        return plain(ids())


@pytest.mark.parametrize(
    "weights",
    [
        *({name: 1.0} for name in TOKENS),
        {"b": -0.5},
        {"a": 1.0, "c": 1.0},
        {"a": 1.0, "b": 1.0},
        {"b": 2.0, "a": 0.5, "d": 1.0, "c": -1.0},
        {},
    ],
    ids=str,
)
def test_by_hand(model: nn.Module, tied: bool, weights: dict[str, float]) -> None:
    set_adapters(model, weights)
    expected = by_hand(model, tied, weights)
    torch.testing.assert_close(model(ids()), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), merged_copy(model)):
        torch.testing.assert_close(twin(ids()), expected)
        assert (twin.head.weight is twin.emb.weight) is tied
    merge(model)
    torch.testing.assert_close(model(ids()), expected)
    torch.testing.assert_close(unmerge(model)(ids()), expected)
    with disable_adapters(model):
        assert torch.equal(model(ids()), Base(tied)(ids()))
    detach(model)
    assert type(model.emb) is nn.Embedding
    assert list(model.state_dict()) == list(Base(tied).state_dict())
    assert torch.equal(model(ids()), Base(tied)(ids()))


def test_rows_alone_are_taken_exactly(model: nn.Module) -> None:
    set_adapters(model, ["b", "c"])
    with torch.no_grad():
        table = model.emb.token_adapter()
    for name in ("b", "c"):
        (rows,) = whole_parameters(model, name).values()
        assert torch.equal(table[TOKENS[name]], rows)


def test_gradients_of_those_that_work(model: nn.Module) -> None:
    set_adapters(model, ["a", "b"])
    model(ids()).square().sum().backward()
    moved = {name for name, p in whole_parameters(model).items() if p.grad is not None}
    path = "emb.token_adapter."
    assert moved == {path + "trainable_tokens_delta", path + "slots.b.trainable_tokens_delta"}


def test_deleted_and_renamed(model: nn.Module, tied: bool) -> None:
    expected = {name: by_hand(model, tied, {name: 1.0}) for name in TOKENS}
    kept = whole_parameters(model, "b")
    delete_adapter(model, "a")
    rename_adapter(model, "b", "other")
    assert all(p is kept[name] for name, p in whole_parameters(model, "other").items())
    for name, called in (("b", "other"), ("c", "c"), ("d", "d")):
        set_adapters(model, called)
        torch.testing.assert_close(model(ids()), expected[name])
    for name in ("c", "other"):
        delete_adapter(model, name)
    assert type(model.emb) is nn.Embedding
    torch.testing.assert_close(model(ids()), expected["d"])


def test_files(model: nn.Module, tied: bool, tmp_path: Path) -> None:
    written = save_adapters(model, tmp_path)
    for name, folder in written.items():
        assert read_adapter(folder).sha256 == adapter_sha256(model, name)
    again = load_adapters(Base(tied), {name: written[name] for name in reversed(TOKENS)})
    for name in TOKENS:
        set_adapters(again, name)
        torch.testing.assert_close(again(ids()), by_hand(model, tied, {name: 1.0}))
    other = copy.deepcopy(model)
    randomize(other)
    save_adapter(other, tmp_path / "new", name="b")
    set_adapters(model, "b")
    swap_adapter(model, tmp_path / "new", "b")
    torch.testing.assert_close(model(ids()), by_hand(other, tied, {"b": 1.0}))
    before = copy.deepcopy(model.state_dict())
    for put in (swap_adapter, load_adapter):
        with pytest.raises(AdapterMismatchError, match="trains rows of the tokens"):
            put(model, written["a"], name="c")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_peft_reads_each_and_we_read_its(model: nn.Module, tied: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    written = save_adapters(model, tmp_path / "ours")
    # Of those with tokens: beside them PEFT cannot save one that has none.
    theirs = peft.PeftModel.from_pretrained(Base(tied), written["c"], "cc").eval()
    for name in ("b", "a"):
        theirs.load_adapter(written[name], 2 * name)  # PEFT warns of parts of "lora_"
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapters(Base(tied), tmp_path / "theirs")
    for name in ("a", "b", "c"):
        theirs.set_adapter(2 * name)
        set_adapters(ours, 2 * name)
        expected = by_hand(model, tied, {name: 1.0})
        if not tied:  # PEFT ties where the model says that it does
            torch.testing.assert_close(theirs(ids()), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours(ids()), expected, rtol=0, atol=1e-12)


def test_a_table_is_adapted_or_has_rows(model: nn.Module, tied: bool) -> None:
    before = model(ids())
    for fields, message in (
        ({"target_modules": ["emb"]}, "emb"),
        ({"target_modules": ["up"], "modules_to_save": ["emb"]}, "'emb' is adapted in place by"),
    ):
        with pytest.raises(TargetError, match=message):
            attach(model, LoRAConfig(rank=2, **fields), "e")
        assert torch.equal(model(ids()), before)
    with pytest.raises(TargetError, match="goes up to 7"):
        attach(model, config([1, 7]), "e")
    if tied:
        named = LoRAConfig(target_modules=["up"], trainable_token_indices={"head": [1]})
        with pytest.raises(TargetError, match="means 'head'.* where it is tied"):
            attach(model, named, "e")
    assert torch.equal(model(ids()), before)
    for fields in ({"target_modules": ["emb"]}, {"modules_to_save": ["emb"]}):
        first = LoRAConfig(**{"rank": 2, "target_modules": ["up"]} | fields)
        other = attach(Base(tied=False), first, "first")
        with pytest.raises(TargetError, match="'emb', whose table has an adapter or is trained"):
            attach(other, config([1]), "e")
