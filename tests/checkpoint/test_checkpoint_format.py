"""Keys and modules, and what is said of keys that are no plain LoRA factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gauge_ext.checkpoint import format
from gauge_ext.errors import AdapterFormatError

A, B = torch.ones(2, 5), torch.ones(3, 2)


def file(**tensors: Tensor) -> dict[str, Tensor]:
    """A file with one good pair and what else is given, ``__`` for a dot."""
    good = format.keys_of("good", format.LoRAPair(A, B))
    return good | {key.replace("__", "."): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("base_model.model.enc.0.q.lora_A.weight", ("enc.0.q", "linear", "lora_A")),
        ("base_model.model.enc.0.q.lora_B.weight", ("enc.0.q", "linear", "lora_B")),
        ("enc.0.q.lora_A.weight", ("enc.0.q", "linear", "lora_A")),  # without PEFT's wrapper
        ("base_model.model.model.lora_A.lora_B.weight", ("model.lora_A", "linear", "lora_B")),
        ("base_model.model._orig_mod.q.lora_A.weight", ("q", "linear", "lora_A")),
        ("lora_A.weight", None),
        ("base_model.model.q.lora_B.bias", ("q", "linear", "lora_bias")),
        ("base_model.model.q.lora_A.default.weight", None),
        ("base_model.model.q.weight", None),
        (
            "base_model.model.attn.base_layer.out_proj.lora_A.weight",
            ("attn.out_proj", "out_proj", "lora_A"),
        ),
        # The inner wrapper of a module of which several parameters are adapted.
        (
            "base_model.model.experts.base_layer.lora_A.weight",
            ("experts.base_layer", "linear", "lora_A"),
        ),
        ("base_model.model.attn.base_layer.q.lora_A.weight", None),
    ],
)
def test_module_of(key: str, expected: tuple[str, str, str] | None) -> None:
    assert format.module_of(key) == expected


@given(st.lists(st.from_regex(r"[a-z_0-9]{1,6}", fullmatch=True), min_size=1, max_size=5))
def test_keys_and_modules_are_each_others_inverse(parts: list[str]) -> None:
    module = ".".join(parts)
    if module.startswith(("_orig_mod.", format.PREFIX)) or ".base_layer" in f".{module}":
        return
    keys = format.keys_of(module, format.LoRAPair(A, B))
    found = [format.module_of(key) for key in keys]
    assert found == [(module, "linear", "lora_A"), (module, "linear", "lora_B")]


def test_pairs_come_out_sorted() -> None:
    tensors = file(z__lora_A__weight=A, z__lora_B__weight=B, b__lora_A__weight=A)
    tensors["b.lora_B.weight"] = B
    pairs = format.sort_out(tensors, "f")[0]
    assert list(pairs) == ["b", "good", "z"]
    assert pairs["good"].lora_A is A
    assert pairs["good"].lora_B is B


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "f holds no tensors"),
        (file(q__lora_A__weight=A), "holds lora_A of 'q' but no lora_B"),
        (file(q__lora_B__weight=B), "holds lora_B of 'q' but no lora_A"),
        (file(good__lora_A__weight=A), "holds lora_A of 'good' twice"),
        (
            file(q__lora_A__weight=A, q__lora_B__weight=torch.ones(3, 4)),
            "the factors of 'q' have different ranks, 2 and 4; got lora_A (2, 5) and lora_B (3, 4)",
        ),
        (
            file(q__lora_A__weight=torch.ones(2, 5, 1, 1), q__lora_B__weight=B),
            "or those of a convolution, (r, in, *kernel) and (out, r, 1, ...); got lora_A (2, 5,",
        ),
        (
            file(q__lora_A__weight=torch.ones(0, 5), q__lora_B__weight=torch.ones(3, 0)),
            "must be matrices",
        ),
        (file(q__lora_A__weight=A, q__lora_B__weight=B.half()), "of one floating-point dtype"),
        (file(q__lora_A__weight=A.int(), q__lora_B__weight=B.int()), "of one floating-point dtype"),
        (file(q__lora_magnitude_vector=B), "holds lora_magnitude of 'q' but no lora_A"),
        (file(e__lora_embedding_A=A), "holds lora_A of 'e' but no lora_B"),
        (file(q__lora_B__bias=B), "holds lora_bias of 'q' but no lora_A"),
        (file(q__lora_diag=B), "KaSA"),
        (file(q__lora_E=B), "AdaLoRA"),
        (file(e__token_adapter__trainable_tokens_delta=B), "trained tokens"),
        (file(good__lora_B__bias=A), "lora_bias of 'good' must have 3 entries"),
        (file(q__lora_A__default__weight=A), "a part of an adapter that is no tensor of LoRA's"),
        (file(head__weight=A, head__bias=B), "holds 2 tensors that are no LoRA factors"),
    ],
)
def test_what_is_no_plain_lora_is_named(tensors: dict[str, Tensor], words: str) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        format.sort_out(tensors, "f")[0]
    assert words in str(caught.value)


def test_whole_parameters_are_known_below_the_wrapper_or_by_the_config() -> None:
    tensors = file(good__base_layer__bias=B, head__weight=A)
    with pytest.raises(AdapterFormatError, match="modules_to_save, bias"):
        format.sort_out(tensors, "f")
    pairs, whole = format.sort_out(tensors, "f", whole=True)
    assert list(whole) == ["good.bias", "head.weight"]
    assert format.whole_key("good.bias", pairs) == format.PREFIX + "good.base_layer.bias"
    assert format.whole_key("head.weight", pairs) == format.PREFIX + "head.weight"


def test_many_strange_keys_are_not_all_listed() -> None:
    with pytest.raises(AdapterFormatError) as caught:
        format.sort_out({f"layer.{i}.weight": A for i in range(200)}, "f")
    assert "holds 200 tensors" in str(caught.value)
    assert len(str(caught.value)) < 400
