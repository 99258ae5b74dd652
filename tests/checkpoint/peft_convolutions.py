"""Rows of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from row_by_hand import TWO, Row, Tensors, numbers
from torch import nn


def add_conv(model: nn.Module, t: Tensors, s: float) -> None:
    """W + s B A with A as (r, in * kernel), on each convolution; groups written out as zeros."""
    for key in [key for key in t if key.endswith(".lora_A.weight")]:
        path = key.removesuffix(".lora_A.weight")
        layer = model.get_submodule(path)
        a, b = t[key], t[f"{path}.lora_B.weight"].flatten(1)
        groups, rows, ranks = layer.groups, b.shape[0] // layer.groups, b.shape[1]
        total = torch.zeros(b.shape[0], *a.shape[1:], dtype=a.dtype)
        for out in range(b.shape[0]):
            group, ins = out // rows, layer.weight.shape[1]
            total[out, group * ins : (group + 1) * ins] = layer.weight[out]
            total[out] += s * torch.einsum("r,r...->...", b[out], a[group * ranks :][:ranks])
        if (m := t.get(f"{path}.lora_magnitude_vector")) is not None:
            ones = (1,) * (total.dim() - 1)
            total = total * (m.flatten() / total.flatten(1).norm(dim=1)).view(-1, *ones)
        layer.groups, layer.weight = 1, nn.Parameter(total)
        assert groups == 1 or m is None


def conv(kind: type[nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """Make a model of one convolution."""
    return lambda: nn.Sequential(kind(*args, **kwargs), nn.Tanh())


_CONV = {**TWO, "target_modules": ["0"]}


_WIDE = "the padding of A is by zeros, whatever the padding mode of the base"


def add_conv_and_bias(model: nn.Module, t: Tensors, s: float) -> None:
    """The sum on a convolution, and s times the bias of the branch."""
    add_conv(model, t, s)
    model[0].bias += s * t["0.lora_B.bias"]


CONVOLUTIONS = [
    Row("Conv1d", conv(nn.Conv1d, 4, 6, 3, stride=2), numbers(2, 4, 9), _CONV, add_conv),
    Row("Conv2d", conv(nn.Conv2d, 3, 4, 3, padding="same"), numbers(2, 3, 6, 5), _CONV, add_conv),
    Row("Conv2d, 1 x 1", conv(nn.Conv2d, 3, 4, 1), numbers(2, 3, 4, 4), _CONV, add_conv),
    Row("Conv3d", conv(nn.Conv3d, 2, 3, 2, padding=1), numbers(1, 2, 4, 3, 3), _CONV, add_conv),
    Row(
        "Conv2d, groups",
        conv(nn.Conv2d, 4, 6, 3, padding=1, groups=2),
        numbers(1, 4, 5, 5),
        _CONV,
        add_conv,
    ),
    Row(
        "Conv2d, dilation",
        conv(nn.Conv2d, 3, 4, 3, dilation=2),
        numbers(2, 3, 7, 7),
        _CONV,
        add_conv,
        peft_is="fails: A has no dilation, so the shapes do not fit",
    ),
    Row(
        "Conv2d, circular padding",
        conv(nn.Conv2d, 3, 4, 3, padding=1, padding_mode="circular"),
        numbers(2, 3, 6, 6),
        _CONV,
        add_conv,
        peft_is=_WIDE,
    ),
    Row(
        "DoRA, Conv2d",
        conv(nn.Conv2d, 3, 4, 3, padding=1),
        numbers(2, 3, 5, 5),
        {**_CONV, "use_dora": True},
        add_conv,
    ),
    Row(
        "lora_bias, Conv2d",
        conv(nn.Conv2d, 3, 4, 3),
        numbers(2, 3, 5, 5),
        {**_CONV, "lora_bias": True},
        add_conv_and_bias,
    ),
]
