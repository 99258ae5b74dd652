"""The study's first task: a small character model of code learns prose."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT, WIDTH, BATCH = 64, 96, 16


class Block(nn.Module):
    """A causal transformer block of four linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of x's shape."""
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharLM(nn.Module):
    """A character-level language model over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``(batch, length, 128)``."""
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class ProseTask:
    """The base learns the code of Python's library, its adapters the prose of Python's topics.

    Args:
        pretrain_steps: Of the base.
    """

    score_name = "right next characters"

    def __init__(self, pretrain_steps: int) -> None:
        code, prose = _texts()
        ends = [len(prose) * part // 10 for part in (6, 8)]
        self._train = prose[: ends[0]]
        self._held_out = {"validation": prose[ends[0] : ends[1]], "test": prose[ends[1] :]}
        self._base = _pretrained(code, pretrain_steps)

    def model(self) -> nn.Module:
        """A base of one's own."""
        return copy.deepcopy(self._base)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss on a batch that is drawn."""
        return _loss(model, _batch(self._train, generator))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> tuple[float, float]:
        """Loss in nats and the share of characters foretold, on the same sequences for all."""
        text = self._held_out[part]
        count = 4 * min(48, (len(text) - 1) // (4 * CONTEXT))
        starts = torch.arange(count) * ((len(text) - CONTEXT - 1) // count)
        rows = torch.stack([text[s : s + CONTEXT + 1] for s in starts])
        logits = model(rows[:, :-1])
        right = (logits.argmax(-1) == rows[:, 1:]).double().mean()
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        return float(loss), float(right)


def _texts() -> tuple[Tensor, Tensor]:
    import pydoc_data.topics

    library = Path(os.__file__).parent
    code = "".join(p.read_text("utf-8", "ignore") for p in sorted(library.glob("*.py"))[:80])
    prose = "".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    code_tokens, prose_tokens = (
        torch.tensor([min(byte, 127) for byte in text.encode()], dtype=torch.long)
        for text in (code, prose)
    )
    return code_tokens, prose_tokens


def _batch(text: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
    return torch.stack([text[s : s + CONTEXT + 1] for s in starts])


def _loss(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def _pretrained(text: Tensor, steps: int) -> CharLM:
    torch.manual_seed(0)
    model = CharLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(model, _batch(text, generator)).backward()
        optimizer.step()
        schedule.step()
    return model
