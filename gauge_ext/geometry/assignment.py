"""The assignment problem, solved exactly; SciPy has it too, but is no dependency of the core."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gauge_ext.errors import GeometryError


def best_assignment(score: Tensor) -> Tensor:
    r"""Find the permutation p that maximises :math:`\sum_i score_{i, p(i)}`.

    Shortest augmenting paths with dual prices (Jonker and Volgenant, Computing 38, 1987), after a
    greedy start that alone solves what is nearly a permutation already. O(h³) at worst.

    Args:
        score: ``(h, h)``, finite.

    Returns:
        p, ``(h,)`` in int64: row i goes with column p[i].

    Raises:
        GeometryError: ``score`` is not a square matrix of finite numbers.
    """
    if score.ndim != 2 or score.shape[0] != score.shape[1] or not bool(score.isfinite().all()):
        raise GeometryError(
            f"scores of an assignment must be a finite (h, h) matrix, got {tuple(score.shape)}."
        )
    cost = -score.detach().to("cpu", torch.float64)
    size = cost.shape[0]
    # Prices under which no edge costs less than nothing, and each row has one that costs nothing.
    columns = cost.min(0).values if size else cost.new_zeros(0)
    cheapest = (cost - columns).min(1) if size else None
    rows = cheapest.values if cheapest is not None else columns
    row_of, column_of = [-1] * size, [-1] * size
    for row, column in enumerate(cheapest.indices.tolist() if cheapest is not None else []):
        if row_of[column] < 0:
            row_of[column], column_of[row] = row, column
    for row in range(size):
        if column_of[row] < 0:
            _augment(cost, rows, columns, row_of, column_of, row)
    return torch.tensor(column_of, dtype=torch.int64, device=score.device)


def _augment(
    cost: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_of: list[int],
    column_of: list[int],
    start: int,
) -> None:
    """Assign row ``start`` along the cheapest path to a free column, and mend the prices."""
    reach = cost[start] - rows[start] - columns
    # The same for columns that are still open; reached ones are put out of the way.
    waiting = reach.clone()
    before = torch.full(reach.shape, start, dtype=torch.int64)
    done: list[int] = []
    while True:
        column = int(waiting.argmin())
        length = reach[column].clone()
        waiting[column] = math.inf
        if row_of[column] < 0:
            break
        done.append(column)
        row = row_of[column]
        through = length + cost[row] - rows[row] - columns
        nearer = (through < reach) & waiting.isfinite()
        reach = torch.where(nearer, through, reach)
        waiting = torch.where(nearer, through, waiting)
        before[nearer] = row
    rows[start] += length
    if done:
        passed = torch.tensor(done)
        slack = length - reach[passed]
        rows[torch.tensor([row_of[column_] for column_ in done])] += slack
        columns[passed] -= slack
    while True:
        row = int(before[column])
        row_of[column] = row
        column, column_of[row] = column_of[row], column
        if row == start:
            return
