"""What happens without a usable build: one warning that says what to type, and right results."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gauge_ext import _load, _native
from gauge_ext.errors import ExtensionError

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package without a build, which _load believes to be its own."""
    package = tmp_path / "site-packages" / "gauge_ext"
    package.mkdir(parents=True)
    monkeypatch.setattr(_native, "FOLDER", package)
    monkeypatch.delenv("GAUGE_EXT_REQUIRE_COMPILED", raising=False)
    # The build under test must not be found as "the installed one".
    elsewhere = [entry for entry in sys.path if not (Path(entry) / "gauge_ext").is_dir()]
    monkeypatch.setattr(sys, "path", elsewhere)
    cached = (_load.load, _load.status, _native.load, _native.find)
    for function in cached:
        function.cache_clear()
    yield package
    for function in cached:
        function.cache_clear()


def pretend_built_against(
    torch_version: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    info = {"torch": torch_version, "capabilities": ("DEFAULT",)}
    (folder / f"_C{SUFFIX}").touch()
    module = SimpleNamespace(build_info=lambda: info)
    monkeypatch.setattr(_native, "import_file", lambda path: module)
    return info


def make_source_tree(package: Path) -> Path:
    root = package.parent
    (root / "csrc").mkdir()
    (root / "CMakeLists.txt").touch()
    return root


def test_missing_build_warns_once_and_says_what_to_type(folder: Path) -> None:
    with pytest.warns(_load.ExtensionWarning) as caught:
        found = _load.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _load.load() is found
    assert len(caught) == 1
    said = str(caught[0].message)
    assert str(folder) in said
    assert "plain torch" in said
    assert "pip install" in said
    assert not found.compiled
    assert found.built_torch is None
    assert found.found_torch == torch.__version__


def test_what_needs_no_torch_warns_once_too(folder: Path) -> None:
    with pytest.warns(_load.ExtensionWarning, match="numpy: right, but slower.*pip install"):
        assert _native.load() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.load() is None


@pytest.mark.parametrize("module", [_load, _native])
def test_missing_build_is_an_error_where_one_is_required(
    module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAUGE_EXT_REQUIRE_COMPILED", "1")
    with pytest.raises(ExtensionError, match=r"There is no compiled gauge_ext in .*pip install"):
        module.load()


def test_status_neither_warns_nor_raises(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAUGE_EXT_REQUIRE_COMPILED", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _load.status().reason is not None


def test_source_tree_names_the_editable_install(folder: Path) -> None:
    root = make_source_tree(folder)
    mend = _load.status().mend
    assert mend is not None
    assert mend.endswith(f"-e {root}")


def test_source_tree_that_hides_an_installed_build(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_source_tree(folder)
    installed = tmp_path / "other" / "gauge_ext"
    installed.mkdir(parents=True)
    (installed / f"_C{SUFFIX}").touch()
    monkeypatch.syspath_prepend(str(installed.parent))
    found = _load.status()
    assert f"{installed} is hidden" in str(found.reason)
    assert f"-e {root}" in str(found.mend)
    assert "another folder" in str(found.mend)


def test_build_for_another_python_is_named(folder: Path) -> None:
    (folder / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    assert "_C.cpython-399-x86_64-linux-gnu.so" in str(_load.status().reason)


def test_other_torch_is_named_with_both_mends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = pretend_built_against("1.99.0+cpu", folder, monkeypatch)
    found = _load.status()
    assert not found.compiled
    assert found.built_torch == "1.99.0+cpu"
    assert found.build_info == info
    assert "built against torch 1.99.0+cpu" in str(found.reason)
    assert f"torch {torch.__version__} is installed" in str(found.reason)
    assert "pip install" in str(found.mend)
    assert "pip install 'torch==1.99.*'" in str(found.mend)


@pytest.mark.parametrize("suffix", ["", "+cu999", ".post1"])
def test_same_minor_release_is_no_mismatch(
    suffix: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = ".".join(torch.__version__.split(".")[:2])
    pretend_built_against(f"{series}.77{suffix}", folder, monkeypatch)
    # It goes on to the library, which this folder does not have.
    found = _load.status()
    assert "_ops" in str(found.reason)
    assert "cannot be loaded" in str(found.reason)


def test_broken_build_info_module_is_named(folder: Path) -> None:
    module = folder / f"_C{SUFFIX}"
    module.write_bytes(b"not a library")
    assert str(_load.status().reason).startswith(f"{module} cannot be loaded: ")


def test_broken_library_tells_the_loaders_own_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_built_against(str(torch.__version__), folder, monkeypatch)
    library = folder / f"_ops{SUFFIX}"
    library.write_bytes(b"not a library")
    found = _load.status()
    assert found.path == library
    assert "invalid ELF header" in str(found.reason) or "file too short" in str(found.reason)


def test_a_build_without_the_calls_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"torch": str(torch.__version__), "capabilities": ("DEFAULT",)}
    (folder / f"_C{SUFFIX}").touch()
    real = _native.import_file

    def imported(path: Path) -> Any:
        return (
            SimpleNamespace(build_info=lambda: info) if path.name.startswith("_C.") else real(path)
        )

    monkeypatch.setattr(_native, "import_file", imported)
    found = _load.status()
    missing = folder / f"_calls{SUFFIX}"
    assert str(found.reason).startswith(f"{missing} cannot be loaded: ")
    assert "pip install" in str(found.mend)
    assert not found.compiled
    assert found.calls is None


FALLBACK = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import gauge_ext, torch
    x, w, b = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    a, c = torch.randn(2, 5), torch.randn(4, 2)
    y = gauge_ext.ops.lora_linear(x, w, b, a, c, 0.5)
    torch.testing.assert_close(y, x @ (w + 0.5 * c @ a).T + b)
print(gauge_ext.__file__)
print(sum(w.category.__name__ == "ExtensionWarning" for w in caught))
"""


def run_without_build(
    tmp_path: Path, required: str, without: str = "*.so"
) -> subprocess.CompletedProcess[str]:
    """Runs FALLBACK on a copy of the package that has no compiled files, or not those."""
    ignored = shutil.ignore_patterns(without, "__pycache__", "export")
    shutil.copytree(ROOT / "gauge_ext", tmp_path / "gauge_ext", ignore=ignored)
    return subprocess.run(
        [sys.executable, "-c", FALLBACK],
        cwd=tmp_path,
        env={**os.environ, "GAUGE_EXT_REQUIRE_COMPILED": required},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("without", ["*.so", "_calls*.so", "_ops*.so"])
def test_package_without_build_computes_the_same(tmp_path: Path, without: str) -> None:
    # A half of a build, as an older one is, must not leave ops behind where ours are to be put.
    done = run_without_build(tmp_path, required="", without=without)
    assert done.returncode == 0, done.stderr
    file, count = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert count == "1"


def test_package_without_build_refuses_where_one_is_required(tmp_path: Path) -> None:
    done = run_without_build(tmp_path, required="1")
    assert done.returncode == 1
    assert "ExtensionError: There is no compiled gauge_ext in" in done.stderr
