"""The facts that ``gauge-ext doctor`` prints."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gauge_ext import _load, doctor


def rendered(info: dict[str, Any]) -> str:
    out = io.StringIO()
    doctor.render(info, Console(file=out, width=200))
    return out.getvalue()


def pretend(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    changed = dataclasses.replace(_load.status(), **changes)
    monkeypatch.setattr(doctor, "status", lambda: changed)


def test_versions_are_those_installed() -> None:
    versions = doctor.collect()["versions"]
    assert versions["torch"] == torch.__version__
    for name in ("onnx", "onnxruntime", "transformers", "peft", "safetensors"):
        assert versions[name] == importlib.metadata.version(name)


def test_everything_collected_is_json_and_is_shown() -> None:
    info = doctor.collect()
    assert json.loads(json.dumps(info, allow_nan=False)).keys() == info.keys()
    shown = rendered(info)
    assert str(torch.__version__) in shown
    assert info["extension"]["path"] in shown


def test_a_compiled_build_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    build = {
        "compiler": "GNU 12.2.0",
        "build_type": "Release",
        "flags": ("-O2",),
        "kernel_flags": ("-O3",),
        "sanitizers": (),
        "capabilities": ("DEFAULT", "AVX2"),
        "torch": "2.13.0",
        "torch_cuda": "13.0",
        "cuda_architectures": ("8.0", "9.0+PTX"),
        "cuda_reason": "",
    }
    pretend(
        monkeypatch,
        compiled=True,
        path=Path("/x/_ops.so"),
        build_info=build,
        reason=None,
        mend=None,
    )
    info = doctor.collect()
    assert info["healthy"]
    shown = rendered(info)
    for words in (
        "/x/_ops.so",
        "GNU 12.2.0, Release",
        "torch 2.13.0, CUDA 13.0",
        "DEFAULT AVX2",
        "for 8.0 9.0+PTX",
    ):
        assert words in shown
    assert shown.rstrip().endswith("healthy")


def test_a_build_without_cuda_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    build = {**_load.status().build_info, "cuda_architectures": (), "cuda_reason": "No nvcc."}
    pretend(monkeypatch, compiled=True, build_info=build)
    info = doctor.collect()
    assert info["cuda"]["architectures"] == []
    assert info["cuda"]["reason"] == "No nvcc."
    assert "none: No nvcc." in rendered(info)


def test_no_build_is_not_healthy_and_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(
        monkeypatch, compiled=False, build_info={}, reason="Nothing there.", mend="Type: pip do it"
    )
    info = doctor.collect()
    assert not info["healthy"]
    assert info["missing"][0] == {
        "what": "compiled ops",
        "purpose": "Nothing there.",
        "mend": "Type: pip do it",
    }
    shown = rendered(info)
    assert "Nothing there." in shown
    assert "Type: pip do it" in shown
    assert "not healthy" in shown


def test_a_missing_extra_is_named_but_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else find_spec(name)
    )
    pretend(monkeypatch, compiled=True)
    info = doctor.collect()
    assert info["versions"]["onnx"] is None
    assert [entry["what"] for entry in info["missing"]] == ["onnx"]
    assert info["healthy"]
    assert "pip install 'gauge-ext[export]'" in rendered(info)


def test_one_mend_is_printed_once() -> None:
    info = doctor.collect()
    mend = "pip install 'gauge-ext[export]'"
    info["missing"] = [
        {"what": name, "purpose": "export", "mend": mend} for name in ("onnx", "onnxscript")
    ]
    shown = rendered(info)
    assert "missing: onnx (export)" in shown
    assert "missing: onnxscript (export)" in shown
    assert shown.count(mend) == 1


@pytest.mark.parametrize(
    ("torch_says", "used"), [("AVX2", "AVX2"), ("NO AVX", "DEFAULT"), ("DEFAULT", "DEFAULT")]
)
def test_kernels_used_follow_torchs_choice(
    torch_says: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torch_says)
    pretend(monkeypatch, compiled=True, build_info={"capabilities": ("DEFAULT", "AVX2", "AVX512")})
    cpu = doctor.collect()["cpu"]
    assert cpu["torch_capability"] == torch_says
    assert cpu["kernels_used"] == used


def test_threads_and_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    threads = doctor.collect()["threads"]
    assert threads["torch"] == torch.get_num_threads()
    assert threads["environment"]["OMP_NUM_THREADS"] == "7"
