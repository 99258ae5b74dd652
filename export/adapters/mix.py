"""Weighted sums of adapters as one adapter: exact, by putting their ranks side by side.

sum_i w_i B_i A_i = [w_1 B_1 ... w_k B_k] [A_1; ...; A_k]
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gauge_ext.errors import NonFiniteError
from gauge_ext.export.adapters.table import AdapterTable, Arrays


def mix(table: AdapterTable, parts: Mapping[str, tuple[Arrays, float]]) -> Arrays:
    """Make one adapter of several with weights.

    Args:
        table: The graph's inputs.
        parts: Name -> arrays as :meth:`AdapterTable.pack` makes them, weight.

    Returns:
        Arrays of the same kind; the rank of a module is the sum of the adapters' ranks there.

    Raises:
        NonFiniteError: a weight takes a factor out of float16.
    """
    mixed: Arrays = {}
    for entry in table.inputs.values():
        present = [(arrays, w) for arrays, w in parts.values() if entry.lora_A in arrays]
        if not present:
            continue
        mixed[entry.lora_A] = np.concatenate([arrays[entry.lora_A] for arrays, _ in present], 1)
        scale_A, scale_B = f"{entry.lora_A}.scale", f"{entry.lora_B}.scale"
        if table.precision == "int8":
            # The weight goes into the scales, so that no code is rounded again.
            mixed[scale_A] = np.concatenate([arrays[scale_A] for arrays, _ in present])
            mixed[entry.lora_B] = np.concatenate([arrays[entry.lora_B] for arrays, _ in present])
            mixed[scale_B] = np.concatenate(
                [arrays[scale_B] * np.float32(w) for arrays, w in present]
            )
            continue
        with np.errstate(over="ignore"):  # reported by name below
            blocks = [
                (arrays[entry.lora_B].astype(np.float64) * w).astype(table.precision)
                for arrays, w in present
            ]
        mixed[entry.lora_B] = np.concatenate(blocks)
        if not np.isfinite(mixed[entry.lora_B]).all():
            raise NonFiniteError(
                f"the weights {[w for _, w in present]} take {entry.lora_B} out of the range of "
                f"{table.precision}.",
                hint="Use smaller weights.",
            )
    return mixed
