"""What two gloo processes compute, run by ``torchrun``; test_training_distributed.py judges it.

    torchrun --nproc-per-node 2 two_processes.py FOLDER

Every process trains on its half of the batch, in each of the ways below; process 0 writes the
trained factors to FOLDER/WAY.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import gauge_ext

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


def train(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


def ddp(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, x, target)
    return {n: p.detach() for n, p in gauge_ext.named_adapter_parameters(model)}


def fsdp(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    for layer in gauge_ext.models.lora_layers(model).values():
        fully_shard(layer)
    fully_shard(model)
    train(model, x, target)
    named = gauge_ext.named_adapter_parameters(model)
    return {n: p.full_tensor().detach() for n, p in named}


def dcp(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Train sharded, save a distributed checkpoint, and load it into a fresh sharded model."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    fsdp(model, x, target)
    folder = Path(sys.argv[1]) / "checkpoint"
    checkpoint.save(get_model_state_dict(model), checkpoint_id=folder)
    fresh = build()
    for layer in gauge_ext.models.lora_layers(fresh).values():
        fully_shard(layer)
    fully_shard(fresh)
    state = get_model_state_dict(fresh)
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(fresh, state)
    named = gauge_ext.named_adapter_parameters(fresh)
    return {n: p.full_tensor().detach() for n, p in named}


WAYS = (ddp, fsdp, dcp)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, target = batch()
    half = slice(4 * rank, 4 * rank + 4)
    for way in WAYS:
        factors = way(build(), x[half], target[half])
        if rank == 0:
            kept = {name: factor.clone() for name, factor in factors.items()}
            torch.save(kept, Path(sys.argv[1]) / f"{way.__name__}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
