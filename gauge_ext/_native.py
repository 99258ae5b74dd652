"""Loads ``_C``, the small compiled module that is linked to nothing, without importing torch.

It says how the extension was built, which :mod:`gauge_ext._load` compares with the torch that is
there, and has the loops of what works on files without torch, see ``_C.pyi``. Where it is missing
these run in numpy, with one :class:`ExtensionWarning`; ``GAUGE_EXT_REQUIRE_COMPILED=1`` turns that
into an error.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from gauge_ext.errors import ExtensionError

FOLDER = Path(__file__).resolve().parent
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


class ExtensionWarning(UserWarning):
    """The compiled extension is not used: missing, or built against another torch."""


@dataclass(frozen=True)
class Native:
    """What became of ``_C``.

    Attributes:
        module: The module; None where there is none that can be loaded.
        path: Its file; without one, the folder where it was looked for.
        reason: Why there is none; None where it is loaded.
        mend: What to type to change that; None where nothing needs it.
    """

    module: ModuleType | None
    path: Path
    reason: str | None = None
    mend: str | None = None


@functools.cache
def find() -> Native:
    """Loads ``_C`` once; later calls return the same answer. It neither warns nor raises."""
    path = FOLDER / f"_C{SUFFIX}"
    if not path.is_file():
        reason, mend = _explain_missing()
        return Native(None, FOLDER, reason, mend)
    try:
        return Native(import_file(path), path)
    except ImportError as error:
        return Native(None, path, f"{path} cannot be loaded: {error}.", type_this(rebuild()))


@functools.cache
def load() -> ModuleType | None:
    """The loops that need no torch; where they are missing None, and a warning has said why.

    Raises:
        ExtensionError: They are missing and ``GAUGE_EXT_REQUIRE_COMPILED`` is 1.
    """
    found = find()
    if found.reason is not None:
        say_missing(found.reason, found.mend, "Files are changed in numpy")
    return found.module


def say_missing(reason: str, mend: str | None, instead: str) -> None:
    """Warns, or raises where the compiled extension is required.

    Args:
        reason: Why the compiled extension is not used.
        mend: What to type to change that.
        instead: What is done without it.

    Raises:
        ExtensionError: ``GAUGE_EXT_REQUIRE_COMPILED`` is 1.
    """
    if os.environ.get("GAUGE_EXT_REQUIRE_COMPILED", "0") not in ("", "0"):
        raise ExtensionError(reason, hint=mend)
    warnings.warn(f"{reason} {instead}: right, but slower. {mend}", ExtensionWarning, stacklevel=3)


def import_file(path: Path) -> ModuleType:
    """Imports a compiled module of this package from this very file.

    An ordinary import may find another folder's: where gauge_ext is also installed in editable
    form, its import hook answers for a ``gauge_ext._C`` that is missing here.
    """
    name = path.name.removesuffix(SUFFIX)
    spec = importlib.util.spec_from_file_location(f"gauge_ext.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _source_root() -> Path | None:
    """The repository that this package is imported from, or None for an installed one."""
    root = FOLDER.parent
    return root if (root / "CMakeLists.txt").is_file() and (root / "csrc").is_dir() else None


def rebuild() -> str:
    """The command that compiles the extension for this environment."""
    root = _source_root()
    if root is not None:
        return f"pip install --no-build-isolation --no-deps -e {root}"
    return "pip install --force-reinstall --no-deps FOLDER, with the folder of gauge_ext's sources"


def type_this(command: str) -> str:
    """A command as the end of a message."""
    return f"Type: {command}"


def _explain_missing() -> tuple[str, str]:
    """Returns why there is no ``_C`` for this Python in this folder, and the mend."""
    for_others = sorted(FOLDER.glob("_C.*.so"))
    if for_others:
        names = ", ".join(path.name for path in for_others)
        reason = f"{FOLDER} has {names}, but this Python loads _C{SUFFIX} only."
        return reason, type_this(rebuild())
    reason = f"There is no compiled gauge_ext in {FOLDER}."
    root = _source_root()
    if root is not None:
        # Started in the repository after a plain `pip install .`: ./gauge_ext hides the installed.
        for entry in sys.path:
            other = Path(entry or ".").resolve() / "gauge_ext"
            if other != FOLDER and (other / f"_C{SUFFIX}").is_file():
                reason += (
                    f" The compiled one in {other} is hidden, as Python was started in {root}."
                )
                return reason, f"{type_this(rebuild())} (or start Python in another folder)"
    return reason, type_this(rebuild())
