"""DDP and FSDP2 with two gloo processes: the factors of one process that sees the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes

import gauge_ext


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes trained, in every way."""
    folder = tmp_path_factory.mktemp("two_processes")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        two_processes.__file__, str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("way", [way.__name__ for way in two_processes.WAYS])
def test_two_processes_equal_one(way: str, together: Path) -> None:
    alone = two_processes.build()
    before = {n: p.detach().clone() for n, p in gauge_ext.named_adapter_parameters(alone)}
    two_processes.train(alone, *two_processes.batch())
    found = torch.load(together / f"{way}.pt", weights_only=True)
    for name, parameter in gauge_ext.named_adapter_parameters(alone):
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-10, atol=1e-12)
        assert not torch.equal(found[name], before[name])


@pytest.mark.parametrize("name", two_processes.INVARIANT)
@pytest.mark.parametrize("way", [way.__name__ for way in two_processes.INVARIANT_WAYS])
def test_invariant_optimizers_take_the_same_steps(way: str, name: str, together: Path) -> None:
    alone, start = two_processes.build_with_bias(), two_processes.build_with_bias()
    optimizer = two_processes.optimizer_of(alone, name)
    two_processes.train(alone, *two_processes.batch(), optimizer)
    found = torch.load(together / f"{way}_{name}.pt", weights_only=True)
    expected = two_processes.named_trained(alone)
    assert found.keys() == expected.keys()
    assert len(found) == 7  # three pairs and the bias
    for key, parameter in expected.items():
        torch.testing.assert_close(found[key], parameter, rtol=1e-8, atol=1e-10)
        assert not torch.equal(found[key], start.get_parameter(key))
