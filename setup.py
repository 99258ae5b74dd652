"""Drives CMake: one configure and one build, then the libraries are copied where they belong.

What is compiled and how stands in CMakeLists.txt alone; pyproject.toml has the metadata.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "_build"))

import cmake_tools  # noqa: E402 - in the folder just named
import torch_env  # noqa: E402 - in the folder just named


class CMakeBuild(build_ext):
    """Builds ``gauge_ext._C``, ``_ops`` and ``_calls`` with CMake and Ninja."""

    def build_extensions(self) -> None:
        """Configures, compiles, and copies each library to where setuptools expects it."""
        torch = torch_env.find_torch()
        if torch is None:
            sys.exit(
                f"error: no torch in the environment of {sys.executable}; the extension compiles"
                " against the torch that it will run with. Type: pip install torch"
            )
        build_dir = self.cmake_dir(torch)
        self.cmake(
            "--log-level=NOTICE",
            "-S", str(ROOT),
            "-B", str(build_dir),
            "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            # Passed each time: in pip's isolated builds these paths are new ones at every build.
            f"-DCMAKE_MAKE_PROGRAM={required('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_dir()}",
            f"-DGAUGE_EXT_TORCH={torch.root};{torch.version};{torch.cuda}",
            f"-DGAUGE_EXT_CUDA={os.environ.get('GAUGE_EXT_CUDA') or 'auto'}",
        )  # fmt: skip
        self.cmake("--build", str(build_dir))
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            name = extension.name.rpartition(".")[2]
            # A fresh time stamp, as setuptools carries only newer files on into the source tree:
            # after `make asan` or a change of torch, this one was perhaps compiled earlier.
            shutil.copy(build_dir / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}", target)

    def cmake_dir(self, torch: torch_env.TorchInstall) -> Path:
        """One build folder for each Python and torch: a change of either never mixes objects."""
        tag = sysconfig.get_config_var("SOABI")
        kind = "-debug" if self.debug else ""
        return ROOT / "build" / f"cmake-{tag}-torch{torch.version}{kind}"

    def cmake(self, *arguments: str) -> None:
        """Runs cmake; a failure ends the build with cmake's own message, without a traceback."""
        done = subprocess.run([required("cmake"), *arguments], check=False)
        if done.returncode:
            sys.exit(f"error: cmake left with status {done.returncode}; its message is above")


def required(tool: str) -> str:
    """Returns the path of ``tool``, or ends the build saying what to type."""
    path = cmake_tools.find(tool)
    if path is None:
        sys.exit(f"error: no usable {tool} found. Type: pip install {tool}")
    return path


def pybind11_dir() -> str:
    """Returns pybind11's CMake folder, or ends the build saying what to type."""
    try:
        import pybind11
    except ImportError:
        sys.exit("error: pybind11 is missing. Type: pip install 'pybind11>=3'")
    return str(pybind11.get_cmake_dir())


def packages() -> list[str]:
    """Returns the packages by name; ``export/`` at the root is ``gauge_ext.export``.

    The tracked symlink ``gauge_ext/export`` serves type checkers and runs from the source tree; an
    unpacked sdist has none, so ``export/`` is always listed under its own folder.
    """
    core = find_packages(include=["gauge_ext*"], exclude=["gauge_ext.export*"])
    inner = find_packages("export")
    return [*core, "gauge_ext.export", *(f"gauge_ext.export.{name}" for name in inner)]


def dependencies() -> list[str]:
    """Returns the run-time dependencies; torch is pinned to the minor release built against."""
    torch = torch_env.find_torch()
    pin = (
        f"torch=={torch_env.minor(torch_env.TESTED_TORCH)}.*"
        if torch is None
        else torch.requirement
    )
    return [pin, "safetensors>=0.4", "typer>=0.12", "rich>=13"]


setup(
    packages=packages(),
    package_dir={"gauge_ext": "gauge_ext", "gauge_ext.export": "export"},
    package_data={"gauge_ext": ["py.typed"], "gauge_ext.export.proof": ["*.cjs", "*.html"]},
    install_requires=dependencies(),
    ext_modules=[Extension(f"gauge_ext.{name}", sources=[]) for name in ("_C", "_ops", "_calls")],
    cmdclass={"build_ext": CMakeBuild},
)
