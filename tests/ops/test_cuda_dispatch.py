"""What the dispatcher knows of CUDA tensors, which a build and a torch can tell without a GPU."""

from __future__ import annotations

import pytest
import torch
from marks import needs_compiled
from torch._subclasses.fake_tensor import FakeTensorMode

from gauge_ext import _load
from gauge_ext.ops import lora_gather, lora_linear, lora_linear_group

pytestmark = needs_compiled


def test_every_op_is_registered_for_what_it_promises() -> None:
    # CUDA's own kernels are there in a build with CUDA; autocast and autograd in every build.
    for op in ("lora_linear", "lora_linear_group", "lora_gather"):
        for key in ("Autograd", "AutocastCUDA", "AutocastCPU", "FuncTorchBatched"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gauge_ext::{op}", key), (
                op,
                key,
            )
    inner = ("lora_linear_forward", "lora_linear_backward", "lora_linear_group_forward")
    inner += ("lora_linear_group_backward", "lora_gather_backward", "dropout_mask", "merge_")
    inner += ("merge_out", "scaled_gd_step", "gauge_adam_step", "factor_gradient_norm")
    for op in ("lora_linear", "lora_linear_group", "lora_gather", *inner):
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"gauge_ext::{op}", "CUDA")
        assert has == _load.status().cuda, op
    # Elsewhere torch's operators run.
    for op in ("lora_rite_step", "lora_embedding", "dora_scale", "dora_row_norms"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gauge_ext::{op}", "CPU")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"gauge_ext::{op}", "CUDA")


@pytest.mark.skipif(
    not (torch.backends.cuda.is_built() and _load.status().cuda),
    reason="this torch or this build has no CUDA",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_the_base_and_leaves_the_adapter(dtype: torch.dtype) -> None:
    before = torch.get_autocast_dtype("cuda")
    # Not torch.autocast, which turns itself off where there is no GPU.
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with FakeTensorMode():
            x, weight = (torch.empty(n, 8, device="cuda") for n in (3, 5))
            a = torch.empty(2, 8, device="cuda", requires_grad=True)
            b = torch.empty(5, 2, device="cuda", requires_grad=True)
            index = torch.zeros(3, dtype=torch.int64)
            ys = [
                lora_linear(x, weight, None, a, b, 1.0),
                lora_gather(x, weight, None, [a], [b], [1.0], index),
                *lora_linear_group(x, [weight], [None], [a], [b], [1.0]),
            ]
            for y in ys:
                assert (y.dtype, y.device.type, y.requires_grad) == (dtype, "cuda", True)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
