"""What is imported when: nothing before it is used, and the ops as soon as torch is there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gauge_ext

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [
    path.parent
    for folder in (ROOT / "gauge_ext", ROOT / "export")
    for path in folder.rglob("__init__.py")
    if "deferred(__name__)" in path.read_text(encoding="utf-8")
]


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "order", ["import torch, gauge_ext", "import gauge_ext, torch"], ids=["torch first", "last"]
)
def test_the_ops_are_there_in_either_order(order: str) -> None:
    said = python(
        f"{order}\nx = torch.ones(2, 3)\nprint(torch.ops.gauge_ext.lora_linear.default)\n"
        "print(type(torch.__loader__).__name__, type(torch.__spec__.loader).__name__)"
    )
    assert said.split() == ["gauge_ext.lora_linear.default", *2 * ["SourceFileLoader"]]


def test_files_are_read_and_written_without_torch() -> None:
    python(
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxruntime', 'transformers']))\n"
        "import gauge_ext.export\n"
        "from gauge_ext.adapters import LoRAConfig\n"
        "from gauge_ext.checkpoint.fields import check_supported, from_peft\n"
        "from gauge_ext.checkpoint.format import module_of\n"
        "import gauge_ext.cli\n"
        "config = from_peft({'peft_type': 'LORA', 'r': 4, 'use_rslora': True}, 'here', ['a'])\n"
        "assert config.scaling_for('a') == 4.0"
    )


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
def test_no_name_is_a_submodule_too(folder: Path) -> None:
    # The import of that submodule, by whomever, would put it in the name's place.
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    names = {
        alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "gauge_ext"
        for alias in node.names
    }
    assert names
    clashes = names & {path.stem for path in folder.iterdir()}
    assert not clashes, f"rename the file, not the function: {clashes}"


def test_every_public_name_and_every_submodule_is_there() -> None:
    for name in gauge_ext.__all__:
        assert getattr(gauge_ext, name) is not None
    assert set(gauge_ext.__all__) <= set(dir(gauge_ext))
    assert gauge_ext.geometry.__name__ == "gauge_ext.geometry"  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="'gauge_ext' has no attribute 'nothing'"):
        _ = gauge_ext.nothing  # type: ignore[attr-defined]


def test_several_adapters_at_hand() -> None:
    # Whoever comes from PEFT looks for them beside attach() and load_adapter().
    said = python(
        "import gauge_ext, gauge_ext.checkpoint as c, gauge_ext.models as m, sys\n"
        "assert 'gauge_ext.models.fidelity' not in sys.modules\n"
        "import torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=2))\n"
        "gauge_ext.add_adapter(model, gauge_ext.LoRAConfig(rank=3), 'b')\n"
        "with gauge_ext.use_adapters(model, 'b'):\n"
        "    print(gauge_ext.active_adapters(model))\n"
        "for where, names in ((m, 'adapter_rows merge_fidelity merge_stochastic set_adapters'),\n"
        "                     (c, 'load_adapters save_adapters swap_adapter')):\n"
        "    for name in names.split():\n"
        "        assert getattr(where, name) is getattr(gauge_ext, name)\n"
    )
    assert said.split() == ["{'b':", "1.0}"]
