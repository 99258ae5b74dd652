"""One row for each thing that PEFT's LoRA can do: a model, both configs, and the result by hand.

``docs/make_compatibility.py`` prints them as a table; the tests hold every row in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "base_model.model."
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """A feature.

    Attributes:
        name: What it is called in the table.
        make: The base model.
        inputs: What it is called with.
        fields: PEFT's LoraConfig.
        by_hand: Adds the adapter's tensors, keys without prefix, with scaling s to the weights.
        scaling: s.
        ours: Fields of our LoRAConfig that differ from PEFT's by more than their name.
        peft_is: What PEFT computes where that is not the sum by hand; "" where it is.
        dtype: Of the model; float32 where it is not made for more.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    fields: dict[str, Any]
    by_hand: Callable[[nn.Module, Tensors, float], None]
    scaling: float = 0.5
    ours: dict[str, Any] = field(default_factory=dict)
    peft_is: str = ""
    dtype: torch.dtype = torch.float64

    @property
    def tolerance(self) -> float:
        """Rounding of a few layers stays below this by far, a wrong formula above it."""
        return 1e-10 if self.dtype == torch.float64 else 1e-5

    def base(self) -> nn.Module:
        """The model, the same each time."""
        torch.manual_seed(0)
        model = self.make()
        return (model.double() if self.dtype == torch.float64 else model).eval()

    def expected(self, base: nn.Module, tensors: Tensors) -> nn.Module:
        """A copy of the base with the update by hand."""
        twin = copy.deepcopy(base)
        bare = {key.removeprefix(PREFIX): value.double() for key, value in tensors.items()}
        with torch.no_grad():
            self.by_hand(twin, bare, self.scaling)
        return twin

    def our_fields(self) -> dict[str, Any]:
        """PEFT's fields under our names."""
        names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
        return {names.get(key, key): value for key, value in self.fields.items()} | self.ours


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """The model's output, whatever it wraps it in."""
    with torch.no_grad():
        found = model(*inputs)
    if isinstance(found, tuple):
        return found[0]
    return found if isinstance(found, Tensor) else found[0]


def add_linear(model: nn.Module, t: Tensors, s: float) -> None:
    """W + s B A on each linear layer, with DoRA's lengths and the branch's bias where given."""
    for key in [key for key in t if key.endswith(".lora_A.weight")]:
        path = key.removesuffix(".lora_A.weight")
        layer = model.get_submodule(path)
        transposed = type(layer).__name__ == "Conv1D"
        weight = layer.weight.T if transposed else layer.weight
        total = weight + s * t[f"{path}.lora_B.weight"] @ t[key]
        gain = torch.ones(total.shape[0], dtype=total.dtype)
        if (m := t.get(f"{path}.lora_magnitude_vector")) is not None:
            gain = m / total.norm(dim=1)
        total = total * gain[:, None]
        if (shift := t.get(f"{path}.lora_B.bias")) is not None:
            layer.bias += s * gain * shift
        layer.weight = nn.Parameter(total.T if transposed else total)


def add_embedding(model: nn.Module, t: Tensors, s: float) -> None:
    """W + s (B A)ᵀ on each embedding; with DoRA, columns of the length m."""
    for key in [key for key in t if key.endswith(".lora_embedding_A")]:
        path = key.removesuffix(".lora_embedding_A")
        layer = model.get_submodule(path)
        total = layer.weight + s * (t[f"{path}.lora_embedding_B"] @ t[key]).T
        if (m := t.get(f"{path}.lora_magnitude_vector")) is not None:
            total = total * (m / total.norm(dim=0))
        layer.weight = nn.Parameter(total)


def add_tied(model: nn.Module, t: Tensors, s: float) -> None:
    """W + s (B A)ᵀ on the one table of both, whose adapter the file has twice."""
    head, table = "lm_head.lora_", "model.embed_tokens.lora_embedding_"
    assert torch.equal(t[f"{head}A.weight"], t[f"{table}B"].T)
    assert torch.equal(t[f"{head}B.weight"], t[f"{table}A"].T)
    add_embedding(model, t, s)
    add_linear(model, {key: value for key, value in t.items() if not key.startswith(head)}, s)
    model.lm_head.weight = model.model.embed_tokens.weight


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


def add_whole(model: nn.Module, t: Tensors, s: float) -> None:
    """The sum on linear layers; every other tensor of the file replaces a parameter."""
    add_linear(model, t, s)
    for key, value in t.items():
        if ".lora_" not in key:
            model.get_parameter(key.replace(".base_layer", "")).copy_(value)


def add_attention(model: nn.Module, t: Tensors, s: float) -> None:
    """W + s B A on in_proj and out_proj of each attention, once."""
    for key in [k for k in t if k.endswith(".lora_A.weight") and ".base_layer." not in k]:
        path = key.removesuffix(".lora_A.weight")
        attention = model.get_submodule(path)
        attention.in_proj_weight += s * t[f"{path}.lora_B.weight"] @ t[key]
        inner = f"{path}.base_layer.out_proj"
        attention.out_proj.weight += s * t[f"{inner}.lora_B.weight"] @ t[f"{inner}.lora_A.weight"]


def add_experts(model: nn.Module, t: Tensors, s: float) -> None:
    """W_e + s B_e A_e on each expert: A by experts, B by directions; the outer wrapper is last."""
    add_linear(model, {key: value for key, value in t.items() if key.startswith("up.")}, s)
    places = {"experts": (model.experts, "last"), "experts.base_layer": (model.experts, "first")}
    places |= {"router": (model.router, "matrix")}
    for path, (holder, name) in places.items():
        if f"{path}.lora_A.weight" not in t:
            continue
        a, b, weight = (
            *(t[f"{path}.lora_{factor}.weight"] for factor in "AB"),
            getattr(holder, name),
        )
        count = 1 if weight.dim() == 2 else weight.shape[0]
        rank = a.shape[0] // count
        for e in range(count):
            delta = sum(torch.outer(b[:, k * count + e], a[e * rank + k]) for k in range(rank))
            one = weight if weight.dim() == 2 else weight[e]
            one += s * (delta.T if getattr(holder, "is_transposed", False) else delta)


TRAINED = [1, 4]


def add_tokens(model: nn.Module, t: Tensors, s: float) -> None:
    """The sum on linear layers; two rows of a table replaced, for every layer that shares it."""
    add_linear(model, t, s)
    for key, rows in t.items():
        if key.endswith(".token_adapter.trainable_tokens_delta"):
            table = model.get_submodule(key.removesuffix(".token_adapter.trainable_tokens_delta"))
            for token, row in zip(TRAINED, rows, strict=True):
                table.weight[token] = row


class Attention(nn.Module):
    """Self-attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x, x, x)[0])


class Experts(nn.Module):
    """Two stacked layers of three experts, all of which answer."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.first = nn.Parameter(torch.randn(3, 8, 6))
        self.last = nn.Parameter(torch.randn(3, 5, 8))
        self.shift = nn.Parameter(torch.randn(3, 8))
        if transposed:
            self.first, self.last = (
                nn.Parameter(p.detach().mT.contiguous()) for p in (self.first, self.last)
            )

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        layout = "eio" if self.is_transposed else "eoi"
        hidden = torch.einsum(f"ni,{layout}->eno", x, self.first) + self.shift[:, None]
        return torch.einsum(f"ne,eni,{layout}->no", gates, torch.tanh(hidden), self.last)


class Mixture(nn.Module):
    """A linear layer, a router whose matrix is a bare parameter, and experts."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.router = Router()
        self.experts = Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.experts(x, self.router(x))


class Router(nn.Module):
    """Weights of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ self.matrix.T, -1)


class MLP(nn.Module):
    """Two linear layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.up(x))))


class Table(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6, padding_idx=0)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.emb(x))


def tied_llama() -> nn.Module:
    """A tiny Llama whose head is its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config)


def in_eight_bits() -> nn.Module:
    """A linear layer of torchao's, int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh())
    quantize_(model, Int8WeightOnlyConfig())
    return model


def in_four_bits() -> nn.Module:
    """A linear layer of bitsandbytes', nf4 weights."""
    import bitsandbytes

    linear = nn.Linear(64, 16)
    layer = bitsandbytes.nn.Linear4bit(64, 16, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(linear.state_dict())
    model = nn.Sequential(layer.to("cpu"), nn.Tanh())
    model.is_loaded_in_4bit = True  # what transformers leaves for PEFT to know it by
    return model


def add_decoded(model: nn.Module, t: Tensors, s: float) -> None:
    """W + s B A on the weight that the library says it is, as an ordinary layer."""
    weight = model[0].weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        decoded = dequantize_4bit(weight.data, weight.quant_state)
    else:
        decoded = weight.dequantize()
    total = decoded.double() + s * t["0.lora_B.weight"] @ t["0.lora_A.weight"]
    plain = nn.Linear(64, 16)
    plain.weight.copy_(total)
    plain.bias.copy_(model[0].bias)
    model[0] = plain


def conv(kind: type[nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """Make a model of one convolution."""
    return lambda: nn.Sequential(kind(*args, **kwargs), nn.Tanh())


def gpt2() -> nn.Module:
    """A tiny GPT-2, of transformers' Conv1D."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, initializer_range=0.4
    )
    return GPT2Model(config)


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Callable[[], tuple[Tensor]]:
    """Make inputs of a shape."""
    return lambda: (torch.randn(*shape, dtype=dtype, generator=_generator()),)


def tokens(vocab: int, *shape: int) -> Callable[[], tuple[Tensor]]:
    """Make token ids of a shape."""
    return lambda: (torch.randint(vocab, shape, generator=_generator()),)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


_TWO = {"r": 4, "lora_alpha": 2}
_UP = {**_TWO, "target_modules": ["up", "head"]}
_CONV = {**_TWO, "target_modules": ["0"]}
_WIDE = "the padding of A is by zeros, whatever the padding mode of the base"

ROWS = [
    Row("Linear", MLP, numbers(3, 6), _UP, add_linear),
    Row("rsLoRA", MLP, numbers(3, 6), {**_UP, "use_rslora": True}, add_linear, scaling=1.0),
    Row("DoRA, Linear", MLP, numbers(3, 6), {**_UP, "use_dora": True}, add_linear),
    Row("lora_bias, Linear", MLP, numbers(3, 6), {**_UP, "lora_bias": True}, add_linear),
    Row(
        "modules_to_save",
        MLP,
        numbers(3, 6),
        {**_TWO, "target_modules": ["up"], "modules_to_save": ["head"]},
        add_whole,
    ),
    Row(
        'bias="lora_only"',
        MLP,
        numbers(3, 6),
        {**_TWO, "target_modules": ["up"], "bias": "lora_only"},
        add_whole,
    ),
    Row(
        'bias="all"',
        MLP,
        numbers(3, 6),
        {**_TWO, "target_modules": ["up"], "bias": "all"},
        add_whole,
    ),
    Row(
        "transformers Conv1D",
        gpt2,
        tokens(20, 2, 5),
        {**_TWO, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        add_linear,
    ),
    Row(
        "DoRA, Conv1D",
        gpt2,
        tokens(20, 2, 5),
        {**_TWO, "target_modules": ["c_fc"], "fan_in_fan_out": True, "use_dora": True},
        add_linear,
    ),
    Row("Embedding", Table, tokens(9, 2, 5), {**_TWO, "target_modules": ["emb"]}, add_embedding),
    Row(
        "DoRA, Embedding",
        Table,
        tokens(9, 2, 5),
        {**_TWO, "target_modules": ["emb"], "use_dora": True},
        add_embedding,
    ),
    Row(
        "trainable_token_indices",
        Table,
        tokens(9, 2, 5),
        {**_TWO, "target_modules": ["head"], "trainable_token_indices": {"emb": TRAINED}},
        add_tokens,
    ),
    Row(
        "trainable_token_indices, tied head",
        tied_llama,
        tokens(9, 2, 5),
        {**_TWO, "target_modules": ["q_proj"], "trainable_token_indices": TRAINED},
        add_tokens,
    ),
    Row(
        "modules_to_save, ensure_weight_tying",
        tied_llama,
        tokens(9, 2, 5),
        {
            **_TWO,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        add_whole,
    ),
    *(
        Row(
            f"{target}, ensure_weight_tying",
            tied_llama,
            tokens(9, 2, 5),
            {**_TWO, "target_modules": ["q_proj", target], "ensure_weight_tying": True},
            add_tied,
        )
        for target in ("embed_tokens", "lm_head")
    ),
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
        "MultiheadAttention",
        Attention,
        numbers(2, 5, 8),
        {**_TWO, "target_modules": ["attn"]},
        add_attention,
        peft_is="the update of out_proj twice",
    ),
    Row(
        "target_parameters, experts and router",
        Mixture,
        numbers(4, 6),
        {
            **_TWO,
            "target_modules": ["up"],
            "target_parameters": ["experts.first", "experts.last", "matrix"],
            "rank_pattern": {"first": 2},
            "alpha_pattern": {"first": 1},
        },
        add_experts,
    ),
    Row(
        "target_parameters, transposed, alone",
        lambda: Mixture(transposed=True),
        numbers(4, 6),
        {**_TWO, "target_modules": [], "target_parameters": ["experts.last"]},
        add_experts,
    ),
    Row(
        "lora_bias, Conv2d",
        conv(nn.Conv2d, 3, 4, 3),
        numbers(2, 3, 5, 5),
        {**_CONV, "lora_bias": True},
        lambda model, t, s: _conv_with_bias(model, t, s),
    ),
    *(
        Row(
            f"Linear, {name}",
            make,
            numbers(3, 64, dtype=torch.float32),
            {**_TWO, "target_modules": ["0"]},
            add_decoded,
            dtype=torch.float32,
        )
        for name, make in (("torchao int8", in_eight_bits), ("bitsandbytes nf4", in_four_bits))
    ),
]


def _conv_with_bias(model: nn.Module, t: Tensors, s: float) -> None:
    add_conv(model, t, s)
    model[0].bias += s * t["0.lora_B.bias"]
