"""The dtypes that hold weights."""

from __future__ import annotations

import torch

# The kernels and the plain-torch fallback compute in these; anything else (integers, float8) holds
# codes of weights, not weights.
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
