"""onnxruntime-genai loads the folder and writes the same tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
from language_models import END, PAD, VOCABULARY

from gauge_ext.export import OnnxGenerator


def test_the_settings_are_those_of_the_graph(exported_llama):
    _, folder, _ = exported_llama
    found = json.loads((folder / "genai_config.json").read_text())["model"]
    assert found["type"] == "llama"
    assert (found["eos_token_id"], found["pad_token_id"]) == (END, PAD)
    assert (found["vocab_size"], found["context_length"]) == (VOCABULARY, 64)
    decoder = found["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (4, 2)
    assert (decoder["head_size"], decoder["num_hidden_layers"]) == (4, 2)
    assert (folder / decoder["filename"]).is_file()


def test_genai_writes_the_same_tokens(exported_llama):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    _, folder, _ = exported_llama
    prompts = np.array([[9, 8, 10, 30], [20, 21, 22, 12]], np.int32)
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=20, batch_size=2)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompts)
    while not generator.is_done():
        generator.generate_next_token()
    found = [list(generator.get_sequence(row)) for row in range(2)]
    expected = OnnxGenerator(folder).generate(prompts, max_new_tokens=16)
    assert found == expected.tolist()
