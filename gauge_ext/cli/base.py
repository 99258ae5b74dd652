"""BASE: the model that an adapter belongs to, from a folder or from the user's own code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gauge_ext.cli.console import note
from gauge_ext.cli.problems import OptionError, blame
from gauge_ext.errors import AdapterMismatchError, ConfigError, GaugeError

if TYPE_CHECKING:
    import torch

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Base:
    """A model in eval mode, and what is known about it.

    Attributes:
        name: BASE as the user typed it.
        model: The model.
        folder: The transformers folder that it came from, or None.
        example_inputs: Positional (tuple) or keyword (dict) inputs, or None if none are known.
        dynamic_shapes: Which sizes may change, in torch.export's form; "auto" asks torch.
    """

    name: str
    model: torch.nn.Module
    folder: Path | None
    example_inputs: Inputs | None = None
    dynamic_shapes: Any = "auto"


def folder_of(spec: str) -> Path | None:
    """Return the folder that BASE names, or None where it is a ``module:factory``.

    Raises:
        ConfigError: It is neither; the message says what the text looks like instead.
    """
    path = Path(spec)
    if path.is_dir():
        return path
    if path.exists():
        hint = (
            f"To use a function in it, give {path.stem}:FUNCTION and run from its folder."
            if path.suffix == ".py"
            else "Give the folder that holds it."
        )
        raise ConfigError(
            f"expected a transformers folder or module:factory, got the file {spec!r}.",
            hint=hint,
        )
    if _FACTORY.fullmatch(spec):
        return None
    hint = "Give a local folder with config.json and weights, or module:factory."
    if _HUB_ID.fullmatch(spec):
        hint += f" If it is a model of the Hugging Face hub: hf download {spec} --local-dir DIR"
    raise ConfigError(f"no such folder: {spec!r}.", hint=hint)


def load_base(spec: str, *, architecture: str | None = None) -> Base:
    """Load BASE, in eval mode and without touching the network.

    Args:
        spec: A local transformers folder, or ``module:factory``.
        architecture: Class of transformers to load a folder as, instead of the one that its
            config names.

    Raises:
        ConfigError: It cannot be loaded; see :mod:`gauge_ext.cli.folder` and
            :mod:`gauge_ext.cli.factory` for the many ways.
    """
    folder = folder_of(spec)
    if folder is not None:
        from gauge_ext.cli.folder import load_folder

        return Base(spec, load_folder(folder, architecture).eval(), folder)
    if architecture is not None:
        raise OptionError(
            "--architecture",
            f"it is for transformers folders, and {spec!r} builds its own model.",
            hint="Leave it out.",
        )
    from gauge_ext.cli.factory import call_factory

    built = call_factory(spec)
    return Base(spec, built.model.eval(), None, built.example_inputs, built.dynamic_shapes)


def example_inputs(
    base: Base, *, batch: int | None, sequence: int | None, seed: int
) -> tuple[Inputs, Any]:
    """Return example inputs and dynamic shapes, made up from the model's config if need be.

    Raises:
        ConfigError: No inputs are known and none can be made.
        OptionError: Sizes were asked for that the model can't take, or where the factory brings
            its own inputs.
    """
    if base.example_inputs is None:
        from gauge_ext.cli.inputs import make_example_inputs

        return make_example_inputs(base.model, batch=batch, sequence=sequence, seed=seed)
    for option, size in (("--batch", batch), ("--sequence", sequence)):
        if size is not None:
            raise OptionError(
                option,
                f"{base.name!r} brings its own example inputs.",
                hint="Leave the option out, or change the factory.",
            )
    return base.example_inputs, base.dynamic_shapes


def check_adapter(adapter: Path | None) -> None:
    """Read the adapter and forget it, before minutes go into loading a large base.

    Raises:
        OptionError: It is missing or unreadable, holds NaN, or asks for more than is implemented.
    """
    if adapter is not None:
        from gauge_ext.checkpoint import read_adapter

        with blame("--adapter"):
            read_adapter(adapter)


def add_adapter(base: Base, adapter: Path | None) -> None:
    """Attach the adapter in place, or make sure that BASE brought one.

    Raises:
        ConfigError: The adapter is missing, unreadable, or for another model.
    """
    from gauge_ext.checkpoint import load_adapter
    from gauge_ext.models import lora_layers

    if adapter is not None:
        try:
            load_adapter(base.model, adapter, trainable=False)
        except GaugeError as error:
            hint = error.hint or ""
            if base.folder is not None and isinstance(error, AdapterMismatchError):
                loaded = type(base.model).__name__
                hint += f" {base.name} was loaded as {loaded}; --architecture names another class."
            raise OptionError("--adapter", error.message, hint=hint.strip() or None) from error
        return
    layers = lora_layers(base.model)
    if not layers:
        raise OptionError(
            "--adapter",
            f"not given, and the model of {base.name!r} has no adapter of its own.",
            hint="Give the folder of a saved adapter.",
        )
    note(f"no --adapter: using the {len(layers)} adapted layers that {base.name} brings")
