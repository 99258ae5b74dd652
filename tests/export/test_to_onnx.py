"""The whole road: what is written, what is refused, and what is left behind when it fails."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

import gauge_ext
from gauge_ext.export import Tolerance, export_onnx
from gauge_ext.export.trace import graph_file
from gauge_ext.export.trace.graph import quiet
from gauge_ext.models import is_merged, merged_copy

BATCH = {"x": {0: "batch"}}


def initializers(path: Path) -> dict[str, Tensor]:
    model = onnx.load(path)
    return {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for tensor in model.graph.initializer
    }


def metadata(path: Path) -> dict[str, str]:
    found = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
    assert all(key.startswith("gauge_ext.") for key in found)
    return {key.removeprefix("gauge_ext."): value for key, value in found.items()}


def test_merged_weights_by_hand_under_their_own_names(mlp, adapted, tmp_path, run_onnx):
    base = copy.deepcopy(mlp)
    adapted(mlp)
    path = tmp_path / "mlp.onnx"
    export_onnx(mlp, (torch.randn(2, 12),), path, dynamic_shapes=BATCH)

    # The oracle: W + (alpha / r) B A in float64, straight from the parameters.
    expected = {name: tensor.double() for name, tensor in base.state_dict().items()}
    for name in ("up", "block.down"):
        layer = mlp.get_submodule(name)
        expected[f"{name}.weight"] += 2.0 * (layer.lora_B.double() @ layer.lora_A.double())
    found = initializers(path)
    assert set(base.state_dict()) <= set(found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-7)

    x = torch.randn(7, 12)
    hidden = torch.tanh(x.double() @ expected["up.weight"].T + expected["up.bias"])
    y = hidden @ expected["block.down.weight"].T
    torch.testing.assert_close(run_onnx(path, {"x": x})["output"].double(), y, atol=1e-5, rtol=0)


def test_dict_output_two_inputs_and_a_batch_of_one(two_inputs, adapted, tmp_path, run_onnx):
    adapted(two_inputs, target_modules=["left", "right"])
    path = tmp_path / "two.onnx"
    report = export_onnx(
        two_inputs,
        {"y": torch.randn(1, 3), "x": torch.randn(1, 4)},
        path,
        dynamic_shapes={"x": {0: "batch"}, "y": {0: "batch"}},
    )
    assert report.inputs == {"x": ("batch", 4), "y": ("batch", 3)}
    assert report.outputs == {
        "total": ("batch", 6),
        "parts.0": ("batch", 6),
        "parts.1": ("batch",),
    }
    assert set(report.parameters) == {"left.weight", "left.bias", "right.weight", "right.bias"}
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    with torch.no_grad():
        expected = two_inputs.eval()(x, y)
    found = run_onnx(path, {"x": x, "y": y})
    torch.testing.assert_close(found["total"], expected["total"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["parts.1"], expected["parts"][1], atol=1e-5, rtol=0)


def test_a_model_without_adapter_and_with_static_shapes(mlp, tmp_path):
    report = export_onnx(mlp, (torch.randn(2, 12),), tmp_path / "mlp.onnx")
    assert report.inputs == {"x": (2, 12)}
    assert [case.name for case in report.validation.cases] == ["example", "random 1", "random 2"]
    assert report.validation.passed
    assert "adapter_sha256" not in report.provenance
    for name, tensor in initializers(tmp_path / "mlp.onnx").items():
        assert torch.equal(tensor, mlp.state_dict()[name])


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def test_an_adapter_on_a_tied_head_unties_it(adapted, tmp_path):
    model = adapted(TiedHead(), target_modules=["head"])
    path = tmp_path / "m.onnx"
    report = export_onnx(model, (torch.tensor([[1, 2, 3]]),), path)
    table = model.table.weight.detach()
    update = 2.0 * (model.head.lora_B @ model.head.lora_A).detach()
    stored = initializers(path)
    assert torch.equal(stored["table.weight"], table)
    torch.testing.assert_close(stored["head.weight"], table + update)
    assert report.parameters == {"table.weight": ("table.weight",), "head.weight": ("head.weight",)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes(mlp, dtype, tmp_path, run_onnx):
    mlp.to(dtype)
    x = torch.randn(2, 12, dtype=dtype)
    report = export_onnx(mlp, (x,), tmp_path / "mlp.onnx", dynamic_shapes=BATCH)
    usual = Tolerance.for_dtype(dtype)
    for output in (o for case in report.validation.cases for o in case.outputs):
        assert output.dtype == str(dtype).removeprefix("torch.")
        assert output.limit < 10 * (usual.absolute + usual.relative)
    with torch.no_grad():
        difference = run_onnx(tmp_path / "mlp.onnx", {"x": x})["output"] - mlp(x)
    assert float(difference.abs().max()) <= 20 * torch.finfo(dtype).eps


def test_the_callers_model_is_untouched(mlp, adapted, tmp_path):
    adapted(mlp)
    mlp.train()
    mlp.up.eval()
    mlp.register_buffer("steps", torch.tensor(3))
    before = {name: t.clone() for name, t in mlp.state_dict().items()}
    objects = {name: id(t) for name, t in mlp.named_parameters()}
    needs_grad = {name: t.requires_grad for name, t in mlp.named_parameters()}
    x = torch.randn(2, 12)
    kept = x.clone()
    export_onnx(mlp, (x,), tmp_path / "mlp.onnx", dynamic_shapes=BATCH)
    after = mlp.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: id(t) for name, t in mlp.named_parameters()} == objects
    assert {name: t.requires_grad for name, t in mlp.named_parameters()} == needs_grad
    assert mlp.training
    assert not mlp.up.training
    assert mlp.block.training
    assert not is_merged(mlp)
    assert torch.equal(x, kept)


def test_dropout_is_off_and_a_stateful_forward_is_harmless(tmp_path):
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.norm(self.linear(x)))

    model = Stateful().train()
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, (torch.randn(3, 4),), tmp_path / "m.onnx", dynamic_shapes=BATCH)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert "norm.running_mean" in initializers(tmp_path / "m.onnx")


def test_provenance(mlp, adapted, tmp_path):
    base_hash = metadata_of_export(copy.deepcopy(mlp), tmp_path / "base.onnx")["base_sha256"]
    adapted(mlp)
    gauge_ext.save_adapter(mlp, tmp_path / "adapter")
    found = metadata_of_export(mlp, tmp_path / "mlp.onnx", provenance={"base": "a small MLP"})
    assert found["version"] == gauge_ext.__version__
    assert found["torch_version"] == torch.__version__
    assert found["base_sha256"] == base_hash
    assert found["adapter_sha256"] == gauge_ext.checkpoint.read_adapter(tmp_path / "adapter").sha256
    layer = {"rank": 3, "scaling": 2.0}
    assert json.loads(found["adapted_layers"]) == {"up": layer, "block.down": layer}
    assert json.loads(found["parameters"])["up.weight"] == ["up.weight"]
    assert json.loads(found["dynamic_dims"]) == {"batch": [1, 9]}
    assert found["base"] == "a small MLP"


def metadata_of_export(model: nn.Module, path: Path, **more: Any) -> dict[str, str]:
    shapes = {"x": {0: torch.export.Dim("batch", max=9)}}
    report = export_onnx(
        model, (torch.randn(2, 12),), path, dynamic_shapes=shapes, validate=False, **more
    )
    assert report.validation is None
    assert report.provenance == metadata(path)
    return report.provenance


def test_the_same_model_gives_the_same_bytes_and_no_paths_of_this_machine(mlp, tmp_path):
    x = (torch.randn(2, 12),)
    for name in ("a.onnx", "b.onnx"):
        export_onnx(mlp, x, tmp_path / name, dynamic_shapes=BATCH, validate=False)
    content = (tmp_path / "a.onnx").read_bytes()
    assert content == (tmp_path / "b.onnx").read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(Path(__file__).parent).encode() not in content


@pytest.mark.parametrize("external", [True, False])
def test_external_data_forced(mlp, external, tmp_path, listing, run_onnx):
    path = tmp_path / "mlp.onnx"
    report = export_onnx(mlp, (torch.randn(2, 12),), path, external_data=external)
    files = ["mlp.onnx", "mlp.onnx.data"] if external else ["mlp.onnx"]
    assert listing() == files
    assert list(report.files) == [tmp_path / name for name in files]
    assert report.bytes_written == sum((tmp_path / name).stat().st_size for name in files)
    x = torch.randn(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(path, {"x": x})["output"], mlp(x))


def test_external_data_when_large_and_on_pages(tmp_path, listing, monkeypatch):
    monkeypatch.setattr(graph_file, "EXTERNAL_DATA_ABOVE", 5000)
    export_onnx(nn.Linear(8, 8), (torch.randn(2, 8),), tmp_path / "small.onnx", validate=False)
    assert listing() == ["small.onnx"]
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    export_onnx(model, (torch.randn(2, 40),), tmp_path / "large.onnx", validate=False)
    assert listing() == ["large.onnx", "large.onnx.data", "small.onnx"]
    stored = onnx_ir.load(tmp_path / "large.onnx").graph.initializers
    for name in ("0.weight", "1.weight"):
        assert stored[name].const_value.offset % 4096 == 0
    assert torch.equal(initializers(tmp_path / "large.onnx")["1.weight"], model[1].weight)


def test_the_exporter_is_quiet_and_tells_its_progress(mlp, tmp_path, capfd):
    told: list[tuple[str, float]] = []
    export_onnx(
        mlp,
        (torch.randn(2, 12),),
        tmp_path / "m.onnx",
        dynamic_shapes=BATCH,
        opset=17,
        progress=lambda what, share: told.append((what, share)),
    )
    assert capfd.readouterr() == ("", "")
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert any("validating" in what for what, _ in told)


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_model_that_is_merged_already(mlp, adapted, keep_base, tmp_path, run_onnx):
    base_hash = metadata_of_export(copy.deepcopy(mlp), tmp_path / "base.onnx")["base_sha256"]
    adapted(mlp)
    reference = merged_copy(mlp)
    gauge_ext.merge(mlp, keep_base=keep_base)
    report = export_onnx(mlp, (torch.randn(2, 12),), tmp_path / "m.onnx")
    assert report.provenance.get("base_sha256") == (base_hash if keep_base else None)
    assert is_merged(mlp)
    x = torch.randn(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(tmp_path / "m.onnx", {"x": x})["output"], reference(x))


def test_plain_torch_export_of_an_unmerged_model(mlp, adapted, tmp_path, run_onnx):
    """By someone who never heard of this package: nothing to register, nothing to know."""
    adapted(mlp).eval()
    x = torch.randn(2, 12)
    path = tmp_path / "plain.onnx"
    with quiet():
        torch.onnx.export(
            mlp, (x,), path, dynamo=True, dynamic_shapes=BATCH, verbose=False, external_data=False
        )
    x = torch.randn(6, 12)
    with torch.no_grad():
        expected = mlp(x)
    found = next(iter(run_onnx(path, {"x": x}).values()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
