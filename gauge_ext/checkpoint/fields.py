"""PEFT's config fields: which are ours, which are refused, which are kept.

Every field of ``peft.LoraConfig`` 0.21.2 has its place in one of the three tables below (a test
compares them with PEFT's own list). Source: peft/tuners/lora/config.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from gauge_ext.adapters import LoRAConfig
from gauge_ext.adapters.spec import Init
from gauge_ext.errors import AdapterFormatError, ConfigError

# The release whose format is written; readers compare it with their own.
PEFT_VERSION = "0.21.2"

# PEFT's name -> ours. `init_lora_weights` is ours too, and translated by hand.
OWN = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "trainable_token_indices",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "lora_bias": "lora_bias",
    "bias": "bias",
    "modules_to_save": "modules_to_save",
    "ensure_weight_tying": "ensure_weight_tying",
    "fan_in_fan_out": "fan_in_fan_out",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "task_type": "task_type",
    "base_model_name_or_path": "base_model_name_or_path",
}


def _unset(value: Any) -> bool:
    return value is None or value is False or value in ([], {}, "")


def _absent(value: Any) -> bool:
    return value is None or value is False


# Fields that change what the adapted model computes -> (whether a value leaves it off, what it is).
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "layer_replication": (_unset, "replicated layers"),
    # An empty sub-config still switches its variant on, so only null and false are off.
    "megatron_config": (_absent, "Megatron's parallel layers"),
    "use_qalora": (_unset, "QALoRA"),
    "alora_invocation_tokens": (_absent, "activated LoRA"),
    "monteclora_config": (_absent, "MonteCLoRA"),
    "use_bdlora": (_absent, "block-diagonal LoRA"),
    "arrow_config": (_absent, "Arrow routing"),
    "kasa_config": (_absent, "KaSA"),
}

# Ways to start training that leave the base weights alone: the adapter itself is a plain one.
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

_MERGE_HINT = "Merge the adapter with PEFT, or train it without that field."
_INIT_HINT = (
    "Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
)

# Fields that change nothing of what an adapter in a file computes: notes for others, and settings
# of inits and of training steps that are over.
KEPT = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "velora_config",
    }
)

# What PEFT 0.21.2 writes for the fields that are not ours.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "corda_config": None,
    "eva_config": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "revision": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}


def check_supported(raw: Mapping[str, Any], where: str) -> None:
    """Refuse a config that asks for what is not implemented.

    Args:
        raw: The JSON object of ``adapter_config.json``.
        where: The file, for messages.

    Raises:
        AdapterFormatError: It describes no LoRA adapter.
        ConfigError: A field changes the mathematics in a way that is not implemented; it is named.
    """
    if (kind := raw.get("peft_type")) != "LORA":
        raise AdapterFormatError(
            f'{where}: peft_type must be "LORA", got {kind!r}.',
            hint="Other kinds of adapters are not supported.",
        )
    for name, (harmless, meaning) in REFUSED.items():
        if name in raw and not harmless(raw[name]):
            raise ConfigError(
                f"{where}: {name} = {raw[name]!r} asks for {meaning}, which is not supported.",
                hint=_MERGE_HINT,
            )
    init = raw.get("init_lora_weights", True)
    if init not in HARMLESS_INITS:
        raise ConfigError(
            f"{where}: init_lora_weights = {init!r} changed the base weights before training, so "
            "the adapter does not fit the base as it is published.",
            hint=_INIT_HINT,
        )


def from_peft(raw: Mapping[str, Any], where: str, modules: list[str]) -> LoRAConfig:
    """Turn the content of ``adapter_config.json`` into a :class:`LoRAConfig`.

    Args:
        raw: The JSON object, one that :func:`check_supported` let pass.
        where: The file, for messages.
        modules: Paths of the modules that the weights name; they stand in for a missing
            ``target_modules``, which PEFT allows.

    Raises:
        AdapterFormatError: A field has an impossible value.
    """
    known = {*OWN, *REFUSED, *KEPT, "init_lora_weights", "runtime_config"}
    if unknown := sorted(name for name in raw if name not in known and not _unset(raw[name])):
        warnings.warn(
            f"{where}: {', '.join(unknown)} is unknown to PEFT {PEFT_VERSION} and to gauge_ext, "
            "and kept as it is; if it changes what the adapter computes, results will differ.",
            stacklevel=2,
        )
    # PEFT takes null, and for these an empty list or string, for "not given". Where the file leaves
    # rank or alpha out, its own default stands, not ours.
    values: dict[str, Any] = {"rank": 8, "alpha": 8}
    values |= {ours: raw[name] for name, ours in OWN.items() if raw.get(name) is not None}
    for name in (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "target_parameters",
    ):
        if values.get(name) in ([], ""):
            del values[name]
    values.setdefault("target_modules", [] if values.get("target_parameters") else modules)
    started = raw.get("init_lora_weights")
    init: Init = started if started in ("gaussian", "orthogonal") else "kaiming"
    dropped = {*OWN, *REFUSED, "runtime_config", "peft_version"}
    if started in (True, "gaussian", "orthogonal"):
        dropped.add("init_lora_weights")
    extra = {name: value for name, value in raw.items() if name not in dropped}
    try:
        return LoRAConfig(**values, init=init, extra=extra)
    except ConfigError as error:
        raise AdapterFormatError(
            f"{where} (r, lora_alpha and lora_dropout are rank, alpha and dropout here): "
            f"{error.message}",
            hint=error.hint,
        ) from error


def to_peft(config: LoRAConfig) -> dict[str, Any]:
    """Turn ``config`` into the content of ``adapter_config.json``, with every field of PEFT's.

    Raises:
        ConfigError: ``config.extra`` asks for what is not implemented.
    """
    written = {name: _plain(getattr(config, ours)) for name, ours in OWN.items()}
    written |= {"lora_dropout": config.dropout, "inference_mode": True}
    # Starts that took from the base are converted on the way out, so no file speaks of them.
    plain = config.init in ("gaussian", "orthogonal")
    init = {"init_lora_weights": config.init} if plain else {}
    raw = {**DEFAULTS, **init, **config.extra, **written}
    check_supported(raw, "the adapter's config (extra)")
    return raw


def _plain(value: Any) -> Any:
    """Return what PEFT writes for a value: lists for tuples, and alpha as 16 rather than 16.0."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
