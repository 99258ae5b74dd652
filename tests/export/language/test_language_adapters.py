"""Models that generate with adapters as inputs: token for token torch's, switched between calls."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from language_models import PAD, VOCABULARY, adapter_folder, adapter_targets, build

import gauge_ext
from gauge_ext.errors import ConfigError, ExportError, TargetError
from gauge_ext.export import (
    OnnxGenerator,
    export_causal_lm,
    validate_causal_lm,
    write_onnx_adapter,
)
from gauge_ext.export.adapters.file import read_table

transformers = pytest.importorskip("transformers")

LENGTH = 16


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows, two of them padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(8, VOCABULARY, (4, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, :1] = 0, 0
    return ids.masked_fill(mask == 0, PAD), mask


def greedy(model, ids, mask) -> np.ndarray:
    """The most probable token after all before it, from a plain model without a cache."""
    for _ in range(LENGTH):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids.numpy()


@pytest.fixture(scope="module")
def llama(attach, tmp_path_factory):
    """A folder of graphs, two adapters with other ranks, and torch's tokens for each and none."""
    root = tmp_path_factory.mktemp("adapters")
    one = adapter_folder("llama", attach, root / "one", 1)
    two = adapter_folder("llama", attach, root / "two", 2, rank=5, alpha=4.0)
    model = gauge_ext.load_adapter(build("llama"), root / "one")
    report = export_causal_lm(model, root / "onnx", mode="adapters")
    ids, mask = prompts()
    expected = {
        name: greedy(plain, ids, mask)
        for name, plain in ((None, build("llama")), ("one", one), ("two", two))
    }
    return root, model, report, expected


def run(generator, adapter):
    ids, mask = prompts()
    options = {"max_new_tokens": LENGTH, "eos_token_id": None}
    return generator.generate(ids, attention_mask=mask, adapter=adapter, **options)


def test_an_adapter_is_chosen_call_by_call(llama):
    root, _, _, expected = llama
    assert not np.array_equal(expected[None], expected["one"])
    assert not np.array_equal(expected["two"], expected["one"])
    generator = OnnxGenerator(root / "onnx", {"one": root / "one"})
    generator.add("two", root / "two")
    assert generator.adapters == ("one", "two")
    for adapter in ("one", None, "two", "one", None):
        assert np.array_equal(run(generator, adapter), expected[adapter]), adapter
    generator.remove("two")
    with pytest.raises(ConfigError, match="no adapter 'two'"):
        run(generator, "two")


def test_each_row_has_its_own(llama):
    root, _, _, expected = llama
    generator = OnnxGenerator(root / "onnx", {name: root / name for name in ("one", "two")})
    choices = ["two", None, "one", "two"]
    found = run(generator, choices)
    for row, choice in enumerate(choices):
        assert np.array_equal(found[row], expected[choice][row])


@pytest.mark.parametrize("suffix", ["onnx_adapter", "safetensors"])
def test_from_a_file(llama, suffix, tmp_path):
    root, _, _, expected = llama
    file = tmp_path / f"two.{suffix}"
    write_onnx_adapter(root / "two", root / "onnx" / "model.onnx", file)
    generator = OnnxGenerator(root / "onnx", {"two": file})
    assert np.array_equal(run(generator, "two"), expected["two"])
    stream = generator.stream(*prompts()[:1], attention_mask=prompts()[1], adapter="two")
    assert np.array_equal(next(stream), expected["two"][:, 6])


def test_a_mixture_is_the_sum_of_the_updates(llama, attach, tmp_path):
    root, _, _, _ = llama
    base, one, two = (build("llama") for _ in range(3))
    one = adapter_folder("llama", attach, tmp_path / "one", 1)
    two = adapter_folder("llama", attach, tmp_path / "two", 2, rank=5, alpha=4.0)
    mixed = copy.deepcopy(base)
    for p, w, a, b in zip(
        mixed.parameters(), base.parameters(), one.parameters(), two.parameters(), strict=True
    ):
        p.data = w + 0.75 * (a - w) - 0.5 * (b - w)
    generator = OnnxGenerator(root / "onnx", {name: root / name for name in ("one", "two")})
    ids, _mask = prompts()
    with torch.no_grad():
        expected = mixed(ids[:1]).logits.numpy()
    found = generator.logits(ids[:1], adapter={"one": 0.75, "two": -0.5})
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_what_was_validated_and_written(llama):
    root, model, report, _ = llama
    graph = report.graphs[0]
    names = [case.name for case in graph.validation.cases]
    assert names == [name.removesuffix(", with adapter") for name in names[:6]] + [
        f"{name}, with adapter" for name in names[:6]
    ]
    loop = "loop of 5, 1, 4 tokens, left padding"
    assert [case.name for case in report.whole.cases] == [loop, f"{loop}, with adapter"]
    assert report.whole.passed
    # The factors are no inputs that must be fed, and the file holds the base alone.
    assert not any("lora" in name for name in graph.inputs)
    assert f"model.layers.0.{'self_attn.q_proj'}.lora_A" in graph.adapter_inputs
    assert "adapter_sha256" not in graph.provenance
    settings = json.loads((root / "onnx" / "genai_config.json").read_text())
    assert settings["model"]["decoder"]["num_key_value_heads"] == 2

    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.lora_B.mul_(2.0)
    steps, whole = validate_causal_lm(root / "onnx", other)
    assert steps.passed  # the graph holds no adapter: what it is fed is the other's
    assert whole.passed
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    steps, whole = validate_causal_lm(root / "onnx", other)
    assert not steps.passed
    assert [case.passed for case in whole.cases] == [False, False]


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma", "gpt2"])
def test_greedy_is_that_of_torch(kind, attach, tmp_path):
    plain = adapter_folder(kind, attach, tmp_path / "a", 1)
    report = export_causal_lm(
        build(kind), tmp_path / "onnx", mode="adapters", adapter_targets=adapter_targets(kind)
    )
    assert report.whole.passed
    assert len(report.whole.cases) == 1  # the model has no adapter
    generator = OnnxGenerator(tmp_path / "onnx", {"a": tmp_path / "a"})
    ids, mask = prompts()
    for adapter, model in ((None, build(kind)), ("a", plain)):
        expected = greedy(model, ids, mask)
        assert np.array_equal(run(generator, adapter), expected)
        assert len(np.unique(expected[:, 6:])) > 3  # and not one token over and over
    assert not np.array_equal(run(generator, "a"), run(generator, None))


def test_required_and_narrow_factors(llama, tmp_path):
    root, model, _, expected = llama
    report = export_causal_lm(
        model,
        tmp_path / "onnx",
        mode="adapters",
        adapter_form="required",
        adapter_precision="int8",
    )
    assert report.whole.passed
    generator = OnnxGenerator(tmp_path / "onnx", {"one": root / "one"})
    assert np.array_equal(run(generator, None), expected[None])
    # torch with the very factors that the graph is fed, decoded by hand.
    table = read_table(tmp_path / "onnx" / "model.onnx")
    file = tmp_path / "one.safetensors"
    write_onnx_adapter(root / "one", tmp_path / "onnx" / "model.onnx", file)
    from safetensors.numpy import load_file

    stored = load_file(file)
    plain = build("llama")
    for name, entry in table.inputs.items():
        a, b = (stored[key].astype(np.float64) for key in (entry.lora_A, entry.lora_B))
        a = a * stored[f"{entry.lora_A}.scale"]
        b = b * stored[f"{entry.lora_B}.scale"][:, None]
        weight = plain.get_submodule(name).weight
        weight.data = (weight.double() + torch.from_numpy((a @ b).T)).float()
    assert np.array_equal(run(generator, "one"), greedy(plain, *prompts()))


def test_genai_runs_an_adapter_file(llama, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    root, _, _, expected = llama
    file = tmp_path / "two.onnx_adapter"
    write_onnx_adapter(root / "two", root / "onnx" / "model.onnx", file)
    model = genai.Model(str(root / "onnx"))
    loaded = genai.Adapters(model)
    loaded.load(str(file), "two")
    prompt = prompts()[0][:1].numpy().astype(np.int32)  # a row without padding
    for adapter in (None, "two"):
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=6 + LENGTH, batch_size=1)
        generator = genai.Generator(model, params)
        if adapter is not None:
            generator.set_active_adapter(loaded, adapter)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        found = list(generator.get_sequence(0))
        assert found == expected[adapter][0].tolist()[: len(found)]
        assert len(found) > 8


class TestRefusals:
    def test_options(self, tmp_path):
        with pytest.raises(ConfigError, match="adapter_targets"):
            export_causal_lm(build("llama"), tmp_path / "out", mode="adapters")
        with pytest.raises(ConfigError, match="mode must be"):
            export_causal_lm(build("llama"), tmp_path / "out", mode="both")
        with pytest.raises(ConfigError, match="mode='merged'"):
            export_causal_lm(build("llama"), tmp_path / "out", adapter_targets=["q_proj"])
        with pytest.raises(TargetError, match="nothing_like_it"):
            export_causal_lm(
                build("llama"), tmp_path / "out", mode="adapters", adapter_targets="nothing_like_it"
            )
        assert list(tmp_path.iterdir()) == []

    def test_a_merged_folder_takes_no_adapter(self, exported_llama, llama):
        generator = OnnxGenerator(exported_llama[1])
        with pytest.raises(ConfigError, match=r"no inputs for adapters.*mode adapters"):
            generator.add("one", llama[0] / "one")
        with pytest.raises(ConfigError, match="no inputs for adapters"):
            generator.generate([[9, 8]], adapter="one")
        assert generator.adapters == ()

    def test_dora_is_none(self, attach, tmp_path):
        model = attach(build("llama"), target_modules=["q_proj"], use_dora=True)
        with pytest.raises(ExportError, match=r"mode='merged'"):
            export_causal_lm(model, tmp_path / "out", mode="adapters")
        assert list(tmp_path.iterdir()) == []


def test_the_base_is_stored_once(llama):
    root, _, _, _ = llama
    stored = onnx.load(root / "onnx" / "model.onnx").graph.initializer
    shapes = [sorted(tensor.dims) for tensor in stored]
    assert shapes.count([16, VOCABULARY]) == 1  # the tied output layer
