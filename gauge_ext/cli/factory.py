"""``module:factory``: a model, and perhaps its inputs, from the user's own Python."""

from __future__ import annotations

import difflib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.cli.problems import first_line
from gauge_ext.errors import ConfigError

_RETURNS = (
    "It must return a torch.nn.Module, (model, example_inputs) or "
    "(model, example_inputs, dynamic_shapes)."
)


@dataclass(frozen=True)
class Built:
    """What a factory returned, in one form."""

    model: nn.Module
    example_inputs: tuple[Any, ...] | dict[str, Any] | None
    dynamic_shapes: Any


def call_factory(spec: str) -> Built:
    """Import the module, with the current folder in front of the path, and call the factory.

    Args:
        spec: ``package.module:name`` or ``package.module:name.attribute``.

    Raises:
        ConfigError: The module or the name doesn't exist, importing or calling it fails, or it
            returns something else than a model.
    """
    module_name, _, path = spec.partition(":")
    factory: Any = _import(module_name)
    for part in path.split("."):
        if not hasattr(factory, part):
            near = difflib.get_close_matches(part, dir(factory), n=3)
            raise ConfigError(
                f"{spec!r}: {getattr(factory, '__name__', factory)!r} has no {part!r}.",
                hint=f"Did you mean {' or '.join(map(repr, near))}?" if near else _RETURNS,
            )
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ConfigError(
            f"{spec!r}: expected a function without arguments, got {type(factory).__name__}.",
            hint=_RETURNS,
        )
    try:
        returned = factory()
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(
            f"{spec!r} raised {first_line(error)}.", hint="Call it in Python to see where."
        ) from error
    return _understand(spec, returned)


def _import(name: str) -> ModuleType:
    """Import by name, and tell a missing module from one that fails while it is imported."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # "a.b" is missing if "a" or "a.b" is; any other name is an import inside the module.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _import_failed(name, error) from error
        raise ConfigError(
            f"no module {error.name!r} in {here} or on the Python path.",
            hint="Run from the folder that holds it, or set PYTHONPATH.",
        ) from error
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise _import_failed(name, error) from error


def _import_failed(name: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"importing {name!r} raised {first_line(error)}.",
        hint=f"Try: python -c 'import {name}'",
    )


def _understand(spec: str, returned: object) -> Built:
    """Bring the three forms that a factory may return into one."""
    parts = returned if isinstance(returned, tuple) else (returned,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ConfigError(
            f"{spec!r} returned {f'({kinds})' if isinstance(returned, tuple) else kinds}.",
            hint=_RETURNS,
        )
    inputs = parts[1] if len(parts) > 1 else None
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    if inputs is not None and not isinstance(inputs, (tuple, dict)):
        raise ConfigError(
            f"{spec!r} returned example inputs of type {type(inputs).__name__}.",
            hint="Return a tensor, a tuple of positional or a dict of keyword arguments.",
        )
    shapes = parts[2] if len(parts) > 2 else "auto"
    built = Built(parts[0], inputs, shapes)
    _try_once(spec, built)
    return built


def _try_once(spec: str, built: Built) -> None:
    """Run the model on its own inputs, so that a wrong input is not blamed on the exporter."""
    if built.example_inputs is None:
        return
    was_training = built.model.training
    built.model.eval()
    try:
        with torch.no_grad():
            if isinstance(built.example_inputs, dict):
                built.model(**built.example_inputs)
            else:
                built.model(*built.example_inputs)
    except (Exception, SystemExit) as error:  # the user's model may raise anything
        raise ConfigError(
            f"the model of {spec!r} cannot run on its example inputs: {first_line(error)}.",
            hint="Mend the inputs that the factory returns.",
        ) from error
    finally:
        built.model.train(was_training)
