"""Which inputs of a graph belong to which adapted layer: the contract between graph and adapter.

The graph, the files that are written for it and the session that runs both all read this table; it
lies in the graph's metadata. numpy is enough here, for a machine that only runs models.

A layer ``y = x W^T + b`` with inputs for an adapter computes ``y = x W^T + (x A) B + b`` with

- ``<module>.lora_A`` ``(in, r)``, PEFT's lora_A transposed,
- ``<module>.lora_B`` ``(r, out)``, PEFT's lora_B transposed, times the scaling.

In int8 each of the r columns of A and rows of B has its own scale, in ``<module>.lora_A.scale`` and
``<module>.lora_B.scale`` ``(r,)``: an entry is code times scale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gauge_ext.errors import AdapterMismatchError, ConfigError, NonFiniteError
from gauge_ext.export.adapters.codes import PRECISIONS, AdapterPrecision, encode

AdapterForm = Literal["optional", "required"]
Arrays = dict[str, NDArray[Any]]

FORMS: tuple[AdapterForm, ...] = get_args(AdapterForm)
_LARGEST = 2**31  # beyond it no layer has features, and no array would fit
METADATA_KEY = "gauge_ext.adapter_inputs"

_STORED: dict[AdapterPrecision, np.dtype[Any]] = {name: np.dtype(name) for name in PRECISIONS}


@dataclass(frozen=True)
class AdapterInput:
    """The inputs of one layer.

    Attributes:
        module: The layer's path in the torch model.
        in_features: Size of x's last axis.
        out_features: Size of y's last axis.
        rank: The name of the axis that is r. Each layer has its own, since onnxruntime gives
            buffers of equal names the same size, and adapters may have a rank for each layer.
    """

    module: str
    in_features: int
    out_features: int
    rank: str

    @property
    def lora_A(self) -> str:
        """The name of the input for A."""
        return f"{self.module}.lora_A"

    @property
    def lora_B(self) -> str:
        """The name of the input for B."""
        return f"{self.module}.lora_B"


@dataclass(frozen=True)
class AdapterTable:
    """All adapter inputs of a graph.

    Attributes:
        form: "optional": the inputs have defaults of rank 0 and may be left out (onnxruntime).
            "required": they have none (onnxruntime-web and -node, OpenVINO).
        precision: How A and B are stored.
        compute: The dtype that the layers compute in.
        base: The SHA-256 of the base that the graph holds, see
            :func:`gauge_ext.export.metadata.base_sha256`.
        inputs: Path of the layer -> its inputs.
        elsewhere: Layers of the same model whose inputs another graph has, such as the decoder's
            where this is the encoder. An adapter may have factors for them.
    """

    form: AdapterForm
    precision: AdapterPrecision
    compute: str
    base: str
    inputs: Mapping[str, AdapterInput]
    elsewhere: tuple[str, ...] = ()

    @property
    def version(self) -> int:
        """31 bits of a hash of the table, the base's included.

        An ``.onnx_adapter`` file has room for one number about the model it belongs to; with this
        one an adapter for another base, whose names and shapes may well fit, is refused.
        """
        # The form is left out: one adapter file serves both forms of a graph where names agree.
        said = [self.precision, self.base, *sorted(map(repr, self.inputs.values()))]
        digest = hashlib.sha256("\n".join(said).encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    @property
    def shapes(self) -> dict[str, tuple[tuple[int | str, ...], np.dtype[Any]]]:
        """The shape and dtype of every adapter input of the graph, by name."""
        stored = _STORED[self.precision]
        if stored.kind == "f":
            return {
                name: (shape, stored)
                for entry in self.inputs.values()
                for name, shape in (
                    (entry.lora_A, (entry.in_features, entry.rank)),
                    (entry.lora_B, (entry.rank, entry.out_features)),
                )
            }
        scale = np.dtype(np.float32)
        found: dict[str, tuple[tuple[int | str, ...], np.dtype[Any]]] = {}
        for entry in self.inputs.values():
            found[entry.lora_A] = ((entry.in_features, entry.rank), stored)
            found[f"{entry.lora_A}.scale"] = ((entry.rank,), scale)
            found[entry.lora_B] = ((entry.rank, entry.out_features), stored)
            found[f"{entry.lora_B}.scale"] = ((entry.rank,), scale)
        return found

    def empty(self, rank: int = 0) -> Arrays:
        """Arrays for every input that change nothing.

        Args:
            rank: 0, or 1 for runtimes that take no empty tensors: a zero A and B.
        """
        return {
            name: np.zeros([rank if isinstance(size, str) else size for size in shape], dtype)
            for name, (shape, dtype) in self.shapes.items()
        }

    def nothing(self) -> Arrays:
        """What the graph has to be fed for the base alone."""
        return self.empty(rank=1) if self.form == "required" else {}

    def to_json(self) -> str:
        """The table as text, for the metadata; says of each input which module's it is."""
        layers = {
            entry.module: {
                "in": entry.in_features,
                "out": entry.out_features,
                "rank": entry.rank,
                "inputs": [n for n in self.shapes if n.startswith(f"{entry.module}.lora_")],
            }
            for entry in self.inputs.values()
        }
        head: dict[str, Any] = {
            "form": self.form,
            "precision": self.precision,
            "compute": self.compute,
        }
        layout = "lora_A (in, r) and lora_B (r, out), transposed; lora_B times the scaling"
        if self.elsewhere:
            head["elsewhere"] = list(self.elsewhere)
        return json.dumps({**head, "base_sha256": self.base, "layout": layout, "layers": layers})

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> AdapterTable | None:
        """Read the table of a graph, or return None where it has no adapter inputs.

        Raises:
            ConfigError: the metadata is not what gauge_ext writes.
        """
        if METADATA_KEY not in metadata:
            return None
        try:
            said = json.loads(metadata[METADATA_KEY])
            inputs = {
                str(module): AdapterInput(
                    str(module), int(entry["in"]), int(entry["out"]), str(entry["rank"])
                )
                for module, entry in said["layers"].items()
            }
            for entry in inputs.values():
                if not (0 < entry.in_features < _LARGEST and 0 < entry.out_features < _LARGEST):
                    raise ValueError(f"{entry.in_features} and {entry.out_features} features")
            form, precision = said["form"], said["precision"]
            if form not in FORMS or precision not in PRECISIONS:
                raise ValueError(f"form {form!r}, precision {precision!r}")
            elsewhere = tuple(map(str, said.get("elsewhere", ())))
            compute, base = str(said["compute"]), str(said["base_sha256"])
            return cls(form, precision, compute, base, inputs, elsewhere)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"the metadata {METADATA_KEY} is not what gauge_ext writes: {error!r}.",
                hint="Export the graph again with mode='adapters'.",
            ) from error

    def place(self, factors: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], what: str) -> str:
        """Find what stands before an adapter's paths in the graph's, mostly nothing.

        An adapter that was trained on a part of the exported model, such as the encoder of a
        pipeline, names its modules from there.

        Args:
            factors: Path of a module -> lora_A ``(r, in)`` and lora_B ``(out, r)``.
            what: The adapter's name, for messages.

        Returns:
            The prefix, empty or ending in a dot.

        Raises:
            AdapterMismatchError: the graph has no inputs for some modules, or they have other
                shapes.
        """
        first = next(iter(factors))
        known = {*self.inputs, *self.elsewhere}
        prefixes = [name.removesuffix(first) for name in known if name.endswith(first)]
        fitting = [
            prefix
            for prefix in prefixes
            if (not prefix or prefix.endswith("."))
            and all(prefix + name in known for name in factors)
        ]
        if len(fitting) != 1 and "" not in fitting:
            lacking = [name for name in factors if name not in known]
            raise AdapterMismatchError(
                f"{what} has factors for {len(factors)} modules, and the graph has no inputs for "
                f"{len(lacking)} of them: {_some(lacking)}. It has inputs for "
                f"{_some(list(self.inputs))}.",
                hint="Export the graph with adapter_targets that name these layers, or use the "
                "graph that the adapter was made for.",
            )
        prefix = "" if "" in fitting else fitting[0]
        for name, (a, b) in factors.items():
            if (entry := self.inputs.get(prefix + name)) is None:
                continue
            if (a.shape[1], b.shape[0]) != (entry.in_features, entry.out_features):
                raise AdapterMismatchError(
                    f"{what} does not fit the graph at {name!r}: lora_A {a.shape} and lora_B "
                    f"{b.shape} are for {a.shape[1]} inputs and {b.shape[0]} outputs, the layer "
                    f"has {entry.in_features} and {entry.out_features}.",
                    hint="It was made for a model of another size.",
                )
        return prefix

    def pack(self, factors: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], what: str) -> Arrays:
        """Turn an adapter into the arrays that the graph takes.

        Args:
            factors: Path of a module -> lora_A ``(r, in)`` and *scaling times* lora_B ``(out, r)``.
            what: The adapter's name, for messages.

        Returns:
            The arrays of the graph's modules that the adapter has; in the required form those of
            all modules, with zeros of rank 1 where the adapter has none.

        Raises:
            AdapterMismatchError: see :meth:`place`.
            NonFiniteError: a factor exceeds float16.
        """
        prefix = self.place(factors, what)
        arrays = self.nothing()
        for name, (a, b) in factors.items():
            if (entry := self.inputs.get(prefix + name)) is None:
                continue
            for key, matrix, axis in ((entry.lora_A, a.T, 1), (entry.lora_B, b.T, 0)):
                codes, scale = encode(matrix, self.precision, axis)
                if codes.dtype == np.float16 and not np.isfinite(codes).all():
                    raise NonFiniteError(
                        f"{what}: {key} exceeds the range of float16, its largest entry is "
                        f"{np.abs(matrix).max():.3g}.",
                        hint="Choose gauge='balanced', or a graph with float32 adapter inputs.",
                    )
                arrays[key] = codes
                if scale is not None:
                    arrays[f"{key}.scale"] = scale
        return arrays

    def check(self, arrays: Mapping[str, NDArray[Any]], what: str) -> None:
        """Refuse arrays that are not inputs of this graph, or do not fit each other.

        Raises:
            AdapterMismatchError: an unknown name, another shape or dtype, a rank that differs
                between the arrays of one module, or a missing one.
        """
        shapes = self.shapes
        if unknown := [name for name in arrays if name not in shapes]:
            raise AdapterMismatchError(
                f"{what} holds {len(unknown)} tensors that are no adapter inputs of the graph: "
                f"{_some(unknown)}.",
                hint="Write it for this graph: gauge-ext onnx-adapter.",
            )
        ranks: dict[str, tuple[str, int]] = {}
        for name, array in arrays.items():
            shape, dtype = shapes[name]
            fits = array.ndim == len(shape) and all(
                isinstance(size, str) or size == found
                for size, found in zip(shape, array.shape, strict=True)
            )
            if not fits or array.dtype != dtype:
                raise AdapterMismatchError(
                    f"{what}: {name} must be {dtype} {list(shape)}, got {array.dtype} "
                    f"{list(array.shape)}.",
                    hint="Write it for this graph: gauge-ext onnx-adapter.",
                )
            axis = next(i for i, size in enumerate(shape) if isinstance(size, str))
            other, rank = ranks.setdefault(str(shape[axis]), (name, array.shape[axis]))
            if array.shape[axis] != rank:
                raise AdapterMismatchError(
                    f"{what}: {name} has rank {array.shape[axis]}, and {other} has rank {rank}."
                )
        for entry in self.inputs.values():
            names = [n for n in shapes if n.startswith(f"{entry.module}.lora_")]
            present = [n for n in names if n in arrays]
            if (present and len(present) < len(names)) or (self.form == "required" and not present):
                lacking = next(n for n in names if n not in arrays)
                raise AdapterMismatchError(f"{what} lacks {lacking!r}, which the graph needs.")


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "")
