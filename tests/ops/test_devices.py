"""``lora_linear`` on every device that has kernels, against formulas written out in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from closeness import assert_close
from marks import needs_compiled
from torch import Tensor

from gauge_ext import _load
from gauge_ext.ops import draw_seed, lora_linear, reference

pytestmark = needs_compiled

SCALING = 0.7
SEED = 1234567890123456789

# (N, in, out, r): tails of every tile, rows that are no multiple of a pack, ranks above a block's
SIZES = [
    (7, 37, 51, 5),
    (64, 384, 384, 8),
    (1, 128, 130, 4),
    (200, 260, 132, 16),
    (130, 1000, 260, 17),
    (33, 64, 72, 70),
    (5, 3, 2, 1),
    (0, 8, 8, 2),
]
# Half a unit in the last place of what is stored, and what the low-rank part loses, which is stored
# before the product of the base is added. float32: three tf32 products, about 2**-21 of each term.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 4e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


@pytest.fixture(params=list(TOLERANCES), ids=str)
def storage(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if device.type == "cuda" and not _load.status().cuda:
        pytest.skip("this build has no CUDA kernels")
    if device.type == "cpu" and request.param == torch.float16:
        pytest.skip("no float16 on the CPU")
    return request.param


@pytest.fixture
def kernels(device: torch.device) -> torch.device:
    if device.type == "cuda" and not _load.status().cuda:
        pytest.skip("this build has no CUDA kernels")
    return device


def make(
    sizes: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    rows, in_features, out_features, rank = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    shapes = {
        "x": (rows, in_features),
        "weight": (out_features, in_features),
        "bias": (out_features,),
        "lora_A": (rank, in_features),
        "lora_B": (out_features, rank),
        "grad": (rows, out_features),
    }
    tensors = {}
    for name, shape in shapes.items():
        wanted = (adapter_dtype or dtype) if name.startswith("lora") else dtype
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[name] = value.to(device, wanted).requires_grad_(name in ("x", "lora_A", "lora_B"))
    return tensors


def run(t: dict[str, Tensor], dropout_p: float = 0.0, seed: Tensor | None = None) -> list[Tensor]:
    """Return y and the gradients of x, lora_A and lora_B."""
    y = lora_linear(
        t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"], SCALING, dropout_p, seed
    )
    inputs = (t["x"], t["lora_A"], t["lora_B"])
    return [y, *torch.autograd.grad(y, inputs, t["grad"])]


def by_hand(t: dict[str, Tensor], mask: Tensor | float = 1.0) -> list[Tensor]:
    """Return the same in float64 on the CPU."""
    x, weight, bias, lora_A, lora_B, grad = (v.detach().cpu().double() for v in t.values())
    dropped = x * mask
    return [
        x @ weight.T + bias + SCALING * (dropped @ lora_A.T @ lora_B.T),
        grad @ weight + SCALING * (grad @ lora_B @ lora_A) * mask,
        SCALING * (grad @ lora_B).T @ dropped,
        SCALING * grad.T @ (dropped @ lora_A.T),
    ]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients(
    sizes: tuple[int, int, int, int], dropout_p: float, device: torch.device, storage: torch.dtype
) -> None:
    t = make(sizes, device, storage)
    seed = torch.tensor(SEED)
    mask = reference.dropout_mask(sizes[0], sizes[1], dropout_p, seed)
    for actual, expected in zip(run(t, dropout_p, seed), by_hand(t, mask), strict=True):
        assert actual.device.type == device.type
        assert actual.dtype == storage
        assert_close(actual, expected, TOLERANCES[storage])


def test_float32_adapters_keep_their_precision_on_a_half_precision_base(
    device: torch.device, storage: torch.dtype
) -> None:
    if storage.itemsize != 2:
        pytest.skip("about half precision")
    t = make((200, 256, 192, 24), device, storage, torch.float32)
    _, _, grad_A, grad_B = run(t)
    _, _, expected_A, expected_B = by_hand(t)
    assert_close(grad_A, expected_A, TOLERANCES[torch.float32])
    assert_close(grad_B, expected_B, TOLERANCES[torch.float32])


def test_strides_and_offsets(device: torch.device, storage: torch.dtype) -> None:
    t = make((24, 36, 20, 6), device, storage)
    expected = by_hand(t)

    def shifted(tensor: Tensor) -> Tensor:
        # Neither contiguous nor aligned
        room = torch.zeros(tensor.numel() + 1, device=device, dtype=tensor.dtype)[1:]
        return room.view(tensor.shape[::-1]).T.copy_(tensor.detach())

    moved = {n: shifted(v).requires_grad_(v.requires_grad) for n, v in t.items() if v.dim() == 2}
    for actual, wanted in zip(run({**t, **moved}), expected, strict=True):
        assert_close(actual, wanted, TOLERANCES[storage])


def test_the_mask_is_the_references(kernels: torch.device) -> None:
    for columns in (5, 128, 300):
        x = torch.zeros(70, columns, dtype=torch.float64, device=kernels)
        seed = torch.tensor(-99)
        expected = reference.dropout_mask(70, columns, 0.3, seed)
        for where in ("cpu", kernels):
            mask = torch.ops.gauge_ext.dropout_mask(x, 0.3, seed.to(where))
            assert torch.equal(mask.cpu(), expected)


def test_results_repeat_bit_for_bit(kernels: torch.device) -> None:
    t = make((1030, 520, 260, 8), kernels, torch.float32)
    seed = draw_seed()
    for first, second in zip(run(t, 0.2, seed), run(t, 0.2, seed), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_to_second_order(dropout_p: float, kernels: torch.device) -> None:
    t = make((3, 4, 5, 2), kernels, torch.float64)
    inputs = tuple(t[n].requires_grad_() for n in ("x", "weight", "bias", "lora_A", "lora_B"))

    def function(*tensors: Tensor) -> Tensor:
        return lora_linear(*tensors, SCALING, dropout_p, torch.tensor(5))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_opcheck(kernels: torch.device) -> None:
    t = make((6, 4, 5, 2), kernels, torch.float32)
    call = (*(t[n] for n in ("x", "weight", "bias", "lora_A", "lora_B")), SCALING, 0.4)
    torch.library.opcheck(
        torch.ops.gauge_ext.lora_linear.default, (*call, torch.tensor(5, device=kernels))
    )


def test_under_torch_compile(kernels: torch.device) -> None:
    t = make((64, 48, 40, 8), kernels, torch.float32)
    seed = torch.tensor(SEED, device=kernels)
    compiled: Callable[..., Tensor] = torch.compile(lora_linear, fullgraph=True)
    y = compiled(*(t[n] for n in ("x", "weight", "bias", "lora_A", "lora_B")), SCALING, 0.1, seed)
    mask = reference.dropout_mask(64, 48, 0.1, seed.cpu())
    assert_close(y.detach(), by_hand(t, mask)[0], TOLERANCES[torch.float32])


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    if not _load.status().cuda:
        pytest.skip("this build has no CUDA kernels")
    return torch.device("cuda")


def test_nothing_waits_for_the_gpu(gpu: torch.device) -> None:
    t = make((64, 48, 40, 8), gpu, torch.bfloat16)
    on_device = torch.tensor(SEED, device=gpu)
    run(t, 0.1, on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in (on_device, torch.tensor(SEED)):
            run(t, 0.1, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_reads_the_seed_again(gpu: torch.device) -> None:
    t = make((64, 48, 40, 8), gpu, torch.float32)
    seed = torch.tensor(1, device=gpu)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(t, 0.3, seed)  # cuBLAS allocates its workspace
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(t, 0.3, seed)
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        mask = reference.dropout_mask(64, 48, 0.3, torch.tensor(value))
        for actual, expected in zip(results, by_hand(t, mask), strict=True):
            assert_close(actual, expected, TOLERANCES[torch.float32])


def test_a_stream_of_ones_own(gpu: torch.device) -> None:
    t = make((200, 260, 132, 16), gpu, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs on another stream comes too early
        results = run(t)
    stream.synchronize()
    for actual, expected in zip(results, by_hand(t), strict=True):
        assert_close(actual, expected, TOLERANCES[torch.float32])


def test_a_seed_on_another_device_is_refused(gpu: torch.device) -> None:
    t = make((2, 4, 3, 2), gpu, torch.float32)
    with pytest.raises(RuntimeError, match="seed must be on the CPU or on x's device, cuda:0"):
        run(t, 0.5, torch.tensor(1, device="meta"))
