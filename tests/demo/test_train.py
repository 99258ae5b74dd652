from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gauge_ext import LoRAConfig, LoRALinear, attach
from gauge_ext.demo.corpus import Pair
from gauge_ext.demo.encoder import SentenceEncoder
from gauge_ext.demo.text import TextTokenizer
from gauge_ext.demo.train import Step, TrainConfig, info_nce, rate_factor, train
from gauge_ext.errors import ConfigError, NonFiniteError

LORA = LoRAConfig(rank=4, alpha=8, dropout=0.1, target_modules=["query", "value", "dense"])
SMALL = TrainConfig(epochs=4, batch_size=16, learning_rate=1e-2)


def test_info_nce_by_hand() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    answers = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    # S = [[0.6, 0], [0.8, 1]] / 0.5
    rows = math.log(1 + math.exp(-1.2)) + math.log(1 + math.exp(1.6 - 2))
    columns = math.log(1 + math.exp(1.6 - 1.2)) + math.log(1 + math.exp(-2))
    assert info_nce(queries, answers, 0.5).item() == pytest.approx((rows + columns) / 4)


def test_info_nce_of_indifference_is_log_n() -> None:
    same = torch.ones(5, 2)
    assert info_nce(same, same, 0.05).item() == pytest.approx(math.log(5))


def test_rate_rises_and_falls_in_straight_lines() -> None:
    factors = [rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors == pytest.approx(
        [1 / 2, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9]
    )
    assert rate_factor(0, 1, 0.0) == 1


def test_one_step_lowers_the_loss_of_its_batch(
    encoder: SentenceEncoder, tokenizer: TextTokenizer, pairs: list[Pair]
) -> None:
    attach(encoder.bert, LoRAConfig(rank=4, alpha=8, target_modules=["query", "value", "dense"]))
    # One batch that holds every pair, twice: the second loss is what the first step left.
    first, second = train(encoder, tokenizer, pairs, TrainConfig(epochs=2, batch_size=len(pairs)))
    assert second < first


def test_training_learns_and_touches_the_adapters_alone(
    encoder: SentenceEncoder, tokenizer: TextTokenizer, pairs: list[Pair]
) -> None:
    base = {name: value.clone() for name, value in encoder.state_dict().items()}
    attach(encoder.bert, LORA)
    steps: list[Step] = []
    losses = train(encoder, tokenizer, pairs, SMALL, steps.append)
    assert len(losses) == 4 * (50 // 16)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    state = encoder.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.items())
    assert all(bool(state[n].any()) for n in state if n.endswith("lora_B"))
    assert [step.loss for step in steps] == losses
    assert [(step.number, step.total) for step in steps] == [(n, 12) for n in range(1, 13)]
    assert steps[0].rate == SMALL.learning_rate > steps[-1].rate > 0
    assert not any(module.training for module in encoder.modules())


def test_only_the_adapters_drop_out(
    encoder: SentenceEncoder, tokenizer: TextTokenizer, pairs: list[Pair]
) -> None:
    attach(encoder.bert, LORA)
    modes: dict[bool, set[bool]] = {True: set(), False: set()}

    def look(step: Step) -> None:
        for module in encoder.modules():
            modes[isinstance(module, LoRALinear)].add(module.training)

    train(encoder, tokenizer, pairs, SMALL, look)
    assert modes == {True: {True}, False: {False}}


def test_equal_seeds_give_equal_losses(
    small_model: Path, tokenizer: TextTokenizer, pairs: list[Pair]
) -> None:
    from gauge_ext.demo.encoder import load_encoder

    def run(seed: int) -> list[float]:
        model = load_encoder(small_model)
        torch.manual_seed(seed)
        attach(model.bert, LORA)
        config = TrainConfig(epochs=1, batch_size=16, seed=seed)
        return train(model, tokenizer, pairs, config)

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_divergence_is_an_error(
    encoder: SentenceEncoder, tokenizer: TextTokenizer, pairs: list[Pair]
) -> None:
    attach(encoder.bert, LORA)
    # Not in a query: torch's attention on the CPU gives numbers where its scores are NaN.
    encoder.get_submodule("bert.encoder.layer.1.output.dense").lora_A.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"loss became nan at step 1 of 12") as caught:
        train(encoder, tokenizer, pairs, SMALL)
    assert "smaller learning rate" in str(caught.value)


def test_too_few_pairs_for_a_batch(
    encoder: SentenceEncoder, tokenizer: TextTokenizer, pairs: list[Pair]
) -> None:
    with pytest.raises(ConfigError, match="batch_size is 16, but there are only 3 pairs"):
        train(encoder, tokenizer, pairs[:3], SMALL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("temperature", -1.0),
        ("warmup", 1.0),
    ],
)
def test_config_refuses(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} must .*got {value}"):
        TrainConfig(**{field: value})
