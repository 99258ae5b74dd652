"""What every test stands on: no network, a fresh compiler cache, seeds, small models."""

from __future__ import annotations

import atexit
import copy
import html
import json
import os
import random
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# These are read when torch or huggingface_hub is imported, so they come before those. A compiler
# cache that outlives the session hides errors of today behind the results of yesterday; a thread
# that waits in a loop takes its core from the tests of another worker.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
_CACHE = tempfile.mkdtemp(prefix="gauge-ext-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

import pytest  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from torch import Tensor, nn  # noqa: E402

# Most tests compute on matrices so small that a second thread only waits. tests/ops, where the
# pieces that threads work on matter, asks for two.
torch.set_num_threads(1)

# Examples are the same in every run, and a slow machine is no failure.
settings.register_profile("gauge_ext", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("gauge_ext")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        # torch's own compiler, when first used, imports what torch deprecates.
        r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning",
        # torch's ONNX exporter asks torch's own trees in a way that torch deprecates.
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
        # PEFT asks transformers 5 under a name of transformers 4.
        r"ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype that the kernels compute in."""
    return request.param


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that has kernels; the GPU is skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return torch.device(request.param)


class MLP(nn.Module):
    """Two linear layers, the second without a bias, with a name that repeats at two depths."""

    def __init__(self, width: int = 12, hidden: int = 20, out: int = 5) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.block = nn.ModuleDict({"down": nn.Linear(hidden, out, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["down"](torch.tanh(self.up(x)))


@pytest.fixture
def make_mlp() -> Callable[..., MLP]:
    """Make an MLP: ``make_mlp(width, hidden, out)``; its layers are ``up`` and ``block.down``."""
    return MLP


@pytest.fixture
def mlp(make_mlp: Callable[..., MLP]) -> MLP:
    """An MLP for inputs ``(*, 12)``."""
    return make_mlp()


# With the usual 0.02 a narrow model attends almost evenly, whatever query and key are, and a test
# with adapters on them would prove nothing.
_RANGE = 0.3


@pytest.fixture(scope="session")
def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=_RANGE,
    )
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


@pytest.fixture
def bert(_bert: nn.Module) -> nn.Module:
    """A BertModel of 2 layers and width 16, in evaluation mode."""
    return copy.deepcopy(_bert)


@pytest.fixture(scope="session")
def _llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=_RANGE,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def llama(_llama: nn.Module) -> nn.Module:
    """A LlamaForCausalLM of 2 layers and width 16, lm_head tied to the embedding."""
    return copy.deepcopy(_llama)


@pytest.fixture
def small_files() -> Callable[[int], AbstractContextManager[None]]:
    """Let the system itself stop every file at so many bytes: a full disk, in mid-write.

    ``with small_files(4096): ...``; not for a whole test, since pytest's output may be a file too.
    """

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def token_ids() -> Tensor:
    """Token ids ``(3, 7)`` for the models of transformers above."""
    return torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(0))


def randomize(parameters: Mapping[str, Tensor]) -> None:
    """Fill adapter factors with values that matter: a fresh lora_B is zero and proves nothing."""
    with torch.no_grad():
        for name, parameter in sorted(parameters.items()):
            parameter.normal_(std=0.3 if "lora_A" in name else 0.2)


@pytest.fixture
def make_peft_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Make a PEFT adapter with random factors for a copy of a model, and return its folder.

    ``make_peft_adapter(model, name="adapter", adapter_name="default", **LoraConfig's fields)``.
    """
    peft = pytest.importorskip("peft")

    def make(
        model: nn.Module, name: str = "adapter", adapter_name: str = "default", **fields: Any
    ) -> Path:
        adapted = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(**fields), adapter_name=adapter_name
        )
        randomize({n: p for n, p in adapted.named_parameters() if "lora_" in n})
        folder = tmp_path / name
        adapted.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def merge_by_hand() -> Callable[..., nn.Module]:
    """Add ``s·B·A``, read straight from an adapter's file, to the weights of a copy of a model.

    ``merge_by_hand(model, folder, scaling)``, with one scaling or a function of the module's path.
    The sum is taken in float64 and rounded to the weight's dtype.
    """

    def merge(model: nn.Module, folder: Path, scaling: float | Callable[[str], float]) -> nn.Module:
        twin = copy.deepcopy(model)
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        paths = {key.rpartition(".lora_")[0] for key in tensors}
        assert len(tensors) == 2 * len(paths)
        for path in paths:
            a, b = (tensors[f"{path}.lora_{factor}.weight"].double() for factor in "AB")
            name = path.removeprefix("base_model.model.")
            s = scaling(name) if callable(scaling) else scaling
            # A new Parameter, for the old one may be tied to an embedding.
            layer = twin.get_submodule(name)
            weight = (layer.weight.double() + s * (b @ a)).to(layer.weight.dtype)
            layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        return twin

    return merge


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page in a frame of a phone's width.

    ``scroll_width`` is above ``client_width`` where something sticks out sideways; ``errors`` is
    what it wrote to the console, requests that the page's own policy blocked among them.
    """

    scroll_width: int
    client_width: int
    counts: list[int]
    errors: list[str]


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Seen]:
    """Open a page in headless chromium as it is written, 390 pixels wide.

    Called with the page's text and CSS selectors whose elements are to be counted; a screenshot
    goes to ``look.png`` in the test's folder.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")

    def run(text: str, *selectors: str) -> Seen:
        # No script runs in the page: the frame around it measures, and tells in its title.
        around = tmp_path / "look.html"
        around.write_text(
            "<!doctype html><meta charset=utf-8><body style='margin:0'><script>"
            "const frame = document.createElement('iframe');"
            "frame.style = 'width:390px;height:2400px;border:0';"
            "frame.onload = () => { const page = frame.contentDocument, top = page.documentElement;"
            "document.title = JSON.stringify([top.scrollWidth, top.clientWidth,"
            f"{json.dumps(selectors)}.map(s => page.querySelectorAll(s).length)]); }};"
            f"frame.srcdoc = {json.dumps(text).replace('</', '<' + chr(92) + '/')};"
            "document.body.append(frame);</script>",
            encoding="utf-8",
        )
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", "--window-size=500,2400"),
            f"--user-data-dir={tmp_path}/profile",
        ]
        done = subprocess.run(
            [chromium, *flags, "--dump-dom", around.as_uri()],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        subprocess.run(
            [chromium, *flags, f"--screenshot={tmp_path}/look.png", around.as_uri()],
            capture_output=True,
            check=True,
            timeout=120,
        )
        title = re.search(r"<title>(\[.*?\])</title>", done.stdout)
        assert title is not None, done.stderr
        errors = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return Seen(*json.loads(html.unescape(title.group(1))), errors)

    return run
