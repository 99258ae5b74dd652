"""The proof of a graph with adapter inputs: the base alone, and the base with an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gauge_ext.export.adapters.codes import decode
from gauge_ext.export.adapters.feeds import adapter_feeds
from gauge_ext.export.adapters.file import read_table
from gauge_ext.export.adapters.layers import bare_copy, with_factors
from gauge_ext.export.adapters.table import AdapterTable
from gauge_ext.export.report import ValidationReport
from gauge_ext.export.validate import Progress, validate_onnx
from gauge_ext.models import lora_layers


def validate_adapters(
    path: str | Path,
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    progress: Progress | None = None,
    **options: Any,
) -> ValidationReport:
    """Compares a graph with adapter inputs with a torch model: without and with its adapter.

    Where the graph stores factors in less than float32, torch computes with the very factors that
    the graph is fed: what is under test here is the graph. What rounding costs is measured by
    :func:`gauge_ext.export.write_onnx_adapter`.

    Args:
        path: The graph.
        model: The model it was made from, its adapters unmerged.
        example_inputs: See :func:`~gauge_ext.export.validate_onnx`, as for ``options``.
        progress: Called with what is being done and the share done.
        options: Those of :func:`~gauge_ext.export.validate_onnx`.

    Returns:
        One report; the cases with the adapter have names that say so.
    """
    adapted = bool(lora_layers(model))
    half = 0.5 if adapted else 1.0

    def first(what: str, share: float) -> None:
        if progress is not None:
            progress(what, half * share)

    def second(what: str, share: float) -> None:
        if progress is not None:
            progress(f"{what}, with adapter", 0.5 + 0.5 * share)

    base = validate_onnx(path, bare_copy(model), example_inputs, progress=first, **options)
    if not adapted:
        return base
    table = read_table(Path(path))
    twin = as_fed([table], model)
    found = validate_onnx(path, twin, example_inputs, progress=second, **options)
    cases = tuple(replace(case, name=f"{case.name}, with adapter") for case in found.cases)
    return replace(base, cases=base.cases + cases)


def as_fed(tables: Iterable[AdapterTable], model: nn.Module) -> nn.Module:
    """A copy of an adapted model that computes with the factors that its graphs are fed.

    Args:
        tables: Of the graphs, which may share the layers among them.
        model: The model, its adapters unmerged.
    """
    factors = {}
    layers = lora_layers(model)
    for table in tables:
        feeds = adapter_feeds(table, model)
        for name in layers:
            if (entry := table.inputs.get(name)) is not None:
                a, b = (
                    torch.from_numpy(decode(feeds[key], feeds.get(f"{key}.scale"), axis)).mT
                    for key, axis in ((entry.lora_A, 1), (entry.lora_B, 0))
                )
                factors[name] = (a, b)
    return with_factors(model, factors)
