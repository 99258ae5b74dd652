from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch
from torch import nn

import gauge_ext
from gauge_ext.checkpoint import adapter_sha256
from gauge_ext.errors import ConfigError
from gauge_ext.export.metadata import base_sha256, provenance, read_bounds


def test_the_hash_by_hand():
    model = nn.Linear(2, 1, dtype=torch.float64)
    text = b"bias\0torch.float64\0(1,)\0" + model.bias.detach().numpy().tobytes()
    text += b"weight\0torch.float64\0(1, 2)\0" + model.weight.detach().numpy().tobytes()
    assert base_sha256(model) == hashlib.sha256(text).hexdigest()


def test_the_base_is_the_same_whatever_the_adapter_does(mlp, adapted):
    mlp.register_buffer("steps", torch.tensor(3))
    before = base_sha256(mlp)
    adapted(mlp)
    assert base_sha256(mlp) == before
    gauge_ext.merge(mlp)
    assert base_sha256(mlp) == before
    gauge_ext.unmerge(mlp)
    gauge_ext.merge(mlp, keep_base=False)
    assert base_sha256(mlp) is None


@pytest.mark.parametrize("adapter", [gauge_ext.LoRAGaugeField, gauge_ext.LoRAFiberBundle])
def test_the_base_is_the_same_below_an_adapter_that_holds_it(mlp, adapter):
    before, alone = base_sha256(mlp), base_sha256(mlp.up)
    assert base_sha256(adapter(copy.deepcopy(mlp.up), 2)) == alone
    mlp.up = adapter(mlp.up, 2)
    assert base_sha256(mlp) == before
    said = provenance(mlp)
    assert said["adapter_sha256"] == adapter_sha256(mlp)
    assert json.loads(said["adapted_layers"]) == {"up": {"rank": 2, "scaling": 1.0}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int8], ids=str)
def test_every_dtype_is_bytes(dtype):
    model = nn.Module()
    model.register_buffer("scalar", torch.tensor(1).to(dtype))
    other = copy.deepcopy(model)
    other.scalar = torch.tensor(0).to(dtype)
    assert base_sha256(model) == base_sha256(copy.deepcopy(model)) != base_sha256(other)


def test_names_and_shapes_count(mlp):
    other = nn.ModuleDict({"up": copy.deepcopy(mlp.up)})
    assert base_sha256(other) != base_sha256(nn.ModuleDict({"down": copy.deepcopy(mlp.up)}))
    flat = copy.deepcopy(other)
    flat.up.weight = nn.Parameter(other.up.weight.detach().reshape(-1))
    assert base_sha256(flat) != base_sha256(other)


def test_what_a_user_may_add(mlp):
    assert provenance(mlp, {"base": "MLP"})["base"] == "MLP"
    for key in ("base_sha256", "parameters", "dynamic_dims", "validation", "precision"):
        with pytest.raises(ConfigError, match="is written by gauge_ext itself"):
            provenance(mlp, {key: ""})
    with pytest.raises(ConfigError, match="must map text to text"):
        provenance(mlp, {"rank": 8})


def test_bounds_of_a_file():
    text = '{"batch": [1, 8], "sequence": [2, null]}'
    assert read_bounds({"gauge_ext.dynamic_dims": text}) == {"batch": (1, 8), "sequence": (2, None)}
    assert read_bounds({"other": "x"}) == {}
    for bad in ("{", "[1]", '{"batch": 3}', '{"batch": [null, null]}'):
        with pytest.raises(ConfigError, match=r"gauge_ext\.dynamic_dims is not what"):
            read_bounds({"gauge_ext.dynamic_dims": bad})
