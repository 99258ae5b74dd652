"""Finds the torch to build against, without importing it.

Importing torch costs seconds, and inside pip's isolated build it would fail: pip hides the target
environment's site-packages there. The folder is still on disk where ``sysconfig`` says, and
``torch/version.py`` is a handful of literals, so both are read as files.

Run as a script (CMake does that when it is started by hand) it prints ``root;version;cuda``.
"""

from __future__ import annotations

import ast
import importlib.machinery
import re
import site
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

#: What is installed where no torch is found: the release that the tests run on.
TESTED_TORCH = "2.13.0"


@dataclass(frozen=True)
class TorchInstall:
    """A torch package on disk.

    Attributes:
        root: The package folder, ``.../site-packages/torch``.
        version: Its full version, such as ``2.13.0+cpu``.
        cuda: The CUDA version that this torch was built with; empty for a CPU build.
    """

    root: Path
    version: str
    cuda: str

    @property
    def requirement(self) -> str:
        """The pin of a package built against this torch: its C++ ABI lasts one minor release."""
        return f"torch=={minor(self.version)}.*"


def minor(version: str) -> str:
    """``2.13.0+cpu`` -> ``2.13``."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"torch's version should start with two numbers, got {version!r}")
    return f"{found[1]}.{found[2]}"


def find_torch(folders: Iterable[str] | None = None) -> TorchInstall | None:
    """Returns the first torch in ``folders``, by default those of this Python.

    ``sys.path`` comes first (a build without isolation, or a torch that the build itself required),
    then the site-packages that pip's isolation takes off ``sys.path``.
    """
    if folders is None:
        paths = sysconfig.get_paths()
        folders = [*sys.path, paths["purelib"], paths["platlib"], *site.getsitepackages()]
        if site.ENABLE_USER_SITE:
            folders.append(site.getusersitepackages())
    # PathFinder looks without running the package, as importing it would.
    for folder in dict.fromkeys(folders):
        spec = importlib.machinery.PathFinder.find_spec("torch", [folder])
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent
        # A torch without headers or libraries (a stub, a leftover folder) is none to build against.
        if (root / "version.py").is_file() and (root / "include").is_dir():
            return read_torch(root)
    return None


def read_torch(root: Path) -> TorchInstall:
    """Reads ``version.py`` of the torch package in ``root``."""
    values: dict[str, object] = {}
    for node in ast.parse((root / "version.py").read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and isinstance(getattr(node, "value", None), ast.Constant):
            values[target.id] = node.value.value  # type: ignore[attr-defined]
    version = values.get("__version__")
    if not isinstance(version, str):
        raise ValueError(f"{root / 'version.py'} should set __version__ to a string")
    return TorchInstall(root=root, version=version, cuda=str(values.get("cuda") or ""))


if __name__ == "__main__":
    torch = find_torch()
    if torch is None:
        sys.exit(f"no torch in the environment of {sys.executable}: pip install torch")
    print(f"{torch.root};{torch.version};{torch.cuda}", end="")
