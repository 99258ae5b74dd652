"""LoRA adapters by a compiled op, as points of a fibre bundle, and their way into ONNX Runtime."""

from gauge_ext import ops
from gauge_ext._version import __version__
from gauge_ext.errors import GaugeError

__all__ = ["GaugeError", "__version__", "ops"]
