"""The values of ``lora_linear`` again, on each instruction set and on each path of the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from marks import needs_compiled

pytestmark = needs_compiled


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine(capability: str) -> None:
    """Runs the value tests again in a process whose kernels are capped at ``capability``."""
    levels = ["DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if here not in levels or levels.index(capability.upper()) > levels.index(here):
        pytest.skip(f"this machine has {here} only")
    check = f"assert torch.backends.cpu.get_cpu_capability() == '{capability.upper()}'"
    done = run_again({"ATEN_CPU_CAPABILITY": capability}, check)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "forced",
    [
        {"MERGED": "always", "SMALL": "never", "BFLOAT16": "float32"},
        {"MERGED": "never", "SMALL": "never", "BFLOAT16": "native"},
        {"SMALL": "always"},
    ],
    ids=lambda forced: ",".join(f"{name}={value}" for name, value in forced.items()),
)
def test_every_path(forced: dict[str, str]) -> None:
    """Runs the value tests again in a process that must take the path, whatever the sizes."""
    done = run_again({f"GAUGE_EXT_{name}": value for name, value in forced.items()})
    assert done.returncode == 0, done.stderr


def test_a_path_that_does_not_exist_is_refused() -> None:
    done = run_again({"GAUGE_EXT_MERGED": "sometimes"})
    assert done.returncode != 0
    assert "GAUGE_EXT_MERGED must be auto, always or never, got sometimes" in done.stderr


def run_again(variables: dict[str, str], check: str = "") -> subprocess.CompletedProcess[str]:
    program = (
        f"import sys, torch\n{check}\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_lora_linear\n"
        "test_lora_linear.check_every_value()"
    )
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
