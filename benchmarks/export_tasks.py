"""What bench_export.py runs, each in a process of its own: ``export_tasks.py TASK FOLDER KIND``.

Every task starts from files and ends with files, as a user's script would. Nothing heavy is
imported before the task asks for it, so that a process has only what its way needs.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

CHUNK = 2**23


def numpy_alone(folder: Path, kind: str) -> None:
    """The interpreter and numpy: what the promise of memory is counted from."""
    importlib.import_module("numpy")


def copy_onnx(folder: Path, kind: str) -> None:
    """The ONNX file and its weights, read and written once."""
    _copy(folder / "onnx", folder / "out_copy_onnx")


def copy_folder(folder: Path, kind: str) -> None:
    """The checkpoint, read and written once."""
    _copy(folder / "base", folder / "out_copy_folder")


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    buffer = memoryview(bytearray(CHUNK))
    for file in source.iterdir():
        reader = os.open(file, os.O_RDONLY)
        writer = os.open(target / file.name, os.O_WRONLY | os.O_CREAT, 0o666)
        while count := os.readv(reader, [buffer]):
            os.write(writer, buffer[:count])
        os.close(reader)
        os.close(writer)


def patch(folder: Path, kind: str) -> None:
    """Ours, into the ONNX file."""
    from gauge_ext.export.patching.patch import patch_onnx

    patch_onnx(folder / "onnx" / "model.onnx", folder / "adapter", folder / "out_patch/model.onnx")


def merge(folder: Path, kind: str) -> None:
    """Ours, into the checkpoint."""
    from gauge_ext.export.patching.merge import merge_checkpoint

    merge_checkpoint(folder / "base", folder / "adapter", folder / "out_merge")


def onnx_numpy(folder: Path, kind: str) -> None:
    """onnx.load, numpy, onnx.save: what people write by hand."""
    import ast

    import numpy as np
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import load_file

    model = onnx.load(str(folder / "onnx" / "model.onnx"))
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    origin = {
        value.name: ast.literal_eval(note.value)[0]
        for value in model.graph.value_info
        for note in value.metadata_props
        if note.key == "pkg.onnxscript.optimizer.folded_from"
    }
    for tensor in model.graph.initializer:
        name = origin.get(tensor.name, tensor.name).removeprefix("model_.").removesuffix(".weight")
        key = f"base_model.model.{name}.lora_A.weight"
        if key in factors:
            delta = scaling * (factors[key.replace("lora_A", "lora_B")] @ factors[key])
            weight = numpy_helper.to_array(tensor)
            delta = delta.T if tensor.name in origin else delta
            tensor.CopyFrom(
                numpy_helper.from_array((weight + delta).astype(np.float32), tensor.name)
            )
    out = folder / "out_onnx_numpy"
    out.mkdir()
    onnx.save(
        model, str(out / "model.onnx"), save_as_external_data=True, location="model.onnx.data"
    )


def peft_onnx(folder: Path, kind: str) -> None:
    """PEFT's merge, then torch.onnx."""
    merged, inputs = _peft_merged(folder, kind)
    out = folder / "out_peft_onnx"
    out.mkdir()
    export(merged, inputs, out / "model.onnx")


def peft_save(folder: Path, kind: str) -> None:
    """PEFT's merge, then the checkpoint again."""
    from safetensors.torch import save_model

    merged, _ = _peft_merged(folder, kind)
    (folder / "out_peft_save").mkdir()
    save_model(merged, str(folder / "out_peft_save" / "model.safetensors"))


def _peft_merged(folder: Path, kind: str) -> tuple[Any, Any]:
    import peft
    import torch

    model, inputs = build(kind)
    load(model, folder / "base" / "model.safetensors")
    config = peft.LoraConfig.from_pretrained(folder / "adapter")
    wrapped = peft.PeftModel(model, config)
    wrapped.load_adapter(str(folder / "adapter"), "default")
    with torch.no_grad():
        return wrapped.merge_and_unload().eval(), inputs


def build(kind: str) -> tuple[Any, Any]:
    """The model, with random weights, and example inputs.

    ``llama30`` is the shape of a Llama of 135M parameters in 30 layers, ``wide24`` 24 linear layers
    of 4096 x 4096: 1.5 GiB.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    count = int(kind.lstrip("abcdefghijklmnopqrstuvwxyz"))
    if kind.startswith("wide"):
        layers = [nn.Linear(4096, 4096, bias=False, device="meta") for _ in range(count)]
        model = nn.Sequential(OrderedDict(layers=nn.Sequential(*layers)))
        return model.to_empty(device="cpu").eval(), torch.randn(1, 4096)
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=count,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 49152, (1, 16))


def load(model: Any, file: Path) -> None:
    """The weights of a model from a file, those that are tied once."""
    from safetensors.torch import load_model

    load_model(model, file)


def export(model: Any, inputs: Any, path: Path) -> None:
    """torch.onnx, with the weights outside."""
    import warnings

    import torch
    from torch import nn

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model_ = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.model_(x, use_cache=False) if hasattr(model, "lm_head") else self.model_(x)
            logits: torch.Tensor = getattr(found, "logits", found)
            return logits

    warnings.simplefilter("ignore")
    torch.onnx.export(
        Logits().eval(), (inputs,), path, dynamo=True, external_data=True, verbose=False
    )


TASKS = (
    *(numpy_alone, copy_onnx, patch, onnx_numpy, peft_onnx),
    *(copy_folder, merge, peft_save),
)


if __name__ == "__main__":
    task = next(function for function in TASKS if function.__name__ == sys.argv[1])
    shutil.rmtree(Path(sys.argv[2]) / f"out_{task.__name__}", ignore_errors=True)
    task(Path(sys.argv[2]), sys.argv[3])
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    (Path(sys.argv[2]) / "peak").write_text(peak)
