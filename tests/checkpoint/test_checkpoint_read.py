"""Reading a folder: what is there, and every way in which it can be no adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gauge_ext.checkpoint import read_adapter
from gauge_ext.errors import AdapterFormatError, ConfigError, GaugeError, NonFiniteError

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]}


def tensors() -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.a.{name}.lora_{factor}.weight": torch.randn(shape)
        for name in ("q", "v")
        for factor, shape in (("A", (2, 5)), ("B", (3, 2)))
    }


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write an adapter's folder, with changes to its config and tensors."""

    def write(
        config: dict[str, Any] | None = None, changed: dict[str, torch.Tensor] | None = None
    ) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
        safetensors.torch.save_file(
            {**tensors(), **(changed or {})}, folder / "adapter_model.safetensors"
        )
        return folder

    return write


def refused(path: Path | str, kind: type[GaugeError] = AdapterFormatError) -> str:
    """Return the message with which ``path`` is refused."""
    with pytest.raises(kind) as caught:
        read_adapter(path)
    return str(caught.value)


def test_a_good_folder(make: Make) -> None:
    folder = make({"lora_dropout": 0.1, "revision": "main"})
    adapter = read_adapter(str(folder))
    assert adapter.path == folder
    assert list(adapter.tensors) == ["a.q", "a.v"]
    assert adapter.tensors["a.q"].lora_A.shape == (2, 5)
    assert adapter.tensors["a.q"].lora_B.shape == (3, 2)
    assert adapter.config.dropout == 0.1
    assert adapter.config.scaling_for("a.q") == 2.0
    assert adapter.raw_config["revision"] == "main"
    assert len(adapter.sha256) == 64


def test_missing_folder(tmp_path: Path) -> None:
    message = refused(tmp_path / "nowhere")
    assert (
        message == f"{tmp_path / 'nowhere'} does not exist. Give the folder that holds the adapter."
    )


def test_a_file_in_place_of_a_folder(make: Make) -> None:
    folder = make()
    assert "is a file, and an adapter is a folder" in refused(folder / "adapter_config.json")


def test_a_folder_that_holds_no_adapter(tmp_path: Path, make: Make) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "holds no adapter_config.json, so it is no adapter." in refused(tmp_path)
    folder = make()
    message = refused(tmp_path)
    assert f"There are adapters below it: {folder}." in message


def test_missing_weights(make: Make) -> None:
    folder = make()
    (folder / "adapter_model.safetensors").unlink()
    assert refused(folder) == f"{folder} holds no adapter_model.safetensors."


def test_a_pickle_is_not_opened(make: Make) -> None:
    folder = make()
    (folder / "adapter_model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "exploded",)

    torch.save(Bomb(), folder / "adapter_model.bin")
    message = refused(folder)
    assert "only adapter_model.bin" in message
    assert "weights_only=True" in message
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_weights(make: Make, keep: int) -> None:
    folder = make()
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    message = refused(folder)
    assert str(file) in message
    assert "is damaged or no safetensors file" in message
    assert "cut short" in message


def test_weights_that_are_something_else(make: Make) -> None:
    folder = make()
    (folder / "adapter_model.safetensors").write_bytes(b"<html>404 Not Found</html>" * 20)
    assert "is damaged or no safetensors file" in refused(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b'{"r": 8', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b"{}", 'peft_type must be "LORA", got None'),
    ],
)
def test_a_config_that_is_none(make: Make, content: bytes, words: str) -> None:
    folder = make()
    (folder / "adapter_config.json").write_bytes(content)
    message = refused(folder)
    assert str(folder / "adapter_config.json") in message
    assert words in message


def test_a_folder_in_place_of_a_file(make: Make) -> None:
    folder = make()
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()
    assert "holds no adapter_model.safetensors" in refused(folder)


def test_a_refused_field_comes_before_the_keys_that_it_explains(make: Make) -> None:
    folder = make({"kasa_config": {}}, {"base_model.model.a.q.lora_diag": torch.ones(3)})
    assert "kasa_config = {} asks for KaSA" in refused(folder, ConfigError)


def test_a_rank_that_is_not_the_configs(make: Make) -> None:
    folder = make({"rank_pattern": {"v": 7}})
    message = refused(folder)
    assert "the rank of 'a.v' is 7 by adapter_config.json (r, rank_pattern)" in message
    assert "lora_A (2, 5) and lora_B (3, 2)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite(
    make: Make, factor: str, value: float, dtype: torch.dtype
) -> None:
    changed = {key: t.to(dtype) for key, t in tensors().items()}
    changed[f"base_model.model.a.v.lora_{factor}.weight"][1, 0] = value
    folder = make(changed=changed)
    message = refused(folder, NonFiniteError)
    assert f"lora_{factor} of 'a.v' holds NaN or infinity" in message


def test_an_unreadable_folder_is_left_as_it_was(make: Make, tmp_path: Path) -> None:
    folder = make()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    shutil.copytree(folder, tmp_path / "copy")
    read_adapter(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
