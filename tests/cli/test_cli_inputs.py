"""Inputs made up from a config: the model runs on them, at every size that is called dynamic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gauge_ext.cli.inputs import make_example_inputs
from gauge_ext.cli.problems import OptionError
from gauge_ext.errors import ConfigError

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SMALL, max_position_embeddings=20))


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=20, type_vocab_size=1))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=20)
    config.use_cache = False
    return LlamaForCausalLM(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    config.use_cache = False
    return T5Model(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    sizes = {name: SMALL[name] for name in SMALL if name != "vocab_size"}
    return ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=2))


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (bert, {"input_ids", "attention_mask", "token_type_ids"}),
        (roberta, {"input_ids", "attention_mask", "token_type_ids"}),
        (llama, {"input_ids", "attention_mask"}),
        (t5, {"input_ids", "attention_mask", "decoder_input_ids"}),
        (vit, {"pixel_values"}),
    ],
)
def test_the_model_runs_on_them(build: Callable[[], nn.Module], names: set[str]) -> None:
    model = build().eval()
    inputs, shapes = make_example_inputs(model, batch=None, sequence=None, seed=0)
    assert set(inputs) == set(shapes) == names
    with torch.no_grad():
        model(**inputs)
    for name, axes in shapes.items():
        assert axes[0].__name__ == "batch"
        assert inputs[name].shape[0] == 2


@pytest.mark.parametrize(("build", "longest"), [(bert, 20), (roberta, 18)])
def test_the_longest_sequence_is_known(build: Callable[[], nn.Module], longest: int) -> None:
    model = build().eval()
    inputs, shapes = make_example_inputs(model, batch=1, sequence=longest, seed=0)
    assert shapes["input_ids"][1].max == longest
    with torch.no_grad():
        model(**inputs)
        with pytest.raises((IndexError, RuntimeError)):  # one more is too long indeed
            model(input_ids=torch.full((1, longest + 1), 5))
    with pytest.raises(OptionError, match=f"at most {longest} tokens") as caught:
        make_example_inputs(model, batch=1, sequence=longest + 1, seed=0)
    assert caught.value.option == "--sequence"


def test_sizes_and_seed() -> None:
    model = bert()
    inputs, _ = make_example_inputs(model, batch=3, sequence=9, seed=1)
    again, _ = make_example_inputs(model, batch=3, sequence=9, seed=1)
    other, _ = make_example_inputs(model, batch=3, sequence=9, seed=2)
    assert inputs["input_ids"].shape == (3, 9)
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    assert not torch.equal(inputs["input_ids"], other["input_ids"])
    mask = inputs["attention_mask"]
    assert mask[:-1].all()
    assert mask[-1].tolist() == [1] * 5 + [0] * 4


def test_a_short_model_gets_a_short_example() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**SMALL, max_position_embeddings=5))
    inputs, _ = make_example_inputs(model, batch=None, sequence=None, seed=0)
    assert inputs["input_ids"].shape == (2, 5)


def test_an_image_model_has_no_sequence() -> None:
    with pytest.raises(OptionError) as caught:
        make_example_inputs(vit(), batch=None, sequence=4, seed=0)
    assert caught.value.option == "--sequence"


class Speech(nn.Linear):
    """Names an input that nothing is known about."""

    main_input_name = "input_values"
    config: Any = object()


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Speech(2, 2)])
def test_other_models_are_refused_with_the_mend(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"no example inputs.*\(model, example_inputs\)"):
        make_example_inputs(model, batch=None, sequence=None, seed=0)
