"""The inspection over time: what training does to updates, and to the frames they are kept in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gauge_ext.checkpoint.gauges import adapter_points
from gauge_ext.errors import GaugeError, GeometryError
from gauge_ext.geometry import LoRAPoint, LoRATangent, frobenius_distance, link, metric, vertical
from gauge_ext.geometry.connection import connection_form
from gauge_ext.inspect.spectrum import Spectrum, delta_spectrum

#: What of a record hangs on how often it is taken, and is logged under a name that says so.
EXPERIMENTAL = ("drift", "holonomy")


class ScalarWriter(Protocol):
    """What is asked of a TensorBoard ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Log one number."""


@dataclass(frozen=True)
class LayerRecord:
    r"""One layer at one step. What is undefined there is NaN.

    Attributes:
        norm: :math:`\|X\|_F` of the update X.
        effective_rank: See :class:`~gauge_ext.inspect.Spectrum`, as for the next two.
        stable_rank: :math:`\|X\|_F^2 / \sigma_1^2`.
        condition: :math:`\sigma_1 / \sigma_r`.
        change: :math:`\|X - X_{last}\|_F / \|X\|_F` since the record before.
        vertical_share: :math:`g(v_\omega, v_\omega) / g(\eta, \eta)` of the motion :math:`\eta` of
            the factors since the record before, in the invariant metric at its start: the share
            that only changed the gauge. (1 step apart it is about one step; further apart, about
            the chord.)
        drift: Experimental. :math:`\max |\log \sigma(\prod U_k)|` of the links since the start: how
            far the stored frame is from the start's, parallel transported along the records. 0 for
            a horizontal run.
        holonomy: Experimental. :math:`\max |\log |\lambda||` of the eigenvalues of the loop that
            the direct link closes; the same in every gauge. Like the drift it hangs on how often
            a record is taken.
    """

    norm: float
    effective_rank: float
    stable_rank: float
    condition: float
    change: float = math.nan
    vertical_share: float = math.nan
    drift: float = math.nan
    holonomy: float = math.nan


class AdapterMonitor:
    """Follows the adapters of a model through training.

    Call :meth:`record` now and then, every 10 to 100 steps; it costs O((in + out) r²) a layer, in
    float64, and about as much as a step of the optimizer. The points recorded last and first are
    kept.

    Args:
        model: A model with adapters.

    Attributes:
        history: (step, layer -> record), in the order in which they were taken.

    Raises:
        AdapterStateError: The model has no adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        adapter_points(model)  # says at once what is wrong
        self._model = model
        self._last: dict[str, LoRAPoint] = {}
        self._paths: dict[str, _Path] = {}
        self.history: list[tuple[int, dict[str, LayerRecord]]] = []

    def record(self, step: int) -> dict[str, LayerRecord]:
        """Look at every layer now.

        Args:
            step: What to file it under.

        Returns:
            Path of the module -> its record.

        Raises:
            NonFiniteError: A factor holds NaN or infinity.
        """
        records = {}
        for name, live in adapter_points(self._model).items():
            # A factor that is float64 already would change under us with the next step.
            point = LoRAPoint(live.B.clone(), live.A.clone())
            spectrum = delta_spectrum(point.A, point.B, 1.0)
            last = self._last.get(name)
            if last is not None and last.rank != point.rank:
                last = None
                self._paths.pop(name, None)
            drift, holonomy = self._follow(name, point)
            records[name] = LayerRecord(
                norm=spectrum.frobenius,
                effective_rank=spectrum.effective_rank,
                stable_rank=spectrum.stable_rank,
                condition=spectrum.condition,
                change=_change(last, point, spectrum),
                vertical_share=_vertical_share(last, point),
                drift=drift,
                holonomy=holonomy,
            )
            self._last[name] = point
        self.history.append((step, records))
        return records

    def log(self, writer: ScalarWriter, step: int) -> dict[str, LayerRecord]:
        """Take a record and write its numbers to TensorBoard; what is undefined is left out.

        Tags are ``adapter/<quantity>/<layer>``, and ``adapter/experimental_<quantity>/<layer>``.

        Args:
            writer: A ``torch.utils.tensorboard.SummaryWriter``, or whatever has ``add_scalar``.
            step: The step.
        """
        records = self.record(step)
        for tag, value in scalars(records).items():
            writer.add_scalar(tag, value, step)
        return records

    def _follow(self, name: str, point: LoRAPoint) -> tuple[float, float]:
        path = self._paths.get(name)
        try:
            if path is None:
                point.require_full_rank("A frame")
                self._paths[name] = _Path(point, point, torch.eye(point.rank, dtype=torch.float64))
                return 0.0, 0.0
            product = path.product @ link(path.last, point)
        except GeometryError:
            # No frame before the rank is full; a break in the path begins a new one.
            self._paths.pop(name, None)
            return math.nan, math.nan
        self._paths[name] = _Path(path.first, point, product)
        drift = float(torch.linalg.svdvals(product).log().abs().max())
        try:
            loop = product @ link(point, path.first)
        except GeometryError:
            return drift, math.nan
        return drift, float(torch.linalg.eigvals(loop).abs().log().abs().max())


@dataclass(frozen=True, eq=False)
class _Path:
    first: LoRAPoint
    last: LoRAPoint
    product: Tensor


def scalars(records: Mapping[str, LayerRecord]) -> dict[str, float]:
    """Flatten records to tag -> number, without what is undefined or infinite."""
    found = {}
    for layer, record in records.items():
        for quantity, value in asdict(record).items():
            if math.isfinite(value):
                mark = "experimental_" if quantity in EXPERIMENTAL else ""
                found[f"adapter/{mark}{quantity}/{layer}"] = value
    return found


def trainer_callback(
    monitor: AdapterMonitor, *, every: int = 50, writer: ScalarWriter | None = None
) -> Any:
    """Return a ``transformers.TrainerCallback`` that takes a record every so many steps.

    Records go into the Trainer's ``state.log_history``, under the tags of
    :meth:`AdapterMonitor.log`, and to ``writer``. One is taken when training begins, too.

    Args:
        monitor: Of the model that is trained.
        every: How many optimizer steps lie between records.
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or whatever has ``add_scalar``.

    Raises:
        GaugeError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise GaugeError(
            "trainer_callback needs transformers.", hint="Type: pip install transformers"
        ) from error

    class MonitorCallback(TrainerCallback):
        """Takes a record every ``every`` steps."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._take(state)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                self._take(state)

        def _take(self, state: Any) -> None:
            found = scalars(monitor.record(state.global_step))
            state.log_history.append({"step": state.global_step, "epoch": state.epoch, **found})
            if writer is not None:
                for tag, value in found.items():
                    writer.add_scalar(tag, value, state.global_step)

    return MonitorCallback()


def _change(last: LoRAPoint | None, point: LoRAPoint, spectrum: Spectrum) -> float:
    if last is None or not spectrum.frobenius:
        return math.nan
    return float(frobenius_distance(last, point)) / spectrum.frobenius


def _vertical_share(last: LoRAPoint | None, point: LoRAPoint) -> float:
    if last is None:
        return math.nan
    motion = LoRATangent(point.B - last.B, point.A - last.A)
    try:
        moved = vertical(last, connection_form(last, motion))
    except GeometryError:
        return math.nan
    whole = float(metric(last, motion, motion))
    return float(metric(last, moved, moved)) / whole if whole else math.nan
