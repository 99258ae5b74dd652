"""Importing: under one name only, and without what only an export needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_folder_cannot_be_imported_twice():
    found = python("import export")
    assert found.returncode != 0
    assert "import it as gauge_ext.export" in found.stderr


def test_importing_it_needs_torch_alone():
    extras = "('onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'transformers', 'peft', 'rich')"
    found = python(
        f"import sys, gauge_ext.export; print([name for name in {extras} if name in sys.modules])"
    )
    assert found.stdout.strip() == "[]", found.stderr
