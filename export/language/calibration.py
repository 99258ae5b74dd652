"""What graphs with a cache are fed while they write: the calibration sets of int8-static.

The ranges have to come from caches like those in use, and no user has such caches at hand. So the
float32 graphs of the folder make them: they read each prompt and write on after it, and all that a
graph is fed meanwhile, prefill and single steps, it is calibrated on. A prompt runs alone and
without padding: what comes out at padding is of no consequence and must not widen a range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gauge_ext.export.adapters.feeds import adapter_feeds
from gauge_ext.export.adapters.table import Arrays
from gauge_ext.export.language.calibration_prompts import STEPS, CalibrationError, Prompt
from gauge_ext.export.language.causal_inputs import BATCH, SEQUENCE
from gauge_ext.export.language.generate import OnnxGenerator
from gauge_ext.export.language.graphs import ENCODER, Feeds
from gauge_ext.export.language.loop import add_adapter

_SETTINGS = (  # of a model's generation: which tokens come, and when it ends
    *("eos_token_id", "pad_token_id", "repetition_penalty"),
    *("suppress_tokens", "begin_suppress_tokens"),
)
_TOKENS = ("input_ids", "decoder_input_ids", "input_features")


class Calibration:
    """The runs of a folder's float32 graphs on prompts.

    The graphs are loaded here and held: their files may be replaced from then on. Runs are done
    anew each time that they are asked for, because the caches of all of them would not fit.

    Args:
        folder: The folder.
        model: What it was made from. Where the graphs have inputs for adapters and the model has an
            adapter, each prompt is run without it and with it.
        prompts: See :func:`~gauge_ext.export.language.calibration_prompts.prompts_of`.
    """

    def __init__(self, folder: Path, model: nn.Module, prompts: Sequence[Prompt]) -> None:
        self._generator = _Watched(folder)
        self._prompts = prompts
        self._arrays: dict[str, Arrays] = {}
        self._adapters: list[str | None] = [None]
        if (adapter := add_adapter(self._generator, model)) is not None:
            self._adapters.append(adapter)
            tables = self._generator.tables.items()
            self._arrays = {graph: adapter_feeds(table, model) for graph, table in tables}
        held: Any = model
        settings = getattr(held, "generation_config", None) or held.config
        self._settings = {name: getattr(settings, name, None) for name in _SETTINGS}

    def feeds(self, graph: str) -> Iterator[Feeds]:
        """All that a graph is fed, run by run.

        Args:
            graph: Its file name.

        Raises:
            CalibrationError: onnxruntime refuses a prompt.
        """
        for number in range(len(self._prompts)):
            for _, feeds in self._runs(graph, number, STEPS):
                yield feeds

    def cases(self, graph: str) -> Iterator[tuple[str, dict[str, int], Feeds]]:
        """Name, sizes and feeds of the first prompt: the encoder's, or prefill and one step."""
        for name, feeds in self._runs(graph, 0, 2):
            tokens = next(feeds[key] for key in _TOKENS if key in feeds)
            yield name, {BATCH: 1, SEQUENCE: tokens.shape[-1]}, feeds

    def _runs(self, graph: str, number: int, most: int) -> Iterator[tuple[str, Feeds]]:
        prompt = self._prompts[number]
        kinds = ["encoder"] if graph == ENCODER else ["prefill", *["step"] * most]
        for adapter in self._adapters:
            fed = self._generator.watch(graph)
            written = self._generator.stream(
                prompt.inputs,
                decoder_input_ids=prompt.first,
                max_new_tokens=1 if graph == ENCODER else min(most, prompt.steps),
                adapter=adapter,
                **self._settings,
            )
            suffix, more = ("", {}) if adapter is None else (", with adapter", self._arrays[graph])
            for kind in kinds:
                try:
                    if next(written, None) is None:
                        break
                except Exception as error:  # onnxruntime's exceptions have no other common base
                    raise CalibrationError(
                        f"calibration prompt {number + 1} cannot be run: {str(error).strip()}"
                    ) from error
                yield f"calibration prompt {number + 1}, {kind}{suffix}", {**fed.pop(), **more}


class _Watched(OnnxGenerator):
    """A generator that keeps what one of its graphs is fed."""

    def watch(self, graph: str) -> list[Feeds]:
        """What the graph of a file name is fed from now on; whoever reads it takes it out."""
        fed: list[Feeds] = []
        for one in (self._encoder, self._decoder):
            if one is not None:
                one.fed = fed if (one is self._encoder) == (graph == ENCODER) else None
        return fed
