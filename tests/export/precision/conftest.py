"""What the tests of precisions share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantized_tokens import Tokens

from gauge_ext.export import export_onnx


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The file of the tokens' model in float32."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("quantize") / "fp32.onnx"
    axes = ({0: "batch", 1: "steps"},)
    ids = torch.randint(50, (3, 7))
    export_onnx(Tokens(), (ids,), path, dynamic_shapes=axes, validate=False)
    return path
