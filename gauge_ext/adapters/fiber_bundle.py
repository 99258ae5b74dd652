"""The seed's fibre bundle: an update as a sum of rank-one fibres, each behind a gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from gauge_ext.adapters.low_rank import LowRankAdapter, set_parameter
from gauge_ext.adapters.merging import accumulation_dtype
from gauge_ext.adapters.wrapped import WrappedAdapter
from gauge_ext.errors import AdapterStateError, ConfigError
from gauge_ext.geometry.gauge import to_gauge
from gauge_ext.geometry.linalg import to_double
from gauge_ext.geometry.low_rank import nearest_low_rank
from gauge_ext.geometry.point import LoRAPoint


@dataclass(frozen=True, eq=False)
class Fiber:
    r"""One fibre: the rank-one map :math:`x \mapsto \gamma\,s\,b\,(a^T x)`; a view, not a copy.

    Attributes:
        b: Where it writes, ``(out,)``.
        a: What it reads, ``(in,)``.
        gate: gamma, ``()``.
        scaling: s.
    """

    b: Tensor
    a: Tensor
    gate: Tensor
    scaling: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the fibre's contribution, ``(*batch, out)``, to the output at x."""
        return (x.to(self.a.dtype) @ self.a).unsqueeze(-1) * (self.scaling * self.gate * self.b)

    def norm(self) -> float:
        """The Frobenius norm of the fibre, its only singular value."""
        sizes = self.scaling * self.gate.detach() * self.b.detach().norm() * self.a.detach().norm()
        return float(sizes.abs())


class LoRAFiberBundle(LowRankAdapter):
    r"""A linear layer with an update of gated rank-one fibres.

    .. math:: W = W_0 + s \sum_{i=1}^{r} \gamma_i\, b_i a_i^T

    The seed's class with the seed's names, made of the fibres of its section 5.2 (one term
    :math:`b_i a_i^T` each) and not of its listing, whose full-matrix fibres are
    :class:`FullFiberBundle` and amount to one matrix.

    Single fibres mean nothing in a general gauge: of all the changes of gauge that leave the update
    alone only permutations and scales keep it apart into the same terms. :meth:`gauge_fix` with
    "svd" makes them the singular triples, :math:`\gamma_i = 1`, and then keeping the first k is the
    best approximation of rank k (Eckart and Young), which is what :meth:`prune` does. The gradient
    of a gate is the first-order effect of its fibre on the loss:

    .. math:: \gamma_i\, \frac{\partial f}{\partial \gamma_i}
        = \Bigl\langle b_i, \frac{\partial f}{\partial b_i} \Bigr\rangle
        = \Bigl\langle a_i, \frac{\partial f}{\partial a_i} \Bigr\rangle
        = \sigma_i\, u_i^T \nabla_W f\, v_i \quad\text{in the svd gauge,}

    the sensitivity that AdaLoRA (arXiv:2303.10512) ranks triples by.

    Args:
        base_model: See :class:`~gauge_ext.adapters.low_rank.LowRankAdapter`; it is frozen.
        fiber_dim: r, the number of fibres.
        scaling: s.

    Attributes:
        gates: gamma, ``(r,)``, ones at first.
        frame: The b_i as columns, ``(out, r)``, zero at first.
        coframe: The a_i as rows, ``(r, in)``, random at first.

    Raises:
        TargetError: The base has neither weight nor dim, or is an adapter.
        ConfigError: The number of fibres or the scaling cannot be used.
    """

    gates: nn.Parameter
    frame: nn.Parameter
    coframe: nn.Parameter

    def __init__(self, base_model: nn.Module, fiber_dim: int = 8, *, scaling: float = 1.0) -> None:
        super().__init__(base_model, fiber_dim, scaling)
        a, b = self._new_factors(fiber_dim)
        self.gates = nn.Parameter(a.new_ones(fiber_dim))
        self.frame = nn.Parameter(b)
        self.coframe = nn.Parameter(a)

    @property
    def lora_A(self) -> Tensor:
        """The a_i as rows, ``(r, in)``."""
        return self.coframe

    @property
    def lora_B(self) -> Tensor:
        """The gated b_i as columns, ``(out, r)``."""
        return self.frame * self.gates

    @property
    def fiber_dim(self) -> int:
        """r, the number of fibres."""
        return self.rank

    @property
    def fibers(self) -> tuple[Fiber, ...]:
        """The fibres, each callable; the output is the base's plus the sum of theirs."""
        return tuple(
            Fiber(b, a, gate, self.scaling)
            for b, a, gate in zip(self.frame.unbind(1), self.coframe, self.gates, strict=True)
        )

    def assign(self, point: LoRAPoint) -> None:
        """Make ``(s B, A) = (point.B, point.A)`` with all gates 1, see the base class."""
        set_parameter(self, "frame", to_double(point.B) / self.scaling)
        set_parameter(self, "coframe", point.A)
        set_parameter(self, "gates", torch.ones_like(point.A[:, 0]))

    def importance(self) -> Tensor:
        r"""Return :math:`|\gamma_i\,\partial f / \partial \gamma_i|`, ``(r,)``.

        To first order, by how much the loss of the last backward pass changes when a fibre is
        taken out.

        Raises:
            AdapterStateError: The gates have no gradient.
        """
        if self.gates.grad is None:
            raise AdapterStateError(
                "the gates have no gradient to rate the fibres by.",
                hint="Run loss.backward() first, with gates.requires_grad on.",
            )
        return (self.gates.detach() * self.gates.grad).abs()

    def prune(self, keep: int | None = None, *, energy: float | None = None) -> float:
        r"""Keep the best few fibres: change to the svd gauge and drop the least singular values.

        No other k fibres, and no other matrix of rank k, are nearer to the update. The parameters
        are new ones, smaller; an optimizer has to be made anew.

        Args:
            keep: k, from 1 to the number of fibres.
            energy: Instead: keep the fewest whose share of :math:`\sum_i \sigma_i^2` is at least
                this, in (0, 1].

        Returns:
            :math:`\|X - X_k\|_F / \|X\|_F`, the relative error made.

        Raises:
            ConfigError: Not exactly one of the two is given, or it is out of its range.
            NonFiniteError: A factor holds NaN or infinity.
        """
        if (keep is None) == (energy is None):
            raise ConfigError(f"give keep or energy, one of the two; got {keep!r} and {energy!r}.")
        if keep is not None and not 1 <= keep <= self.rank:
            raise ConfigError(f"keep must lie between 1 and {self.rank} fibres, got {keep!r}.")
        if energy is not None and not 0.0 < energy <= 1.0:
            raise ConfigError(f"energy must lie in (0, 1], got {energy!r}.")
        point = self.gauge_fix("svd").point
        # In this gauge the squared norm of column i is sigma_i.
        shares = to_double(point.B).square().sum(0).square()
        total = float(shares.sum())
        if energy is not None:
            short = shares.cumsum(0) < energy * total * (1.0 - 1e-12)  # rounding of the sum
            keep = min(int(short.sum()) + 1, self.rank)
        self.assign(LoRAPoint(point.B[:, :keep], point.A[:keep]))
        return math.sqrt(float(shares[keep:].sum()) / total) if total > 0.0 else 0.0

    def extra_repr(self) -> str:
        """Say how many fibres there are, and the scaling."""
        return f"fiber_dim={self.fiber_dim}, scaling={self.scaling:g}"


class FullFiberBundle(WrappedAdapter):
    r"""The seed's listing to the letter: a base plus :math:`\sum_i F_i x` with full matrices F_i.

    A sum of linear maps is a linear map: r fibres of ``out * in`` parameters each say what
    :math:`F = \sum_i F_i`, one matrix, says, and each F_i gets the same gradient, that of F. So
    there is no low rank here and no fibre that means anything. The class is kept because the seed
    has it; :meth:`collapse` gives the one matrix and :meth:`to_bundle` the nearest update made of
    rank-one fibres.

    Args:
        base_model: See :class:`~gauge_ext.adapters.wrapped.WrappedAdapter`; it is frozen.
        fiber_dim: How many fibres.

    Attributes:
        fibers: ``nn.Linear`` each, zero at first; without a bias, of which there would be r for one
            as well.

    Raises:
        TargetError: The base has neither weight nor dim, or is an adapter.
        ConfigError: The number of fibres cannot be used.
    """

    def __init__(self, base_model: nn.Module, fiber_dim: int = 8) -> None:
        super().__init__(base_model)
        if isinstance(fiber_dim, bool) or not isinstance(fiber_dim, int) or fiber_dim < 1:
            raise ConfigError(f"fiber_dim must be a whole number of at least 1, got {fiber_dim!r}.")
        like = self._like()
        fresh = torch.zeros(
            fiber_dim, self.out_features, self.in_features, dtype=like.dtype, device=like.device
        )
        self.fibers = nn.ModuleList(_linear(weight.clone()) for weight in fresh)

    @property
    def fiber_dim(self) -> int:
        """The number of fibres."""
        return len(self.fibers)

    def update(self, x: Tensor) -> Tensor:
        """Return the sum of the fibres' outputs, ``(*batch, out)``, each computed by itself."""
        return torch.stack([fiber(x) for fiber in self.fibers]).sum(0)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ``sum_i F_i``, ``(out, in)``, in float32, or float64 if the fibres are."""
        weights = [cast("Tensor", fiber.weight) for fiber in self.fibers]
        dtype = accumulation_dtype(weights[0].dtype)
        return torch.stack([weight.to(dtype) for weight in weights]).sum(0)

    def collapse(self) -> nn.Linear:
        """Return the one layer, without a bias, that all the fibres together are."""
        return _linear(self.delta_weight().to(self._like().dtype))

    def to_bundle(self, fiber_dim: int) -> LoRAFiberBundle:
        """Return the nearest :class:`LoRAFiberBundle` on the same base, in the svd gauge.

        Args:
            fiber_dim: How many rank-one fibres.

        Raises:
            NonFiniteError: A fibre holds NaN or infinity.
        """
        bundle = LoRAFiberBundle(self.base_model, fiber_dim)
        if (found := nearest_low_rank(self.delta_weight(), fiber_dim)) is not None:
            bundle.assign(bundle.filled(to_gauge(found.point, "svd").point))
        return bundle

    def extra_repr(self) -> str:
        """Say how many fibres there are."""
        return f"fiber_dim={self.fiber_dim}"


def _linear(weight: Tensor) -> nn.Linear:
    """A layer without bias whose weight is this very tensor."""
    out, size = weight.shape
    layer = nn.Linear(size, out, bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer
