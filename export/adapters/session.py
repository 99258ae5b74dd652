"""One base in onnxruntime, many adapters: a session that switches between them call by call.

onnxruntime and numpy are enough to run it. onnxruntime's own way with adapters has traps that give
wrong outputs without a word: of two active adapters with the same tensors the first wins; an
adapter wins over a feed of the same name; ``run_with_iobinding`` and ``run_async`` overlook
adapters; an adapter that Python has collected is none. Here the tensors of the one chosen adapter
are bound as inputs (:mod:`bound`), from arrays that the session holds, and what would be a trap is
an error.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gauge_ext.errors import ConfigError, ExportError
from gauge_ext.export.adapters.bound import BoundAdapter
from gauge_ext.export.adapters.declared import session_table
from gauge_ext.export.adapters.mix import mix
from gauge_ext.export.adapters.table import AdapterTable, Arrays
from gauge_ext.export.session import CPU, open_session

_MIXTURES = 8  # kept for calls to come; each takes the memory of its adapters

Choice = str | None | Mapping[str, float]  # an adapter, none, or weights of several


class AdapterSession:
    """Runs a graph that was exported with ``mode="adapters"``.

    Threads may call :meth:`run` at the same time, also while others add and remove adapters: a call
    works on the adapters that there were when it began.

    Args:
        graph: The file, or an ``onnxruntime.InferenceSession`` of it.
        adapters: Name -> what :meth:`add` takes.
        session_options: onnxruntime's, such as its number of threads; for a file.
        providers: onnxruntime's; by default the CPU; for a file.

    Attributes:
        table: Which inputs belong to which layer.

    Raises:
        ConfigError: the file is missing or has no adapter inputs.
        ExportError: onnxruntime is not installed or cannot load the file.
    """

    table: AdapterTable

    def __init__(
        self,
        graph: Any,
        adapters: Mapping[str, str | Path | Mapping[str, ArrayLike]] | None = None,
        *,
        session_options: Any = None,
        providers: Sequence[Any] = CPU,
    ) -> None:
        if isinstance(graph, str | Path):
            session, _ = open_session(graph, session_options, providers)
            what = str(graph)
        else:
            session, what = graph, "the graph of this session"
        table = session_table(session)
        if table is None:
            raise ConfigError(
                f"{what} has no adapter inputs.",
                hint="Export it with mode='adapters' (gauge-ext export --mode adapters).",
            )
        self.table = table
        self._session = session
        self._factors = frozenset(table.shapes)
        self._inputs = {
            v.name: list(v.shape) for v in session.get_inputs() if v.name not in self._factors
        }
        self._outputs = {value.name: list(value.shape) for value in session.get_outputs()}
        self._lock = threading.Lock()
        self._adapters: dict[str, BoundAdapter] = {}
        self._mixtures: dict[Hashable, BoundAdapter] = {}  # the last few, by their weights
        # What is not fed has its default, which is no adapter.
        nothing: Arrays = {} if table.form == "optional" else table.nothing()
        self._nothing = BoundAdapter(session, nothing)
        for name, source in (adapters or {}).items():
            self.add(name, source)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(self._adapters)

    def add(self, name: str, source: str | Path | Mapping[str, ArrayLike]) -> None:
        """Loads an adapter and checks that it fits the graph.

        Args:
            name: How :meth:`run` calls it; one that is taken is an error.
            source: A file of :func:`~gauge_ext.export.write_onnx_adapter` (``.onnx_adapter`` or
                ``.safetensors``), an adapter's folder in PEFT's format, or the graph's inputs as
                arrays.

        Raises:
            ConfigError: the name is taken, or the adapter asks for what is not implemented.
            AdapterFormatError: it is missing, damaged, or no adapter.
            AdapterMismatchError: it was made for another graph.
        """
        from gauge_ext.export.adapters.read import read_arrays

        if not isinstance(name, str) or not name:
            raise ConfigError(f"an adapter's name must be a text, got {name!r}.")
        arrays = read_arrays(self.table, source, f"the adapter {name!r}")
        bound = BoundAdapter(self._session, arrays)
        with self._lock:
            if name in self._adapters:
                raise ConfigError(
                    f"there is an adapter {name!r} already.", hint="Call remove() first."
                )
            self._adapters = {**self._adapters, name: bound}

    def remove(self, name: str) -> None:
        """Forgets an adapter; calls that are under way finish with it.

        Raises:
            ConfigError: there is none of that name.
        """
        with self._lock:
            self._require([name], self._adapters)
            self._adapters = {key: a for key, a in self._adapters.items() if key != name}
            self._mixtures = {}

    def run(
        self,
        feeds: Mapping[str, ArrayLike],
        adapter: Choice | Sequence[Choice] = None,
        *,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Runs the base with an adapter, with none, with a mixture, or with one for each row.

        Args:
            feeds: Input -> array; the inputs of the base alone.
            adapter: The name of an adapter; None for the base as it is; weights by name for
                ``sum_i weight_i * scaling_i * B_i A_i``, exact, of a rank that is the sum of all;
                or a list with one of these for each row of the batch.
            outputs: Names of the outputs to compute; by default all.

        Returns:
            Output -> array. With a list of adapters each output has the rows of the batch in the
            order of the feeds.

        Raises:
            ConfigError: an unknown adapter, input or output; a feed that is the adapter's; or a
                list that is not as long as the batch.
            ExportError: onnxruntime refuses to run.
        """
        arrays = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        self._check_feeds(arrays)
        wanted = list(self._outputs) if outputs is None else list(outputs)
        if unknown := [name for name in wanted if name not in self._outputs]:
            raise ConfigError(
                f"the graph has no output {unknown[0]!r}; it has {', '.join(self._outputs)}."
            )
        if isinstance(adapter, str | Mapping) or adapter is None:
            return self._run(arrays, adapter, wanted)
        return self._run_rows(arrays, list(adapter), wanted)

    def run_with_iobinding(self, *_: object, **__: object) -> NoReturn:
        """Raises ConfigError: onnxruntime would overlook the adapter."""
        raise ConfigError(
            "run_with_iobinding is not offered: onnxruntime overlooks active adapters there and "
            "gives the base's outputs.",
            hint="Use run().",
        )

    def run_async(self, *_: object, **__: object) -> NoReturn:
        """Raises ConfigError: onnxruntime would overlook the adapter."""
        raise ConfigError(
            "run_async is not offered: onnxruntime overlooks active adapters there and gives the "
            "base's outputs.",
            hint="Call run() in threads of your own; it may be called by several at once.",
        )

    def _run(self, arrays: Arrays, choice: Choice, wanted: list[str]) -> dict[str, NDArray[Any]]:
        chosen = self._chosen(choice)
        try:
            found = chosen.run(wanted, arrays)
        except Exception as error:  # onnxruntime's exceptions have no other common base
            raise ExportError(f"onnxruntime refuses to run: {str(error).strip()}") from error
        return dict(zip(wanted, found, strict=True))

    def _run_rows(
        self, arrays: Arrays, choices: list[Choice], wanted: list[str]
    ) -> dict[str, NDArray[Any]]:
        """Groups rows that have the same adapter, runs each group, and restores the order."""
        batch, rows = self._batch(arrays)
        if len(choices) != rows:
            raise ConfigError(
                f"adapter is a list of {len(choices)} and the batch has {rows} rows: a list gives "
                "an adapter to each row.",
                hint="To use several at once, give their weights: {'a': 0.5, 'b': 0.5}.",
            )
        if fixed := [n for n in wanted if batch not in self._outputs[n]]:
            raise ConfigError(
                f"the output {fixed[0]!r} {self._outputs[fixed[0]]} has no axis {batch!r}, so its "
                "rows cannot be told apart.",
                hint="Leave it out of outputs, or run each adapter on its own.",
            )
        groups: dict[Hashable, list[int]] = {}
        for row, choice in enumerate(choices):
            groups.setdefault(_key(choice), []).append(row)
        order = np.argsort(np.concatenate(list(groups.values())), kind="stable")
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in wanted}
        for members in groups.values():
            part = {
                name: np.take(array, members, self._inputs[name].index(batch))
                if batch in self._inputs[name]
                else array
                for name, array in arrays.items()
            }
            for name, array in self._run(part, choices[members[0]], wanted).items():
                parts[name].append(array)
        result = {}
        for name, pieces in parts.items():
            axis = self._outputs[name].index(batch)
            other = {p.shape[:axis] + p.shape[axis + 1 :] for p in pieces}
            if len(other) > 1:
                raise ConfigError(
                    f"the output {name!r} has rows of different shapes in the groups: {other}.",
                    hint="Run each adapter on its own.",
                )
            result[name] = np.take(np.concatenate(pieces, axis), order, axis)
        return result

    def _batch(self, arrays: Arrays) -> tuple[str, int]:
        """The name of the batch axis, the first of the first input, and its size."""
        name, shape = next(iter(self._inputs.items()))
        if not shape or not isinstance(shape[0], str):
            raise ConfigError(
                f"the batch size of the graph is fixed: {name} {shape}, so rows cannot be grouped.",
                hint="Export it with a dynamic batch (dynamic_shapes), or give one adapter.",
            )
        return shape[0], arrays[name].shape[0]

    def _check_feeds(self, arrays: Arrays) -> None:
        if clashes := [name for name in arrays if name in self._factors]:
            raise ConfigError(
                f"{clashes[0]!r} is fed, and it belongs to the adapter: onnxruntime would let one "
                "of the two win without a word.",
                hint="Add it as an adapter: add(name, {input: array, ...}).",
            )
        if unknown := [name for name in arrays if name not in self._inputs]:
            raise ConfigError(
                f"the graph has no input {unknown[0]!r}; it has {', '.join(self._inputs)}."
            )
        if missing := [name for name in self._inputs if name not in arrays]:
            raise ConfigError(f"the input {missing[0]!r} is not fed.")

    def _chosen(self, choice: Choice) -> BoundAdapter:
        """The tensors of a choice; mixtures are made once."""
        if choice is None:
            return self._nothing
        # One look at each, whatever other threads do.
        adapters, mixtures = self._adapters, self._mixtures
        if isinstance(choice, str):
            self._require([choice], adapters)
            return adapters[choice]
        if (mixed := mixtures.get(key := _key(choice))) is not None:
            return mixed
        self._require(list(choice), adapters)
        parts = {name: (adapters[name].arrays, choice[name]) for name in choice}
        mixed = BoundAdapter(self._session, mix(self.table, parts))
        with self._lock:
            if all(self._adapters.get(name) is adapters[name] for name in choice):
                kept = list(self._mixtures.items())[1 - _MIXTURES :]
                self._mixtures = {**dict(kept), key: mixed}
        return mixed

    def _require(self, names: Sequence[str], known: Mapping[str, Any]) -> None:
        if unknown := [name for name in names if name not in known]:
            there = f"there are {', '.join(map(repr, known))}" if known else "there is none"
            raise ConfigError(
                f"there is no adapter {unknown[0]!r}; {there}.", hint="Load it with add()."
            )


def _key(choice: Choice) -> Hashable:
    if choice is None or isinstance(choice, str):
        return choice
    if not isinstance(choice, Mapping) or not choice:
        raise ConfigError(
            f"an adapter is chosen by a name, None, or weights by name, got {choice!r}."
        )
    for name, weight in choice.items():
        if isinstance(weight, bool) or not np.isfinite(weight):
            raise ConfigError(f"the weight of {name!r} must be a finite number, got {weight!r}.")
    return tuple(sorted((name, float(weight)) for name, weight in choice.items()))
