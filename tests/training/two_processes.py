"""What two gloo processes compute, run by ``torchrun``; test_training_distributed.py judges it.

    torchrun --nproc-per-node 2 two_processes.py FOLDER

Every process trains on its half of the batch, in each of the ways below; process 0 writes the
trained factors to FOLDER/WAY.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

import gauge_ext
from gauge_ext.errors import ConfigError
from gauge_ext.optim import create_optimizer

STEPS = 3
# SGD: AdamW would turn rounding of the all-reduce, where a gradient is tiny, into whole steps.
LEARNING_RATE = 0.5


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16, bias=False), nn.GELU(), nn.Linear(16, 4)
    )
    gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=4, alpha=8, target_modules=["0", "2", "4"]))
    for name, parameter in gauge_ext.named_adapter_parameters(model):
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model.double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    return x, torch.randn(8, 4, generator=generator, dtype=torch.float64)


def train(
    model: nn.Module,
    x: torch.Tensor,
    target: torch.Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = STEPS,
) -> None:
    if optimizer is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


def ddp(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, x, target)
    return {n: p.detach() for n, p in gauge_ext.named_adapter_parameters(model)}


def shard(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in gauge_ext.models.lora_layers(model).values():
        fully_shard(layer)
    fully_shard(model)


def fsdp(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    shard(model)
    train(model, x, target)
    named = gauge_ext.named_adapter_parameters(model)
    return {n: p.full_tensor().detach() for n, p in named}


def dcp(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Train sharded, save a distributed checkpoint, and load it into a fresh sharded model."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    fsdp(model, x, target)
    folder = Path(sys.argv[1]) / "checkpoint"
    checkpoint.save(get_model_state_dict(model), checkpoint_id=folder)
    fresh = build()
    shard(fresh)
    state = get_model_state_dict(fresh)
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(fresh, state)
    named = gauge_ext.named_adapter_parameters(fresh)
    return {n: p.full_tensor().detach() for n, p in named}


def build_with_bias() -> nn.Module:
    """With one parameter beside the pairs, which the invariant optimizers train by AdamW."""
    model = build()
    model[4].bias.requires_grad_(True)
    return model


def optimizer_of(model: nn.Module, name: Any) -> torch.optim.Optimizer:
    # Adam makes whole steps of the all-reduce's rounding where a gradient is tiny, but for eps.
    options = {"momentum": 0.9} if name == "scaled_gd" else {"eps": 1e-4}
    return create_optimizer(model, name, lr=0.05, max_grad_norm=0.1, **options)


def named_trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that is trained, gathered."""
    found = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in found.items()}


def invariant_ddp(name: Any, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    model = build_with_bias()
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, x, target, optimizer_of(model, name))
    return named_trained(model)


def invariant_fsdp(name: Any, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """One step sharded, one unsharded that resumes from it, and one sharded again."""
    full = StateDictOptions(full_state_dict=True)
    model = build_with_bias()
    shard(model)
    optimizer = optimizer_of(model, name)
    train(model, x, target, optimizer, steps=1)
    values, state = get_state_dict(model, optimizer, options=full)
    parts = optimizer.state_dict()
    model = build_with_bias()
    optimizer = optimizer_of(model, name)
    try:
        optimizer.load_state_dict(parts)
        raise AssertionError("the parts of a sharded parameter were loaded as if they were whole")
    except ConfigError:
        pass
    set_state_dict(model, optimizer, model_state_dict=values, optim_state_dict=state, options=full)
    train(nn.parallel.DistributedDataParallel(model), x, target, optimizer, steps=1)
    values, parts = model.state_dict(), optimizer.state_dict()
    model = build_with_bias()
    model.load_state_dict(values)
    shard(model)
    optimizer = optimizer_of(model, name)
    optimizer.load_state_dict(parts)
    train(model, x, target, optimizer, steps=1)
    return named_trained(model)


WAYS = (ddp, fsdp, dcp)
INVARIANT = ("scaled_gd", "gauge_adam", "lora_rite")
INVARIANT_WAYS = (invariant_ddp, invariant_fsdp)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, target = batch()
    half = slice(4 * rank, 4 * rank + 4)
    ways: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
        way.__name__: partial(way, build()) for way in WAYS
    }
    for name in INVARIANT:
        ways |= {f"{way.__name__}_{name}": partial(way, name) for way in INVARIANT_WAYS}
    for way, run in ways.items():
        factors = run(x[half], target[half])
        if rank == 0:
            kept = {name: factor.clone() for name, factor in factors.items()}
            torch.save(kept, Path(sys.argv[1]) / f"{way}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
