"""``export``, ``validate`` and ``provenance`` of models that generate, from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import Result

Run = Callable[..., Result]
Fails = Callable[..., str]


@pytest.fixture(scope="session")
def llama_source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a Llama with a tokenizer, and of an adapter for it."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path_factory.mktemp("llama") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=7,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).eval().save_pretrained(base)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(base / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))

    adapter = tmp_path_factory.mktemp("adapter") / "lora"
    adapter.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.v_proj"
    save_file(
        {f"{stem}.lora_A.weight": torch.randn(2, 16), f"{stem}.lora_B.weight": torch.randn(8, 2)},
        adapter / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 1.0, "target_modules": ["v_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, "bias": "none"}))
    return base, adapter


@pytest.fixture(scope="session")
def exported(
    llama_source: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, invoke: Run
) -> Path:
    base, adapter = llama_source
    out = tmp_path_factory.mktemp("out") / "onnx"
    report = out.with_name("report.json")
    result = invoke("export", base, "--adapter", adapter, "--out", out, "--report", report)
    assert result.exit_code == 0, result.output
    assert json.loads(report.read_text())["task"] == "text-generation"
    return out


def test_the_folder_generates_as_the_merged_model(
    exported: Path, llama_source: tuple[Path, Path]
) -> None:
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    from gauge_ext.export import OnnxGenerator

    base, adapter = llama_source
    model = LlamaForCausalLM.from_pretrained(base).eval()
    lora_A, lora_B = (
        t for _, t in sorted(load_file(adapter / "adapter_model.safetensors").items())
    )
    model.model.layers[0].self_attn.v_proj.weight.data += 0.5 * lora_B @ lora_A
    ids = torch.tensor([[9, 8, 10], [20, 30, 40]])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False
    )
    found = OnnxGenerator(exported).generate(ids, max_new_tokens=15)
    assert np.array_equal(found, expected.numpy())
    assert (exported / "tokenizer.json").is_file()


def test_adapters_as_inputs(
    llama_source: tuple[Path, Path], run: Run, fails: Fails, tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    from gauge_ext.export import OnnxGenerator

    base, adapter = llama_source
    out, file = tmp_path / "onnx", tmp_path / "a.onnx_adapter"
    arguments = ("export", base, "--out", out, "--mode", "adapters")
    fails("--targets", *arguments, "--targets", "nothing_like_it")
    assert not out.exists()
    result = run(*arguments, "--targets", "v_proj")
    assert result.exit_code == 0, result.output
    result = run("onnx-adapter", out / "model.onnx", "--adapter", adapter, "--out", file)
    assert result.exit_code == 0, result.output

    generator = OnnxGenerator(out, {"a": file})
    model = LlamaForCausalLM.from_pretrained(base).eval()
    ids = torch.tensor([[9, 8, 10], [20, 30, 40]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 15, "do_sample": False}
    plain = model.generate(ids, **options)
    lora_A, lora_B = (
        t for _, t in sorted(load_file(adapter / "adapter_model.safetensors").items())
    )
    model.model.layers[0].self_attn.v_proj.weight.data += 0.5 * lora_B @ lora_A
    adapted = model.generate(ids, **options)
    assert plain.tolist() != adapted.tolist()
    for name, expected in (("a", adapted), (None, plain), ("a", adapted)):
        found = generator.generate(ids, max_new_tokens=15, adapter=name)
        assert np.array_equal(found, expected.numpy())

    checked = run("validate", out, "--against", base, "--adapter", adapter, "--json")
    assert checked.exit_code == 0, checked.output
    cases = [
        case["name"]
        for report in json.loads(checked.stdout)["validations"]
        for case in report["cases"]
    ]
    assert sum(name.endswith("with adapter") for name in cases) * 2 == len(cases)


def test_in_fewer_bits(
    llama_source: tuple[Path, Path], run: Run, fails: Fails, tmp_path: Path
) -> None:
    base, adapter = llama_source
    out = tmp_path / "onnx"
    arguments = ("export", base, "--adapter", adapter, "--out", out, "--precision", "int8")
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (graph,) = found["graphs"]
    assert graph["quantization"]["precision"] == "int8"
    assert graph["quantization"]["weights"] > 5
    assert found["whole"]["passed"] is True
    (written,) = found["generated"]
    assert written["agreed"] / written["tokens"] == written["top1"] > 0.7
    said = run("provenance", out, "--base", base, "--adapter", adapter, "--json")
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["graphs"]["model.onnx"]["precision"] == "int8"


def test_static_ranges_from_prompts(
    llama_source: tuple[Path, Path],
    bert_source: Path,
    run: Run,
    fails: Fails,
    tmp_path: Path,
) -> None:
    base, adapter = llama_source
    out, text, ids = tmp_path / "onnx", tmp_path / "prompts.txt", tmp_path / "ids.npz"
    text.write_text("w9 w8 w10\n\nw20 w30 w40 w41\n", encoding="utf-8")
    np.savez(ids, input_ids=np.array([[9, 50]]))
    arguments = ("export", base, "--adapter", adapter, "--out", out, "--precision", "int8-static")
    assert "none are given" in fails("--calibration", *arguments)
    assert "the token 50" in fails("--calibration", *arguments, "--calibration", ids)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n", encoding="utf-8")
    assert "no prompt" in fails("--calibration", *arguments, "--calibration", empty)
    missing = tmp_path / "missing.txt"
    assert "cannot be read" in fails("--calibration", *arguments, "--calibration", missing)
    single = ("export", base, "--out", tmp_path / "m.onnx", "--precision", "int8-static")
    said = fails("--calibration", *single, "--calibration", text)
    assert "is for models that generate" in said
    other = ("export", bert_source, "--out", out, "--precision", "int8-static")
    assert "no tokenizer" in fails("--calibration", *other, "--calibration", text)
    assert not out.exists()

    np.savez(
        ids, input_ids=np.array([[9, 10, 11], [0, 12, 13]]), attention_mask=[[1] * 3, [0, 1, 1]]
    )
    result = run(*arguments, "--calibration", ids, "--calibration", text, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (graph,) = found["graphs"]
    assert graph["quantization"]["precision"] == "int8-static"
    assert graph["quantization"]["cases"][-1]["name"] == "calibration prompt 1, step"
    (written,) = found["generated"]
    assert written["top1"] > 0.7
    from gauge_ext.export import OnnxGenerator

    assert OnnxGenerator(out).generate([[9, 8, 10]], max_new_tokens=4).shape == (1, 7)


def test_validate_a_folder(
    exported: Path, llama_source: tuple[Path, Path], run: Run, fails: Fails, tmp_path: Path
) -> None:
    base, adapter = llama_source
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 50}" for i in range(60)))
    page = tmp_path / "proof.html"
    arguments = ("validate", exported, "--against", base, "--adapter", adapter)
    result = run(*arguments, "--text", text, "--html", page, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"] is True
    assert found["perplexity"]["tokens"] == 60
    assert len(found["validations"]) == 2
    assert "agrees with torch" in page.read_text(encoding="utf-8")

    without = run("export", base, "--out", tmp_path / "x", "--adapter", tmp_path)
    assert without.exit_code == 1
    fails("--text", *arguments, "--text", tmp_path / "none.txt")
    fails("--batch", *arguments, "--batch", 3)
    said = fails("--tolerance", *arguments, "--tolerance", "1e-14", writes=True)
    assert "disagrees with torch" in said


def test_a_runtime_that_is_not_installed(
    exported: Path,
    llama_source: tuple[Path, Path],
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ("validate", exported, "--against", llama_source[0])
    said = fails("--runtime", *arguments, "--runtime", "onnxruntime-node")
    assert "node is not on the PATH" in said


def test_provenance(
    exported: Path, llama_source: tuple[Path, Path], run: Run, fails: Fails, tmp_path: Path
) -> None:
    base, adapter = llama_source
    result = run("provenance", exported, "--base", base, "--adapter", adapter)
    assert result.exit_code == 0, result.output
    assert "differs" not in result.stdout
    assert result.stdout.count("as it says") >= 6
    found = json.loads(run("provenance", exported / "model.onnx", "--json").stdout)
    assert found["graphs"]["model.onnx"]["task"] == "text-generation"

    damaged = shutil.copytree(exported, tmp_path / "copy")
    (damaged / "config.json").write_text("{}")
    assert "config.json" in fails("FILE", "provenance", damaged, writes=True)
    other = shutil.copytree(adapter, tmp_path / "other")
    tensors = other / "adapter_model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    fails("--adapter", "provenance", exported, "--adapter", other, writes=True)
    fails("FILE", "provenance", tmp_path / "none.onnx")


def test_which_task_it_is(
    llama_source: tuple[Path, Path], bert_source: Path, fails: Fails, tmp_path: Path
) -> None:
    base, adapter = llama_source
    arguments = ("export", base, "--adapter", adapter, "--out", tmp_path / "out")
    said = fails("BASE", *arguments, "--task", "seq2seq")
    assert "decoder_input_ids" in said
    said = fails("--calibration", *arguments, "--precision", "int8-static")
    assert "none are given" in said
    said = fails("--batch", *arguments, "--batch", 3)
    assert not (tmp_path / "out").exists()
