"""The loop in onnxruntime: batches, padding, ends, sampling, perplexity, and its errors."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from language_models import END, PAD, VOCABULARY

from gauge_ext.errors import ConfigError, ExportError
from gauge_ext.export import OnnxGenerator


@pytest.fixture(scope="module")
def generator(exported_llama) -> OnnxGenerator:
    return OnnxGenerator(exported_llama[1])


@pytest.fixture
def copied(exported_llama, tmp_path):
    """A copy of the folder that a test may damage."""
    return shutil.copytree(exported_llama[1], tmp_path / "copy")


def test_rows_of_different_length_are_padded_on_the_left(generator):
    rows = [[9, 8, 10, 11, 12], [13], [20, 21, 22]]
    together = generator.generate(rows, max_new_tokens=8)
    assert together.shape == (3, 13)
    for row, prompt in zip(together, rows, strict=True):
        alone = generator.generate([prompt], max_new_tokens=8)[0]
        start = 5 - len(prompt)
        assert list(row[:start]) == [PAD] * start
        written = row[start : start + alone.size]
        assert list(written) == list(alone)
        assert set(row[start + alone.size :]) <= {PAD}


def test_the_end_and_what_comes_after(generator):
    prompts = [[9, 8, 10], [20, 21, 22]]
    free = generator.generate(prompts, max_new_tokens=12, eos_token_id=None)
    # The third new token of the first row becomes the end.
    end = int(free[0, 5])
    ended = generator.generate(prompts, max_new_tokens=12, eos_token_id=end, pad_token_id=49)
    first = list(free[0, 3:]).index(end)
    assert list(ended[0, : 4 + first]) == list(free[0, : 4 + first])
    assert set(ended[0, 4 + first :]) <= {49}
    assert generator.generate([prompts[0]], max_new_tokens=12, eos_token_id=[end]).shape == (
        1,
        4 + first,
    )


def test_a_stream_is_the_same_step_by_step(generator):
    prompts = [[9, 8, 10], [20, 21, 22]]
    columns = list(generator.stream(prompts, max_new_tokens=5, eos_token_id=None))
    whole = generator.generate(prompts, max_new_tokens=5, eos_token_id=None)
    assert np.array_equal(np.stack(columns, 1), whole[:, 3:])


def test_repetition_penalty_is_that_of_transformers(exported_llama, generator):
    model, _, _ = exported_llama
    ids = torch.randint(8, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(4))
    expected = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=15,
        do_sample=False,
        repetition_penalty=1.7,
    )
    found = generator.generate(ids, max_new_tokens=15, repetition_penalty=1.7)
    assert np.array_equal(found, expected.numpy())
    assert not np.array_equal(found, generator.generate(ids, max_new_tokens=15))


def test_sampling(generator):
    def sample(**options):
        return generator.generate([[9, 8, 10]] * 8, max_new_tokens=6, do_sample=True, **options)

    assert np.array_equal(sample(seed=1), sample(seed=1))
    assert not np.array_equal(sample(seed=1), sample(seed=2))
    greedy = generator.generate([[9, 8, 10]] * 8, max_new_tokens=6)
    assert np.array_equal(sample(seed=1, top_k=1), greedy)
    assert np.array_equal(sample(seed=1, top_p=1e-6), greedy)


def test_perplexity_by_definition(exported_llama, generator):
    model, _, _ = exported_llama
    text = torch.randint(VOCABULARY, (11,), generator=torch.Generator().manual_seed(5))
    nll = []
    for piece in text.split(4):  # windows of 4, 4 and 3
        with torch.no_grad():
            logits = model(input_ids=piece[None]).logits[0].double()
        for place in range(1, len(piece)):
            nll.append(-logits[place - 1].log_softmax(-1)[piece[place]])
    expected = torch.stack(nll).mean().exp()
    assert generator.perplexity(text, window=4) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {}, "rows of integers"),
        ([[]], {}, "rows of integers"),
        ([1, 2], {}, "rows of integers.*batch of one"),
        ([[1, 2]], {"attention_mask": [[1]]}, r"shape \(1, 1\), the token ids \(1, 2\)"),
        ([[1, 2]], {"attention_mask": [[1, 0]]}, "padded on the right.*padding_side"),
        ([[1, 2]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([[1, 2]], {"temperature": 0.0}, "temperature must be above 0"),
        ([[1, 2]], {"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ([[1, 2]], {"num_beams": 4}, r"num_beams=4 is not implemented.*num_beams=1"),
        ([[1, 2]], {"no_such": 4}, "no option 'no_such'.*temperature"),
        ([[1, 2]], {"decoder_input_ids": [[1]]}, "encoder-decoder"),
    ],
)
def test_what_cannot_be_generated(generator, arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        generator.generate(arguments, **options)


def test_perplexity_of_one_token(generator):
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        generator.perplexity([3])


def test_settings_come_from_the_folder(copied):
    path = copied / "generation_config.json"
    settings = json.loads(path.read_text())
    assert OnnxGenerator(copied).sampling.eos_token_id == (END,)
    path.write_text(json.dumps(settings | {"do_sample": True, "top_k": 3}))
    found = OnnxGenerator(copied).sampling
    assert found.top_k == 3
    assert not found.do_sample  # greedy unless asked
    path.write_text(json.dumps(settings | {"num_beams": 3}))
    with pytest.raises(ConfigError, match="num_beams=3 is not implemented"):
        OnnxGenerator(copied)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        OnnxGenerator(copied)


def test_folders_that_are_none(copied, tmp_path):
    with pytest.raises(ConfigError, match=r"no model\.onnx"):
        OnnxGenerator(tmp_path)
    (copied / "model.onnx").write_bytes((copied / "model.onnx").read_bytes()[:-50])
    with pytest.raises(ExportError, match="cannot load"):
        OnnxGenerator(copied)


def test_a_graph_without_a_cache(bert, token_ids, tmp_path):
    from gauge_ext.export import export_onnx

    export_onnx(bert, {"input_ids": token_ids}, tmp_path / "model.onnx", validate=False)
    with pytest.raises(ConfigError, match=r"no past_key_values.*export_causal_lm"):
        OnnxGenerator(tmp_path)
