from __future__ import annotations

import pytest
import torch

from gauge_ext.demo.threads import useful_threads


@pytest.fixture(autouse=True)
def _two_threads(_one_thread: None) -> None:
    torch.set_num_threads(2)


class Machine:
    """A clock, and work that takes a time of its own with each number of threads."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.now = 0.0

    def work(self) -> None:
        self.now += self.seconds[torch.get_num_threads()]

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(("alone", "together", "best"), [(1.0, 0.6, 2), (1.0, 8.0, 1)])
def test_the_faster_number_of_threads_is_used(alone: float, together: float, best: int) -> None:
    machine = Machine({1: alone, 2: together})
    with useful_threads(machine.work, machine.clock) as threads:
        assert threads == best
        assert torch.get_num_threads() == best
    assert torch.get_num_threads() == 2


def test_an_error_leaves_the_threads_as_they_were() -> None:
    machine = Machine({1: 1.0, 2: 8.0})
    with (
        pytest.raises(RuntimeError, match="in the block"),
        useful_threads(machine.work, machine.clock),
    ):
        raise RuntimeError("in the block")
    assert torch.get_num_threads() == 2


def test_one_thread_needs_no_trial() -> None:
    torch.set_num_threads(1)
    with useful_threads(lambda: pytest.fail("timed")) as threads:
        assert threads == 1
