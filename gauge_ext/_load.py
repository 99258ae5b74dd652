"""Loads the compiled ops, or says in one sentence why not and what to type.

``_ops`` is linked to torch's C++ libraries, whose ABI lasts one minor release: loaded under another
it dies of an undefined symbol, or worse. So the small module ``_C``, which is linked to nothing, is
imported first and tells which torch the build was made for; only then is ``_ops`` loaded.

Without a usable build the package still works: its ops are then computed by plain torch, with one
:class:`ExtensionWarning`. ``GAUGE_EXT_REQUIRE_COMPILED=1`` turns that into an error.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gauge_ext.errors import ExtensionError

_FOLDER = Path(__file__).resolve().parent
_SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


class ExtensionWarning(UserWarning):
    """The compiled ops are not used: missing, or built against another torch."""


@dataclass(frozen=True)
class ExtensionStatus:
    """What became of the compiled extension.

    Attributes:
        compiled: Whether the compiled ops are loaded.
        path: The library loaded; without one, the folder where it was looked for.
        built_torch: The torch that the build was made for; None where there is no build.
        found_torch: The torch that is installed.
        build_info: What the build says of itself: compiler, flags, instruction sets; may be empty.
        reason: Why the compiled ops are not used; None where they are.
        mend: What to type to change that; None where nothing needs it.
    """

    compiled: bool
    path: Path
    built_torch: str | None
    found_torch: str
    build_info: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    mend: str | None = None

    @property
    def cuda(self) -> bool:
        """Whether the compiled ops in use have kernels for CUDA tensors too."""
        return self.compiled and bool(self.build_info.get("cuda_architectures"))


@functools.cache
def load() -> ExtensionStatus:
    """Loads the compiled ops into torch, once; later calls return the same answer.

    Returns:
        What was loaded. With nothing usable ``compiled`` is False, and a warning has said why.

    Raises:
        ExtensionError: Nothing usable was found and ``GAUGE_EXT_REQUIRE_COMPILED`` is 1.
    """
    found = status()
    if found.compiled or found.reason is None:
        return found
    if os.environ.get("GAUGE_EXT_REQUIRE_COMPILED", "0") not in ("", "0"):
        raise ExtensionError(found.reason, hint=found.mend)
    warnings.warn(
        f"{found.reason} The ops run in plain torch: right, but slower. {found.mend}",
        ExtensionWarning,
        stacklevel=2,
    )
    return found


@functools.cache
def status() -> ExtensionStatus:
    """Like :func:`load`, but neither warns nor raises: the reason is in what it returns."""
    found_torch = str(torch.__version__)
    module = _FOLDER / f"_C{_SUFFIX}"
    reason: str | None
    mend: str | None
    if not module.is_file():
        reason, mend = _explain_missing()
        return ExtensionStatus(False, _FOLDER, None, found_torch, reason=reason, mend=mend)
    try:
        info = _read_build_info(module)
    except ImportError as error:
        reason = f"{module} cannot be loaded: {error}."
        mend = _type(_rebuild())
        return ExtensionStatus(False, module, None, found_torch, reason=reason, mend=mend)

    built_torch = info["torch"]
    library = _FOLDER / f"_ops{_SUFFIX}"
    reason = mend = None
    if _minor(built_torch) != _minor(found_torch):
        reason = (
            f"The compiled gauge_ext in {_FOLDER} was built against torch {built_torch}, but torch"
            f" {found_torch} is installed."
        )
        other = f"pip install 'torch=={_minor(built_torch)}.*'"
        mend = f"{_type(_rebuild())} (or go back to the other torch: {other})"
    else:
        try:
            torch.ops.load_library(library)
        except OSError as error:
            # torch wraps the loader's message, which names the missing file or symbol.
            reason = f"{library} cannot be loaded: {error.__cause__ or error}."
            mend = _type(_rebuild())
    return ExtensionStatus(
        compiled=reason is None,
        path=library,
        built_torch=built_torch,
        found_torch=found_torch,
        build_info=info,
        reason=reason,
        mend=mend,
    )


def _read_build_info(path: Path) -> Mapping[str, Any]:
    """Imports ``_C`` from this very file.

    An ordinary import may find another folder's: where gauge_ext is also installed in editable
    form, its import hook answers for a ``gauge_ext._C`` that is missing here.
    """
    spec = importlib.util.spec_from_file_location("gauge_ext._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    info: Mapping[str, Any] = module.build_info()
    return info


def _minor(version: str) -> str:
    """``2.13.0+cpu`` -> ``2.13``, the part that the ABI hangs on."""
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found else version


def _source_root() -> Path | None:
    """The repository that this package is imported from, or None for an installed one."""
    root = _FOLDER.parent
    return root if (root / "CMakeLists.txt").is_file() and (root / "csrc").is_dir() else None


def _rebuild() -> str:
    root = _source_root()
    if root is not None:
        return f"pip install --no-build-isolation --no-deps -e {root}"
    return "pip install --force-reinstall --no-deps FOLDER, with the folder of gauge_ext's sources"


def _type(command: str) -> str:
    return f"Type: {command}"


def _explain_missing() -> tuple[str, str]:
    """Returns why there is no ``_C`` for this Python in this folder, and the mend."""
    for_others = sorted(_FOLDER.glob("_C.*.so"))
    if for_others:
        names = ", ".join(path.name for path in for_others)
        reason = f"{_FOLDER} has {names}, but this Python loads _C{_SUFFIX} only."
        return reason, _type(_rebuild())
    reason = f"There is no compiled gauge_ext in {_FOLDER}."
    root = _source_root()
    if root is not None:
        # Started in the repository after a plain `pip install .`: ./gauge_ext hides the installed.
        for entry in sys.path:
            other = Path(entry or ".").resolve() / "gauge_ext"
            if other != _FOLDER and (other / f"_C{_SUFFIX}").is_file():
                reason += (
                    f" The compiled one in {other} is hidden, as Python was started in {root}."
                )
                return reason, f"{_type(_rebuild())} (or start Python in another folder)"
    return reason, _type(_rebuild())
