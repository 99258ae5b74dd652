"""Adapters carried along a path of checkpoints, and from one base to another.

The layers' own mathematics is in :mod:`gauge_ext.geometry.carry`; here are whole adapters, and
bases in folders, of which no more than one hidden space is in memory at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gauge_ext.checkpoint.assembly import assemble
from gauge_ext.checkpoint.digest import adapter_digest
from gauge_ext.checkpoint.extracting import Source
from gauge_ext.checkpoint.format import LoRAPair
from gauge_ext.checkpoint.pairing import match_names
from gauge_ext.checkpoint.read import AdapterCheckpoint
from gauge_ext.checkpoint.structure import hidden_spaces
from gauge_ext.checkpoint.weights import Weights, open_weights
from gauge_ext.errors import AdapterMismatchError, ConfigError
from gauge_ext.geometry.carry import MIN_CORRELATION, lift, move_base, rebase
from gauge_ext.geometry.hidden_space import Fit, HiddenSpace
from gauge_ext.geometry.low_rank import RowBlocks
from gauge_ext.geometry.point import LoRAPoint
from gauge_ext.geometry.transport import MIN_OVERLAP


def lift_adapters(
    path: Sequence[AdapterCheckpoint], *, min_overlap: float = MIN_OVERLAP
) -> list[AdapterCheckpoint]:
    """Bring the checkpoints of one training run into one smooth frame.

    Every adapter computes what it did; the factors of neighbours become as alike as their updates,
    so that they may be averaged or interpolated. See :func:`~gauge_ext.geometry.carry.lift`.

    Args:
        path: Adapters on the same modules with the same ranks, in order.
        min_overlap: The least overlap of neighbours that is accepted.

    Raises:
        AdapterMismatchError: The adapters are on different modules.
        GeometryError: An update has a rank below that of its factors, ranks differ, or neighbours
            are too far apart.
    """
    for adapter in path:
        adapter.require_plain("lifted")
    for adapter in path[1:]:
        if adapter.tensors.keys() != path[0].tensors.keys():
            other = sorted(adapter.tensors.keys() ^ path[0].tensors.keys())
            raise AdapterMismatchError(
                "the checkpoints of a path must be on the same modules, and only some are on "
                f"{other[0]!r}."
            )
    tensors: list[dict[str, LoRAPair]] = [{} for _ in path]
    for name in path[0].tensors if path else ():
        points = [_point(adapter, name) for adapter in path]
        for adapter, point, found in zip(
            path, lift(points, min_overlap=min_overlap), tensors, strict=True
        ):
            found[name] = _pair(point, adapter, name)
    return [_with(adapter, found) for adapter, found in zip(path, tensors, strict=True)]


@torch.no_grad()
def move_adapter(
    adapter: AdapterCheckpoint,
    old_base: Source,
    new_base: Source,
    structure: Sequence[HiddenSpace] | None = None,
    *,
    min_correlation: float = MIN_CORRELATION,
) -> tuple[AdapterCheckpoint, list[Fit]]:
    """Carry an adapter to a base with its hidden units permuted or its heads rotated.

    See :func:`~gauge_ext.geometry.carry.move_base`.

    Args:
        adapter: The adapter.
        old_base: The base that it was made for: a folder, a module, or its weights.
        new_base: The other base.
        structure: The hidden spaces, by the paths that the bases use; None:
            :func:`~gauge_ext.checkpoint.structure.hidden_spaces` of the old base, as far as they
            touch the adapter.
        min_correlation: The least cosine of the two bases around a space that is accepted.

    Returns:
        The adapter for the new base, with its config, and the fit of each space.

    Raises:
        ConfigError: A folder cannot be read, a layer is in two spaces, or no structure is known.
        AdapterMismatchError: The adapter or the new base is for another model.
        GeometryError: The bases do not fit the structure or one another.
    """
    old, new = open_weights(old_base), open_weights(new_base)
    homes = _homes(adapter, old)
    if structure is None:
        structure = [
            space
            for space in hidden_spaces(old)
            if {*space.writers, *space.readers} & set(homes.values())
        ]
        if not structure:
            raise ConfigError(
                f"no hidden space is known around the adapter's layers in {old.name}.",
                hint="Give the structure: a HiddenSpace for each MLP and each attention.",
            )
    points = {homes[name]: LoRAPoint(p.lora_B, p.lora_A) for name, p in adapter.tensors.items()}
    there = match_names(old.shapes, new.shapes, new.name)
    moved, fits = move_base(
        points,
        _View(old, {key: key for key in old.shapes}),
        _View(new, there),
        structure,
        min_correlation=min_correlation,
    )
    tensors = {
        name: LoRAPair(moved[home].A.contiguous(), moved[home].B.contiguous())
        for name, home in homes.items()
    }
    return _with(adapter, tensors), fits


@torch.no_grad()
def rebase_adapter(
    adapter: AdapterCheckpoint,
    old_base: Source,
    new_base: Source,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[AdapterCheckpoint, dict[str, float]]:
    """Keep what base and adapter computed together while the base changes, as far as ranks allow.

    It undoes what the new base learned in the adapted layers; see
    :func:`~gauge_ext.geometry.carry.rebase`.

    Args:
        adapter: The adapter.
        old_base: The base that it was made for: a folder, a module, or its weights.
        new_base: The other base.
        rank: The rank on every module; None for the adapter's own, unless an energy is given.
        energy: The share of the squared update that has to be kept, in (0, 1].

    Returns:
        The new adapter, with scaling 1; and path of the module -> share of the squared update that
        is lost. Modules on which nothing is left to add have no part in either.

    Raises:
        ConfigError: A folder cannot be read, or an argument is out of its range.
        AdapterMismatchError: The adapter or the new base is for another model; or there is nothing
            left to add anywhere.
        GeometryError: A layer has another shape in one of the bases.
    """
    old, new = open_weights(old_base), open_weights(new_base)
    homes = _homes(adapter, old)
    there = match_names(old.shapes, new.shapes, new.name)
    tensors, lost = {}, {}
    for name, home in homes.items():
        key = f"{home}.weight"
        if key not in there:
            raise AdapterMismatchError(f"{new.name} has no weight of {name!r}.")
        found = rebase(
            _point(adapter, name), _blocks(old, key), _blocks(new, there[key]), rank, energy=energy
        )
        if found is not None:
            tensors[name] = LoRAPair(found.point.A, found.point.B)
            lost[name] = found.unexplained
    if not tensors:
        raise AdapterMismatchError(
            f"{new.name} already is {old.name} with the adapter: nothing is left to add."
        )
    return assemble(tensors, like=adapter.config), lost


class _View(Mapping[str, Tensor]):
    """Weights as a mapping under the names of another model, read when asked for."""

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self._weights, self._names = weights, names

    def __getitem__(self, key: str) -> Tensor:
        return self._weights.whole(self._names[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _homes(adapter: AdapterCheckpoint, base: Weights) -> dict[str, str]:
    """Return the adapter's path of each module -> the path in the base's own names."""
    adapter.require_plain("carried to another base")
    wanted = [f"{name}.weight" for name in adapter.tensors]
    found = match_names(wanted, base.shapes, base.name)
    if lost := [key for key in wanted if key not in found]:
        raise AdapterMismatchError(
            f"{len(lost)} of the adapter's {len(wanted)} modules have no weight in {base.name}, "
            f"such as {lost[0]!r}.",
            hint="Is this the base that the adapter was trained on?",
        )
    for name, pair in adapter.tensors.items():
        shape = (pair.lora_B.shape[0], pair.lora_A.shape[1])
        if base.shapes[found[f"{name}.weight"]] != shape:
            raise AdapterMismatchError(
                f"the adapter for {name!r} is for a weight of shape {shape}, and that in "
                f"{base.name} has shape {base.shapes[found[f'{name}.weight']]}."
            )
    return {name: found[f"{name}.weight"].removesuffix(".weight") for name in adapter.tensors}


def _blocks(weights: Weights, key: str) -> RowBlocks:
    rows, *rest = weights.shapes[key]
    columns = rest[0] if len(rest) == 1 else 0
    return RowBlocks((rows, columns), lambda start, stop: weights.rows(key, start, stop))


def _point(adapter: AdapterCheckpoint, name: str) -> LoRAPoint:
    """The effective factors, of at least float32, which the scaled ones need."""
    pair = adapter.tensors[name]
    dtype = torch.promote_types(pair.lora_A.dtype, torch.float32)
    b = (pair.lora_B.double() * adapter.config.scaling_for(name)).to(dtype)
    return LoRAPoint(b, pair.lora_A.to(dtype))


def _pair(point: LoRAPoint, adapter: AdapterCheckpoint, name: str) -> LoRAPair:
    """The inverse of :func:`_point`, in the dtype of the adapter's own factors."""
    dtype = adapter.tensors[name].lora_A.dtype
    stored = point.B.double() / adapter.config.scaling_for(name)
    return LoRAPair(point.A.to(dtype), stored.to(dtype))


def _with(adapter: AdapterCheckpoint, tensors: dict[str, LoRAPair]) -> AdapterCheckpoint:
    """The adapter with other factors of the same shapes; it lies in no folder yet."""
    digest = adapter_digest(adapter.config, tensors)
    return dataclasses.replace(adapter, tensors=tensors, path=Path(), sha256=digest)
