"""Rows of an embedding that are trained whole, against the table with the rows written in."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gauge_ext
from gauge_ext import LoRAConfig, attach, detach, load_adapter, merge, save_adapter
from gauge_ext.checkpoint import adapter_sha256, read_adapter
from gauge_ext.checkpoint.many import swap_adapter
from gauge_ext.errors import AdapterMismatchError, ConfigError, NonFiniteError, TargetError
from gauge_ext.models import merged_copy, unmerge, whole_parameters

TOKENS = [5, 2]
PATH = "emb.token_adapter.trainable_tokens_delta"


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.emb, self.up = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(self.emb(x))))


def config(**fields: object) -> LoRAConfig:
    named = {"target_modules": ["up"], "trainable_token_indices": TOKENS} | fields
    return LoRAConfig(rank=2, alpha=3, **named)


def adapted(tied: bool, dtype: torch.dtype = torch.float64) -> tuple[Model, Model]:
    torch.manual_seed(0)
    base = Model(tied).to(dtype)
    model = attach(copy.deepcopy(base), config())
    with torch.no_grad():
        for parameter in gauge_ext.adapter_parameters(model):
            parameter.normal_(std=0.5)
    return base, model


def by_hand(base: Model, model: Model) -> Model:
    twin = copy.deepcopy(base).double()
    with torch.no_grad():
        twin.up.weight += 1.5 * model.up.lora_B.double() @ model.up.lora_A.double()
        for row, token in enumerate(TOKENS):
            twin.emb.weight[token] = model.emb.token_adapter.trainable_tokens_delta[row]
    return twin


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([[0, 5, 2], [2, 6, 5]])


@pytest.mark.parametrize("tied", [False, True])
def test_output_merge_and_the_way_back(x: Tensor, tied: bool) -> None:
    base, model = adapted(tied)
    expected = by_hand(base, model)(x)
    assert (expected - base(x)).abs().max() > 0.1
    torch.testing.assert_close(model(x), expected)
    assert list(whole_parameters(model)) == [PATH]
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        merged_copy(model),
        merge(copy.deepcopy(model)),
    ):
        torch.testing.assert_close(twin(x), expected)
        assert (twin.head.weight is twin.emb.weight) is tied
    merge(model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(unmerge(model)(x), expected)
    detach(model)
    assert (type(model.emb), type(model.head)) == (nn.Embedding, nn.Linear)
    assert (model.head.weight is model.emb.weight) is tied
    assert model.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_the_rows_alone(x: Tensor, tied: bool) -> None:
    base, model = adapted(tied)
    model(x).square().sum().backward()
    twin = by_hand(base, model)
    twin(x).square().sum().backward()
    rows = model.emb.token_adapter.trainable_tokens_delta
    torch.testing.assert_close(rows.grad, twin.emb.weight.grad[TOKENS])
    assert model.emb.weight.grad is None
    assert torch.equal(model.emb.weight, base.emb.weight)


def test_fresh_rows_change_nothing_and_have_the_dtype_of_factors(x: Tensor) -> None:
    base = Model(tied=True).bfloat16()
    model = attach(copy.deepcopy(base), config())
    assert torch.equal(model(x), base(x))
    assert model.emb.token_adapter.trainable_tokens_delta.dtype == torch.float32
    assert merge(model).emb.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded(x: Tensor, tied: bool, tmp_path: Path) -> None:
    base, model = adapted(tied)
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert adapter_sha256(model) == read_adapter(tmp_path).sha256
    with torch.no_grad():
        again.emb.token_adapter.trainable_tokens_delta.zero_()
    torch.testing.assert_close(load_adapter(again, tmp_path)(x), model(x), rtol=0, atol=0)
    other = attach(copy.deepcopy(base), config(trainable_token_indices={"emb": [5, 3]}))
    other.load_state_dict(model.state_dict())
    assert adapter_sha256(other) != adapter_sha256(model)
    other = attach(copy.deepcopy(base), config(trainable_token_indices={"emb": [5, 3, 1]}))
    save_adapter(other, tmp_path / "three")
    text = (tmp_path / "three" / "adapter_config.json").read_text()
    written = tmp_path / "adapter_config.json"
    written.write_text(text)
    with pytest.raises(AdapterMismatchError, match=r"of shape \(2, 4\).*of shape \(3, 4\)"):
        load_adapter(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"trainable_token_indices": "emb"}, ConfigError, "list of different token ids"),
        ({"trainable_token_indices": [1, 1]}, ConfigError, "list of different token ids"),
        ({"trainable_token_indices": {"emb": [-1]}}, ConfigError, "list of different token ids"),
        ({"trainable_token_indices": {"": [1]}}, ConfigError, "each key"),
        ({"trainable_token_indices": [7]}, TargetError, r"goes up to 7.*\(7, 4\)"),
        ({"trainable_token_indices": {"no": [1]}}, TargetError, "'no', which is no module"),
        ({"target_modules": ["up", "emb"]}, TargetError, "has an adapter or is trained whole"),
        ({"target_modules": ["head"]}, TargetError, "has an adapter or is trained whole"),
        ({"modules_to_save": ["emb", "head"]}, TargetError, "has an adapter or is trained whole"),
    ],
)
def test_refused(fields: dict[str, object], error: type[Exception], message: str) -> None:
    model = Model(tied=True)
    with pytest.raises(error, match=message):
        attach(model, config(**fields))
    assert [type(m) for m in model.children()] == [nn.Embedding, nn.Linear, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())


def test_a_list_needs_a_model_that_tells_its_embedding() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4))
    with pytest.raises(TargetError, match="which is its input embedding"):
        attach(model, config(target_modules=["1"]))


def test_not_finite(x: Tensor) -> None:
    _, model = adapted(tied=True)
    model.emb.token_adapter.trainable_tokens_delta.data[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="emb.token_adapter"):
        merge(model)
    assert not model.up.merged


def test_swapped_and_loaded_in_place(tmp_path: Path) -> None:
    base, model = adapted(tied=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in gauge_ext.adapter_parameters(other):
            parameter.normal_(std=0.5)
    save_adapter(other, tmp_path / "other")
    swap_adapter(model, tmp_path / "other")
    x = torch.arange(7)[None]
    torch.testing.assert_close(model(x), by_hand(base, other)(x))
    # Rows of other tokens have no place in it, however many they are.
    wrong = attach(copy.deepcopy(base), config(trainable_token_indices=[5, 3]))
    save_adapter(wrong, tmp_path / "wrong")
    for put in (swap_adapter, load_adapter):
        with pytest.raises(AdapterMismatchError, match=r"tokens \(5, 2\).* rows of \(5, 3\)"):
            put(model, tmp_path / "wrong")
        torch.testing.assert_close(model(x), by_hand(base, other)(x))
