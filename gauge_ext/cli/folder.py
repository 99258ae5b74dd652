"""A local transformers folder as a model, loaded offline and checked for completeness."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gauge_ext.cli.problems import OptionError, first_line
from gauge_ext.errors import ConfigError


def load_folder(folder: Path, architecture: str | None) -> nn.Module:
    """Load the model in float32, as the class that its config names.

    transformers fills weights that a folder lacks with random numbers and a warning; here that is
    an error, because an exported model must not be random.

    Args:
        folder: Holds ``config.json`` and the weights.
        architecture: A class of transformers, such as ``BertModel``; None takes the first of the
            config's ``architectures``.

    Raises:
        ConfigError: transformers is missing, the folder is not a model, its class is unknown, or
            its weights are incomplete, damaged or of other shapes.
    """
    _, _, model_class = resolve(folder, architecture)
    try:
        model, found = model_class.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # safetensors, torch and transformers each raise their own
        raise ConfigError(
            f"the weights in {str(folder)!r} cannot be loaded: {first_line(error)}.",
            hint="Copy or download the folder again.",
        ) from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ConfigError(
            f"{str(folder)!r} lacks {len(missing)} of the weights of {model_class.__name__}, "
            f"such as {missing[0]!r}.",
            hint="They would be random. Name the class that was saved there with --architecture.",
        )
    # A cache among the outputs is for generation; nothing here reads it.
    config = model.config.get_text_config()
    config.use_cache = model.config.use_cache = False
    assert isinstance(model, nn.Module)
    return model


def empty_model(folder: Path) -> nn.Module:
    """Build the model of a folder on torch's meta device: its modules without any weights.

    Raises:
        ConfigError: transformers is missing, the folder is not a model, or its class is unknown or
            cannot be built.
    """
    transformers, config, kind = resolve(folder, None)
    try:
        with torch.device("meta"):
            built = kind.from_config(config) if kind is transformers.AutoModel else kind(config)
    except Exception as error:  # whatever the model's own code raises
        raise ConfigError(
            f"the model of {str(folder)!r} cannot be built: {first_line(error)}."
        ) from error
    assert isinstance(built, nn.Module)
    return built


def resolve(folder: Path, architecture: str | None) -> tuple[Any, Any, Any]:
    """Return transformers, the folder's config, and the class to load the folder as.

    Raises:
        ConfigError: transformers is missing, the folder is not a model, or its class is unknown.
    """
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise ConfigError(
            f"{str(folder)!r} has no config.json.",
            hint="It is an adapter: give it with --adapter, and as BASE the model it belongs to."
            if adapter
            else "Give the folder that save_pretrained wrote.",
        )
    transformers = _import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{str(folder / 'config.json')!r} cannot be read: {first_line(error)}.",
            hint="A model with code of its own needs module:factory.",
        ) from error
    return transformers, config, _model_class(transformers, config, folder, architecture)


def _import_transformers() -> Any:
    """Import transformers, quiet and offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"a transformers folder needs transformers, which cannot be imported: "
            f"{first_line(error)}.",
            hint="pip install transformers, or give module:factory.",
        ) from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def _model_class(transformers: Any, config: Any, folder: Path, architecture: str | None) -> Any:
    """Find the class to load the folder as."""
    names = config.architectures or []
    name = architecture or (names[0] if names else None)
    if name is None:
        return transformers.AutoModel
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if architecture is not None:
        raise OptionError(
            "--architecture",
            f"transformers {transformers.__version__} has no model class {name!r}.",
            hint=f"The folder's own is {names[0]!r}." if names else "Leave it out.",
        )
    raise ConfigError(
        f"{str(folder / 'config.json')!r} names the architecture {name!r}, "
        f"which transformers {transformers.__version__} does not have.",
        hint="Name another class with --architecture, or give module:factory.",
    )
