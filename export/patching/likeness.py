"""Recognising a weight by its values, whatever it is called and however it is stored.

A matrix is known by the sums of its rows and of its columns: a transposition exchanges the two, a
narrower format or a quantization moves them a little, and another weight of the same shape has
others altogether. One pass over each weight is enough, some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from gauge_ext.errors import AdapterMismatchError, ConfigError
from gauge_ext.export.disk.base_folder import BaseFolder
from gauge_ext.export.disk.base_targets import base_weights
from gauge_ext.export.disk.numbers import BY_ONNX, BY_SAFETENSORS, Array, Number
from gauge_ext.export.disk.onnx_file import OnnxFile
from gauge_ext.export.disk.spans import Span, opened, read_into
from gauge_ext.export.patching.nbits import quantized_weight, read_rows
from gauge_ext.export.patching.sites import Site
from gauge_ext.export.patching.update import LayerKind, WeightShape, row_blocks

# The distance of two weights in units of their own size: rounding to 8 bits of mantissa makes less
# than the first, 4-bit blocks about half of the second, and unrelated weights 1.4.
_SAME, _SAME_QUANTIZED = 0.005, 0.3


class Likeness:
    """Compares the weights of a graph with those of the base's folder.

    Args:
        file: The ONNX file.
        base: The base.
        weights: Path of each module that matters -> its weight.

    Raises:
        AdapterMismatchError: the base lacks the weight of a module.
    """

    def __init__(
        self, file: OnnxFile, base: BaseFolder, weights: Mapping[str, WeightShape]
    ) -> None:
        self._file, self._base = file, base
        self._weights, self._names = weights, base_weights(base, list(weights))
        self._bases: dict[str, Array] = {}
        self._sites: dict[tuple[str, LayerKind], Array] = {}

    def check(self, module: str, site: Site, found_by: str) -> None:
        """Refuses a home whose values are not the base's.

        Raises:
            AdapterMismatchError: they are not.
        """
        if not self._same(module, site):
            raise AdapterMismatchError(
                f"{site.tensor!r} in {self._file.path}, the weight of {module!r} by {found_by}, "
                f"does not hold the values of {self._names[module]!r} in {self._base.path}.",
                hint="Was the file exported from this base, with no adapter merged into it?",
            )

    def find(self, modules: Sequence[str], sites: Sequence[Site]) -> dict[str, Site]:
        """The modules whose weight is stored in one place and no other."""
        found = {}
        for module in modules:
            alike = {site.tensor: site for site in sites if self._same(module, site)}
            if len(alike) == 1:
                found[module] = next(iter(alike.values()))
        return found

    def _same(self, module: str, site: Site) -> bool:
        stored = self._base.tensors[self._names[module]]
        held = (stored.shape[0], math.prod(stored.shape[1:])) if stored.shape else (0, 0)
        alike = site.kind == self._weights[module].kind
        if not alike or site.shape not in {held, held[::-1]}:
            return False
        if module not in self._bases:
            number = BY_SAFETENSORS.get(stored.dtype)
            if number is None:
                raise ConfigError(
                    f"{self._names[module]} in {self._base.path} is stored as {stored.dtype}, "
                    "whose values cannot be compared.",
                    hint="Give the unquantized base.",
                )
            self._bases[module] = _sums(stored.span, held, number)
        key = (site.tensor, site.kind)
        if key not in self._sites:
            self._sites[key] = self._of_site(site)
        one, other = self._bases[module], self._sites[key]
        limit = _SAME if site.blocks is None else _SAME_QUANTIZED
        forms = [one] if held == site.shape else []
        if held == site.shape[::-1]:  # a square one may lie either way
            forms.append(np.concatenate([one[held[0] :], one[: held[0]]]))
        scale = float(np.linalg.norm(one)) or 1.0
        return any(float(np.linalg.norm(form - other)) < limit * scale for form in forms)

    def _of_site(self, site: Site) -> Array:
        """Sums of the rows of ``(out, in)``, then of its columns."""
        rows, columns = site.shape
        if site.blocks is not None:
            weight = quantized_weight(self._file, site)
            sums = np.zeros(rows + columns)
            with ExitStack() as stack:
                spans = [part.span for part in weight.parts if part.span is not None]
                handles = [stack.enter_context(opened(span.path)) for span in spans]
                for start, stop in row_blocks(rows, 4 * columns):
                    block = weight.values(read_rows(weight, handles, start, stop))
                    sums[start:stop] = block.sum(1, dtype="<f8")
                    sums[rows:] += block.sum(0, dtype="<f8")
            return sums
        tensor = self._file.initializers[site.tensor]
        number = BY_ONNX.get(tensor.data_type)
        if number is None or tensor.span is None:
            return np.full(rows + columns, np.inf)
        if not site.transposed:
            return _sums(tensor.span, (rows, columns), number)
        sums = _sums(tensor.span, (columns, rows), number)
        return np.concatenate([sums[columns:], sums[:columns]])


def _sums(span: Span, shape: tuple[int, int], number: Number) -> Array:
    rows, columns = shape
    sums = np.zeros(rows + columns)
    with opened(span.path) as handle:
        for start, stop in row_blocks(rows, columns):
            raw = np.empty((stop - start, columns), number.stored)
            at = span.offset + start * columns * number.itemsize
            read_into(handle, at, raw.data.cast("B"))
            block = number.decode(raw)
            sums[start:stop] = block.sum(1, dtype="<f8")
            sums[rows:] += block.sum(0, dtype="<f8")
    return sums
