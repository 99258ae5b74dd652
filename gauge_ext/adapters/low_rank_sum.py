"""A weight with a low-rank update beside it that is multiplied and not added, where it can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from gauge_ext import ops


class LowRankSum(Tensor):
    r"""What stands for :math:`W + s\,L R` in calls of torch, of which it has shape and dtype.

    A module that reads a parameter of its own, such as the stacked weights of experts, reads this
    instead. Choosing matrices of the stack and transposing them give another such sum; products
    with inputs (``linear``, ``matmul``, ``bmm``, ``grouped_mm``) are taken with W and with the
    factors, so that neither the sum nor its gradient is ever formed, and the update isn't rounded
    to W's dtype. Any other function of torch gets the sum itself.

    Args:
        weight: W, ``(*stack, p, q)``.
        left: L, ``(*stack, p, r)``.
        right: R, ``(*stack, r, q)``.
        scaling: s.
    """

    weight: Tensor
    left: Tensor
    right: Tensor
    scaling: float

    def __new__(cls, weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> Self:
        """Make one that has no memory of its own: kernels that would read W alone cannot."""
        of_weight = {"dtype": weight.dtype, "device": weight.device}
        make: Any = Tensor._make_wrapper_subclass
        found: Self = make(cls, weight.shape, weight.stride(), **of_weight)
        found.weight, found.left, found.right, found.scaling = weight, left, right, scaling
        return found

    def dense(self) -> Tensor:
        """Return ``W + s L R``, of W's shape and dtype, differentiable in the factors."""
        if (found := vars(self).get("_dense")) is None:
            dtype = self.weight.dtype
            add = torch.baddbmm if self.weight.dim() == 3 else torch.addmm
            # Autocast would give a sum of another dtype than the weight that it stands for.
            with torch.autocast(self.weight.device.type, enabled=False):
                left, right = self.left.to(dtype), self.right.to(dtype)
                found = add(self.weight, left, right, alpha=self.scaling)
            self._dense = found
        return found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[Any, Any] | None = None
    ) -> Any:
        """Take products by the factors, tell what W tells, and give the sum to all else."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (by_factors := _BY_FACTORS.get(func)) is not None:
            found = by_factors(*args, **kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map(_dense, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:  # type: ignore[override]
        """Refuse what comes here past torch's functions, where gradients would be lost."""
        raise RuntimeError(
            f"{func} was called from compiled code on a weight with an adapter, which it cannot "
            "see; merge the adapter (gauge_ext.merge), or take an implementation of the module in "
            "plain torch."
        )


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, LowRankSum) else value


def _choose(stack: LowRankSum, index: Any) -> Any:
    """One matrix of a stack, or a stack of chosen ones."""
    if isinstance(index, Tensor):
        whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        chooses = whole and index.dim() <= 1
    else:
        chooses = isinstance(index, int) and not isinstance(index, bool)
    if not chooses or stack.weight.dim() != 3:
        return NotImplemented
    return LowRankSum(stack.weight[index], stack.left[index], stack.right[index], stack.scaling)


def _transpose(stack: LowRankSum, dim0: int = -2, dim1: int = -1) -> Any:
    dims = stack.weight.dim()
    if {dim0 % dims, dim1 % dims} != {dims - 2, dims - 1}:
        return NotImplemented
    return LowRankSum(stack.weight.mT, stack.right.mT, stack.left.mT, stack.scaling)


def _transpose_matrix(matrix: LowRankSum) -> Any:
    return _transpose(matrix) if matrix.weight.dim() == 2 else NotImplemented


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if type(weight) is not LowRankSum or isinstance(input, LowRankSum) or weight.weight.dim() != 2:
        return NotImplemented
    return ops.lora_linear(input, weight.weight, bias, weight.right, weight.left, weight.scaling)


def _matmul(x: Any, y: Any) -> Any:
    if isinstance(x, LowRankSum):
        if isinstance(y, LowRankSum):
            return NotImplemented
        left, right = x.left.to(y.dtype), x.right.to(y.dtype)
        product = torch.matmul(x.weight, y)
        update = torch.matmul(left, torch.matmul(right, y))
        return torch.add(product, update, alpha=x.scaling)
    left, right = y.left.to(x.dtype), y.right.to(x.dtype)
    product = torch.matmul(x, y.weight)
    update = torch.matmul(torch.matmul(x, left), right)
    return torch.add(product, update, alpha=y.scaling)


def _grouped(input: Any, weight: Any, *, offs: Any = None, **options: Any) -> Any:
    if isinstance(input, LowRankSum) or options.keys() - {"bias", "out_dtype"} or offs is None:
        return NotImplemented
    product = F.grouped_mm(input, weight.weight, offs=offs, **options)
    # Its rows have to begin at multiples of 16 bytes: directions of zeros fill the rank up.
    missing = -weight.left.shape[-1] % (16 // input.element_size())
    left = F.pad(weight.left.to(input.dtype), (0, missing)).contiguous()
    right = F.pad(weight.right.to(input.dtype), (0, 0, 0, missing)).contiguous()
    update = F.grouped_mm(F.grouped_mm(input, left, offs=offs), right, offs=offs)
    return torch.add(product, update.to(product.dtype), alpha=weight.scaling)


def _getter(name: str) -> Any:
    """What torch calls for reading the attribute ``name`` of a tensor."""
    return getattr(Tensor, name).__get__


_BY_FACTORS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _choose,
    torch.transpose: _transpose,
    Tensor.transpose: _transpose,
    _getter("mT"): _transpose,
    _getter("T"): _transpose_matrix,
    Tensor.t: _transpose_matrix,
    torch.t: _transpose_matrix,
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.bmm, Tensor.bmm, torch.mm, Tensor.mm), _matmul),
    Tensor.__rmatmul__: lambda y, x: _matmul(x, y),
    **{getattr(F, name): _grouped for name in ("grouped_mm",) if hasattr(F, name)},
    torch._grouped_mm: _grouped,
}

# What asks about a tensor and not for its elements.
_ABOUT = frozenset(
    {
        *map(_getter, ("dtype", "device", "shape", "ndim", "layout")),
        *map(_getter, ("requires_grad", "is_cuda", "is_meta")),
        *(Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.__len__),
        *(Tensor.is_floating_point, Tensor.element_size, Tensor.is_contiguous),
    }
)
