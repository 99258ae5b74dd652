"""TIES, DARE and magnitude pruning: rules for one number at a time.

They read the numbers of *updates* (see :mod:`gauge_ext.merging.spaces` for which), never those of
factors: on factors, the same adapters in other gauges give other results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gauge_ext.errors import ConfigError
from gauge_ext.merging.recipe import Recipe

#: Half a GiB for a matrix in float64; four are alive at the peak.
MAX_ENTRIES = 2**26

#: The numbers of one task, ``(*batch, p, q)`` in float64, made anew at each call: of large ones no
#: more than a few are alive at a time, however many tasks there are.
Task = Callable[[], Tensor]


def combine_entries(
    tasks: Sequence[Task],
    weights: Sequence[float],
    floors: Sequence[Tensor],
    recipe: Recipe,
    *,
    label: str = "",
) -> Tensor:
    """Combine the tasks by the rule of the recipe.

    Args:
        tasks: The tasks' numbers, all of one shape.
        weights: One for each task.
        floors: ``(*batch)`` for each task, the size up to which a number is rounding: such ones
            count as zeros, which have no sign and no vote.
        recipe: The rule, the density and the seed.
        label: Which layer it is, so that each drops entries of its own.

    Returns:
        ``(*batch, p, q)`` in float64.
    """
    assert recipe.density is not None
    density = recipe.density
    sparse: list[Task] = []
    for index, (task, floor) in enumerate(zip(tasks, floors, strict=True)):
        seed = _seed(recipe.seed, label, index)
        sparse.append(_thinned(task, floor, density, seed if "dare" in recipe.rule else None))
    if recipe.rule in ("ties", "dare_ties"):
        tie = torch.stack([torch.as_tensor(floor) for floor in floors]).sum(0)
        return elect(sparse, weights, tie)
    return _sum(sparse, weights)


def _thinned(task: Task, floor: Tensor, density: float, seed: int | None) -> Task:
    def make() -> Tensor:
        x = task()
        x = x.masked_fill(x.abs() <= floor[..., None, None], 0.0)
        return trim(x, density) if seed is None else drop(x, density, seed)

    return make


def trim(x: Tensor, density: float) -> Tensor:
    """Keep the ``int(density * p * q)`` entries of largest size of each matrix, at least one.

    Entries as large as the smallest that is kept are kept too. Source: the first step of TIES
    (arXiv:2306.01708).

    Args:
        x: ``(*batch, p, q)``.
        density: In (0, 1].
    """
    count = x.shape[-2] * x.shape[-1]
    kept = max(1, int(density * count))
    if kept == count:
        return x
    sizes = x.abs()
    bar = sizes.flatten(-2).kthvalue(count - kept + 1, dim=-1).values
    return x.masked_fill(sizes < bar[..., None, None], 0.0)


def drop(x: Tensor, density: float, seed: int) -> Tensor:
    """Keep each entry with probability ``density`` and scale it by 1 / density.

    The expectation over seeds is ``x``. Source: DARE (arXiv:2311.03099), whose drop rate is 1 -
    density. The same entries are kept on every device and in every gauge.

    Args:
        x: ``(*batch, p, q)``.
        density: In (0, 1].
        seed: Of the choice.
    """
    if density == 1.0:
        return x
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(x.shape, generator=generator).lt(density).to(x.device)
    return x.mul(1.0 / density).masked_fill(~kept, 0.0)


def elect(tasks: Sequence[Task], weights: Sequence[float], tie: Tensor) -> Tensor:
    r"""Elect a sign for each entry and take what agrees with it: the last two steps of TIES.

    .. math:: \gamma = \operatorname{sgn} \sum_t x_t, \qquad
        y = \frac{\sum_{t:\, \operatorname{sgn} x_t = \gamma} w_t x_t}
                 {|\{t : \operatorname{sgn} x_t = \gamma\}|}

    Zeros agree with nothing, and where the sum is zero nothing is elected and y is 0. Weights of 1
    make it the mean. Source: TIES (arXiv:2306.01708), with the weights where PEFT has them; PEFT
    elects plus where the sum is zero, which depends on the sign of a basis.

    Args:
        tasks: The tasks' numbers.
        weights: Positive, one for each task.
        tie: ``(*batch)``, the size up to which a sum is zero.
    """
    total = _sum(tasks, [1.0] * len(tasks))
    sign = total.sign().masked_fill(total.abs() <= tie[..., None, None], 0.0)
    mixed, agreed = torch.zeros_like(total), torch.zeros_like(total)
    for task, weight in zip(tasks, weights, strict=True):
        x = task()
        x = x.masked_fill(x.sign() != sign, 0.0)
        mixed.add_(x, alpha=weight)
        agreed.add_(x.ne(0))
    return mixed / agreed.clamp_(min=1.0)


def _sum(tasks: Sequence[Task], weights: Sequence[float]) -> Tensor:
    total = tasks[0]() * weights[0]
    for task, weight in zip(tasks[1:], weights[1:], strict=True):
        total.add_(task(), alpha=weight)
    return total


def _seed(seed: int, label: str, index: int) -> int:
    """Return a seed for one task of one layer, unlike those of the others."""
    digest = hashlib.sha256(f"{seed}/{label}/{index}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def check_size(shape: tuple[int, int]) -> None:
    """Refuse updates whose entries would fill the memory.

    Raises:
        ConfigError: An update has more entries than :data:`MAX_ENTRIES`.
    """
    if shape[0] * shape[1] > MAX_ENTRIES:
        raise ConfigError(
            f'space = "entries" forms each update, and one of shape {shape} has '
            f"{shape[0] * shape[1]:,} entries; at most {MAX_ENTRIES:,} are formed.",
            hint='Take space = "knots", which works on factors.',
        )
