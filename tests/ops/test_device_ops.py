"""Every op on every device that has kernels: values, CUDA graphs, streams, other GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from marks import needs_compiled
from torch import Tensor

from gauge_ext import _load
from gauge_ext.ops import lora_gather, lora_linear, lora_linear_group, merge_into

pytestmark = needs_compiled

OPS = torch.ops.gauge_ext
# What rounding the inputs of a row of 70 numbers and what is stored costs
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
ROWS, IN, OUT = 37, 70, 52
RANKS = (5, 1, 40)

Tensors = dict[str, Any]
Case = tuple[Callable[[Callable[..., Tensor]], Tensors], Callable[[Tensors], list[Tensor]]]


def each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor in a list or a dictionary of them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: each(part, change) for name, part in value.items()}
    return [each(part, change) for part in value]


def layer(normal: Callable[..., Tensor]) -> Tensors:
    return {
        "x": normal(ROWS, IN),
        "weights": [normal(OUT + i, IN) for i in range(3)],
        "bias": normal(OUT),
        "A": [normal(r, IN) for r in RANKS],
        "B": [normal(OUT, r) for r in RANKS],
        "Bs": [normal(OUT + i, r) for i, r in enumerate(RANKS)],
        "grad": normal(ROWS, OUT),
        "grads": [normal(ROWS, OUT + i) for i in range(3)],
        "index": torch.tensor([(7 * i) % 4 - 1 for i in range(ROWS)]),
        "seeds": [torch.tensor(3 + i) for i in range(3)],
    }


def leaves(t: Tensors, *names: str) -> list[Tensor]:
    found = []
    for name in names:
        part = t[name]
        for tensor in part if isinstance(part, list) else [part]:
            found.append(tensor.requires_grad_())
    return found


def run_linear(t: Tensors) -> list[Tensor]:
    wanted = leaves(t, "x", "A", "B")
    x, a, b = wanted[0], wanted[1], wanted[1 + len(RANKS)]
    y = lora_linear(x, t["weights"][0], t["bias"], a, b, 0.7, 0.25, t["seeds"][0])
    return [y, *torch.autograd.grad(y, (x, a, b), t["grad"])]


def run_group(t: Tensors, seeds: list[Tensor]) -> list[Tensor]:
    wanted = leaves(t, "x", "A", "Bs")
    ys = lora_linear_group(
        t["x"],
        t["weights"],
        [t["bias"], None, None],
        t["A"],
        t["Bs"],
        [0.7, -1.0, 2.0],
        0.25,
        seeds,
    )
    return [*ys, *torch.autograd.grad(ys, wanted, t["grads"])]


def run_gather(t: Tensors) -> list[Tensor]:
    wanted = leaves(t, "x", "A", "B")
    call = (t["x"], t["weights"][0], t["bias"], t["A"], t["B"], [0.7, -1.0, 2.0], t["index"])
    y = lora_gather(*call)
    return [y, *torch.autograd.grad(y, wanted, t["grad"])]


def run_merge(t: Tensors) -> list[Tensor]:
    weights = [t["weights"][0], t["weights"][0].t().contiguous()]
    merged = [torch.empty_like(weight) for weight in weights]
    sums = OPS.merge_out(
        weights, t["A"][:2], t["B"][:2], [0.5, 2.0], [False, True], None, 0, True, out=merged
    )
    assert sums.device == weights[0].device
    return [*merged, sums[:, :2]]  # what rounding takes away depends on the dtype


def pairs(normal: Callable[..., Tensor]) -> Tensors:
    shapes = ((37, 29, 5), (64, 48, 8), (9, 9, 1), (40, 130, 17))
    return {
        "A": [normal(r, n) for _, n, r in shapes],
        "B": [normal(m, r) for m, _, r in shapes],
        "grad_A": [normal(r, n) for _, n, r in shapes],
        "grad_B": [normal(m, r) for m, _, r in shapes],
    }


def step_parts(t: Tensors) -> tuple[list[list[Tensor]], list[list[Tensor]], int]:
    factors = [[x.clone() for x in t[name]] for name in ("A", "B")]
    wide = torch.float64 if factors[0][0].dtype == torch.float64 else torch.float32
    averages = [[0.1 * x.to(wide) for x in t[name]] for name in ("grad_A", "grad_B")]
    return factors, averages, len(t["A"])


def run_scaled(t: Tensors) -> list[Tensor]:
    factors, averages, n = step_parts(t)
    OPS.scaled_gd_step(
        *factors, t["grad_A"], t["grad_B"], *averages, [1.7] * n, [0, 1, 0, 0],
        0.01, 0.9, True, 0.1, 1e-3, 0.5,
    )  # fmt: skip
    return [x for part in (*factors, *averages) for x in part]


def run_adam(t: Tensors) -> list[Tensor]:
    factors, averages, n = step_parts(t)
    moments = [
        [torch.ones_like(q[0]) for q in averages[0]],
        [torch.ones_like(q[:, 0]) for q in averages[1]],
    ]
    OPS.gauge_adam_step(
        *factors, t["grad_A"], t["grad_B"], *averages, *moments, [1.7] * n, [0, 1, 0, 0],
        [3] * n, 0.01, 0.9, 0.99, 1e-8, 0.1, 1e-3, 0.5,
    )  # fmt: skip
    return [x for part in (*factors, *averages, *moments) for x in part]


def run_norm(t: Tensors) -> list[Tensor]:
    n = len(t["A"])
    parts = (t["A"], t["B"], t["grad_A"], t["grad_B"])
    return [OPS.factor_gradient_norm(*parts, [1.7] * n, [0, 1, 0, 0], 1e-3)]


CASES: dict[str, Case] = {
    "lora_linear": (layer, run_linear),
    "lora_linear_group, one mask": (layer, lambda t: run_group(t, t["seeds"][:1])),
    "lora_linear_group, a mask each": (layer, lambda t: run_group(t, t["seeds"])),
    "lora_gather": (layer, run_gather),
    "merge_out": (layer, run_merge),
    "scaled_gd_step": (pairs, run_scaled),
    "gauge_adam_step": (pairs, run_adam),
    "factor_gradient_norm": (pairs, run_norm),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def make(case: Case, dtype: torch.dtype, device: torch.device | str) -> Tensors:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return each(case[0](normal), lambda tensor: tensor.to(device))


def expected(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Return what the CPU makes of the same rounded numbers in float64."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return case[1](each(make(case, dtype, "cpu"), wide))


def assert_close(actual: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    assert len(actual) == len(wanted)
    for got, want in zip(actual, wanted, strict=True):
        assert got.shape == want.shape
        error = (got.detach().cpu().double() - want).abs().max().item()
        assert error <= tolerance * max(want.abs().max().item(), 1.0), f"{error:.2e}"


@pytest.fixture
def kernels(device: torch.device) -> torch.device:
    if device.type == "cuda" and not _load.status().cuda:
        pytest.skip("this build has no CUDA kernels")
    return device


@pytest.mark.parametrize("storage", TOLERANCES, ids=str)
def test_values(case: Case, storage: torch.dtype, kernels: torch.device) -> None:
    if kernels.type == "cpu" and storage == torch.float16 and case[1] is not run_merge:
        pytest.skip("no float16 on the CPU")
    actual = case[1](make(case, storage, kernels))
    assert all(tensor.device.type == kernels.type for tensor in actual)
    assert_close(actual, expected(case, storage), TOLERANCES[storage])


def test_results_repeat_bit_for_bit(case: Case, kernels: torch.device) -> None:
    first, second = (case[1](make(case, torch.float32, kernels)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    if not _load.status().cuda:
        pytest.skip("this build has no CUDA kernels")
    return torch.device("cuda")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_gpu(
    case: Case, gpu: torch.device, request: pytest.FixtureRequest
) -> None:
    t = make(case, torch.float32, gpu)
    case[1](t)
    request.getfixturevalue("no_waiting")
    case[1](t)


def test_a_captured_graph_repeats_the_call(case: Case, gpu: torch.device) -> None:
    t = make(case, torch.float32, gpu)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case[1](t)  # what is made once, cuBLAS's workspace among it, is made here
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case[1](t)
    for tensor in results:
        tensor.detach().zero_()
    graph.replay()
    assert_close(results, expected(case, torch.float32), TOLERANCES[torch.float32])


def test_a_stream_of_ones_own(case: Case, gpu: torch.device) -> None:
    t = make(case, torch.float32, gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs on another stream comes too early
        results = case[1](t)
    stream.synchronize()
    assert_close(results, expected(case, torch.float32), TOLERANCES[torch.float32])


def test_tensors_on_a_gpu_that_is_not_the_current_one(case: Case, gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU here")
    results = case[1](make(case, torch.float32, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in results)
    assert_close(results, expected(case, torch.float32), TOLERANCES[torch.float32])


@pytest.mark.parametrize("storage", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_merges_to_the_same_bits(gpu: torch.device, storage: torch.dtype) -> None:
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("without AVX2 this CPU rounds each product")
    t = make((layer, run_merge), storage, "cpu")
    half = storage.itemsize == 2
    for seed in (None, torch.tensor(5)) if half else (None,):
        merged = []
        for where in (torch.device("cpu"), gpu):
            weight, a, b = (x.to(where) for x in (t["weights"][0], t["A"][0], t["B"][0]))
            out = torch.empty_like(weight)
            merge_into(out, weight, a, b, 0.5, seed=seed, first_row=3)
            merged.append(out.cpu())
        assert torch.equal(*merged)


def test_a_step_that_a_gpu_refuses_writes_nothing_and_the_next_one_says_so(
    gpu: torch.device,
) -> None:
    t = make((pairs, run_adam), torch.float32, gpu)
    t["A"][0][3].zero_()
    assert all(torch.equal(new, old) for new, old in zip(run_scaled(t), t["A"], strict=False))
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"which wrote nothing, pair 0: lora_A"):
        run_scaled(t)
    assert run_norm(t)[0].isnan()
    run_scaled(make((pairs, run_adam), torch.float32, gpu))
