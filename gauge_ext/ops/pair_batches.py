"""What the optimizer steps share: whether a kernel runs them, and batches where none does."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gauge_ext import _load

_OF_THE_CPU = frozenset({torch.float32, torch.float64, torch.bfloat16})
ON_CPU: Mapping[str, frozenset[torch.dtype]] = {"cpu": _OF_THE_CPU}
ON_CPU_AND_CUDA = {**ON_CPU, "cuda": _OF_THE_CPU | {torch.float16}}


def has_kernel(
    factors: Sequence[Tensor],
    kernels: Mapping[str, frozenset[torch.dtype]] = ON_CPU_AND_CUDA,
) -> bool:
    """Whether there is a kernel for these factors; where not, say so once.

    Args:
        factors: Of one dtype and device.
        kernels: Kind of device -> the dtypes that a step has kernels for there.
    """
    if not factors:
        return False
    first = factors[0]
    build = _load.load()
    if not build.compiled:
        return False  # load() has said so
    has_device = not first.is_cuda or build.cuda
    if has_device and first.dtype in kernels.get(first.device.type, ()):
        return True
    if not first.is_meta:
        say_plain(first.device.type, str(first.dtype))
    return False


@functools.cache
def say_plain(device: str, dtype: str) -> None:
    """Warn that the step of an optimizer is none of ours."""
    warnings.warn(
        f"there is no compiled optimizer step for {dtype} on {device}: it runs in plain torch, in "
        "float64, batched over layers of one shape.",
        stacklevel=4,
    )


def groups(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], anchors: Sequence[int]
) -> Iterator[list[int]]:
    """Yield the pairs of one shape and one kind of anchor, which are computed together."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, (a, b, anchor) in enumerate(zip(lora_A, lora_B, anchors, strict=True)):
        found.setdefault((*a.shape, *b.shape, anchor), []).append(i)
    yield from found.values()


def stack(tensors: Sequence[Tensor], group: list[int]) -> Tensor:
    """Return the tensors of a group as one, in float64."""
    return torch.stack([tensors[i] for i in group]).double()


def column(numbers: Sequence[float], group: list[int], like: Tensor) -> Tensor:
    """Return a group's numbers, ``(pairs, 1, 1)`` in float64."""
    values = [float(numbers[i]) for i in group]
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None, None]


def effective(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    group: list[int],
    s: Tensor,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return A, the effective B, and the gradients by them, in float64."""
    return (
        stack(lora_A, group),
        stack(lora_B, group) * s,
        stack(grad_A, group) * grad_scale,
        stack(grad_B, group) * grad_scale / s,
    )


def writes_to(
    tensors: Sequence[Tensor], values: Tensor, group: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """Pair the tensors of a group with what they are to become."""
    return [(tensors[i], value) for i, value in zip(group, values.unbind(), strict=True)]


def write(writes: list[tuple[Tensor, Tensor]]) -> None:
    """Write all, after everything has been computed."""
    if writes:
        torch._foreach_copy_([old for old, _ in writes], [new for _, new in writes])
