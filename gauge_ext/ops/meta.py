"""What the fake kernels, which know shapes alone, must not be taken for."""

from __future__ import annotations

from torch import Tensor


def require_values(*tensors: Tensor | None) -> None:
    """Refuse tensors of which some have values and some, on the meta device, none.

    The dispatcher sends such a call to the fake kernel, whose output nobody has written to.

    Raises:
        RuntimeError: There are both.
    """
    without = {tensor.is_meta for tensor in tensors if tensor is not None}
    if len(without) == 2:
        raise RuntimeError(
            "x, the weights and the factors must all have values, and some are on the meta device: "
            "they were never loaded (load_state_dict(..., assign=True), load_adapter)."
        )
