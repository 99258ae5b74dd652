"""Every field of PEFT's config has its place: ours, refused where it matters, or kept."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint import fields
from gauge_ext.errors import AdapterFormatError, ConfigError

MINIMAL = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}

# For each field that changes the mathematics a value that does, in the form that PEFT writes.
CHANGING: dict[str, list[Any]] = {
    "layer_replication": [[[0, 4], [2, 5]]],
    "megatron_config": [{}, {"hidden_size": 8}],
    "use_qalora": [True],
    "alora_invocation_tokens": [[], [5, 6]],
    "monteclora_config": [{}, {"num_samples": 8}],
    "use_bdlora": [{}, {"nblocks": 2}],
    "arrow_config": [{}, {"top_k": 3}],
    "kasa_config": [{}, {"beta": 1e-4}],
}


def test_every_field_of_pefts_has_its_place() -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    # Added to the file by older releases and by PEFT itself as it reads; never saved by this one.
    theirs -= {"runtime_config"}
    own, refused = set(fields.OWN), set(fields.REFUSED)
    assert theirs == own | refused | fields.KEPT | {"init_lora_weights"}
    assert not own & refused
    assert not (own | refused) & fields.KEPT


def test_the_defaults_are_those_that_peft_writes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q"], inference_mode=True)
    config.save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = fields.to_peft(LoRAConfig(rank=8, alpha=16, target_modules=["q"]))
    assert json.loads(json.dumps(ours)) == theirs
    assert ours["peft_version"] == peft.__version__


def test_the_values_that_change_the_mathematics_are_tested_for_every_field() -> None:
    assert CHANGING.keys() == fields.REFUSED.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in CHANGING.items() for value in values]
)
def test_a_field_that_changes_the_mathematics_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        fields.check_supported({**MINIMAL, name: value}, "adapter_config.json")
    message = str(caught.value)
    assert message.startswith(f"adapter_config.json: {name} = ")
    assert "is not supported" in message
    assert caught.value.hint


@pytest.mark.parametrize("name", [*fields.REFUSED, *sorted(fields.KEPT)])
def test_a_field_that_is_off_is_no_obstacle(name: str) -> None:
    value = fields.DEFAULTS[name]
    fields.check_supported({**MINIMAL, name: value}, "f")
    if name != "peft_type":
        fields.check_supported({**MINIMAL, name: None}, "f")


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "of_tomorrow"]
)
def test_inits_that_change_the_base_are_refused(init: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fields.check_supported({**MINIMAL, "init_lora_weights": init}, "f")
    assert f"init_lora_weights = {init!r} changed the base weights" in str(caught.value)
    assert "path_initial_model_for_weight_conversion" in str(caught.value.hint)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_alone_are_kept(init: Any) -> None:
    raw = {**MINIMAL, "init_lora_weights": init}
    fields.check_supported(raw, "f")
    config = fields.from_peft(raw, "f", ["q"])
    assert config.init == (init if init in ("gaussian", "orthogonal") else "kaiming")
    assert fields.to_peft(config)["init_lora_weights"] == init


@pytest.mark.parametrize("kind", ["ADALORA", "PREFIX_TUNING", None, 3])
def test_other_kinds_of_adapters_are_refused(kind: Any) -> None:
    with pytest.raises(AdapterFormatError, match='peft_type must be "LORA", got'):
        fields.check_supported({**MINIMAL, "peft_type": kind}, "f")


def test_what_we_read_we_write_back() -> None:
    raw = {
        **fields.DEFAULTS,
        **MINIMAL,
        "lora_dropout": 0.05,
        "exclude_modules": ["k"],
        "use_rslora": True,
        "fan_in_fan_out": True,
        "lora_bias": False,
        "use_dora": True,
        "bias": "lora_only",
        "modules_to_save": ["head"],
        "ensure_weight_tying": True,
        "target_parameters": ["experts.up"],
        "trainable_token_indices": {"embed": [3, 1]},
        "rank_pattern": {"a.q": 2},
        "alpha_pattern": {"a.q": 3.5, "b.q": 4},
        "layers_to_transform": [0, 1],
        "layers_pattern": ["layers"],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "revision": "v2",
        "auto_mapping": {"base_model_class": "X"},
        "loftq_config": {"loftq_bits": 4},
        "velora_config": {"num_groups": 64},
    }
    config = fields.from_peft(raw, "f", [])
    assert json.loads(json.dumps(fields.to_peft(config))) == raw
    assert (config.rank, config.alpha, config.dropout, config.use_rslora) == (4, 8.0, 0.05, True)
    assert config.scaling_for("a.q") == 3.5 / math.sqrt(2)
    assert config.layers_to_transform == (0, 1)


def test_an_unknown_field_is_kept_and_warned_of() -> None:
    raw = {**MINIMAL, "of_tomorrow": {"x": 1}, "off": False, "unset": None}
    with pytest.warns(UserWarning, match="f: of_tomorrow is unknown to PEFT"):
        config = fields.from_peft(raw, "f", ["q"])
    assert fields.to_peft(config)["of_tomorrow"] == {"x": 1}
    assert fields.to_peft(config)["off"] is False


def test_empty_and_missing_fields_have_pefts_meaning() -> None:
    raw = {
        "peft_type": "LORA",
        "target_modules": None,
        "exclude_modules": [],
        "layers_to_transform": [],
        "layers_pattern": "",
        "rank_pattern": None,
        "runtime_config": {"ephemeral_gpu_offload": False},
    }
    config = fields.from_peft(raw, "f", ["a.q", "b.q"])
    assert (config.rank, config.alpha) == (8, 8.0)
    assert config.target_modules == ("a.q", "b.q")
    assert config.exclude_modules is None
    assert config.layers_to_transform is None
    assert config.layers_pattern is None
    assert config.rank_pattern == {}
    assert "runtime_config" not in fields.to_peft(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"r": "8"}, "rank must be"),
        ({"lora_alpha": "x"}, "alpha must be"),
        ({"lora_dropout": 1.5}, "dropout must lie in [0, 1)"),
        ({"target_modules": "("}, "target_modules holds '('"),
        ({"target_modules": [1]}, "each name in target_modules"),
        ({"rank_pattern": {"q": -1}}, "rank_pattern['q']"),
        ({"use_rslora": "yes"}, "use_rslora must be"),
    ],
)
def test_an_impossible_value_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        fields.from_peft({**MINIMAL, **change}, "some/adapter_config.json", ["q"])
    assert str(caught.value).startswith("some/adapter_config.json")
    assert words in str(caught.value)


def test_extra_cannot_smuggle_in_what_is_not_implemented() -> None:
    config = LoRAConfig(target_modules=["q"], extra={"use_qalora": True})
    with pytest.raises(ConfigError, match="use_qalora"):
        fields.to_peft(config)
    # Nor can it contradict the config itself.
    config = LoRAConfig(rank=4, target_modules=["q"], extra={"r": 99, "inference_mode": False})
    assert fields.to_peft(config)["r"] == 4
    assert fields.to_peft(config)["inference_mode"] is True
