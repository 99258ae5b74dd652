"""Who may import whom: read from the source, so that no import hidden in a function escapes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up: a module imports only from lines above its own, or from its own package.
# "" is gauge_ext/__init__.py, which collects the public names.
LAYERS = (
    ("_version", "_lazy", "errors", "html"),
    ("_native",),
    ("_load",),
    ("ops",),
    ("geometry", "optim"),
    ("certify",),
    ("adapters",),
    ("models",),
    ("checkpoint",),
    ("merging",),
    ("", "inspect", "training", "doctor"),
    ("export",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}

EXTRAS = {"onnx", "onnx_ir", "onnxruntime", "onnxscript", "peft", "transformers"}


def sources() -> list[tuple[Path, tuple[str, ...]]]:
    """Every module of the package: its file and its name below gauge_ext, in parts."""
    found = []
    for folder, prefix in ((ROOT / "gauge_ext", ()), (ROOT / "export", ("export",))):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder.name == "gauge_ext" and parts[0] == "export":
                continue
            found.append((path, prefix + tuple(part for part in parts if part != "__init__")))
    return found


def imports(path: Path, package: tuple[str, ...]) -> Iterator[tuple[str, int, bool]]:
    """Yields each import of a file: the dotted name, its line, whether it runs at import time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    deferred = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ("gauge_ext", *package)[: len(package) + 2 - node.level]
                base = ".".join([*above, *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) not in deferred


def component(dotted: str) -> str | None:
    """``gauge_ext.models.attach`` -> ``models``; a name of gauge_ext itself -> ""; else None."""
    parts = dotted.split(".")
    if parts[0] != "gauge_ext":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in HEIGHT else ""


@pytest.mark.parametrize(
    ("path", "name"), [pytest.param(*case, id=".".join(case[1]) or "init") for case in sources()]
)
def test_a_module_imports_only_from_below(path: Path, name: tuple[str, ...]) -> None:
    own = name[0] if name else ""
    assert own in HEIGHT, f"{path}: give {own!r} its place in LAYERS"
    package = name if path.name == "__init__.py" else name[:-1]
    for imported, line, _ in imports(path, package):
        other = component(imported)
        if other is not None and other != own:
            assert HEIGHT[other] < HEIGHT[own], f"{path}:{line}: {own} may not import {imported}"


@pytest.mark.parametrize(
    ("path", "name"), [pytest.param(*case, id=".".join(case[1]) or "init") for case in sources()]
)
def test_extras_are_imported_only_where_they_are_used(path: Path, name: tuple[str, ...]) -> None:
    if name[:1] == ("export",):
        return
    for imported, line, at_import in imports(path, name):
        extra = imported.split(".")[0] in EXTRAS or component(imported) == "export"
        assert not (extra and at_import), f"{path}:{line}: import {imported} inside a function"


def test_gauge_ext_imports_without_any_extra() -> None:
    # None in sys.modules makes an import fail as if nothing were installed.
    hidden = sorted(EXTRAS | {"loralib", "rich", "scipy", "typer"})
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden}))\nimport gauge_ext"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_export_under_its_own_name_is_refused() -> None:
    # Imported twice, as export and as gauge_ext.export, its classes would exist twice.
    done = subprocess.run(
        [sys.executable, "-c", "import export"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1
    assert "gauge_ext.export" in done.stderr
