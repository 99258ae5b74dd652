"""Which weight belongs to which module, from every kind of evidence and from none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_layouts import random_weights, write_model, write_quantized
from safetensors.numpy import save_file

from gauge_ext.errors import AdapterMismatchError
from gauge_ext.export.disk.base_folder import open_base
from gauge_ext.export.disk.onnx_file import open_onnx
from gauge_ext.export.patching.homes import find_homes
from gauge_ext.export.patching.update import WeightShape

SHAPES = {
    "m.layer.0.q": (8, 8),
    "m.layer.0.v": (8, 8),
    "m.layer.1.q": (8, 8),
    "m.layer.1.v": (8, 8),
}


def found(path: Path, shapes: dict, base: Path | None = None) -> dict[str, tuple[str, str]]:
    weights = {m: s if isinstance(s, WeightShape) else WeightShape(s) for m, s in shapes.items()}
    homes = find_homes(open_onnx(path), weights, None if base is None else open_base(base))
    return {home.module: (home.site.tensor, home.found_by) for home in homes}


@pytest.fixture
def stripped(tmp_path: Path) -> Path:
    """Weights and nodes without names, as another tool may leave them."""
    path = write_model(tmp_path / "s.onnx", random_weights(SHAPES), ["folded"] * 4)
    model = onnx.load(str(path))
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.name = ""
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("layout", ["gemm", "transpose", "folded", "legacy"])
@pytest.mark.parametrize("prefix", ["", "m.", "x.m."])
def test_by_what_the_file_says(layout, prefix, tmp_path):
    path = write_model(tmp_path / "b.onnx", random_weights(SHAPES), [layout] * 4)
    names = {f"{prefix}{module.removeprefix('m.')}": module for module in SHAPES}
    homes = found(path, {name: SHAPES[module] for name, module in names.items()})
    order = list(SHAPES)
    for name, (tensor, _) in homes.items():
        number = order.index(names[name]) + 60
        expected = {"folded": f"val_{number}", "legacy": f"onnx::MatMul_{number}"}
        assert tensor == expected.get(layout, f"{names[name]}.weight")


def test_by_the_metadata_of_our_own_exporter(stripped):
    model = onnx.load(str(stripped))
    said = {f"val_{60 + i}": [f"{module}.weight", "tied"] for i, module in enumerate(SHAPES)}
    helper.set_model_props(model, {"gauge_ext.parameters": json.dumps(said)})
    onnx.save(model, str(stripped))
    assert found(stripped, SHAPES)["m.layer.1.q"] == ("val_62", "gauge_ext's metadata")


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_what_torch_exports(optimize, dimensions, tmp_path):
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(8, 8)
            self.v = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.v(torch.relu(self.q(x)))

    model = torch.nn.Sequential(Block(), Block()).eval()
    path = tmp_path / "t.onnx"
    x = torch.randn(*[3] * (dimensions - 1), 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        torch.onnx.export(model, (x,), path, dynamo=True, optimize=optimize, verbose=False)
    homes = found(path, {"0.q": (8, 8), "1.q": (8, 8), "0.v": (8, 8), "1.v": (8, 8)})
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
    for module, (tensor, _) in homes.items():
        weight = model.get_parameter(f"{module}.weight").detach().numpy()
        assert np.array_equal(stored[tensor], weight) or np.array_equal(stored[tensor], weight.T)


def test_by_order_only_where_it_is_unequivocal(stripped):
    with pytest.raises(AdapterMismatchError) as caught:
        found(stripped, dict.fromkeys(SHAPES, (8, 8)))
    said = str(caught.value)
    for part in ("4 of the adapter's 4", "'m.layer.0.q' (8, 8)", "name_scopes", "order", "--base"):
        assert part in said
    assert "4 weights have the first one's shape: 'val_60', 'val_61'" in said
    layers = [f"h.{number}.mlp" for number in (10, 2, 1, 0)]
    homes = found(stripped, dict.fromkeys(layers, (8, 8)))
    assert {name: tensor for name, (tensor, _) in homes.items()} == {
        "h.0.mlp": "val_60",
        "h.1.mlp": "val_61",
        "h.2.mlp": "val_62",
        "h.10.mlp": "val_63",
    }
    with pytest.raises(AdapterMismatchError, match="3 of the adapter's 3"):
        found(stripped, dict.fromkeys(layers[:3], (8, 8)))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder that the models here were exported from, under a shorter prefix."""
    folder = tmp_path / "base"
    folder.mkdir()
    weights = random_weights(SHAPES)
    tensors = {f"{m.removeprefix('m.')}.weight": w for m, w in weights.items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def test_by_values(stripped, base):
    homes = found(stripped, SHAPES, base)
    assert [tensor for tensor, _ in homes.values()] == ["val_60", "val_61", "val_62", "val_63"]
    assert {how for _, how in homes.values()} == {"its values, compared with the base"}


def test_two_weights_alike_have_no_unique_home(stripped, base):
    model = onnx.load(str(stripped))
    model.graph.initializer[1].raw_data = model.graph.initializer[0].raw_data
    onnx.save(model, str(stripped))
    with pytest.raises(AdapterMismatchError, match=r"2 of the adapter's 4.*layer\.0\.q.*values"):
        found(stripped, SHAPES, base)


def test_a_base_that_it_was_not_exported_from(tmp_path, base):
    weights = random_weights(SHAPES)
    weights["m.layer.1.v"] = weights["m.layer.1.v"] + 0.05
    path = write_model(tmp_path / "b.onnx", weights, ["gemm"] * 4)
    with pytest.raises(AdapterMismatchError, match=r"'m\.layer\.1\.v\.weight'.*does not hold the"):
        found(path, SHAPES, base)


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_by_values(bits, tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 64)).astype("f4")
    path, _ = write_quantized(tmp_path / "q.onnx", weight, bits=bits, size=32, with_zero=True)
    folder = tmp_path / "base"
    folder.mkdir()
    other = rng.standard_normal((32, 64)).astype("f4")
    tensors = {"x.q.weight": weight, "x.v.weight": other}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    assert found(path, {"x.q": (32, 64)}, folder)["x.q"][0] == "a.weight_Q4"
    with pytest.raises(AdapterMismatchError, match="no unique weight"):
        found(path, {"x.v": (32, 64)}, folder)


def test_another_shape(tmp_path):
    path = write_model(tmp_path / "b.onnx", random_weights(SHAPES), ["gemm"] * 4)
    with pytest.raises(AdapterMismatchError, match=r"shape \(9, 8\).*has shape \(8, 8\)"):
        found(path, {"m.layer.0.q": (9, 8)})


def test_a_weight_that_is_used_for_something_else(tmp_path):
    weight = numpy_helper.from_array(np.ones((10, 4), "f4"), "head.weight")
    nodes = [
        helper.make_node("Gather", ["head.weight", "ids"], ["e"], name="embed"),
        helper.make_node("Transpose", ["head.weight"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["e", "t"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", 7, ["n"])],
        [helper.make_tensor_value_info("y", 1, ["n", 10])],
        [weight],
    )
    path = tmp_path / "t.onnx"
    onnx.save(helper.make_model(graph), str(path))
    with pytest.raises(
        AdapterMismatchError, match=r"'head\.weight'.*is tied: it is used by Gather"
    ):
        found(path, {"head": (10, 4)})


def test_one_module_that_is_called_twice_is_one_weight(tmp_path):
    weights = random_weights({"m.a": (8, 8)})
    path = write_model(tmp_path / "b.onnx", weights, ["legacy"])
    model = onnx.load(str(path))
    model.graph.node.append(helper.make_node("MatMul", ["h0", "onnx::MatMul_60"], ["z"]))
    model.graph.output[0].name = "z"
    for name in ("/m/a_1/MatMul", "/m/a/MatMul_1"):
        model.graph.node[-1].name = name
        onnx.save(model, str(path))
        assert found(path, {"m.a": (8, 8)})["m.a"][0] == "onnx::MatMul_60"
    for name, other in (("/m/b/MatMul", "b"), ("/m/b_1/MatMul", "b_1")):
        model.graph.node[-1].name = name
        onnx.save(model, str(path))
        with pytest.raises(AdapterMismatchError, match=rf"is tied.*used by m\.a, m\.{other} too"):
            found(path, {"m.a": (8, 8)})


@pytest.mark.parametrize("dynamo", [False, True])
def test_a_module_that_torch_calls_twice(dynamo, tmp_path):
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(torch.relu(self.q(x)))

    path = tmp_path / "t.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        x = torch.randn(2, 3, 8)
        torch.onnx.export(Twice().eval(), (x,), path, dynamo=dynamo, verbose=False)
    assert len(found(path, {"q": (8, 8)})) == 1


def test_a_graph_without_linear_layers(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    info = [helper.make_tensor_value_info(name, 1, ["n"]) for name in "xy"]
    path = tmp_path / "r.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "g", info[:1], info[1:])), str(path))
    with pytest.raises(AdapterMismatchError, match="no linear layer, embedding or convolution"):
        found(path, {"a": (2, 2)})
