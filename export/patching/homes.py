"""Which initializer of a graph is the weight of which module.

By what the file says of it, see :mod:`sites`; else by comparison with the base's own weights; else
by shape and order. A module that has no home, or more than one, is refused: an update added to the
wrong weight gives a model that runs and is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gauge_ext.errors import AdapterMismatchError
from gauge_ext.export.disk.base_folder import BaseFolder
from gauge_ext.export.disk.naming import best_renamings
from gauge_ext.export.disk.onnx_file import OnnxFile
from gauge_ext.export.patching.evidence import EVIDENCE
from gauge_ext.export.patching.likeness import Likeness
from gauge_ext.export.patching.sites import Site, Sites, find_sites
from gauge_ext.export.patching.update import WeightShape

_BY_VALUES, _BY_ORDER = "its values, compared with the base", "its shape and order"
_SHOWN = 4
# torch's older exporter multiplies a batch normalization into a convolution and gives the product a
# name of its own: only where the weight still has its own name is it the module's.
_OF_CONVOLUTIONS = ("parameters", "name")


@dataclass(frozen=True)
class Home:
    """The weight of a module.

    Attributes:
        module: Path of the module.
        site: A node that multiplies with it.
        found_by: What it was recognised by.
    """

    module: str
    site: Site
    found_by: str


def find_homes(
    file: OnnxFile, weights: Mapping[str, WeightShape], base: BaseFolder | None = None
) -> tuple[Home, ...]:
    """Finds the weight of each module.

    Args:
        file: The ONNX file.
        weights: Path of the module -> its weight.
        base: The model that the file was exported from, to compare with.

    Raises:
        AdapterMismatchError: a module has no home or several, its home has another shape, is used
            for something else too, is that of another module too, or has a batch normalization
            multiplied into it.
        ConfigError: the base's weights cannot be compared.
    """
    found = find_sites(file)
    if not found.sites:
        raise AdapterMismatchError(
            f"{file.path} has no linear layer, embedding or convolution with a weight of its own.",
            hint="Weights that come from other nodes, or are quantized otherwise than by "
            "MatMulNBits, cannot be patched: patch the unquantized model and quantize the result.",
        )
    homes = _by_paths(file, found.sites, weights)
    for home in homes.values():
        if home.site.shape != weights[home.module].matrix:
            raise AdapterMismatchError(
                f"the adapter for {home.module!r} is for a weight of shape "
                f"{weights[home.module].matrix}, and {home.site.tensor!r} in {file.path}, found by "
                f"{home.found_by}, has shape {home.site.shape}.",
                hint="Is this the base that the adapter was trained on?",
            )
        if home.site.normalized:
            raise AdapterMismatchError(
                f"{home.site.tensor!r} in {file.path}, the weight of {home.module!r}, has a batch "
                "normalization multiplied into it, and an update for it would need the same.",
                hint="Export the base anew with optimize=False, or merge in torch (gauge-ext "
                "export).",
            )
    tried = [f"by {what}" for what in EVIDENCE.values()]
    if base is not None:
        likeness = Likeness(file, base, weights)
        for home in homes.values():
            likeness.check(home.module, home.site, home.found_by)
        tried.append(f"by {_BY_VALUES}")
        lost = [module for module in weights if module not in homes]
        homes |= {m: Home(m, s, _BY_VALUES) for m, s in likeness.find(lost, found.sites).items()}
    lost = [module for module in weights if module not in homes]
    if lost and base is None:  # whose values are not there is not to be guessed
        tried.append(f"by {_BY_ORDER}")
        homes |= _by_order(found.sites, weights, homes, lost)
    if lost := [module for module in weights if module not in homes]:
        raise _homeless(file, found.sites, weights, lost, tried, with_base=base is not None)
    ordered = tuple(homes[module] for module in weights)
    _refuse_shared(file, found, ordered)
    return ordered


def _by_paths(
    file: OnnxFile, sites: Sequence[Site], weights: Mapping[str, WeightShape]
) -> dict[str, Home]:
    modules = list(weights)
    table: dict[str, dict[str, list[Site]]] = {}
    for site in sites:
        for kind, paths in site.paths.items():
            for path in paths:
                table.setdefault(path, {}).setdefault(kind, []).append(site)
    rules = best_renamings(modules, table)
    if len(rules) > 1:
        example = next(module for module in modules if rules[0](module) in table)
        raise AdapterMismatchError(
            f"the adapter's {example!r} may be {rules[0](example)!r} or {rules[1](example)!r} in "
            f"{file.path}.",
            hint="Give the base's folder (--base), to compare the values.",
        )
    homes = {}
    for module in modules if rules else ():
        said, layer = table.get(rules[0](module), {}), weights[module].kind
        for kind, meaning in EVIDENCE.items():
            if layer == "convolution" and kind not in _OF_CONVOLUTIONS:
                continue
            tensors = {site.tensor: site for site in said.get(kind, ()) if site.kind == layer}
            if len(tensors) == 1:
                homes[module] = Home(module, next(iter(tensors.values())), meaning)
            if tensors:
                break
    return homes


def _by_order(
    sites: Sequence[Site],
    weights: Mapping[str, WeightShape],
    homes: Mapping[str, Home],
    lost: Sequence[str],
) -> dict[str, Home]:
    """Modules that are alike but for their numbers, where a graph has as many weights of the shape.

    Then the first in the graph belongs to the first layer, and so on: data flow through the layers
    in their order. With two kinds of one shape nothing says which is which.
    """
    taken = {home.site.tensor for home in homes.values()}
    free: dict[tuple[int, int], list[Site]] = {}
    for site in {site.tensor: site for site in reversed(sites)}.values():
        if site.tensor not in taken and site.kind == "linear":
            free.setdefault(site.shape, []).append(site)
    wanted: dict[tuple[int, int], list[str]] = {}
    for module in lost:
        if weights[module].kind == "linear":
            wanted.setdefault(weights[module].matrix, []).append(module)
    found = {}
    for shape, modules in wanted.items():
        kinds = {re.sub(r"\d+", "#", module) for module in modules}
        candidates = list(reversed(free.get(shape, [])))
        if len(kinds) == 1 and len(candidates) == len(modules):
            for module, site in zip(sorted(modules, key=_natural), candidates, strict=True):
                found[module] = Home(module, site, _BY_ORDER)
    return found


def _natural(module: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", module)]


def _refuse_shared(file: OnnxFile, found: Sites, homes: Sequence[Home]) -> None:
    owners: dict[str, str] = {}
    for home in homes:
        tensor = home.site.tensor
        if (other := owners.setdefault(tensor, home.module)) != home.module:
            raise AdapterMismatchError(
                f"the adapter changes {other!r} and {home.module!r}, and {file.path} stores one "
                f"weight for both, {tensor!r}.",
                hint="Export the base with the two untied.",
            )
    for home in homes:
        same = (home.site.tensor, home.site.kind)
        uses = list(found.other_uses.get(same, ()))
        callers = _callers(s for s in found.sites if (s.tensor, s.kind) == same)
        if len(callers) > 1:
            uses += sorted(callers)
        if uses:
            raise AdapterMismatchError(
                f"{home.site.tensor!r} in {file.path}, the weight of {home.module!r}, is tied: "
                f"it is used by {', '.join(uses[:_SHOWN])} too, and they would change with it.",
                hint="Export the base with the two untied, or merge in torch (gauge-ext export).",
            )


def _callers(sites: Iterable[Site]) -> set[str]:
    """The modules that multiply with one weight; one that is called several times is one."""
    said = [site.paths.get("scope") or site.paths.get("node") for site in sites]
    paths = {path for names in said if names for path in names}
    # torch's older exporter numbers the calls after the first: a, a_1, a_2.
    return {
        p for p in paths if (first := re.sub(r"_\d+(?=\.|$)", "", p)) == p or first not in paths
    }


def _homeless(
    file: OnnxFile,
    sites: Sequence[Site],
    weights: Mapping[str, WeightShape],
    lost: Sequence[str],
    tried: Sequence[str],
    *,
    with_base: bool,
) -> AdapterMismatchError:
    shown = ", ".join(f"{module!r} {weights[module].matrix}" for module in lost[:_SHOWN])
    first = weights[lost[0]]
    alike = [site for site in sites if site.kind == first.kind]
    same = [site.tensor for site in alike if site.shape == first.matrix]
    what = "" if first.kind == "linear" else f"{first.kind} "
    if same:
        near = f"{len(same)} {what}weights have the first one's shape: " + ", ".join(
            map(repr, same[:_SHOWN])
        )
        near += ", ..." if same[_SHOWN:] else ""
    elif alike:
        there = sorted({site.shape for site in alike})
        near = f"no {what}weight has the first one's shape, only {', '.join(map(str, there[:6]))}"
    else:
        near = f"the graph has no {first.kind} weights"
    hint = "Is this the base that the adapter was trained on?"
    if same and not with_base:
        hint = "Give the folder of the base that it was exported from (--base), to compare values."
    return AdapterMismatchError(
        f"{len(lost)} of the adapter's {len(weights)} modules have no unique weight in "
        f"{file.path}: {shown}{', ...' if lost[_SHOWN:] else ''}. Looked for {'; '.join(tried)}; "
        f"{near}.",
        hint=hint,
    )
