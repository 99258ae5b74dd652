"""Packages whose names are imported when they are first used.

Merging into files, patching ONNX models and printing help need no torch, whose import takes a
second and 200 MiB. So a package lists its public names as ever, under ``if TYPE_CHECKING``, and
this module (PEP 562) imports from that list what is asked for.

The ops are the exception: whoever imports gauge_ext finds ``torch.ops.gauge_ext`` as soon as torch
is there, whichever of the two comes first.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def deferred(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` for a package that defers its imports.

    Args:
        package: Its ``__name__``. Its source holds ``if TYPE_CHECKING:`` with imports of the form
            ``from module import name``. No such name may be that of one of its submodules, which
            Python puts in its place.
    """

    @functools.cache
    def origins() -> dict[str, tuple[str, str]]:
        spec = sys.modules[package].__spec__
        source = spec.loader.get_source(package)  # type: ignore[union-attr]
        return {
            alias.asname or alias.name: (str(node.module), alias.name)
            for block in ast.parse(source or "").body
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in block.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def get(name: str) -> Any:
        found: Any
        module, original = origins().get(name, (package, name))
        if module != package:
            found = getattr(importlib.import_module(module), original)
        elif not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}"):
            found = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, found)
        return found

    return get, lambda: sorted({*vars(sys.modules[package]), *origins()})


def import_with_torch(module: str) -> None:
    """Import ``module`` now if torch is imported already, else right after torch is."""
    if sys.modules.get("torch") is not None:
        importlib.import_module(module)
    else:
        sys.meta_path.insert(0, _AfterTorch(module))


class _AfterTorch(MetaPathFinder):
    """Waits for the import of torch, and finds nothing itself."""

    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the others find torch, and add our import to the end of its own."""
        if name != "torch" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self._module)
        return spec


class _Then(Loader):
    """Loads as another loader does, then imports one module more."""

    def __init__(self, loader: Loader, module: str) -> None:
        self._loader, self._module = loader, module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the other."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Put the loader back in its place, so that torch looks as ever."""
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        importlib.import_module(self._module)
