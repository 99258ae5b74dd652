"""Contrastive training of an adapter: each sentence against the names of its batch."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gauge_ext.demo.corpus import Pair, words_of
from gauge_ext.demo.encoder import SentenceEncoder
from gauge_ext.demo.text import TextTokenizer
from gauge_ext.errors import ConfigError, NonFiniteError
from gauge_ext.models import adapter_parameters, lora_layers


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to learn.

    Args:
        epochs: Passes over the pairs, >= 1.
        batch_size: Pairs a step, >= 2: a pair's negatives are the others of its batch.
        learning_rate: The peak, after the warmup.
        warmup: Share of all steps over which the rate rises from 0.
        weight_decay: AdamW's.
        temperature: The cosine is divided by it before the softmax.
        seed: Order of the pairs.

    Raises:
        ConfigError: A value outside its range.
    """

    epochs: int = 2
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    temperature: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup must lie in [0, 1), got {self.warmup}.")


@dataclass(frozen=True)
class Step:
    """What one training step did."""

    number: int  # from 1
    total: int
    loss: float
    rate: float  # the learning rate used
    pairs_per_second: float  # over the whole training so far


def info_nce(queries: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """Contrastive loss both ways (InfoNCE, arXiv:1807.03748; both ways as in arXiv:2103.00020).

    With S = queries @ answers.T / temperature,

        loss = (mean_i -log softmax(S_i,:)_i + mean_j -log softmax(S_:,j)_j) / 2

    Args:
        queries: (n, d), unit vectors.
        answers: (n, d), unit vectors; row i belongs to query i, the others are its negatives.
        temperature: Smaller is stricter.

    Returns:
        A scalar; log n when everything is equally alike.
    """
    scores = queries @ answers.T / temperature
    right = torch.arange(len(scores))
    forward = nn.functional.cross_entropy(scores, right)
    return (forward + nn.functional.cross_entropy(scores.T, right)) / 2


def train(
    encoder: SentenceEncoder,
    tokenizer: TextTokenizer,
    pairs: Sequence[Pair],
    config: TrainConfig,
    on_step: Callable[[Step], None] | None = None,
) -> list[float]:
    """Trains the adapters that are attached to ``encoder``, and leaves it in eval mode.

    Args:
        encoder: Frozen but for its adapters.
        tokenizer: For sentences and names.
        pairs: At least one batch of them.
        config: Length and speed.
        on_step: Called after every step.

    Returns:
        The loss of every step.

    Raises:
        ConfigError: Fewer pairs than a batch.
        NonFiniteError: The loss became NaN or infinite.
    """
    steps = config.epochs * (len(pairs) // config.batch_size)
    if steps == 0:
        raise ConfigError(
            f"batch_size is {config.batch_size}, but there are only {len(pairs)} pairs to train on."
        )
    parameters = list(adapter_parameters(encoder))
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, steps, config.warmup)
    )
    losses: list[float] = []
    started = time.perf_counter()
    _train_mode(encoder, True)
    for batch in _batches(pairs, config):
        rate = schedule.get_last_lr()[0]
        texts = [pair.sentence for pair in batch] + [words_of(pair.name) for pair in batch]
        vectors = encoder.encode(tokenizer, texts)
        loss = info_nce(vectors[: len(batch)], vectors[len(batch) :], config.temperature)
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the loss became {losses[-1]} at step {len(losses)} of {steps}.",
                hint="Train with a smaller learning rate.",
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            speed = len(losses) * config.batch_size / (time.perf_counter() - started)
            on_step(Step(len(losses), steps, losses[-1], float(rate), speed))
    _train_mode(encoder, False)
    return losses


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Returns the share of the peak rate at ``step``, from 0: a linear rise, then a fall to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / (steps - rising + 1)


def _train_mode(encoder: SentenceEncoder, mode: bool) -> None:
    """Switches the adapters' dropout alone.

    The base is frozen and cannot overfit. Its own dropout made a step a quarter slower and the
    search no better (recall@1 0.658 with it, 0.662 without, after one epoch of one seed).
    """
    encoder.eval()
    for layer in lora_layers(encoder).values():
        layer.train(mode)


def _batches(pairs: Sequence[Pair], config: TrainConfig) -> Iterator[Sequence[Pair]]:
    """Yields full batches; the remainder of an epoch is dropped, for its loss has another scale."""
    draw = random.Random(config.seed)
    for _ in range(config.epochs):
        order = draw.sample(list(pairs), len(pairs))
        for start in range(0, len(order) - config.batch_size + 1, config.batch_size):
            yield order[start : start + config.batch_size]
