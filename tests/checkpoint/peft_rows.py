"""One row for each thing that PEFT's LoRA can do: a model, both configs, and the result by hand.

``docs/make_compatibility.py`` prints them as a table; the tests hold every row in float64.
"""

from __future__ import annotations

from peft_convolutions import CONVOLUTIONS
from peft_linear import LINEAR
from peft_parameters import PARAMETERS
from peft_quantized import QUANTIZED
from peft_tables import TABLES

ROWS = [*LINEAR, *TABLES, *CONVOLUTIONS, *PARAMETERS, *QUANTIZED]
