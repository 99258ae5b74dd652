"""Linear layers whose frozen weight is kept in few bits, with an adapter beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext.adapters import recompute
from gauge_ext.adapters.additive import AdditiveLayer
from gauge_ext.adapters.branches import Branch, low_rank
from gauge_ext.adapters.layer import AdaptedLayer
from gauge_ext.errors import AdapterStateError


@runtime_checkable
class Dequantizable(Protocol):
    """What a linear layer of any library needs in order to carry an adapter on its weight in bits.

    Its forward is left as it is; the weight is asked for where the numbers themselves are needed,
    by DoRA and by merging.
    """

    in_features: int
    out_features: int

    def dequantize(self) -> Tensor:
        """Return the weight that the layer multiplies with, ``(out, in)``, floating-point."""


def _weight_of_torchao(layer: nn.Module) -> Tensor:
    weight: Any = layer._parameters["weight"]
    decoded: Tensor = weight.dequantize()
    return decoded


def _weight_of_bitsandbytes(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = layer._parameters["weight"]
    if weight.quant_state is None:
        raise AdapterStateError(
            "the weight of this bitsandbytes layer has not been quantized yet.",
            hint='Move the model to its device, for example model.to("cpu"), and go on then.',
        )
    decoded: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return decoded


def _weight_of_own(layer: nn.Module) -> Tensor:
    return cast("Dequantizable", layer).dequantize()


def _reader_for(kind: type[nn.Module], weight: object) -> Callable[[nn.Module], Tensor] | None:
    """Return what reads the weight of a layer of class ``kind``; None where it is no such layer.

    Both libraries are known by what they leave on the layer, since neither is imported here:
    torchao exchanges the weight of an ``nn.Linear`` for a tensor of its own class, bitsandbytes
    exchanges the layer.
    """
    if kind is nn.Linear:
        return _weight_of_torchao if isinstance(weight, Tensor) and is_encoded(weight) else None
    if any(
        k.__name__ == "Linear4bit" and k.__module__.startswith("bitsandbytes.")
        for k in kind.__mro__
    ):
        return _weight_of_bitsandbytes
    has_sizes = issubclass(kind, nn.Module) and callable(getattr(kind, "dequantize", None))
    return _weight_of_own if has_sizes else None


def is_encoded(tensor: Tensor) -> bool:
    """Say whether ``tensor`` holds codes of numbers, which ``tensor.dequantize()`` decodes."""
    return type(tensor).dequantize is not Tensor.dequantize


class LoRAQuantized(AdditiveLayer):
    r"""A linear layer on a quantized weight with a LoRA adapter (arXiv:2305.14314, equation 5).

    .. math:: y = \mathrm{base}(x) + s\,(x \circ M / (1 - p))\, A^T B^T

    It stands in for an ``nn.Linear`` whose weight is a tensor that defines ``dequantize``, as those
    of torchao do, for ``Linear4bit`` of bitsandbytes, and for every module that is
    :class:`Dequantizable`. The layer's own forward does the base product, by whatever kernels it
    has; ``lora_A`` (rank, in) and ``lora_B`` (out, rank) are floating-point.

    A merge decodes the weight and adds the update, and the sum stays floating-point: encoding it
    again would lose again what training had won. ``unmerge`` puts the very bits back. Whoever wants
    few bits after a merge quantizes the merged model by the tool that made the base. A module that
    is only Dequantizable has no place for such a weight, so its merge is refused.
    """

    is_linear = True

    in_features: int
    out_features: int

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Say whether ``module`` is a linear layer on a weight that has to be decoded."""
        if isinstance(module, AdaptedLayer):
            return False
        if _reader_for(type(module), module._parameters.get("weight")) is None:
            return False
        return hasattr(module, "in_features") and hasattr(module, "out_features")

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Say why ``module`` cannot carry the adapter, or return None where it can."""
        if "forward" in vars(module):
            return "its forward was replaced on the object (by accelerate's hooks, perhaps)"
        return None

    @classmethod
    def factor_shapes(cls, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``(rank, in)`` and ``(out, rank)``."""
        return (rank, module.in_features), (module.out_features, rank)

    @property
    def base_weight(self) -> Tensor:
        """The weight, ``(out, in)``: decoded anew at each call, or the merged one."""
        weight = self._parameters.get("weight")
        if self.__dict__.get("merged", False):
            return cast("Tensor", weight)
        reader = _reader_for(type(self).base_class, weight)
        if reader is None:
            raise AdapterStateError(
                "the weight of this layer was quantized when the adapter was put on, and is not "
                "any more.",
                hint="Attach the adapter again.",
            )
        decoded = reader(self)
        expected = (self.out_features, self.in_features)
        if tuple(decoded.shape) != expected or not decoded.is_floating_point():
            raise AdapterStateError(
                f"dequantize() must return a floating-point weight {expected}, got "
                f"{decoded.dtype} {tuple(decoded.shape)}."
            )
        return decoded.detach()

    def merged_parameters(self, *, safe: bool = True) -> dict[str, Tensor]:
        """Return the decoded weight with the update in it, and the bias: see MergeableLayer."""
        base = type(self).base_class
        if not issubclass(base, nn.Linear):
            raise AdapterStateError(
                f"a {base.__name__} keeps no weight that an update could be added to.",
                hint="Put an nn.Linear with its dequantized weight in its place, and merge that.",
            )
        return super().merged_parameters(safe=safe)

    def to_base(self) -> nn.Module:
        """Drop the adapter; a merged layer is a plain ``nn.Linear`` from now on."""
        merged = self.merged
        base = super().to_base()
        if merged:
            base.__class__ = nn.Linear
            # What the library had left on the layer for its own kernels, printing and saving.
            for name in vars(base).keys() - vars(nn.Linear(1, 1, device="meta")).keys():
                delattr(base, name)
        return base

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output.

        Args:
            x: ``(*batch, in)``.

        Returns:
            ``(*batch, out)``, of the base's output's dtype.
        """
        bias = cast("Tensor | None", getattr(self, "bias", None))
        if self.merged:
            return F.linear(x, cast("Tensor", self.weight), bias)
        if not self.has_branch:
            return self.base_output(x, with_bias=True)
        output = partial(self.adapted_output, bias=bias)
        return recompute.call(output, x) if self.recomputes_input else output(x)

    def base_output(self, x: Tensor, *, with_bias: bool) -> Tensor:
        """Return the base's own output; its bias is taken off again where it is not wanted."""
        y = cast("Tensor", type(self).base_class.forward(self, x))
        bias = cast("Tensor | None", getattr(self, "bias", None))
        return y if with_bias or bias is None else y - bias

    def branch_output(self, x: Tensor, branch: Branch) -> Tensor:
        """Return the low-rank product, ``(*batch, out)``."""
        return low_rank(x, branch)
