"""How the build finds torch and its tools, and what ends up in the package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gauge_ext

ROOT = Path(__file__).resolve().parents[1]


def build_module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of _build/, imported as pip's front end does: with that folder on sys.path."""
    monkeypatch.syspath_prepend(str(ROOT / "_build"))
    return importlib.import_module(name)


@pytest.fixture
def torch_env(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return build_module("torch_env", monkeypatch)


@pytest.fixture
def cmake_tools(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return build_module("cmake_tools", monkeypatch)


def make_torch(folder: Path, version: str, *, cuda: str = "None", headers: bool = True) -> Path:
    root = folder / "torch"
    (root / "include" if headers else root).mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('torch was imported')\n")
    (root / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ndebug = False\n"
        f"cuda: Optional[str] = {cuda}\n"
    )
    return root


def test_torch_is_read_and_not_imported(torch_env: ModuleType, tmp_path: Path) -> None:
    root = make_torch(tmp_path, "2.14.1+cu130", cuda="'13.0'")
    found = torch_env.find_torch([str(tmp_path)])
    assert (found.root, found.version, found.cuda) == (root, "2.14.1+cu130", "13.0")
    assert found.requirement == "torch==2.14.*"


def test_cpu_torch_has_no_cuda(torch_env: ModuleType, tmp_path: Path) -> None:
    make_torch(tmp_path, "2.13.0+cpu")
    assert torch_env.find_torch([str(tmp_path)]).cuda == ""


def test_torch_without_headers_is_passed_over(torch_env: ModuleType, tmp_path: Path) -> None:
    make_torch(tmp_path / "stub", "2.1.0", headers=False)
    root = make_torch(tmp_path / "whole", "2.13.0")
    folders = [str(tmp_path / "none"), str(tmp_path / "stub"), str(tmp_path / "whole")]
    assert torch_env.find_torch(folders).root == root
    assert torch_env.find_torch(folders[:2]) is None


def test_installed_torch_is_found_as_pips_isolated_build_sees_it(
    torch_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There the environment's site-packages are off sys.path, and on disk all the same.
    hidden = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in hidden])
    found = torch_env.find_torch()
    assert found.version == torch.__version__
    assert found.root == Path(torch.__file__).parent


@pytest.mark.parametrize(("version", "series"), [("2.13.0+cpu", "2.13"), ("2.14.0.dev1", "2.14")])
def test_minor(torch_env: ModuleType, version: str, series: str) -> None:
    assert torch_env.minor(version) == series


def test_minor_of_nonsense(torch_env: ModuleType) -> None:
    with pytest.raises(ValueError, match="'unknown'"):
        torch_env.minor("unknown")


def test_missing_tools_are_asked_for(
    cmake_tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cmake_tools.missing() == ["cmake>=3.24", "ninja"]
    for tool in ("cmake", "ninja"):
        (tmp_path / tool).write_text("#!/bin/sh\necho cmake version 3.24.1\n")
        (tmp_path / tool).chmod(0o755)
    assert cmake_tools.missing() == []


@pytest.mark.parametrize("script", ["echo cmake version 3.18.4", "exit 1"])
def test_old_or_broken_cmake_is_none(
    script: str, cmake_tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cmake").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "cmake").chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cmake_tools.find("cmake") is None


def test_backend_asks_for_torch_only_where_there_is_none(
    torch_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = build_module("backend", monkeypatch)
    # setuptools' own answer comes from running setup.py, which is not the subject here.
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda settings: [])
    assert not any("torch" in each for each in backend.get_requires_for_build_wheel())
    monkeypatch.setattr(torch_env, "find_torch", lambda: None)
    assert f"torch=={torch_env.TESTED_TORCH}" in backend.get_requires_for_build_wheel()


def test_numbers_written_in_two_files_agree(torch_env: ModuleType, cmake_tools: ModuleType) -> None:
    assert f"TORCH ?= torch=={torch_env.TESTED_TORCH}\n" in (ROOT / "Makefile").read_text()
    minimum = ".".join(str(part) for part in cmake_tools.CMAKE_MINIMUM)
    assert f"cmake_minimum_required(VERSION {minimum}." in (ROOT / "CMakeLists.txt").read_text()


def test_installed_package_pins_the_torch_it_was_built_against() -> None:
    pins = importlib.metadata.requires("gauge-ext") or []
    series = ".".join(torch.__version__.split(".")[:2])
    assert f"torch=={series}.*" in pins
    assert importlib.metadata.version("gauge-ext") == gauge_ext.__version__


def test_sdist_holds_what_a_build_needs(tmp_path: Path) -> None:
    command = ["-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run([sys.executable, "setup.py", *command], cwd=ROOT, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {
        "CMakeLists.txt",
        "_build/backend.py",
        "csrc/bindings.cpp",
        "export/__init__.py",
        "gauge_ext/_load.py",
        "gauge_ext/py.typed",
        "setup.py",
    } <= names
    assert not any(re.search(r"\.so$|__pycache__|^gauge_ext/export", name) for name in names)


def test_compiled_libraries_know_nothing_of_this_machine() -> None:
    # No run path: torch's libraries are found by name, because torch was imported first.
    for name in ("_C", "_ops", "_calls"):
        library = ROOT / "gauge_ext" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not library.is_file():
            pytest.skip("gauge_ext is not compiled in place")
        said = subprocess.run(
            ["readelf", "-d", library], capture_output=True, text=True, check=True
        ).stdout
        assert not re.search(r"RPATH|RUNPATH", said)
        # Python's own functions are the process's. Of torch's Python side _calls alone knows.
        assert re.findall(r"NEEDED.*python.*", said.replace("libtorch_python", "")) == []
        assert ("libtorch_python" in said) == (name == "_calls")


def test_one_openmp_runtime_only() -> None:
    # A second libgomp beside torch's would bring a second pool of threads.
    code = "from gauge_ext.doctor import collect\nprint(*collect()['threads']['openmp_runtimes'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout
