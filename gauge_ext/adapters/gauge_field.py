"""The seed's gauge field: an adapter that knows its own geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gauge_ext.adapters.low_rank import LowRankAdapter, set_parameter
from gauge_ext.errors import ConfigError, GeometryError, NonFiniteError
from gauge_ext.geometry.connection import connection_form
from gauge_ext.geometry.connection import horizontal_lift as lift
from gauge_ext.geometry.gauge import to_gauge
from gauge_ext.geometry.linalg import to_double
from gauge_ext.geometry.low_rank import nearest_low_rank
from gauge_ext.geometry.point import LoRAPoint, LoRATangent
from gauge_ext.geometry.transport import MIN_OVERLAP, overlap, transport

_STRAIGHT = "Give more checkpoints between them, a lower rank, or none for the straight line."


@dataclass(frozen=True, eq=False)
class ParallelPath:
    r"""A path of updates from the base to a target, and the frame carried along it.

    The path begins at the base, X = 0, where there is no frame; its first leg is the straight line
    :math:`t X_1`, along which the frame is :math:`\sqrt t\,(B_1, A_1)`, exactly horizontal. From
    node to node the frame goes by :func:`~gauge_ext.geometry.transport.transport`.

    Attributes:
        frames: At each node the carried factors, ``(s phi, A)`` in float64; the last node is the
            target. Their rank is that of the offset, where it is less than the module's.
        unexplained: At each node ``||(W_k - W_0) - X_k||^2 / ||W_k - W_0||^2``, what the rank
            leaves out.
        overlaps: Between neighbours: :func:`~gauge_ext.geometry.transport.overlap`, from 0 to 1.
    """

    frames: tuple[LoRAPoint, ...]
    unexplained: tuple[float, ...]
    overlaps: tuple[float, ...]

    @property
    def end(self) -> LoRAPoint:
        """The factors at the target."""
        return self.frames[-1]

    @property
    def residual(self) -> float:
        """``||(W_1 - W_0) - X|| / ||W_1 - W_0||`` at the target."""
        return math.sqrt(self.unexplained[-1])

    def at(self, t: float) -> LoRAPoint:
        """Return the factors at time t of the first leg, ``sqrt(t) (B_1, A_1)``.

        Args:
            t: From 0, the base itself, to 1, the first node.

        Raises:
            ConfigError: t is outside [0, 1].
        """
        if not 0.0 <= t <= 1.0:
            raise ConfigError(f"t must lie in [0, 1], got {t}.")
        first = self.frames[0]
        return LoRAPoint(first.B * math.sqrt(t), first.A * math.sqrt(t))


class LoRAGaugeField(LowRankAdapter):
    r"""A linear layer with a low-rank update, :math:`W = W_0 + s\,\phi A`.

    The seed's class with the seed's names. ``gauge_field["A"]`` (rank, in) and
    ``gauge_field["phi"]`` (out, rank) are the factors that LoRA calls A and B. Neither is a gauge
    field in the geometer's sense: :math:`(\phi, A)` is a frame, all frames of one update are
    related by GL(r), and the gauge field of that bundle is its connection, :meth:`connection`. See
    ``docs/math.md``.

    Where this differs from the seed's listing: phi starts at zero, so that a fresh module computes
    what its base does; the base is frozen; it need not be square; and the update acts as the weight
    :math:`W_0 + \phi A` of the seed's formula acts, ``x @ (phi @ A).T``, where the listing had
    ``x @ (phi @ A)``.

    Args:
        base_model: See :class:`~gauge_ext.adapters.low_rank.LowRankAdapter`; an ``nn.Linear``, or a
            module with a ``weight`` (out, in) or at least a ``dim``.
        rank: r.
        scaling: s.

    Raises:
        TargetError: The base has neither weight nor dim, or is an adapter.
        ConfigError: The rank or the scaling cannot be used.
    """

    gauge_field: nn.ParameterDict

    def __init__(self, base_model: nn.Module, rank: int = 8, *, scaling: float = 1.0) -> None:
        super().__init__(base_model, rank, scaling)
        a, phi = self._new_factors(rank)
        self.gauge_field = nn.ParameterDict({"A": nn.Parameter(a), "phi": nn.Parameter(phi)})

    @property
    def lora_A(self) -> Tensor:
        """``gauge_field["A"]``."""
        factor: Tensor = self.gauge_field["A"]
        return factor

    @property
    def lora_B(self) -> Tensor:
        """``gauge_field["phi"]``."""
        factor: Tensor = self.gauge_field["phi"]
        return factor

    def assign(self, point: LoRAPoint) -> None:
        """Make ``(s phi, A) = (point.B, point.A)``, see the base class."""
        set_parameter(self.gauge_field, "phi", to_double(point.B) / self.scaling)
        set_parameter(self.gauge_field, "A", point.A)

    def connection(self, dphi: Tensor, dA: Tensor, *, weight: float = 0.5) -> Tensor:
        r"""Return the connection form at the present factors on a motion of them.

        .. math:: \omega(\dot\phi, \dot A) = w\,\dot A A^+ - (1 - w)\,\phi^+\dot\phi

        It is the part of the motion that moves the frame and not the update: the vertical part is
        :math:`(-\phi\omega, \omega A)`, and :math:`\omega = 0` says that the motion is parallel.

        Args:
            dphi: ``(out, r)``, such as a gradient or a step of an optimizer.
            dA: ``(r, in)``.
            weight: w; one half is the connection of the invariant metric.

        Returns:
            ω, ``(r, r)``.

        Raises:
            GeometryError: The update's rank is below r, as it is before training, or a shape is
                wrong.
        """
        point = self.point()
        moved = LoRATangent(dphi.detach() * self.scaling, dA.detach()).to(point.dtype, point.device)
        return connection_form(point, moved, weight)

    def horizontal_lift(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the motion of the factors that moves the update by Z and the frame not at all.

        .. math:: S = \tfrac12 B^+ Z A^+, \quad \dot B = Z A^+ - B S, \quad \dot A = B^+ Z - S A

        with B = s phi. If Z is no tangent vector, the update moves by its tangent part,
        :math:`P_U Z + Z P_V - P_U Z P_V`.

        Args:
            Z: A change of the weight, ``(out, in)``.

        Returns:
            dphi ``(out, r)`` and dA ``(r, in)``.

        Raises:
            GeometryError: The update's rank is below r, as it is before training, or Z has another
                shape.
        """
        point = self.point()
        lifted = lift(point, Z.detach().to(point.device, point.dtype))
        return lifted.B / self.scaling, lifted.A

    def compute_parallel_path(
        self,
        base_weights: Tensor,
        target_weights: Tensor,
        checkpoints: Sequence[Tensor] = (),
    ) -> ParallelPath:
        r"""Find the updates of rank r along a path of weights, and carry the frame along it.

        At each node :math:`X_k` is the best approximation of rank at most r to
        :math:`W_k - W_0`, by :func:`~gauge_ext.geometry.low_rank.nearest_low_rank`; see
        :class:`ParallelPath` for what lies between. Without checkpoints the path is the straight
        line, the first frame is the last, and it is in the svd gauge.

        Args:
            base_weights: W_0, ``(out, in)``.
            target_weights: The weights to arrive at, ``(out, in)``.
            checkpoints: Weights passed on the way, in order, without the base and the target.

        Raises:
            GeometryError: A shape is wrong; or, with checkpoints, two neighbouring updates differ
                in rank or have too little in common.
            NonFiniteError: A weight holds NaN or infinity.
        """
        found = [
            self._nearest(base_weights, weights, place)
            for place, weights in enumerate((*checkpoints, target_weights))
        ]
        nodes = [node for node, _ in found]
        overlaps = [
            self._overlap(nodes[place], nodes[place + 1], place) for place in range(len(nodes) - 1)
        ]
        return ParallelPath(
            frames=tuple(transport(nodes)) if overlaps else tuple(nodes),
            unexplained=tuple(share for _, share in found),
            overlaps=tuple(overlaps),
        )

    def execute_parallel_transport(self, path: ParallelPath) -> Tensor:
        """Set the factors to those at the end of ``path`` and return the weights they make.

        Directions that the target leaves unused start anew, with phi zero and a random row of A:
        where both are zero, no gradient would ever reach them.

        Returns:
            ``W_0 + s phi A``, ``(out, in)``, in the dtype of the base's weight.

        Raises:
            GeometryError: The path's factors have another shape, or a higher rank, than these.
            AdapterStateError: The base has no weight.
        """
        weight, end = self._base_weight(), path.end
        if end.shape != tuple(weight.shape) or end.rank > self.rank:
            raise GeometryError(
                f"the path ends at factors of rank {end.rank} and shape {end.shape}; this module "
                f"has rank {self.rank} and shape {tuple(weight.shape)}."
            )
        self.assign(self.filled(end))
        return self.merged_weight()

    def parallel_transport(
        self, target_weights: Tensor, checkpoints: Sequence[Tensor] = ()
    ) -> Tensor:
        """Take up a fine-tune: transport the factors from the base's weights to ``target_weights``.

        :meth:`compute_parallel_path` from the base's weight, then
        :meth:`execute_parallel_transport`, whose result it returns. The result equals the target
        where ``target - base`` has at most rank r, and is the nearest there is otherwise; the
        path's ``residual`` says how near.

        Args:
            target_weights: W_1, ``(out, in)``.
            checkpoints: Weights on the way; none for the straight line.

        Returns:
            ``W_0 + s phi A``, ``(out, in)``.

        Raises:
            AdapterStateError: The base has no weight.
            GeometryError: See :meth:`compute_parallel_path`.
            NonFiniteError: See :meth:`compute_parallel_path`.
        """
        path = self.compute_parallel_path(self._base_weight(), target_weights, checkpoints)
        return self.execute_parallel_transport(path)

    @staticmethod
    def _overlap(here: LoRAPoint, there: LoRAPoint, place: int) -> float:
        """How near two nodes are; refuses where no frame can be carried between them."""
        try:
            found = float(overlap(here, there))
        except GeometryError as error:
            raise GeometryError(
                f"no frame can be carried from node {place} of the path to the next: "
                f"{error.message}",
                hint=_STRAIGHT,
            ) from error
        if found < MIN_OVERLAP:
            raise GeometryError(
                f"no frame can be carried from node {place} of the path to the next: their "
                f"updates have an overlap of {found:.3g}, and {MIN_OVERLAP:.3g} is needed.",
                hint=_STRAIGHT,
            )
        return found

    def _nearest(self, base: Tensor, weights: Tensor, place: int) -> tuple[LoRAPoint, float]:
        """The balanced factors of the nearest update, and the share of the offset it leaves out."""
        shape = (self.out_features, self.in_features)
        if base.shape != shape or weights.shape != shape:
            raise GeometryError(
                f"the weights of a path must have shape {shape}, got {tuple(base.shape)} for the "
                f"base and {tuple(weights.shape)} at node {place}."
            )
        device = self.lora_A.device
        offset = to_double(weights.detach().to(device)) - to_double(base.detach().to(device))
        try:
            found = nearest_low_rank(offset, self.rank)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"the weights at node {place}, or the base's, cannot be used: {error.message}"
            ) from error
        if found is None:  # no offset, so one zero direction says it all
            return LoRAPoint(offset[:, :1], offset[:1]), 0.0
        return to_gauge(found.point, "svd").point, found.unexplained

    def extra_repr(self) -> str:
        """Say the rank and the scaling."""
        return f"rank={self.rank}, scaling={self.scaling:g}"
