"""Small models and adapters on disk, written without the code under test, and a runner."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

ALPHA = 6.0
RANK = 3

Factors = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def bert_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BertModel of 2 layers and width 16 as ``save_pretrained`` writes it; no tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert") / "base"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    BertModel(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture
def bert_folder(bert_source: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bert_source, tmp_path / "base"))


@pytest.fixture
def factory_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a copy of ``tiny_models.py``, made the current one; imports are undone."""
    folder = tmp_path / "code"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("tiny_models.py"), folder)
    monkeypatch.chdir(folder)
    known = set(sys.modules)
    yield folder
    # Others add to the path too (onnxruntime.transformers does), once for the whole process.
    sys.path[:] = [entry for entry in sys.path if entry != str(folder)]
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) is not None and str(folder) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


def _write_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    config: Mapping[str, Any],
    spoil: Callable[[Factors], None] | None,
) -> Factors:
    """Write PEFT's files by hand; ``shapes`` gives (in, out) by module path."""
    generator = torch.Generator().manual_seed(11)
    factors: Factors = {
        name: (
            torch.randn(RANK, inner, generator=generator),
            0.3 * torch.randn(outer, RANK, generator=generator),
        )
        for name, (inner, outer) in shapes.items()
    }
    if spoil is not None:
        spoil(factors)
    tensors = {}
    for name, (lora_A, lora_B) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_B
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "bias": "none",
        "base_model_name_or_path": "tiny",
        "inference_mode": True,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return factors


BERT_LAYERS = {
    f"encoder.layer.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in (
        ("attention.self.query", (16, 16)),
        ("attention.self.value", (16, 16)),
        ("intermediate.dense", (16, 24)),
    )
}
TINY_LAYERS = {"first": (6, 10), "second": (10, 4)}
# A name in a list is the end of a path: "dense" alone would name other layers of BERT too.
TARGETS = {"bert": ["query", "value", "intermediate.dense"], "tiny": ["first", "second"]}

MakeAdapter = Callable[..., tuple[Path, Factors]]


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Write an adapter for ``"bert"`` or ``"tiny"``: its folder, and its factors by module path.

    ``config`` replaces fields, ``shapes`` replaces layers, ``spoil`` changes the factors in place.
    """

    def make(
        kind: str,
        *,
        shapes: Mapping[str, tuple[int, int]] | None = None,
        config: Mapping[str, Any] | None = None,
        spoil: Callable[[Factors], None] | None = None,
    ) -> tuple[Path, Factors]:
        folder = tmp_path / f"{kind}-adapter"
        layers = BERT_LAYERS if kind == "bert" else TINY_LAYERS
        fields = {"target_modules": TARGETS[kind], **(config or {})}
        return folder, _write_adapter(folder, shapes or layers, fields, spoil)

    return make


@pytest.fixture
def delta() -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """The update of one layer by the definition: alpha / r * B @ A."""
    return lambda factors: ALPHA / RANK * factors[1] @ factors[0]


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run a command in this process, ``run("inspect", folder)``; what is a bug is raised."""

    return _invoke


def _invoke(*arguments: object) -> Result:
    from gauge_ext.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="session")
def invoke() -> Callable[..., Result]:
    """Like ``run``, for fixtures that outlive a test."""
    return _invoke


@pytest.fixture
def fails(run: Callable[..., Result]) -> Callable[..., str]:
    """Run a command that must fail as users' errors do, and return what it said.

    Status 1, one paragraph on stderr that begins with the option at fault and ends in a sentence,
    no traceback; with ``writes=False`` (the default) stdout stays empty.
    """

    def check(option: str, *arguments: object, writes: bool = False) -> str:
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith(f"error: {option}: "), lines[0]
        assert "Traceback" not in result.output
        assert writes or not result.stdout, result.stdout
        return lines[0]

    return check


@pytest.fixture
def tiny(make_adapter: MakeAdapter) -> Path:
    """The folder of an adapter for the tiny models."""
    return make_adapter("tiny")[0]


@pytest.fixture
def unchanged_after_setup(factory_folder: Path, tiny: Path, tmp_path: Path) -> Iterator[None]:
    """After the test no file under ``tmp_path`` is new, gone, or has another size."""
    (factory_folder / "broken_import.py").write_text("import no_such_dependency\n")
    (factory_folder / "broken_syntax.py").write_text("def build(:\n")
    (factory_folder / "leaves.py").write_text("import sys\nsys.exit(0)\n")

    def listing() -> dict[Path, int]:
        return {
            path: path.stat().st_size if path.is_file() else -1
            for path in tmp_path.rglob("*")
            if "__pycache__" not in path.parts
        }

    before = listing()
    yield
    assert listing() == before


@pytest.fixture(scope="session")
def exported_bert(bert_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BERT folder and its adapter as ``model.onnx``, exported once by the command line.

    Beside it lies its report, ``model.json``.
    """
    folder = tmp_path_factory.mktemp("onnx")
    adapter = tmp_path_factory.mktemp("adapter") / "bert"
    _write_adapter(adapter, BERT_LAYERS, {"target_modules": TARGETS["bert"]}, None)
    sizes = ("--batch", "3", "--sequence", "7", "--opset", "18")
    files = ("--out", folder / "model.onnx", "--report", folder / "model.json")
    result = _invoke("export", bert_source, "--adapter", adapter, *sizes, *files)
    assert result.exit_code == 0, result.output
    return folder / "model.onnx"
