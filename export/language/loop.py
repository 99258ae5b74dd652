"""The graphs of a folder in a loop, against the plain model without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.export.adapters.feeds import adapter_feeds
from gauge_ext.export.adapters.layers import bare_copy
from gauge_ext.export.adapters.validate import as_fed
from gauge_ext.export.compare import compare
from gauge_ext.export.language.generate import OnnxGenerator
from gauge_ext.export.report import CaseResult, ValidationReport
from gauge_ext.export.tolerance import Tolerance
from gauge_ext.export.validate import evaluation_copy, float_dtypes, usual_tolerance
from gauge_ext.models import lora_layers
from gauge_ext.models.adapted import unwrap

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


@dataclass(frozen=True)
class Generated:
    """What the graphs wrote by themselves, greedily, beside torch's choices.

    Attributes:
        name: With which adapter.
        tokens: How many tokens they chose.
        agreed: For how many of these torch, after the same tokens, has the same first choice.
    """

    name: str
    tokens: int
    agreed: int

    @property
    def top1(self) -> float:
        """The share of choices that are torch's."""
        return self.agreed / self.tokens


def run_generation(
    folder: Path, model: nn.Module, sample: Sample, length: int = 16
) -> tuple[Generated, ...]:
    """Lets the graphs of a folder write, and asks torch about every token of it.

    Args:
        folder: The folder.
        model: The model, its adapters beside the weights or merged.
        sample: Its first piece is the prompt.
        length: How many tokens each row gets.
    """
    generator = OnnxGenerator(folder)
    start = sample.pieces[0]
    prompt, mask = sample.ids[:, :start], sample.mask[:, :start]
    coded = generator.is_encoder_decoder
    inputs, given = (sample.source, sample.source_mask) if coded else (prompt, mask)
    # The plain first choice, whatever a model's settings add to it.
    plain: dict[str, Any] = {
        "eos_token_id": None,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    found = []
    for suffix, reference, adapter in variants(generator, model):
        written = generator.generate(
            inputs.numpy(),
            attention_mask=None if given is None else given.numpy(),
            decoder_input_ids=prompt.numpy() if coded else None,
            max_new_tokens=length,
            adapter=adapter,
            repetition_penalty=1.0,
            **plain,
        )
        ids = torch.from_numpy(written)
        seen = torch.cat([mask, torch.ones(len(ids), length, dtype=mask.dtype)], 1)
        with torch.no_grad():
            logits = reference(**sample.whole(ids, seen), use_cache=False).logits
        agreed = logits[:, start - 1 : -1].argmax(-1) == ids[:, start:]
        name = suffix.removeprefix(", ") or "alone"
        found.append(Generated(name, agreed.numel(), int(agreed.sum())))
    return tuple(found)


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
    if (adapter := add_adapter(generator, model)) is not None:
        yield ", with adapter", as_fed(generator.tables.values(), model), adapter


def add_adapter(generator: OnnxGenerator, model: nn.Module) -> str | None:
    """Adds a model's adapter to graphs with inputs for it; its name there, or None."""
    if not generator.tables or not lora_layers(model):
        return None
    feeds = {name: adapter_feeds(table, model) for name, table in generator.tables.items()}
    source = feeds if generator.is_encoder_decoder else next(iter(feeds.values()))
    generator.add(_ADAPTER, source)
    return _ADAPTER
