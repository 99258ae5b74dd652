"""From a full fine-tune to an adapter: the best update of low rank for each layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.adapters.config import ALL_LINEAR
from gauge_ext.adapters.dtypes import FLOAT_DTYPES
from gauge_ext.checkpoint.assembly import assemble
from gauge_ext.checkpoint.extraction import ExtractedLayer, Extraction
from gauge_ext.checkpoint.format import LoRAPair
from gauge_ext.checkpoint.moments import LayerInputs
from gauge_ext.checkpoint.pairing import choose, linear_names, match_names
from gauge_ext.checkpoint.weights import Weights, open_weights
from gauge_ext.errors import AdapterMismatchError, ConfigError, NonFiniteError
from gauge_ext.geometry.low_rank import RowBlocks, nearest_low_rank

Progress = Callable[[str, float], None]  # what is being done, and the share that is done
# Of one block that is compared: 32 MiB in float64.
_BLOCK_NUMBERS = 2**22

Source = Weights | nn.Module | str | os.PathLike[str]


@torch.no_grad()
def extract(
    base: Source,
    finetuned: Source,
    *,
    rank: int | None = 16,
    energy: float | None = None,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude_modules: str | Sequence[str] | None = None,
    linear: Collection[str] | None = None,
    activations: Mapping[str, Tensor] | None = None,
    covariances: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    oversampling: int = 8,
    power_iterations: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Extraction:
    r"""Find the adapter nearest to what fine-tuning did to each linear layer.

    .. math:: X = \arg\min_{rank X \le r} \|(W_1 - W_0 - X)\, C^{1/2}\|_F

    with C = I, or the second moment of the layer's inputs where it is given, so that the error of
    the outputs is what is minimised. One layer after the other, some rows at a time, by randomized
    SVD (see :func:`~gauge_ext.geometry.low_rank.nearest_low_rank`); folders are never loaded.

    Args:
        base: The model before: a folder with safetensors weights, a module, or its weights.
        finetuned: The model after; its names may have a prefix more or less.
        rank: The rank of each layer, or the largest where ``energy`` is given; None for no limit.
        energy: In (0, 1]: each layer gets the smallest rank up to ``rank`` that explains this share
            of its squared change.
        target_modules: Which layers, as in :class:`~gauge_ext.LoRAConfig`.
        exclude_modules: Layers that are left out all the same.
        linear: Paths of the model's linear layers, where its classes are known; None: those of the
            module, and for folders by :func:`~gauge_ext.checkpoint.pairing.linear_names`.
        activations: Path of a module -> inputs of it, ``(*, in)``.
        covariances: Path of a module -> second moments of its inputs, ``(in, in)``, see
            :func:`~gauge_ext.checkpoint.input_moments`. A module has one or the other or neither.
        dtype: Dtype of the factors; None: float64 if the base is, else float32.
        oversampling: Of the sketch.
        power_iterations: Of the sketch.
        seed: Of the sketch.
        progress: Called with what is being done and the share done, in [0, 1].

    Raises:
        ConfigError: A folder is missing, damaged or quantized, or an argument cannot be used.
        TargetError: No layer is meant, or a name in ``target_modules`` means none.
        AdapterMismatchError: The two are not one model: no common names, or other shapes; or
            nothing that could be adapted differs.
        InputsError: Inputs are for unknown layers, of another width, or hold NaN.
        NonFiniteError: A weight holds NaN or infinity.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ConfigError(f"dtype must be one of {FLOAT_DTYPES} or None, got {dtype!r}.")
    if linear is None and isinstance(base, nn.Module):
        linear = [name for name, part in base.named_modules() if isinstance(part, nn.Linear)]
    before, after = open_weights(base), open_weights(finetuned)
    config = LoRAConfig(
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        base_model_name_or_path=None if isinstance(base, nn.Module) else before.name,
    )
    paths = _layer_keys(before, linear)
    chosen = choose(list(paths), config, before.name)
    keys = {paths[name]: name for name in chosen}
    partner = match_names(before.shapes, after.shapes, after.name)
    _require_same_model(before, after, keys, partner)
    inputs = LayerInputs(activations or {}, covariances or {}, chosen)

    tensors: dict[str, LoRAPair] = {}
    layers: list[ExtractedLayer] = []
    unchanged: list[str] = []
    left_out = {k: f"only in {before.name}" for k in before.shapes if k not in partner}
    known = set(partner.values())
    left_out |= {k: f"only in {after.name}" for k in after.shapes if k not in known}
    total, done = sum(math.prod(before.shapes[key]) for key in partner) or 1, 0
    for key, other in partner.items():
        if progress is not None:
            progress(f"reading {key}", done / total)
        done += math.prod(before.shapes[key])
        name = keys.get(key)
        if before.shapes[key] != after.shapes[other]:
            left_out[key] = f"from shape {before.shapes[key]} to {after.shapes[other]}"
            continue
        size, change = _norms(before, key, after, other)
        if change == 0.0:
            if name is not None:
                unchanged.append(name)
            continue
        relative = change / size if size else math.inf
        if name is None:
            measured = key in before.dtypes and before.shapes[key]
            left_out[key] = f"changed by {relative:.2g} of its norm" if measured else "changed"
            continue
        difference = _difference(before, key, after, other)
        factor = inputs.factor(name, difference.shape[1])
        found = nearest_low_rank(
            difference,
            rank,
            energy=energy,
            factor=factor,
            oversampling=oversampling,
            power_iterations=power_iterations,
            seed=seed,
        )
        if found is None:  # too small to square, and as good as unchanged
            unchanged.append(name)
            continue
        own = torch.float64 if before.dtypes[key] == torch.float64 else torch.float32
        point = found.point.to(dtype or own, "cpu")
        tensors[name] = LoRAPair(point.A, point.B)
        weighted = None if factor is None else found.unexplained
        layers.append(
            ExtractedLayer(
                name,
                difference.shape,
                point.rank,
                change,
                relative,
                found.unexplained_plain,
                weighted,
            )
        )
    if not tensors:
        raise AdapterMismatchError(
            f"{before.name} and {after.name} do not differ in any layer that was asked for.",
            hint=_where_then(left_out),
        )
    if progress is not None:
        progress("done", 1.0)
    adapter = assemble(tensors, like=config, modules=_module_paths(before, paths))
    return Extraction(adapter, tuple(layers), tuple(unchanged), left_out)


def _layer_keys(weights: Weights, linear: Collection[str] | None) -> dict[str, str]:
    """Return path of each linear layer -> the key of its weight."""
    if linear is None:
        return {name: f"{name}.weight" for name in linear_names(weights)}
    found = match_names((f"{name}.weight" for name in linear), weights.shapes, weights.name)
    return {
        wanted.removesuffix(".weight"): key
        for wanted, key in found.items()
        if len(weights.shapes[key]) == 2 and key in weights.dtypes
    }


def _module_paths(weights: Weights, layers: Mapping[str, str]) -> set[str]:
    """Every module that holds a tensor, or holds one that does, under the adapter's own names."""
    renamed = {key: f"{name}.weight" for name, key in layers.items()}
    found = set()
    for key in weights.shapes:
        parts = renamed.get(key, key).split(".")[:-1]
        found |= {".".join(parts[: end + 1]) for end in range(len(parts))}
    return found


def _require_same_model(
    before: Weights, after: Weights, keys: Mapping[str, str], partner: Mapping[str, str]
) -> None:
    shared = [key for key in keys if key in partner]
    if not shared:
        raise AdapterMismatchError(
            f"{after.name} has none of the {len(keys)} linear layers of {before.name}, such as "
            f"{next(iter(keys))!r}.",
            hint="Are both the same model? Its own tensors are named like "
            f"{next(iter(after.shapes), 'nothing')!r}.",
        )
    for key in shared:
        if before.shapes[key] != after.shapes[partner[key]]:
            raise AdapterMismatchError(
                f"{key!r} has shape {before.shapes[key]} in {before.name} and "
                f"{after.shapes[partner[key]]} in {after.name}.",
                hint="Leave it out with exclude_modules, if the models are the same otherwise.",
            )
        if partner[key] not in after.dtypes:
            raise ConfigError(f"{partner[key]!r} in {after.name} holds no floating-point numbers.")


def _difference(before: Weights, key: str, after: Weights, other: str) -> RowBlocks:
    rows, columns = before.shapes[key]

    def read(start: int, stop: int) -> Tensor:
        # In float64, where the difference of two narrower numbers is all but exact.
        new = after.rows(other, start, stop).double()
        return new - before.rows(key, start, stop).to(new.device, torch.float64)

    return RowBlocks((rows, columns), read)


def _norms(before: Weights, key: str, after: Weights, other: str) -> tuple[float, float]:
    """||W_0|| and ||W_1 - W_0||; codes and single numbers count as they are compared."""
    shape = before.shapes[key]
    if key not in before.dtypes or other not in after.dtypes or not shape:
        old, new = before.whole(key), after.whole(other)
        return 1.0, float(not torch.equal(old, new.to(old.device)))
    size = change = 0.0
    step = max(1, _BLOCK_NUMBERS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        old = before.rows(key, start, start + step).double()
        new = after.rows(other, start, start + step).to(old.device, torch.float64)
        size += float(old.square().sum())
        change += float((new - old).square().sum())
    if not math.isfinite(size + change):
        raise NonFiniteError(
            f"{key} of {before.name} or {other} of {after.name} holds NaN or infinity."
        )
    return math.sqrt(size), math.sqrt(change)


def _where_then(left_out: Mapping[str, str]) -> str:
    changed = [name for name, reason in left_out.items() if reason.startswith("changed")]
    if not changed:
        return "They hold the same weights: give the base first and the fine-tuned model second."
    return f"What changed: {', '.join(changed[:6])}{', ...' if len(changed) > 6 else ''}."
