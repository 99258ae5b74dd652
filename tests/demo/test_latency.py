from __future__ import annotations

import itertools

import pytest

from gauge_ext.demo.latency import interleaved
from gauge_ext.errors import ConfigError


def test_medians_of_calls_in_turn() -> None:
    calls: list[str] = []
    now = 0.0
    costs = {"slow": itertools.cycle([4.0, 4.0, 100.0]), "fast": itertools.cycle([2.0, 2.0, 50.0])}

    def contestant(name: str) -> None:
        nonlocal now
        calls.append(name)
        now += next(costs[name])

    latency = interleaved(
        "a job",
        {name: lambda name=name: contestant(name) for name in costs},
        rounds=3,
        warmups=1,
        clock=lambda: now,
    )
    assert calls[:2] == ["slow", "fast"]  # the warmup
    assert calls[2:] == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert latency.seconds == {"slow": 4.0, "fast": 2.0}
    assert latency.ratio("slow", "fast") == 2.0
    assert (latency.job, latency.rounds) == ("a job", 3)


@pytest.mark.parametrize(("contestants", "rounds"), [({}, 3), ({"a": lambda: None}, 0)])
def test_nothing_to_time_is_refused(contestants: dict[str, object], rounds: int) -> None:
    with pytest.raises(ConfigError, match="at least one round and one contestant"):
        interleaved("a job", contestants, rounds=rounds)
