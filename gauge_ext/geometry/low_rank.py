"""The best update of low rank to a matrix that is only read, never held: randomized SVD.

What ``ParallelTransport(W_0, W_1)`` of the seed can mean for one pair of weights: the point X of
rank r nearest to D = W_1 - W_0. D is read in blocks of rows, so that it may lie in a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gauge_ext.errors import ConfigError, GeometryError, NonFiniteError
from gauge_ext.geometry.linalg import numerical_rank, thin_qr, to_double
from gauge_ext.geometry.point import LoRAPoint

# Of one block in float64: large enough for an efficient product, small beside any layer.
_BLOCK_BYTES = 2**25
# The first guess where only an energy is asked for; it doubles until that is reached.
_FIRST_RANK = 16


@dataclass(frozen=True)
class RowBlocks:
    """A matrix that is read some rows at a time.

    Attributes:
        shape: (m, n).
        read: ``read(start, stop)`` gives those rows, ``(stop - start, n)``; it is called several
            times over for all of them.
    """

    shape: tuple[int, int]
    read: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, matrix: Tensor) -> RowBlocks:
        """Wrap a matrix ``(m, n)`` that is in memory."""
        return cls((matrix.shape[0], matrix.shape[1]), lambda start, stop: matrix[start:stop])

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows in float64) from the top to the bottom."""
        rows, columns = self.shape
        step = max(1, _BLOCK_BYTES // (8 * max(1, columns)))
        for start in range(0, rows, step):
            yield start, to_double(self.read(start, min(start + step, rows)))


@dataclass(frozen=True, eq=False)
class LowRank:
    r"""The nearest matrix of low rank, and how near it is.

    Attributes:
        point: X as a pair of factors with :math:`B^T B = A W A^T = \Sigma`, W being the weight
            (the identity by default): balanced in the norm in which X is nearest.
        singular_values: Those kept, ``(r,)`` descending, in that norm; float64.
        norm: :math:`\|D\|`, in that norm.
        unexplained: :math:`1 - \|X\|^2 / \|D\|^2 = \|D - X\|^2 / \|D\|^2`, in that norm.
        unexplained_plain: :math:`\|D - X\|_F^2 / \|D\|_F^2`, the same without a weight.
    """

    point: LoRAPoint
    singular_values: Tensor
    norm: float
    unexplained: float
    unexplained_plain: float


def input_factor(
    *, activations: Tensor | None = None, covariance: Tensor | None = None, damping: float = 1e-6
) -> Tensor:
    r"""Return R, upper triangular, with :math:`R^T R = C + \delta\,\tfrac{tr C}{n} I`.

    C = E[x xᵀ] is the second moment of a layer's inputs: :math:`\|(D - X) R^T\|_F^2` is the mean
    squared error of its outputs. Activations go through QR, which never squares their condition,
    and covariances through Cholesky. The damping makes R invertible where inputs do not fill the
    space (fewer of them than n, or a feature that is always zero).

    Args:
        activations: Inputs of the layer, ``(*, n)``.
        covariance: C itself, ``(n, n)``; give one of the two.
        damping: delta, above 0.

    Returns:
        R ``(n, n)`` in float64.

    Raises:
        ConfigError: Not exactly one of the two is given, or ``damping`` is not positive.
        GeometryError: C is not a square symmetric positive semidefinite matrix, or is zero.
        NonFiniteError: An entry is NaN or infinite.
    """
    if (activations is None) == (covariance is None):
        raise ConfigError("give activations or covariance, one of the two.")
    if not (math.isfinite(damping) and damping > 0.0):
        raise ConfigError(f"damping must be a positive number, got {damping!r}.")
    given = to_double(activations if activations is not None else covariance)  # type: ignore[arg-type]
    if not bool(given.isfinite().all()):
        raise NonFiniteError("the inputs' activations or covariance hold NaN or infinity.")
    if activations is not None:
        rows = given.reshape(-1, given.shape[-1]) / math.sqrt(given.numel() / given.shape[-1])
        size = rows.shape[-1]
        level = float(rows.square().sum()) / size
        _require_energy(level)
        ridge = math.sqrt(damping * level) * torch.eye(size, dtype=rows.dtype, device=rows.device)
        return thin_qr(torch.cat([rows, ridge]))[1]
    size = given.shape[-1]
    if given.shape != (size, size) or not torch.allclose(given, given.mT, rtol=1e-4, atol=1e-6):
        raise GeometryError(
            f"a covariance must be a symmetric (n, n) matrix, got shape {tuple(given.shape)}.",
            hint="Activations (samples, n) are given as such.",
        )
    level = float(given.diagonal().sum()) / size
    _require_energy(level)
    ridge = damping * level * torch.eye(size, dtype=given.dtype, device=given.device)
    factor, info = torch.linalg.cholesky_ex(0.5 * (given + given.mT) + ridge, upper=True)
    if bool(info):
        raise GeometryError(
            "a covariance must be positive semidefinite, and this one is not.",
            hint="Give the second moment of inputs, or a larger damping.",
        )
    upper: Tensor = factor
    return upper


def _require_energy(level: float) -> None:
    if level <= 0.0:
        raise GeometryError(
            "the inputs of the layer are all zero, so they weigh nothing.",
            hint="Leave the layer's inputs out.",
        )


@torch.no_grad()
def nearest_low_rank(
    matrix: Tensor | RowBlocks,
    rank: int | None = None,
    *,
    energy: float | None = None,
    factor: Tensor | None = None,
    oversampling: int = 8,
    power_iterations: int = 3,
    seed: int = 0,
) -> LowRank | None:
    r"""Find X of rank at most r that minimises :math:`\|(D - X) R^T\|_F`.

    By the randomized range finder with power iterations (Halko, Martinsson and Tropp,
    arXiv:0909.4061, algorithms 4.4 and 5.1): with M = D Rᵀ, an orthonormal basis Q of
    :math:`M (M^T M)^q \Omega` for a Gaussian :math:`\Omega` of r + oversampling columns, then the
    SVD of the small QᵀM. By Eckart and Young the truncated SVD of M is the minimiser, and
    X = (its product) R^-T. D is read q + 2 times, and X is exactly an orthogonal projection of M,
    so ``unexplained`` is what it says, whatever the sketch missed.

    Args:
        matrix: D, ``(m, n)``.
        rank: The largest rank allowed; None for any, if an energy is given.
        energy: In (0, 1]: take the smallest rank with :math:`\|X\|^2 \ge energy\,\|D\|^2`, if one
            up to ``rank`` is enough, and ``rank`` if not.
        factor: R, upper triangular and invertible ``(n, n)``, see :func:`input_factor`; None for
            the identity.
        oversampling: Columns of the sketch beyond the rank, at least 0.
        power_iterations: q, at least 0. Where no singular value stands out, 2 leave an error up
            to 3% above the least possible, and 3 one within 1%.
        seed: Of Omega.

    Returns:
        The nearest matrix, of a rank that D has numerically: directions of rounding are left out.
        None where D = 0.

    Raises:
        ConfigError: An argument is out of its range.
        GeometryError: ``factor`` has another shape than (n, n).
        NonFiniteError: D holds NaN or infinity.
    """
    _check(rank, energy, oversampling, power_iterations)
    source = matrix if isinstance(matrix, RowBlocks) else RowBlocks.of(matrix)
    if factor is not None and factor.shape != (source.shape[1], source.shape[1]):
        raise GeometryError(
            f"the input factor must have shape {(source.shape[1], source.shape[1])} for a matrix "
            f"of shape {source.shape}, got {tuple(factor.shape)}."
        )
    weighted = _Weighted(source, None if factor is None else to_double(factor))
    smallest = min(source.shape)
    limit = smallest if rank is None else min(rank, smallest)
    width = limit if rank is not None else min(_FIRST_RANK, limit)
    while True:
        sketch = min(width + oversampling, smallest)
        u, s, vh = _randomized_svd(weighted, sketch, power_iterations, seed)
        if weighted.norm == 0.0:
            return None
        kept = _kept(s[:width], weighted.norm, energy, source.shape)
        enough = energy is None or float(s[:kept].square().sum()) >= energy * weighted.norm**2
        if enough or width == limit:
            break
        width = min(2 * width, limit)
    return _finish(weighted, u[:, :kept], s[:kept], vh[:kept])


def _check(rank: int | None, energy: float | None, oversampling: int, iterations: int) -> None:
    if rank is None and energy is None:
        raise ConfigError("give a rank, an energy, or both.")
    for name, value, least in (
        ("rank", rank, 1),
        ("oversampling", oversampling, 0),
        ("power_iterations", iterations, 0),
    ):
        wrong = isinstance(value, bool) or not isinstance(value, int) or value < least
        if value is not None and wrong:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ConfigError(f"energy must lie in (0, 1], got {energy!r}.")


class _Weighted:
    """M = D Rᵀ as an operator, and the norms of M and D that fall out of the first pass."""

    def __init__(self, source: RowBlocks, factor: Tensor | None) -> None:
        self.source, self.factor = source, factor
        self.norm = self.plain_norm = math.nan

    def spread(self, x: Tensor) -> Tensor:
        """Rᵀ x."""
        return x if self.factor is None else self.factor.mT @ x

    def gather(self, x: Tensor) -> Tensor:
        """R x."""
        return x if self.factor is None else self.factor @ x

    def measure(self) -> None:
        """One pass for the norms; it also finds NaN before anything is computed from it."""
        plain = weighted = 0.0
        for _, block in self.source.blocks():
            plain += float(block.square().sum())
            if self.factor is not None:
                weighted += float((block @ self.factor.mT).square().sum())
        if not math.isfinite(plain + weighted):
            raise NonFiniteError("the matrix holds NaN, infinity or values too large to square.")
        self.plain_norm = math.sqrt(plain)
        self.norm = self.plain_norm if self.factor is None else math.sqrt(weighted)

    def times(self, x: Tensor) -> Tensor:
        """M x."""
        thin = self.spread(x)
        return torch.cat([block @ thin for _, block in self.source.blocks()])

    def gram_times(self, x: Tensor) -> Tensor:
        """Mᵀ M x, in one pass."""
        thin = self.spread(x)
        total = x.new_zeros(self.source.shape[1], x.shape[1])
        for _, block in self.source.blocks():
            total += block.mT @ (block @ thin)
        return self.gather(total)

    def transpose_times(self, y: Tensor) -> Tensor:
        """Mᵀ y."""
        total = y.new_zeros(self.source.shape[1], y.shape[1])
        for start, block in self.source.blocks():
            total += block.mT @ y[start : start + block.shape[0]]
        return self.gather(total)


def _randomized_svd(
    matrix: _Weighted, width: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    if math.isnan(matrix.norm):
        matrix.measure()
    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    columns = matrix.source.shape[1]
    sketch = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    sketch = sketch.to(matrix.source.read(0, 1).device)
    for _ in range(iterations):
        # Orthonormal between the passes: powers of M alone would drown the small directions.
        sketch = thin_qr(matrix.gram_times(sketch))[0]
    basis = thin_qr(matrix.times(sketch))[0]
    core = matrix.transpose_times(basis).mT
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    return basis @ u, s, vh


def _kept(s: Tensor, norm: float, energy: float | None, shape: tuple[int, int]) -> int:
    """How many directions: none of rounding, and no more than the energy needs."""
    rank = max(1, int(numerical_rank(s, *shape, torch.float64)))
    if energy is None:
        return rank
    enough = s[:rank].square().cumsum(0) >= energy * norm**2
    return min(rank, int((~enough).sum()) + 1)


def _finish(matrix: _Weighted, u: Tensor, s: Tensor, vh: Tensor) -> LowRank:
    root = s.sqrt()
    b, a = u * root, root[:, None] * vh
    unexplained = max(0.0, 1.0 - float(s.square().sum()) / matrix.norm**2)
    plain = unexplained
    if matrix.factor is not None:
        # A Rᵀ = root vh.
        a = torch.linalg.solve_triangular(matrix.factor.mT, a, upper=False, left=False)
        # ||D - X||² = sum over blocks, since X is no projection of D in this norm.
        error = 0.0
        for start, block in matrix.source.blocks():
            error += float((block - b[start : start + block.shape[0]] @ a).square().sum())
        plain = error / matrix.plain_norm**2
    return LowRank(LoRAPoint(b, a), s, matrix.norm, unexplained, plain)
