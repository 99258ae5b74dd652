"""The build backend: setuptools, plus what this machine still needs to compile.

setuptools alone cannot say "cmake unless there is one" or "the torch that is already installed".
With this backend a plain ``pip install .`` builds against the torch of the environment that it
installs into and downloads none; only where there is no torch does it ask for the tested release.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cmake_tools
import torch_env
from setuptools import build_meta

get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_editable = build_meta.build_editable


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Returns what to install before building, beyond ``requires`` in pyproject.toml."""
    requires = [*build_meta.get_requires_for_build_wheel(config_settings)]
    requires += cmake_tools.missing()
    if torch_env.find_torch() is None:
        requires.append(f"torch=={torch_env.TESTED_TORCH}")
    return requires


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(
    wheel_directory: str,
    config_settings: Any = None,
    metadata_directory: str | None = None,
) -> str:
    """Builds the wheel; setuptools' copy of the package from an earlier build is dropped first.

    A module deleted since then would otherwise still be in ``build/lib*`` and get installed.
    """
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))
