"""``gauge-ext regauge``: the same adapter with other factors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gauge_ext.cli import options
from gauge_ext.cli.console import print_json, stdout, working
from gauge_ext.cli.problems import blame, explains_errors
from gauge_ext.errors import WriteError

if TYPE_CHECKING:
    from gauge_ext.checkpoint import AdapterCheckpoint, LayerRegauging


class GaugeChoice(StrEnum):
    """The gauges to choose from, ``gauge_ext.geometry.GAUGES``."""

    SVD = "svd"
    BALANCED = "balanced"
    EQUAL_ENERGY = "equal_energy"
    LEFT = "left"
    PIVOT = "pivot"


@explains_errors
def regauge(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="The adapter's folder, in the PEFT format.", show_default=False
        ),
    ],
    gauge: Annotated[
        GaugeChoice,
        typer.Option(
            help="svd: factors in order of importance, for pruning and identity. balanced: least "
            "norms, for int8 and int4. equal_energy: all ranks weigh the same, for bfloat16. "
            "left: lora_B orthonormal. pivot: rank rows of lora_B are a unit matrix over the "
            "scaling.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The folder to write. An adapter that lies there is replaced.",
            show_default=False,
        ),
    ],
    as_json: options.Json = False,
) -> None:
    """Rewrite an adapter's factors in a canonical gauge.

    scaling * lora_B * lora_A, and so every output of the adapted model, stays the same to the
    rounding of the factors; rank, scaling and format stay as they are. Optimizer states do not
    move along.
    """
    with working("regauging"):
        from gauge_ext.checkpoint import read_adapter, regauging_report, write_adapter
        from gauge_ext.checkpoint import regauge as change

        with blame("DIR"):
            before = read_adapter(adapter)
        with blame("--gauge", {WriteError: "--out"}):
            after = change(before, gauge.value)
            write_adapter(after.config, after.tensors, out)
        layers = regauging_report(before, after)
    if as_json:
        print_json(_to_dict(out, gauge, after, layers))
        return
    change_max = max(layer.change for layer in layers)
    stdout().print(
        f"{out}: {len(layers)} layers in the gauge {gauge.value}\n"
        f"largest change of an update by rounding: {change_max:.1e} of its norm\n"
        f"cost of rounding the factors, over that of the best gauge: "
        f"{_mean(layer.factor_before for layer in layers):.3f} before, "
        f"{_mean(layer.factor_after for layer in layers):.3f} now\n"
        f"sha256: {after.sha256}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _mean(factors: Iterable[float]) -> float:
    """The mean over layers of the root of their quantisation factors: of errors, not squares."""
    roots = [math.sqrt(factor) for factor in factors]
    return math.fsum(roots) / len(roots)


def _to_dict(
    out: Path, gauge: GaugeChoice, after: AdapterCheckpoint, layers: tuple[LayerRegauging, ...]
) -> dict[str, Any]:
    return {
        "path": str(out),
        "gauge": gauge.value,
        "sha256": after.sha256,
        "layers": [
            {
                "name": layer.name,
                "rank": layer.rank,
                "change": layer.change,
                "quantisation_factor_before": _finite(layer.factor_before),
                "quantisation_factor_after": _finite(layer.factor_after),
            }
            for layer in layers
        ],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
