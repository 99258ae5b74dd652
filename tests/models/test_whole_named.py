"""modules_to_save of several adapters on one model: each has copies of its own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.adapters.whole import WholeModule
from gauge_ext.checkpoint import adapter_sha256, load_adapter, read_adapter, save_adapter
from gauge_ext.checkpoint.many import load_adapters, save_adapters, swap_adapter
from gauge_ext.errors import AdapterMismatchError, AdapterStateError, ConfigError, TargetError
from gauge_ext.models import (
    adapter_parameters,
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
    active_adapters,
    adapter_rows,
    disable_adapters,
    set_adapters,
    use_adapters,
)

# "c" has no copies; the other two have, of different modules.
SAVED = {"a": ["head"], "b": ["mid", "head"], "c": None}


class Base(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pre, self.up, self.act = nn.Linear(6, 6), nn.Linear(6, 8), nn.Tanh()
        self.mid = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 5)
        self.double()


def config(name: str, **fields: object) -> LoRAConfig:
    alpha = {"a": 4.0, "b": 6.0, "c": 1.0}[name]
    named = {"rank": 2, "alpha": alpha, "target_modules": ["up"], "modules_to_save": SAVED[name]}
    return LoRAConfig(**named | fields)


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.5)


@pytest.fixture
def model() -> nn.Module:
    found = Base()
    for name in SAVED:
        attach(found, config(name), name)
    randomize(found)
    return found


def inputs() -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def by_hand(model: nn.Module, weights: dict[str, float]) -> Tensor:
    """The bare model with W + sum of w s B A in its layer, and the modules that are saved."""
    plain, tensors = Base(), model.state_dict()
    with torch.no_grad():
        for name, weight in weights.items():
            within = "" if name == "a" else f"slots.{name}."
            product = tensors[f"up.{within}lora_B"] @ tensors[f"up.{within}lora_A"]
            plain.up.weight += weight * config(name).alpha / 2 * product
            for path in SAVED[name] or ():
                # The first adapter to have copies of a module is the one under its own names.
                within = "slots.b." if (name, path) == ("b", "head") else ""
                for key, own in plain.get_submodule(path).named_parameters():
                    own.copy_(tensors[f"{path}.{within}{key}"])
        return plain(inputs())


@pytest.mark.parametrize(
    "weights",
    [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"b": -0.5}, {"a": 2.0, "c": 0.5}, {"c": 3.0, "b": 1.0}],
    ids=str,
)
def test_by_hand(model: nn.Module, weights: dict[str, float]) -> None:
    base = Base()(inputs())
    for before in ("b", "a"):
        set_adapters(model, before)
        set_adapters(model, weights)
        torch.testing.assert_close(model(inputs()), by_hand(model, weights))
    with use_adapters(model, "a"), disable_adapters(model):
        torch.testing.assert_close(model(inputs()), base)
    torch.testing.assert_close(model(inputs()), by_hand(model, weights))
    set_adapters(model, [])
    torch.testing.assert_close(model(inputs()), base)


def test_two_at_once_are_refused(model: nn.Module) -> None:
    before = model(inputs())
    for together in (["a", "b"], {"c": 1.0, "b": 0.5, "a": 0.5}):
        with pytest.raises(AdapterStateError, match=r"'head' can be that of one adapter.*'a'"):
            set_adapters(model, together)
        assert active_adapters(model) == {"a": 1.0}
        assert torch.equal(model(inputs()), before)


def test_samples_of_different_copies_are_refused(model: nn.Module) -> None:
    for names in (["a", "b"], ["a", "c"], ["a", None], ["b", "a"]):
        with pytest.raises(AdapterStateError, match="'(head|mid)' can be that of one adapter"):
            model(inputs()[:2], adapter_names=[name or "__base__" for name in names])
    for name in ("a", "b", "c"):
        expected = by_hand(model, {name: 1.0})
        torch.testing.assert_close(model(inputs(), adapter_names=[name] * 7), expected)
    torch.testing.assert_close(model(inputs()), by_hand(model, {"a": 1.0}))
    with adapter_rows(model, ["b"] * 7):  # rows are of the batch, not of a copy
        torch.testing.assert_close(copy.deepcopy(model)(inputs()), by_hand(model, {"a": 1.0}))


def test_training_reaches_the_one_that_works(model: nn.Module) -> None:
    set_adapters(model, "b")
    untouched = {n: p for n, p in whole_parameters(model).items() if "slots" not in n}
    model(inputs()).square().sum().backward()
    moved = {name for name, p in whole_parameters(model).items() if p.grad is not None}
    assert moved == {"mid.weight", "head.slots.b.weight", "head.slots.b.bias"}
    assert set(untouched) == {"mid.weight", "head.weight", "head.bias"}
    assert not any(p.requires_grad for m in (model.mid, model.head) for p in m._own.values())


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


def test_compiled_once_for_each(model: nn.Module) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for frames in ([1, 2, 3], [3, 3, 3]):
        for name, count in zip(SAVED, frames, strict=True):
            set_adapters(model, name)
            torch.testing.assert_close(compiled(inputs()), by_hand(model, {name: 1.0}))
            assert counter.frame_count == count
    set_adapters(compiled, "b")
    torch.testing.assert_close(torch.compile(model)(inputs()), by_hand(model, {"b": 1.0}))


def test_moved_with_the_model(model: nn.Module) -> None:
    model.float()
    assert {p.dtype for p in (*model.parameters(), *model.head._own.values())} == {torch.float32}
    with disable_adapters(model):
        torch.testing.assert_close(model(inputs().float()), Base().float()(inputs().float()))
    detach(model.bfloat16())
    assert model.head.weight.dtype == torch.bfloat16


def test_tied_weights_stay_tied(llama: nn.Module) -> None:
    table, ids = llama.model.embed_tokens.weight, torch.tensor([[1, 2, 3]])
    base = llama(ids).logits
    fields = {"target_modules": ["q_proj"], "ensure_weight_tying": True}
    for name, saved in (("a", ["lm_head"]), ("b", ["embed_tokens"])):
        attach(llama, LoRAConfig(rank=2, **fields, modules_to_save=saved), name)
    randomize(llama)
    seen = []
    for name in ("a", "b"):
        set_adapters(llama, name)
        assert llama.lm_head.weight is llama.model.embed_tokens.weight
        seen.append(llama.lm_head.weight)
        plain = merged_copy(llama)
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
        torch.testing.assert_close(plain(ids).logits, llama(ids).logits)
    assert len({id(p) for p in (*seen, table)}) == 3
    with disable_adapters(llama):
        assert torch.equal(llama(ids).logits, base)
    detach(llama)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight is table


def test_copies_of_a_part_take_the_place_of_copies_of_all() -> None:
    model = nn.Sequential()
    model.emb, model.up, model.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)
    model.head.weight = table = model.emb.weight
    bias, fields = model.head.bias, {"target_modules": ["up"], "ensure_weight_tying": True}
    attach(model, LoRAConfig(rank=2, **fields, modules_to_save=["head"]), "a")
    attach(model, LoRAConfig(rank=2, **fields, modules_to_save=["emb"]), "b")
    randomize(model)
    assert set(whole_parameters(model, "a")) == {"emb.weight", "head.weight", "head.bias"}
    set_adapters(model, "b")
    assert model.head.bias is bias
    delete_adapter(model, "a")
    assert set(whole_parameters(model)) == {"emb.weight", "head.weight"}
    assert dict(model.named_parameters(remove_duplicate=False))["head.bias"] is bias
    assert model.head.weight is model.emb.weight is not table


def test_a_module_that_keeps_what_it_has_read() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.rnn = nn.Linear(6, 6), nn.LSTM(6, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.rnn(self.up(x))[0]
            return found

    model = Model().double()
    x, base = inputs()[None], copy.deepcopy(model)
    for name in ("a", "b"):
        attach(model, LoRAConfig(rank=2, target_modules=["up"], modules_to_save=["rnn"]), name)
    randomize(model)
    for name in ("a", "b"):
        set_adapters(model, name)
        torch.testing.assert_close(model(x), merged_copy(model)(x))
        for key, own in base.rnn.named_parameters():
            within = "" if name == "a" else "slots.b."
            own.data.copy_(model.rnn.get_parameter(within + key))
        base.up.weight.data.copy_(merged_copy(model).up.weight)
        torch.testing.assert_close(model(x), base(x))


def test_what_goes_with_it_no_further(model: nn.Module) -> None:
    before = model(inputs())
    for fields, error, message in (
        (
            {"target_modules": ["pre"], "modules_to_save": ["up"]},
            TargetError,
            "'up' is adapted in place by 'a', 'b', 'c'",
        ),
        ({"target_modules": ["mid"]}, TargetError, "'b' has it trained whole"),
        ({"target_parameters": ["mid.weight"]}, TargetError, "'b' has its module trained whole"),
        ({"modules_to_save": ["no"]}, TargetError, "modules_to_save names 'no'"),
        ({"bias": "all"}, ConfigError, "bias='all'"),
    ):
        named = {"rank": 2, "target_modules": ["up"]} | fields
        with pytest.raises(error, match=message):
            attach(model, LoRAConfig(**named), "d")
        assert torch.equal(model(inputs()), before)
    other = attach(Base(), config("c", bias="all"), "c")
    with pytest.raises(TargetError, match="means 'head.bias', in whose place the adapter 'c'"):
        attach(other, config("a"), "a")
    assert type(other.head) is nn.Linear


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
