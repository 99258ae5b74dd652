"""Whether CUDA kernels are built: what is asked, what torch and the toolkits on disk allow."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cuda_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """_build/cuda_env.py on a machine whose only toolkits are those that a test makes."""
    monkeypatch.syspath_prepend(str(ROOT / "_build"))
    module = importlib.import_module("cuda_env")
    roots = module._roots
    monkeypatch.setattr(
        module,
        "_roots",
        lambda environment: (r for r in roots(environment) if r.is_relative_to(tmp_path)),
    )
    return module


def make_toolkit(root: Path, version: str, *, cudart: bool = True) -> Path:
    for folder in ("bin", "include", "lib64"):
        (root / folder).mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    (root / "include" / "cuda_runtime_api.h").touch()
    if cudart:
        (root / "lib64" / "libcudart.so").touch()
    return root


def make_torch(root: Path) -> Path:
    (root / "lib").mkdir(parents=True)
    (root / "lib" / "libc10_cuda.so").touch()
    return root


def test_a_cuda_torch_and_its_toolkit(cuda_env: ModuleType, tmp_path: Path) -> None:
    toolkit = make_toolkit(tmp_path / "cuda", "13.1")
    found = cuda_env.decide(
        "1", make_torch(tmp_path / "torch"), "13.0", {"CUDA_HOME": str(toolkit)}
    )
    assert found.usable
    assert found.toolkit.nvcc == toolkit / "bin" / "nvcc"
    assert found.toolkit.version == "13.1"
    assert found.architectures == ("8.0", "9.0", "10.0+PTX")
    assert found.reason == ""


def test_the_toolkit_beside_a_script_on_path(cuda_env: ModuleType, tmp_path: Path) -> None:
    toolkit = make_toolkit(tmp_path / "cuda", "13.0")
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    (tmp_path / "include").mkdir()
    environment = {"PATH": f"{script.parent}{os.pathsep}/bin"}
    assert [found.root for found in cuda_env.toolkits(environment)] == [toolkit]


def test_the_toolkit_of_torchs_cuda_is_taken(cuda_env: ModuleType, tmp_path: Path) -> None:
    old, new = make_toolkit(tmp_path / "old", "12.8"), make_toolkit(tmp_path / "new", "13.0")
    torch = make_torch(tmp_path / "torch")
    environment = {"CUDA_HOME": str(old), "CUDA_PATH": str(new)}
    assert cuda_env.decide("auto", torch, "13.2", environment).toolkit.root == new
    assert cuda_env.decide("auto", torch, "12.6", environment).toolkit.root == old


def test_what_is_missing_is_named(cuda_env: ModuleType, tmp_path: Path) -> None:
    torch = make_torch(tmp_path / "torch")
    full = {"CUDA_HOME": str(make_toolkit(tmp_path / "full", "13.0"))}
    bare = {"CUDA_HOME": str(make_toolkit(tmp_path / "bare", "13.0", cudart=False))}
    old = {**full, "TORCH_CUDA_ARCH_LIST": "7.0 7.5+PTX"}
    (tmp_path / "cpu" / "lib").mkdir(parents=True)
    for reason, call in {
        "torch was built without CUDA": (torch, "", full),
        "has no libc10_cuda.so": (tmp_path / "cpu", "13.0", full),
        "no nvcc was found: set CUDA_HOME": (torch, "13.0", {}),
        "is of CUDA 13.0: set CUDA_HOME to a toolkit of CUDA 12": (torch, "12.8", full),
        "no libcudart.so in": (torch, "13.0", bare),
        "TORCH_CUDA_ARCH_LIST names no architecture from 8.0 on": (torch, "13.0", old),
    }.items():
        found = cuda_env.decide("auto", *call)
        assert not found.usable
        assert reason in found.reason
        with pytest.raises(cuda_env.CudaError, match="^GAUGE_EXT_CUDA=1, but "):
            cuda_env.decide("1", *call)
    assert cuda_env.decide("0", torch, "13.0", full).reason == "GAUGE_EXT_CUDA=0"
    with pytest.raises(cuda_env.CudaError, match="must be auto, 0 or 1, got 'yes'"):
        cuda_env.decide("yes", torch, "13.0", full)


def test_architectures(cuda_env: ModuleType) -> None:
    assert cuda_env.parse_architectures("7.5;8.6,9.0a  12.0+PTX") == ("8.6", "9.0a", "12.0+PTX")
    assert cuda_env.gencode(("8.6", "9.0a", "12.0+PTX")) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    with pytest.raises(cuda_env.CudaError, match="such as 8.0;9.0\\+PTX, got 'Hopper'"):
        cuda_env.parse_architectures("Hopper")


def test_the_script_speaks_cmakes_language(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "_build" / "cuda_env.py")]
    done = subprocess.run([*script, "0", str(tmp_path), ""], capture_output=True, text=True)
    fields = done.stdout.split(";")
    assert done.returncode == 0
    assert len(fields) == 8
    assert (fields[0], fields[-1]) == ("0", "GAUGE_EXT_CUDA=0")
    done = subprocess.run([*script, "1", str(tmp_path), ""], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "GAUGE_EXT_CUDA=1, but torch was built without CUDA\n"
