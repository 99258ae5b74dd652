"""A transformers folder as BASE: complete and undamaged, or an error that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gauge_ext.cli.base import load_base
from gauge_ext.errors import ConfigError


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_class_that_the_config_names(bert_folder: Path) -> None:
    base = load_base(str(bert_folder))
    assert type(base.model).__name__ == "BertModel"
    assert base.folder == bert_folder
    assert not base.model.training
    stored = load_file(bert_folder / "model.safetensors")
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, stored[name]), name


def test_half_precision_weights_are_loaded_in_float32(bert_folder: Path) -> None:
    stored = load_file(bert_folder / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in stored.items()}
    save_file(halves, bert_folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(bert_folder, dtype="bfloat16")
    for name, parameter in load_base(str(bert_folder)).model.named_parameters():
        assert torch.equal(parameter, halves[name].float()), name


def test_another_class_on_request(bert_folder: Path) -> None:
    # Saved as a model with a head, the encoder alone can be had.
    edit_config(bert_folder, architectures=["BertForMaskedLM"])
    with pytest.raises(ConfigError, match=r"lacks \d+ of the weights of BertForMaskedLM") as caught:
        load_base(str(bert_folder))
    assert "--architecture" in str(caught.value)
    assert type(load_base(str(bert_folder), architecture="BertModel").model).__name__ == "BertModel"


def test_a_class_that_does_not_exist(bert_folder: Path) -> None:
    with pytest.raises(Exception, match="no model class 'Nonsense'") as caught:
        load_base(str(bert_folder), architecture="Nonsense")
    assert getattr(caught.value, "option", None) == "--architecture"
    edit_config(bert_folder, architectures=["TheirOwnModel"])
    with pytest.raises(ConfigError, match=r"'TheirOwnModel'.*module:factory"):
        load_base(str(bert_folder))


def test_no_class_in_the_config(bert_folder: Path) -> None:
    edit_config(bert_folder, architectures=None)
    assert type(load_base(str(bert_folder)).model).__name__ == "BertModel"


def test_a_model_type_that_does_not_exist(bert_folder: Path) -> None:
    edit_config(bert_folder, model_type="nonsense")
    with pytest.raises(ConfigError, match=r"config\.json.*cannot be read"):
        load_base(str(bert_folder))


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_no_config(text: str, bert_folder: Path) -> None:
    (bert_folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_base(str(bert_folder))


def test_no_config(bert_folder: Path) -> None:
    (bert_folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_base(str(bert_folder))


def test_no_weights(bert_folder: Path) -> None:
    (bert_folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_base(str(bert_folder))


def test_truncated_weights(bert_folder: Path) -> None:
    weights = bert_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_base(str(bert_folder))


def test_weights_of_another_shape(bert_folder: Path) -> None:
    edit_config(bert_folder, intermediate_size=32)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_base(str(bert_folder))


def test_one_weight_missing(bert_folder: Path) -> None:
    stored = load_file(bert_folder / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    del stored[name]
    save_file(stored, bert_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=name):
        load_base(str(bert_folder))


def test_a_file(bert_folder: Path) -> None:
    with pytest.raises(ConfigError, match="Give the folder"):
        load_base(str(bert_folder / "model.safetensors"))
