"""Writing adapters as PEFT would: those of a model, and those that are on none."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import nn

from gauge_ext._version import __version__
from gauge_ext.adapters import (
    AdaptedLayer,
    Adapter,
    LoRAConfig,
)
from gauge_ext.adapters.tied import TiedLinear
from gauge_ext.adapters.transposed import LoRATransposed
from gauge_ext.checkpoint.assembly import describe_pairs
from gauge_ext.checkpoint.describing import EMBEDDINGS, describe, plain_paths
from gauge_ext.checkpoint.fields import to_peft
from gauge_ext.checkpoint.format import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    LoRAPair,
    keys_of,
    turned,
    whole_key,
)
from gauge_ext.checkpoint.nesting import file_names
from gauge_ext.checkpoint.on_model import adapter_parts
from gauge_ext.checkpoint.portable import make_portable
from gauge_ext.checkpoint.staging import staged_folder, write_bytes
from gauge_ext.errors import AdapterMismatchError, AdapterStateError, ConfigError, NonFiniteError
from gauge_ext.models.adapted import (
    adapter_config,
    unwrap,
    whole_parameters,
)
from gauge_ext.models.tied import tied_layers


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    portable: bool = False,
) -> Path:
    """Write an adapter of ``model`` to a folder in PEFT's format.

    The folder gets ``adapter_config.json``, ``adapter_model.safetensors`` and, unless it has one,
    a ``README.md``. It is written whole or not at all; an adapter that lies there is replaced.

    Args:
        model: A model with adapters, merged or not.
        path: The folder; it is made if need be.
        name: Which of several adapters; None: the only one, or the only active one.
        save_embedding_layers: Whether the base's table goes along with the adapter of an input or
            output embedding. "auto" is PEFT's rule: where ``target_modules`` names ``embed_tokens``
            or ``lm_head``.
        portable: Write what servers read that look at little of the config: the scaling within
            lora_B, one rank r = alpha for all layers, no base weights.

    Returns:
        The folder.

    Raises:
        AdapterStateError: No adapters are attached, none of that name, or several and it is not
            said which; or a layer was changed so that its config does not describe it any more.
        NonFiniteError: A factor holds NaN or infinity.
        ConfigError: The config's ``extra`` holds what JSON cannot.
        WriteError: The system refused a write; nothing is left or changed at ``path``.
    """
    inner = unwrap(model)
    name, parts = adapter_parts(inner, name, "saved")
    layers = {path: part.layer for path, part in parts.items()}
    pairs = {path: part.pair for path, part in parts.items()}
    scalings = {path: part.scaling for path, part in parts.items()}
    if name is None:  # adapters that hold their base have no config but themselves
        config = describe_pairs(pairs, scaling=scalings, modules=plain_paths(inner))
    else:
        config = adapter_config(inner, name)
    for at, (_, pair, rank, scaling) in parts.items():
        _check(at, pair, rank, scaling, config)
        _require_finite(at, pair)
    targets = [n for n, layer in layers.items() if layer.kind not in ("out_proj", "parameter")]
    config = describe(inner, config, targets)
    on_parameters = [path for path, pair in pairs.items() if pair.kind == "parameter"]
    started = any(
        part.pair.rank != part.rank for path, part in parts.items() if path not in on_parameters
    )
    if on_parameters and (portable or started):
        raise ConfigError(
            f"an adapter on a bare parameter, as at {on_parameters[0]!r}, can be saved neither "
            "with portable=True nor beside layers that start with a nonzero product.",
            hint="Merge the adapter into the base.",
        )
    if portable or started:
        # A start that took from the base makes an update of twice the rank.
        if portable:
            tied = {at: head.source for at, head in tied_layers(inner).items() if at in pairs}
            tables = {layer: at for at, layer in layers.items()}
            pairs = make_portable({k: p for k, p in pairs.items() if k not in tied}, scalings)
            pairs |= {at: turned(pairs[tables[source]]) for at, source in tied.items()}
            scalings = dict.fromkeys(pairs, 1.0)
        made = describe_pairs(pairs, scaling=scalings, like=config)
        config = dataclasses.replace(made, init="kaiming", target_modules=config.target_modules)
        config = describe(inner, config, targets)
    if any(isinstance(layer, LoRATransposed) for layer in layers.values()):
        config = dataclasses.replace(config, fan_in_fan_out=True)
    written = to_peft(config)
    if written["base_model_name_or_path"] is None:
        written["base_model_name_or_path"] = vars(inner).get("name_or_path") or None
    if written["task_type"] is None and written["auto_mapping"] is None:
        kind = type(inner)
        written["auto_mapping"] = {
            "base_model_class": kind.__name__,
            "parent_library": kind.__module__,
        }
    whole: dict[str, torch.Tensor] = {**whole_parameters(inner, name)}
    for at, tensor in whole.items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(f"{at} holds NaN or infinity.", hint="Nothing was saved.")
    if portable and whole:
        raise ConfigError(
            f"portable=True holds low-rank updates alone, and {len(whole)} parameters were trained "
            f"whole, such as {next(iter(whole))!r}.",
            hint="Merge the adapter into the base, or save it as it is.",
        )
    if portable:
        save_embedding_layers = False
    if save_embedding_layers == "auto":
        targeted = config.target_modules
        save_embedding_layers = not isinstance(targeted, str) and bool({*targeted} & EMBEDDINGS)
    if save_embedding_layers:
        whole |= _embeddings(inner, layers)
    names = file_names(layers)
    return _write(written, {names[at]: pair for at, pair in pairs.items()}, path, whole)


def _embeddings(
    model: nn.Module, layers: Mapping[str, Adapter | TiedLinear]
) -> dict[str, torch.Tensor]:
    """The base's own tables of the input and output embeddings that are adapted."""
    tables = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        if callable(get := getattr(model, getter, None)):
            tables.append(get())
    found = {}
    for name, layer in layers.items():
        adapted = layer.source if isinstance(layer, TiedLinear) else layer
        if isinstance(adapted, AdaptedLayer) and any(layer is table for table in tables):
            found[f"{name}.weight"] = adapted.kept_parameters.get("weight", adapted.base_weight)
    return found


def write_adapter(
    config: LoRAConfig,
    tensors: Mapping[str, LoRAPair],
    path: str | os.PathLike[str],
    *,
    whole: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write an adapter that is on no model to a folder in PEFT's format, as :func:`save_adapter`.

    Args:
        config: Its description, whose ranks are those of ``tensors``; see
            :func:`~gauge_ext.checkpoint.describe_pairs` for one made to measure.
        tensors: Path of the module -> its two factors.
        path: The folder; it is made if need be.
        whole: Path of a parameter that was trained whole -> its value.

    Returns:
        The folder.

    Raises:
        AdapterMismatchError: A rank is not the config's.
        NonFiniteError: A factor holds NaN or infinity.
        ConfigError: The config's ``extra`` holds what JSON cannot.
        WriteError: The system refused a write; nothing is left or changed at ``path``.
    """
    for name, pair in tensors.items():
        # Which parameter an adapter is on, and so which rank it has, only the model knows.
        if pair.kind != "parameter" and pair.rank != config.rank_for(
            config.name_for(name, pair.kind)
        ):
            raise AdapterMismatchError(
                f"the factors of {name} have rank {pair.rank}, and the config says rank "
                f"{config.rank_for(name)}.",
                hint="Say so in rank_pattern.",
            )
        _require_finite(name, pair)
    return _write(to_peft(config), tensors, path, whole or {})


def _write(
    written: dict[str, Any],
    pairs: Mapping[str, LoRAPair],
    path: str | os.PathLike[str],
    whole: Mapping[str, torch.Tensor],
) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in pairs.items():
        for key, factor in keys_of(name, pair).items():
            # A copy, since safetensors refuses factors that share their storage.
            tensors[key] = factor.detach().to("cpu", copy=True).contiguous()
    for name, value in whole.items():
        tensors[whole_key(name, pairs)] = value.detach().to("cpu", copy=True).contiguous()
    try:
        text = json.dumps(written, indent=2, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"extra must hold what JSON can: {error}.") from error
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    with staged_folder(path) as folder:
        write_bytes(folder / CONFIG_NAME, text.encode())
        write_bytes(folder / WEIGHTS_NAME, content)
        if not (Path(path) / CARD_NAME).exists():
            write_bytes(folder / CARD_NAME, _card(written, pairs).encode())
    return Path(path)


def _check(name: str, pair: LoRAPair, rank: int, scaling: float, config: LoRAConfig) -> None:
    named = config.name_for(name, pair.kind)
    described = (config.rank_for(named), config.scaling_for(named))
    if (rank, scaling) != described:
        raise AdapterStateError(
            f"{name} has rank {rank} and scaling {scaling}, but its config says rank "
            f"{described[0]} and scaling {described[1]}, so it cannot be saved.",
            hint="Attach it with a config that says so (rank_pattern, alpha_pattern).",
        )


def _require_finite(name: str, pair: LoRAPair) -> None:
    for factor, tensor in pair.tensors.items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                f"{factor} of {name} holds NaN or infinity.", hint="Nothing was saved."
            )


def _card(written: dict[str, Any], pairs: Mapping[str, LoRAPair]) -> str:
    base = written["base_model_name_or_path"]
    # A JSON string is a YAML string, whatever the name holds.
    head = [f"base_model: {json.dumps(base)}"] if base else []
    tags = [f"- {json.dumps(f'base_model:adapter:{base}')}"] if base else []
    parameters = sum(t.numel() for pair in pairs.values() for t in pair.tensors.values())
    ranks = sorted({pair.rank for pair in pairs.values()})
    lines = [
        "---",
        *head,
        "library_name: peft",
        "tags:",
        *tags,
        "- lora",
        "---",
        "",
        "# LoRA adapter",
        "",
        f"- Base model: {base or 'not recorded'}",
        f"- Adapted layers: {len(pairs)}",
        f"- Rank: {', '.join(map(str, ranks))}",
        f"- Alpha: {written['lora_alpha']}" + (" (rsLoRA)" if written["use_rslora"] else ""),
        f"- Parameters: {parameters:,}",
        f"- Written by: gauge_ext {__version__}",
        "",
        "It loads with `gauge_ext.load_adapter(model, folder)` or with PEFT's",
        "`PeftModel.from_pretrained(model, folder)`.",
        "",
    ]
    return "\n".join(lines)
