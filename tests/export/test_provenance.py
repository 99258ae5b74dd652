"""What files say about themselves, and whether it is found when it is not so."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil

import onnx
import pytest
import torch
from language_models import build
from torch import nn

from gauge_ext.checkpoint import adapter_sha256
from gauge_ext.errors import ConfigError
from gauge_ext.export import export_onnx, write_onnx_adapter
from gauge_ext.export.metadata import append_metadata, base_sha256
from gauge_ext.export.provenance import check_provenance, read_provenance


@pytest.fixture(scope="module")
def exported(attach, tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    plain = copy.deepcopy(model)
    attach(model)
    path = tmp_path_factory.mktemp("provenance") / "m.onnx"
    report = export_onnx(model, (torch.randn(2, 4),), path, provenance={"note": "mine"})
    return plain, model, path, report


def test_what_a_file_says(exported):
    _, _, path, report = exported
    found = read_provenance(path)
    assert found.passed
    assert found.checks == ()
    said = found.graphs["m.onnx"]
    assert said == report.provenance
    assert said["note"] == "mine"
    summary = json.loads(said["validation"])
    assert summary["against"] == "torch"
    assert summary["cases"] == len(report.validation.cases)
    assert summary["runtime"] == report.validation.runtime
    assert float(summary["max_abs"]) == pytest.approx(report.validation.max_abs, rel=0.5, abs=1e-12)
    assert found.to_dict()["graphs"]["m.onnx"]["validation"] == summary


def test_a_file_that_was_not_validated_says_so(tmp_path):
    export_onnx(nn.Linear(2, 2), (torch.ones(1, 2),), tmp_path / "m.onnx", validate=False)
    assert "validation" not in read_provenance(tmp_path / "m.onnx").graphs["m.onnx"]


def test_base_and_adapter(exported):
    plain, model, path, _ = exported
    said = read_provenance(path)
    digest = adapter_sha256(model)
    for base in (plain, model):  # with or without the adapter beside it
        assert check_provenance(said, model=base, adapter_sha256=digest).passed
    with torch.no_grad():
        changed = copy.deepcopy(plain)
        changed[0].bias[0] += 1.0
    found = check_provenance(said, model=changed, adapter_sha256=digest)
    assert [(check.what, check.passed) for check in found.checks] == [
        ("base_sha256", False),
        ("adapter_sha256", True),
    ]
    assert not found.passed
    assert not check_provenance(said, adapter_sha256="0" * 64).passed


def test_an_adapter_in_a_file_without_any(tmp_path):
    export_onnx(nn.Linear(2, 2), (torch.ones(1, 2),), tmp_path / "m.onnx", validate=False)
    found = check_provenance(read_provenance(tmp_path / "m.onnx"), adapter_sha256="0" * 64)
    assert found.checks[0].claimed is None
    assert not found.passed


def test_a_folder_and_its_manifest(exported_llama, tmp_path):
    model, folder, report = exported_llama
    found = read_provenance(folder)
    names = {file.name for file in folder.iterdir()}
    origin = {f"{key} of model.onnx" for key in ("precision", "base_sha256", "adapter_sha256")}
    assert {check.what for check in found.checks} == names - {"gauge_ext.json"} | origin
    said = json.loads((folder / "gauge_ext.json").read_text())["graphs"]
    assert said["model.onnx"] == {
        "precision": "fp32",
        "base_sha256": base_sha256(build("llama")),
        "adapter_sha256": adapter_sha256(model),
    }
    assert found.passed
    assert json.loads(found.graphs["model.onnx"]["validation"])["cases"] == 7
    assert found.graphs["model.onnx"]["base_sha256"] == report.graphs[0].provenance["base_sha256"]
    assert check_provenance(
        found, model=build("llama"), adapter_sha256=adapter_sha256(model)
    ).passed

    damaged = shutil.copytree(folder, tmp_path / "copy")
    (damaged / "config.json").write_text("{}")
    (damaged / "generation_config.json").unlink()
    wrong = [check for check in read_provenance(damaged).checks if not check.passed]
    assert {check.what for check in wrong} == {"config.json", "generation_config.json"}
    # A graph that the manifest's hashes were made to fit, but that comes from something else.
    other = shutil.copytree(folder, tmp_path / "other")
    append_metadata(other / "model.onnx", {"base_sha256": "0" * 64, "precision": "int8"})
    manifest = json.loads((other / "gauge_ext.json").read_text())
    digest = hashlib.sha256((other / "model.onnx").read_bytes()).hexdigest()
    manifest["files"]["model.onnx"]["sha256"] = digest
    (other / "gauge_ext.json").write_text(json.dumps(manifest))
    wrong = [check.what for check in read_provenance(other).checks if not check.passed]
    assert wrong == ["precision of model.onnx", "base_sha256 of model.onnx"]

    (damaged / "gauge_ext.json").write_text('{"files": {"../x": {"sha256": ""}}, "graphs": {}}')
    with pytest.raises(ConfigError, match="not a file of its folder"):
        read_provenance(damaged)
    (damaged / "gauge_ext.json").write_text("{}")
    with pytest.raises(ConfigError, match="can be read"):
        read_provenance(damaged)


def test_an_adapters_file(mlp, adapted, tmp_path):
    model = adapted(mlp)
    base = copy.deepcopy(model)
    graph = tmp_path / "m.onnx"
    options = {"mode": "adapters", "adapter_precision": "float16", "validate": False}
    export_onnx(model, (torch.randn(2, 12),), graph, **options)
    digest = adapter_sha256(model)

    report = write_onnx_adapter(model, graph, tmp_path / "a.safetensors", gauge="auto")
    found = read_provenance(tmp_path / "a.safetensors")
    said = found.to_dict()["graphs"]["a.safetensors"]
    assert (said["adapter_sha256"], said["base_sha256"]) == (digest, base_sha256(base))
    assert (said["precision"], said["gauge"]) == ("float16", "auto")
    assert said["gauges"] == report.gauges
    assert set(said["loss"]) == {"trained", "balanced", "equal_energy"}
    for name, loss in said["loss"].items():
        squares = [found**2 for found in report.losses[name].values()]
        assert loss == pytest.approx((sum(squares) / len(squares)) ** 0.5)
    assert check_provenance(found, model=base, adapter_sha256=digest).passed
    other = check_provenance(found, adapter_sha256="0" * 64)
    assert [check.what for check in other.checks if not check.passed] == ["adapter_sha256"]

    write_onnx_adapter(model, graph, tmp_path / "a.onnx_adapter")
    found = read_provenance(tmp_path / "a.onnx_adapter")
    assert int(found.graphs["a.onnx_adapter"]["adapter_number"]) == int(digest[:8], 16) // 2
    assert check_provenance(found, adapter_sha256=digest).passed
    other = check_provenance(found, adapter_sha256="0" * 64)
    assert [check.what for check in other.checks if not check.passed] == ["adapter_number"]


def test_files_that_say_nothing(tmp_path):
    with pytest.raises(ConfigError, match="no file or folder"):
        read_provenance(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(ConfigError, match="not an ONNX file"):
        read_provenance(tmp_path / "text.onnx")
    onnx.save(onnx.ModelProto(ir_version=10), tmp_path / "bare.onnx")
    with pytest.raises(ConfigError, match="says nothing about where it came from"):
        read_provenance(tmp_path / "bare.onnx")
    with pytest.raises(ConfigError, match=r"no gauge_ext\.json"):
        read_provenance(tmp_path)


def test_appended_metadata_is_part_of_the_file(exported, tmp_path):
    _, _, path, _ = exported
    copied = shutil.copy(path, tmp_path / "m.onnx")
    before = onnx.load(copied)
    append_metadata(tmp_path / "m.onnx", {"more": "äöü"})
    after = onnx.load(copied)
    onnx.checker.check_model(after)
    assert {e.key: e.value for e in after.metadata_props} == {
        **{e.key: e.value for e in before.metadata_props},
        "gauge_ext.more": "äöü",
    }
    del after.metadata_props[-1]
    assert after == before
