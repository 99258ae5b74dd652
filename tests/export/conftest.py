"""Small modules with every shape of input and output, and onnxruntime with nothing around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from language_models import build
from torch import Tensor, nn

import gauge_ext
from gauge_ext.export import export_causal_lm
from gauge_ext.export.language.model_report import ModelReport


class TwoInputs(nn.Module):
    """Two inputs, a dict of outputs with a nested tuple in it, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 6)
        self.right = nn.Linear(3, 6)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        total = torch.tanh(self.left(x) + self.right(y))
        return {"total": total, "parts": (total * 2, total.mean(-1))}


class NamesClash(nn.Module):
    """An input named like a parameter, an output named like an input, and an input given back."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"x": x, "linear": x * self.scale + scale}


@pytest.fixture
def two_inputs() -> TwoInputs:
    return TwoInputs()


@pytest.fixture
def names_clash() -> NamesClash:
    return NamesClash()


@pytest.fixture(autouse=True, scope="package")
def _parse_torchlib_once() -> Iterator[None]:
    """torch.onnx parses its 500 translations anew for each export: half the time of a small one."""
    from torch.onnx._internal.exporter import _registration

    registry = _registration.ONNXRegistry
    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(registry.from_torchlib)
        patch.setattr(registry, "from_torchlib", staticmethod(once))
        yield


def attach_random(model: nn.Module, **fields: Any) -> nn.Module:
    """Attaches an adapter whose update is not zero."""
    gauge_ext.attach(model, gauge_ext.LoRAConfig(**{"rank": 3, "alpha": 6.0} | fields))
    with torch.no_grad():
        for name, parameter in gauge_ext.named_adapter_parameters(model):
            parameter.normal_(std=0.3 if name.endswith("lora_A") else 0.2)
    return model


@pytest.fixture(scope="session")
def attach() -> Callable[..., nn.Module]:
    """Like ``adapted``, for fixtures that outlive a test."""
    return attach_random


@pytest.fixture
def adapted() -> Callable[..., nn.Module]:
    """``adapted(model, **LoRAConfig's fields)``: the model with a random adapter on it."""
    return attach_random


@pytest.fixture
def run_onnx() -> Callable[[Path, Mapping[str, Tensor]], dict[str, Tensor]]:
    """``run_onnx(path, inputs)``: the outputs by name."""

    def run(path: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}

    return run


@pytest.fixture
def listing(tmp_path: Path) -> Callable[[], list[str]]:
    """Everything under the test's folder, hidden files too."""
    return lambda: sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))


@pytest.fixture(scope="session")
def exported_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, ModelReport]:
    """A Llama with an adapter that is not merged, its folder of ONNX, and the report."""
    pytest.importorskip("transformers")
    model = build("llama")
    torch.manual_seed(1)
    attach_random(model, target_modules=["q_proj", "v_proj", "down_proj"])
    folder = tmp_path_factory.mktemp("llama") / "onnx"
    return model, folder, export_causal_lm(model, folder)
