"""Loads the compiled ops, or says in one sentence why not and what to type.

``_ops`` is linked to torch's C++ libraries, whose ABI lasts one minor release: loaded under another
it dies of an undefined symbol, or worse. So the small module ``_C``, which is linked to nothing, is
imported first (:mod:`gauge_ext._native`) and tells which torch the build was made for; only then is
``_ops`` loaded, and ``_calls``, which calls its ops from Python at less cost than ``torch.ops``.

Without a usable build the package still works: its ops are then computed by plain torch, with one
:class:`ExtensionWarning`. ``GAUGE_EXT_REQUIRE_COMPILED=1`` turns that into an error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gauge_ext import _native
from gauge_ext._native import ExtensionWarning

__all__ = ["ExtensionStatus", "ExtensionWarning", "load", "status"]


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
        calls: The module ``_calls``; None where the compiled ops are not used.
    """

    compiled: bool
    path: Path
    built_torch: str | None
    found_torch: str
    build_info: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    mend: str | None = None
    calls: ModuleType | None = None

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
    if found.reason is not None:
        _native.say_missing(found.reason, found.mend, "The ops run in plain torch")
    return found


@functools.cache
def status() -> ExtensionStatus:
    """Like :func:`load`, but neither warns nor raises: the reason is in what it returns."""
    found_torch = str(torch.__version__)
    native = _native.find()
    if native.module is None:
        return ExtensionStatus(
            False, native.path, None, found_torch, reason=native.reason, mend=native.mend
        )
    info: Mapping[str, Any] = native.module.build_info()
    built_torch = info["torch"]
    library = _native.FOLDER / f"_ops{_native.SUFFIX}"
    reason: str | None = None
    mend: str | None = None
    calls: ModuleType | None = None
    if _minor(built_torch) != _minor(found_torch):
        reason = (
            f"The compiled gauge_ext in {_native.FOLDER} was built against torch {built_torch}, but"
            f" torch {found_torch} is installed."
        )
        other = f"pip install 'torch=={_minor(built_torch)}.*'"
        again = _native.type_this(_native.rebuild())
        mend = f"{again} (or go back to the other torch: {other})"
    else:
        part = library.with_name(f"_calls{_native.SUFFIX}")
        try:
            # _ops last: where a part is missing, formulas in plain torch take the names of its ops,
            # which a library once loaded keeps.
            calls = _native.import_file(part)
            part = library
            torch.ops.load_library(library)
        except (ImportError, OSError) as error:
            # torch wraps the loader's message, which names the missing file or symbol.
            reason = f"{part} cannot be loaded: {error.__cause__ or error}."
            mend = _native.type_this(_native.rebuild())
    return ExtensionStatus(
        compiled=reason is None,
        path=library,
        built_torch=built_torch,
        found_torch=found_torch,
        build_info=info,
        reason=reason,
        mend=mend,
        calls=calls if reason is None else None,
    )


def _minor(version: str) -> str:
    """``2.13.0+cpu`` -> ``2.13``, the part that the ABI hangs on."""
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found else version
