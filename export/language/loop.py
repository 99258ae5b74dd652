"""The graphs of a folder in a loop, against the plain model without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.export.adapters.feeds import adapter_feeds
from gauge_ext.export.adapters.graph import bare_copy
from gauge_ext.export.adapters.validate import as_fed
from gauge_ext.export.compare import compare
from gauge_ext.export.language.generate import OnnxGenerator
from gauge_ext.export.report import CaseResult, ValidationReport
from gauge_ext.export.tolerance import Tolerance
from gauge_ext.export.validate import evaluation_copy, float_dtypes, usual_tolerance
from gauge_ext.models import lora_layers
from gauge_ext.models.attach import unwrap

_ADAPTER = "of the model"


@dataclass(frozen=True)
class Sample:
    """Tokens that both see, the graphs piece by piece.

    Attributes:
        name: What is done.
        source: What :meth:`OnnxGenerator.decoder` takes.
        source_mask: Its mask; None where there is none.
        ids: Tokens ``(batch, length)``.
        mask: ``(batch, length)``, 0 where a token is padding.
        pieces: Lengths that add up to ``length``: what each run of the graph is fed.
        whole: What the plain model is called with for some ids and their mask.
        sizes: For the report.
    """

    name: str
    source: Tensor
    source_mask: Tensor | None
    ids: Tensor
    mask: Tensor
    pieces: tuple[int, ...]
    whole: Callable[[Tensor, Tensor], dict[str, Tensor]]
    sizes: dict[str, int]


def run_loop(
    folder: Path, graph: str, model: nn.Module, sample: Sample, tolerance: Tolerance | None
) -> ValidationReport:
    """Feeds the tokens of a sample to the graphs of a folder, each piece on the present before it.

    Graphs with inputs for adapters run without an adapter and, where the model has one, with it.

    Args:
        folder: The folder.
        graph: File name of the decoder's graph.
        model: The model, its adapters beside the weights or merged.
        sample: The tokens.
        tolerance: The bar; by default by dtype.
    """
    generator = OnnxGenerator(folder)
    source_mask = None if sample.source_mask is None else sample.source_mask.numpy()
    pieces = list(
        zip(sample.ids.split(sample.pieces, 1), sample.mask.split(sample.pieces, 1), strict=True)
    )
    seen = sample.mask.bool()
    cases = []
    for suffix, reference, adapter in variants(generator, model):
        with torch.no_grad():
            whole = sample.whole(sample.ids, sample.mask)
            expected = reference(**whole, use_cache=False).logits
        session = generator.decoder(
            sample.source.numpy(), attention_mask=source_mask, adapter=adapter
        )
        found = [
            torch.from_numpy(session.feed(tokens.numpy(), mask.numpy())) for tokens, mask in pieces
        ]
        bar = tolerance or usual_tolerance(float_dtypes([*reference.parameters(), expected]))
        difference = compare("logits", expected[seen], torch.cat(found, 1)[seen], bar, logits=True)
        cases.append(CaseResult(sample.name + suffix, sample.sizes, (difference,)))
    return ValidationReport(folder / graph, generator.runtime, tuple(cases))


def variants(generator: OnnxGenerator, model: nn.Module) -> Iterator[tuple[str, Any, str | None]]:
    """What the graphs have to equal.

    Args:
        generator: The graphs; if they have inputs for adapters, the model's is added.
        model: The model, its adapters beside the weights or merged.

    Yields:
        A suffix for names, a plain model, and what the graphs call its adapter: first the base and
        then, where the model has an adapter, the model with it; one where the graphs are merged.
    """
    if not generator.tables:
        yield "", evaluation_copy(model), None
        return
    yield "", bare_copy(unwrap(model)), None
    if lora_layers(model):
        feeds = {name: adapter_feeds(table, model) for name, table in generator.tables.items()}
        source = feeds if generator.is_encoder_decoder else next(iter(feeds.values()))
        generator.add(_ADAPTER, source)
        yield ", with adapter", as_fed(generator.tables.values(), model), _ADAPTER
