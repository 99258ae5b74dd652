"""The graphs of a folder in onnxruntime, and the adapters that those with inputs for them take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gauge_ext.errors import ConfigError
from gauge_ext.export.adapters.session import AdapterSession, Choice
from gauge_ext.export.adapters.table import METADATA_KEY, AdapterTable
from gauge_ext.export.session import CPU, open_session

CAUSAL, ENCODER, DECODER = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
Feeds = dict[str, NDArray[Any]]
Adapter = Choice | Sequence[Choice]  # one for all rows, or one for each


class FolderGraph:
    """One graph.

    Args:
        path: The file.
        session_options: An ``onnxruntime.SessionOptions``, for threads and the like.
        providers: Execution providers of onnxruntime.

    Attributes:
        inputs: Name -> onnxruntime's description; those for adapters are not among them.
        adapters: What switches between adapters; None where the graph has no inputs for them.
        runtime: What runs it, with its version.
        fed: Where someone wants to know, a list to which each run adds its feeds; else None.

    Raises:
        ConfigError: there is no such file.
        ExportError: onnxruntime is missing or cannot load it.
    """

    def __init__(
        self, path: Path, session_options: Any = None, providers: Sequence[Any] = CPU
    ) -> None:
        if not path.is_file():
            raise ConfigError(
                f"there is no {path.name} in {path.parent}.",
                hint="Give a folder that export_causal_lm or export_seq2seq wrote.",
            )
        self._session, self.runtime = open_session(path, session_options, providers)
        opened = METADATA_KEY in self._session.get_modelmeta().custom_metadata_map
        self.adapters = AdapterSession(self._session) if opened else None
        taken = self.adapters.table.shapes if self.adapters is not None else ()
        self.inputs = {v.name: v for v in self._session.get_inputs() if v.name not in taken}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self.fed: list[Feeds] | None = None

    def run(self, feeds: Feeds, adapter: Adapter = None) -> Feeds:
        """Output -> array.

        Args:
            feeds: Input -> array.
            adapter: As that of :meth:`gauge_ext.export.AdapterSession.run`.
        """
        if self.fed is not None:
            self.fed.append(feeds)
        if self.adapters is not None:
            return self.adapters.run(feeds, adapter)
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))


class FolderGraphs:
    """All graphs of a folder; an adapter is known to all of them or to none.

    Args:
        folder: The folder.
        session_options: As for :class:`FolderGraph`; so are the providers.
        providers: Execution providers of onnxruntime.

    Attributes:
        decoder: The graph with a cache.
        encoder: The other; None for a decoder-only model.

    Raises:
        ConfigError: there is no such graph, or it has no cache.
        ExportError: onnxruntime is missing or cannot load a graph.
    """

    def __init__(
        self, folder: Path, session_options: Any = None, providers: Sequence[Any] = CPU
    ) -> None:
        names = [DECODER, ENCODER] if (folder / ENCODER).is_file() else [CAUSAL]
        graphs = {name: FolderGraph(folder / name, session_options, providers) for name in names}
        self.decoder, self.encoder = graphs[names[0]], graphs.get(ENCODER)
        if not any(name.startswith("past_key_values.") for name in self.decoder.inputs):
            raise ConfigError(
                f"{folder / names[0]} has no past_key_values inputs, so it cannot generate step by "
                "step.",
                hint="Export it with export_causal_lm (--task text-generation).",
            )
        self._folder = folder
        self._switches = {n: g.adapters for n, g in graphs.items() if g.adapters is not None}

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return next((switch.adapters for switch in self._switches.values()), ())

    @property
    def tables(self) -> dict[str, AdapterTable]:
        """File name of each graph with inputs for adapters -> what they are."""
        return {name: switch.table for name, switch in self._switches.items()}

    def add(self, name: str, source: str | Path | Mapping[str, Any]) -> None:
        """See :meth:`gauge_ext.export.OnnxGenerator.add`."""
        self.require_adapters()
        sources = dict.fromkeys(self._switches, source)
        if self.encoder is not None and not (
            isinstance(source, str | Path) and Path(source).is_dir()
        ):
            if not isinstance(source, Mapping) or set(source) != set(self._switches):
                raise ConfigError(
                    f"the adapter {name!r} must be an adapter's folder, or a mapping with what "
                    f"{' and '.join(self._switches)} take, got {source!r}.",
                    hint="Write a file for each of the graphs: gauge-ext onnx-adapter.",
                )
            sources = dict(source)
        done: list[AdapterSession] = []
        try:
            for graph, switch in self._switches.items():
                switch.add(name, sources[graph])
                done.append(switch)
        finally:
            if len(done) < len(self._switches):
                for switch in done:
                    switch.remove(name)

    def remove(self, name: str) -> None:
        """See :meth:`gauge_ext.export.OnnxGenerator.remove`."""
        self.require_adapters()
        for switch in self._switches.values():
            switch.remove(name)

    def require_adapters(self) -> None:
        """Refuses graphs without inputs for adapters.

        Raises:
            ConfigError: they have none.
        """
        if not self._switches:
            raise ConfigError(
                f"the graphs in {self._folder} have no inputs for adapters.",
                hint="Export the model with mode='adapters' (gauge-ext export --mode adapters).",
            )
