"""What a combination is asked to be: the method, what it needs, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gauge_ext.errors import ConfigError

Method = Literal[
    "exact",
    "karcher",
    "bures",
    "procrustes",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "knots",
]
Space = Literal["entries", "knots"]

METHODS: tuple[Method, ...] = get_args(Method)
SPACES: tuple[Space, ...] = get_args(Space)

#: Averages of factors, which adapters must be alike for.
MEANS: tuple[Method, ...] = ("karcher", "bures", "procrustes")
#: Rules for one number at a time, which keep a share of them.
SPARSE: tuple[Method, ...] = ("ties", "dare_linear", "dare_ties", "magnitude_prune", "knots")

# Where signs are elected a negative weight has no meaning that two libraries agree on, and a mean
# with one may not exist.
_POSITIVE: tuple[Method, ...] = (*MEANS, "ties", "dare_ties", "knots")

# Below it, averaged factors lose about a third of the update or more: for two updates of rank one
# with overlaps c = <u, u'> = <v, v'> the mean misses sqrt((1-c)^2 / (2 + 2c^2)) of the sum.
MIN_ALIGNMENT = 0.5


@dataclass(frozen=True)
class Recipe:
    """How to combine adapters; it checks itself.

    Args:
        method: One of :data:`METHODS`; see :func:`gauge_ext.merging.combine`.
        rank: The largest rank of the result; None for what holds it all.
        energy: The share of the squared norm of the result to keep, in (0, 1]; the smallest rank
            that does. With ``rank`` too, the smaller of both.
        density: The share of entries that the methods of :data:`SPARSE` keep, in (0, 1].
        seed: Of the entries that DARE drops.
        space: What the methods of :data:`SPARSE` take for entries: those of the update itself, or
            its coordinates in the basis that KnOTS finds; "entries" unless the method is "knots".
        min_alignment: What the methods of :data:`MEANS` demand of each pair, in [0, 1].

    Raises:
        ConfigError: A value cannot be used; the message names it and what was expected.
    """

    method: Method = "exact"
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    seed: int = 0
    space: Space | None = None
    min_alignment: float = MIN_ALIGNMENT

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"method must be one of {', '.join(METHODS)}, got {self.method!r}.",
                hint='A weighted sum without loss is "exact".',
            )
        if self.rank is not None and (not _whole(self.rank) or self.rank < 1):
            raise ConfigError(
                f"rank must be a whole number of at least 1 or None, got {self.rank!r}."
            )
        if self.energy is not None:
            _share("energy", self.energy)
        if not _whole(self.seed) or self.seed < 0:
            raise ConfigError(f"seed must be a whole number of at least 0, got {self.seed!r}.")
        if not _real(self.min_alignment) or not 0.0 <= self.min_alignment <= 1.0:
            raise ConfigError(f"min_alignment must lie in [0, 1], got {self.min_alignment!r}.")
        self._check_sparse()

    def _check_sparse(self) -> None:
        if self.method not in SPARSE:
            for name in ("density", "space"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} means nothing for the method {self.method!r}, got "
                        f"{getattr(self, name)!r}.",
                        hint=f"It belongs to {', '.join(SPARSE)}.",
                    )
            return
        if self.density is None:
            raise ConfigError(
                f"the method {self.method!r} needs density, the share of entries to keep.",
                hint="0.2 is usual for TIES, 0.5 for DARE.",
            )
        _share("density", self.density)
        if self.space is not None and self.space not in SPACES:
            raise ConfigError(f"space must be one of {', '.join(SPACES)}, got {self.space!r}.")
        if self.method == "knots" and self.space == "entries":
            raise ConfigError(
                'the method "knots" is TIES in the space "knots", got space = "entries".',
                hint='For TIES on the entries of the update take the method "ties".',
            )

    @property
    def rule(self) -> Method:
        """The method without its space: "knots" is "ties" there."""
        return "ties" if self.method == "knots" else self.method

    @property
    def coordinates(self) -> Space:
        """The space in which the rule works."""
        return "knots" if self.method == "knots" else self.space or "entries"

    def check_weights(self, weights: Sequence[float], count: int) -> tuple[float, ...]:
        """Return the weights as floats, one for each of ``count`` adapters.

        Raises:
            ConfigError: There are none, too many or too few, one is not finite, or one is not
                positive where the method needs that.
        """
        if count == 0:
            raise ConfigError("there must be at least one adapter to combine, got none.")
        if len(weights) != count:
            raise ConfigError(
                f"each adapter needs one weight, got {count} adapters and {len(weights)} weights."
            )
        for weight in weights:
            if not _real(weight):
                raise ConfigError(f"weights must be finite numbers, got {weight!r}.")
            if weight <= 0 and self.method in _POSITIVE:
                raise ConfigError(
                    f"the method {self.method!r} needs positive weights, got {weight!r}.",
                    hint='Subtract adapters with the method "exact".',
                )
        return tuple(float(weight) for weight in weights)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _share(name: str, value: float) -> None:
    if not _real(value) or not 0.0 < value <= 1.0:
        raise ConfigError(f"{name} must lie in (0, 1], got {value!r}.")
