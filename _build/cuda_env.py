"""Decides whether CUDA kernels are built: what ``GAUGE_EXT_CUDA`` asks, what torch and nvcc allow.

``GAUGE_EXT_CUDA`` is ``auto`` (where torch was built with CUDA and an nvcc of the same major version
is there), ``1`` (or the build fails) or ``0``. ``TORCH_CUDA_ARCH_LIST`` names the architectures, as
it does for torch's own extensions.

Run as a script (CMake does) it prints ``usable;nvcc;version;include;cudart;flags;architectures;reason``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

#: What is built where ``TORCH_CUDA_ARCH_LIST`` says nothing: A100, H100 and H200, B200.
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"

#: The kernels multiply in tf32 on the tensor cores.
OLDEST = (8, 0)


class CudaError(Exception):
    """``GAUGE_EXT_CUDA=1`` without the means, or a setting that says nothing known."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit on disk: its folder, the nvcc in it, and nvcc's version such as ``13.0``."""

    root: Path
    nvcc: Path
    version: str

    @property
    def include(self) -> Path:
        """The folder of ``cuda_runtime_api.h``."""
        return self.root / "include"

    def cudart(self, torch_root: Path | None = None) -> Path | None:
        """The run-time library to link to: the toolkit's, or the one that torch brought."""
        folders = [self.root / "lib64", self.root / "lib"]
        if torch_root is not None:
            folders += torch_root.parent.glob("nvidia/*/lib")
        for folder in folders:
            for library in sorted(folder.glob("libcudart.so*")):
                return library
        return None


@dataclass(frozen=True)
class Decision:
    """What the build does: ``usable`` with a toolkit and architectures, or not and a reason."""

    usable: bool
    toolkit: Toolkit | None
    architectures: tuple[str, ...]
    reason: str


def decide(
    mode: str,
    torch_root: Path,
    torch_cuda: str,
    environment: Mapping[str, str] = os.environ,
) -> Decision:
    """Returns whether and how CUDA kernels are built.

    Args:
        mode: ``auto``, ``0`` or ``1``.
        torch_root: The torch package's folder.
        torch_cuda: The CUDA version that torch was built with; empty for a CPU build.
        environment: Where ``CUDA_HOME``, ``CUDA_PATH``, ``PATH`` and ``TORCH_CUDA_ARCH_LIST`` are.

    Raises:
        CudaError: ``mode`` is ``1`` and something is missing, or a setting is not understood.
    """
    if mode.lower() not in ("auto", "0", "1"):
        raise CudaError(f"GAUGE_EXT_CUDA must be auto, 0 or 1, got {mode!r}")
    architectures = parse_architectures(environment.get("TORCH_CUDA_ARCH_LIST", ""))
    major = torch_cuda.partition(".")[0]
    found = list(toolkits(environment))
    matching = [toolkit for toolkit in found if toolkit.version.partition(".")[0] == major]
    toolkit = next(iter(matching or found), None)
    reason = ""
    if mode == "0":
        reason = "GAUGE_EXT_CUDA=0"
    elif not torch_cuda:
        reason = "torch was built without CUDA"
    elif not (torch_root / "lib" / "libc10_cuda.so").is_file():
        reason = f"{torch_root / 'lib'} has no libc10_cuda.so"
    elif toolkit is None:
        reason = "no nvcc was found: set CUDA_HOME to a CUDA toolkit, or put its nvcc on PATH"
    elif not matching:
        reason = (
            f"torch was built with CUDA {torch_cuda}, but {toolkit.nvcc} is of CUDA"
            f" {toolkit.version}: set CUDA_HOME to a toolkit of CUDA {major}"
        )
    elif toolkit.cudart(torch_root) is None:
        reason = f"there is no libcudart.so in {toolkit.root} nor beside torch"
    elif not architectures:
        oldest = ".".join(map(str, OLDEST))
        reason = f"TORCH_CUDA_ARCH_LIST names no architecture from {oldest} on"
    if reason and mode == "1":
        raise CudaError(f"GAUGE_EXT_CUDA=1, but {reason}")
    return Decision(not reason, toolkit, architectures, reason)


def parse_architectures(text: str) -> tuple[str, ...]:
    """``8.0;9.0+PTX`` -> ``("8.0", "9.0+PTX")``; those that the kernels cannot run on are left out.

    Empty text means :data:`DEFAULT_ARCHITECTURES`.
    """
    kept = []
    for word in re.split(r"[;,\s]+", text.strip()) if text.strip() else ():
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if found is None:
            raise CudaError(
                f"TORCH_CUDA_ARCH_LIST must name architectures such as 8.0;9.0+PTX, got {word!r}"
            )
        if (int(found[1]), int(found[2])) >= OLDEST:
            kept.append(word)
    return tuple(kept) if text.strip() else tuple(DEFAULT_ARCHITECTURES.split(";"))


def gencode(architectures: tuple[str, ...]) -> list[str]:
    """Returns nvcc's options: machine code for each architecture, and PTX where ``+PTX`` asks."""
    options = []
    for word in architectures:
        number = word.removesuffix("+PTX").replace(".", "")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if word.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def toolkits(environment: Mapping[str, str] = os.environ) -> Iterator[Toolkit]:
    """Yields the usable toolkits: named ones first, then those of PATH, of the system, of pip."""
    seen = set()
    for root in _roots(environment):
        nvcc = root / "bin" / "nvcc"
        header = root / "include" / "cuda_runtime_api.h"
        if nvcc not in seen and nvcc.is_file() and header.is_file():
            seen.add(nvcc)
            said = subprocess.run(
                [nvcc, "--version"], capture_output=True, text=True, check=False
            ).stdout
            version = re.search(r"release (\d+\.\d+)", said)
            if version is not None:
                yield Toolkit(root, nvcc, version[1])


def _roots(environment: Mapping[str, str]) -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            yield Path(environment[name])
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    if on_path is not None:
        # What is on PATH may be a script that starts another one: then the toolkit is beside it.
        yield Path(on_path).resolve().parent.parent
        yield Path(on_path).parent.parent / "cuda"
    yield Path("/usr/local/cuda")
    # pip install nvidia-cuda-nvcc
    yield from sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*"))


def main(mode: str, torch_root: str, torch_cuda: str) -> None:
    """Prints the decision for CMake, a list of its kind."""
    try:
        decision = decide(mode, Path(torch_root), torch_cuda)
    except CudaError as error:
        sys.exit(str(error))
    toolkit = decision.toolkit
    fields = (
        str(int(decision.usable)),
        "" if toolkit is None else str(toolkit.nvcc),
        "" if toolkit is None else toolkit.version,
        "" if toolkit is None else str(toolkit.include),
        "" if toolkit is None else str(toolkit.cudart(Path(torch_root)) or ""),
        " ".join(gencode(decision.architectures)),
        " ".join(decision.architectures),
        decision.reason.replace(";", ","),
    )
    print(";".join(field or "-" for field in fields), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
