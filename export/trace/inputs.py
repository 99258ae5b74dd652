"""Example inputs and dynamic shapes in one form: tensors by name, in the order of the graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from gauge_ext.errors import ConfigError

Axes = dict[int, Any]  # axis -> name, torch.export.Dim, or one of Dim.AUTO, Dim.DYNAMIC, Dim.STATIC
Bounds = dict[str, tuple[int, int | None]]  # dynamic dimension -> least and largest size


@dataclass(frozen=True)
class BoundInputs:
    """The arguments of one call of ``forward``, with the tensors in them laid out flat.

    Attributes:
        args: Positional arguments, only where ``forward`` takes ``*args``.
        kwargs: All other arguments, in the order of the signature.
        names: A name for each tensor: the parameter's, or a dotted path into its container.
        tensors: The tensors, in the order in which torch.export makes graph inputs of them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    def with_tensors(self, tensors: Sequence[Tensor]) -> BoundInputs:
        """The same call with other tensors; everything that is not a tensor stays."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        new = iter(tensors)
        filled = [next(new) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return BoundInputs(args, kwargs, self.names, tuple(tensors))


def bind_inputs(
    model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any], what: str = "example_inputs"
) -> BoundInputs:
    """Finds the parameter of ``model.forward`` that each input belongs to.

    Args:
        model: The model whose ``forward`` will be called.
        inputs: Positional arguments as a tuple, or keyword arguments as a mapping.
        what: The argument's name for messages.

    Returns:
        The arguments by name, in the order of the signature: torch.export pairs dynamic shapes
        with keyword arguments by position.

    Raises:
        ConfigError: not a tuple or mapping, no tensor in it, or not what ``forward`` takes.
    """
    signature = inspect.signature(model.forward)
    where = f"{type(model).__name__}.forward"
    try:
        if isinstance(inputs, Mapping):
            bound = signature.bind(**inputs)
        elif isinstance(inputs, tuple | list):
            bound = signature.bind(*inputs)
        else:
            raise ConfigError(
                f"{what} must be a tuple (positional) or a dict (by name), "
                f"got {type(inputs).__name__}.",
                hint="Write (x,) for a single tensor x.",
            )
    except TypeError as error:
        raise ConfigError(
            f"{what} does not fit {where}({', '.join(signature.parameters)}): {error}.",
            hint="Give what you would call the model with.",
        ) from error

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            # Positional arguments before *args must stay positional too.
            args, kwargs = (*kwargs.values(), *value), {}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            kwargs.update(value)
        else:
            kwargs[name] = value
    leaves = [(name, leaf) for name, leaf in _leaves(args, kwargs) if isinstance(leaf, Tensor)]
    if not leaves:
        raise ConfigError(f"{what} holds no tensor.", hint="Give at least one tensor.")
    names = tuple(name for name, _ in leaves)
    return BoundInputs(args, kwargs, names, tuple(tensor for _, tensor in leaves))


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, tuples, lists and registered classes, each with a dotted path."""
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        yield ".".join(str(_key(entry)) for entry in path), leaf


def resolve_dynamic_shapes(inputs: BoundInputs, dynamic_shapes: Any) -> list[Axes]:
    """Says for each tensor which of its axes may vary.

    Args:
        inputs: The example.
        dynamic_shapes: None (nothing varies), ``"auto"``, or torch.export's form: a mapping by
            parameter or a sequence by position, of ``{axis: name or Dim}`` for each tensor.
            ``"auto"`` lets the first axis of every input ("batch") and the second axis of every
            2-D integer or boolean input ("sequence") vary, as far as the model itself allows.

    Returns:
        One ``{axis: dim}`` for each tensor, in order; fixed axes left out.

    Raises:
        ConfigError: the shapes do not fit the inputs, or one name stands for two sizes.
    """
    if dynamic_shapes is None:
        return [{} for _ in inputs.tensors]
    if isinstance(dynamic_shapes, str):
        if dynamic_shapes != "auto":
            raise ConfigError(
                f"dynamic_shapes must be None, 'auto' or torch.export's form, "
                f"got {dynamic_shapes!r}."
            )
        return _auto_shapes(inputs)
    values = [*inputs.args, *inputs.kwargs.values()]
    names = [*map(str, range(len(inputs.args))), *inputs.kwargs]
    axes: list[Axes] = []
    for name, value, spec in zip(names, values, _by_parameter(names, dynamic_shapes), strict=True):
        axes += _axes_of(name, value, spec)
    _check_sizes(inputs, axes)
    return axes


def tree_of_shapes(inputs: BoundInputs, axes: list[Axes]) -> Any:
    """The axes as torch.export takes them; names become ``Dim.DYNAMIC`` or ``Dim.AUTO``.

    torch.onnx would take names too, but loses them as soon as one argument is not a tensor.
    """
    remaining = iter(axes)
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    filled = [
        {axis: hint for axis, (_, hint) in _named(next(remaining)).items()}
        if isinstance(leaf, Tensor)
        else None
        for leaf in leaves
    ]
    args, kwargs = pytree.tree_unflatten(filled, spec)
    return kwargs if not args else (*args, *kwargs.values())


def axis_names(axes: Axes) -> dict[int, str]:
    """The axes that have a name of the user's."""
    return {axis: name for axis, (name, _) in _named(axes).items() if name is not None}


def bounds_of(axes: list[Axes]) -> Bounds:
    """The least and largest sizes that ``torch.export.Dim`` objects ask for."""
    bounds: Bounds = {}
    for dim in (dim for entry in axes for dim in entry.values()):
        if isinstance(dim, Dim):
            low, high = getattr(dim, "min", None), getattr(dim, "max", None)
            # A Dim without a minimum says 0; without a maximum, torch's own kind of infinity.
            bounds[dim.__name__] = (
                max(1, low) if isinstance(low, int) else 1,
                high if isinstance(high, int) and high < 2**31 else None,
            )
    return bounds


@dataclass(frozen=True)
class AutoName:
    """A name given by ``"auto"``: the axis may turn out to be fixed by the model."""

    name: str


def _auto_shapes(inputs: BoundInputs) -> list[Axes]:
    batch = next((t.shape[0] for t in inputs.tensors if t.dim()), None)
    sequence: int | None = None
    result: list[Axes] = []
    for name, tensor in zip(inputs.names, inputs.tensors, strict=True):
        axes: Axes = {}
        if tensor.dim() and tensor.shape[0] == batch:
            axes[0] = AutoName("batch")
            if tensor.dim() == 2 and not tensor.is_floating_point():
                if sequence is None:
                    sequence = tensor.shape[1]
                same = tensor.shape[1] == sequence
                axes[1] = AutoName("sequence" if same else f"{name}_sequence")
        result.append(axes)
    return result


def _by_parameter(names: list[str], spec: Any) -> list[Any]:
    if isinstance(spec, Mapping):
        if unknown := [key for key in spec if key not in names]:
            raise ConfigError(
                f"dynamic_shapes names {unknown[0]!r}, which is not among the inputs "
                f"({', '.join(names)}).",
                hint="Use the names of forward's parameters that the example gives.",
            )
        return [spec.get(name) for name in names]
    if isinstance(spec, tuple | list):
        if len(spec) > len(names):
            raise ConfigError(
                f"dynamic_shapes has {len(spec)} entries for {len(names)} inputs "
                f"({', '.join(names)}).",
                hint="Give one entry for each input, None where nothing varies.",
            )
        return [*spec, *[None] * (len(names) - len(spec))]
    raise ConfigError(
        f"dynamic_shapes must be None, 'auto', a mapping or a sequence, got {type(spec).__name__}."
    )


def _axes_of(name: str, value: Any, spec: Any) -> list[Axes]:
    """The axes of every tensor in one argument; ``spec`` nests as the argument does."""
    leaves, structure = pytree.tree_flatten(value)
    try:
        specs = [None] * len(leaves) if spec is None else structure.flatten_up_to(spec)
    except ValueError as error:
        raise ConfigError(
            f"dynamic_shapes of {name!r} does not nest as the input does: {error}.",
            hint="Give {axis: name} or None for each tensor in it.",
        ) from error
    result: list[Axes] = []
    for leaf, entry in zip(leaves, specs, strict=True):
        if not isinstance(leaf, Tensor):
            if entry:
                raise ConfigError(
                    f"dynamic_shapes gives axes to {name!r}, which holds a {type(leaf).__name__}.",
                    hint="Only tensors have axes; write None for it.",
                )
            continue
        if not isinstance(entry, dict | tuple | list | None):
            raise ConfigError(
                f"dynamic_shapes of {name!r} must be {{axis: name}} or None, got {entry!r}."
            )
        pairs = entry.items() if isinstance(entry, dict) else enumerate(entry or ())
        axes = {axis: dim for axis, dim in pairs if dim is not None}
        for axis in axes:
            if not isinstance(axis, int) or not 0 <= axis < leaf.dim():
                raise ConfigError(
                    f"dynamic_shapes of {name!r} names axis {axis!r}, and the tensor has shape "
                    f"{tuple(leaf.shape)}.",
                    hint="Axes count from 0.",
                )
        result.append(axes)
    return result


def _check_sizes(inputs: BoundInputs, axes: list[Axes]) -> None:
    seen: dict[str, tuple[int, str]] = {}
    for input_name, tensor, entry in zip(inputs.names, inputs.tensors, axes, strict=True):
        for axis, dim_name in axis_names(entry).items():
            size, first = seen.setdefault(dim_name, (tensor.shape[axis], input_name))
            if size != tensor.shape[axis]:
                raise ConfigError(
                    f"dynamic_shapes calls two sizes {dim_name!r}: {size} in {first!r} and "
                    f"{tensor.shape[axis]} in {input_name!r}.",
                    hint="Give them different names, or fix the example.",
                )


def _named(axes: Axes) -> dict[int, tuple[str | None, Any]]:
    """Axis -> the user's name, if any, and what torch.export shall be told."""
    result: dict[int, tuple[str | None, Any]] = {}
    for axis, dim in axes.items():
        if isinstance(dim, AutoName):
            result[axis] = (dim.name, Dim.AUTO)
        elif isinstance(dim, str):
            result[axis] = (dim, Dim.DYNAMIC)
        elif isinstance(dim, Dim):
            result[axis] = (dim.__name__, dim)
        else:
            result[axis] = (None, dim)
    return result


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for index, value in enumerate(args):
        for path, leaf in named_leaves(value):
            yield (f"input_{index}.{path}" if path else f"input_{index}"), leaf
    for name, value in kwargs.items():
        for path, leaf in named_leaves(value):
            yield (f"{name}.{path}" if path else name), leaf


def _key(entry: Any) -> Any:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry
