from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gauge_ext import load_adapter
from gauge_ext.demo import DemoResult, run, run_demo
from gauge_ext.demo.corpus import Pair, words_of
from gauge_ext.demo.encoder import load_encoder
from gauge_ext.demo.search import OnnxEncoder
from gauge_ext.demo.text import TextTokenizer
from gauge_ext.demo.train import TrainConfig
from gauge_ext.errors import GaugeError, WriteError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def demo(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path, pairs: list[Pair]
) -> tuple[DemoResult, str]:
    """The whole demo on fifty pairs and a small model."""
    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    console = Console(file=io.StringIO(), width=160)
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "model_folder", lambda: small_model)
        result = run_demo(
            out,
            epochs=8,
            seed=1,
            console=console,
            pairs=pairs,
            held_out=10,
            training=TrainConfig(batch_size=20),
        )
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), generator)
    return result, console.file.getvalue()


def test_the_adapter_helped_and_the_file_is_as_good(demo: tuple[DemoResult, str]) -> None:
    result, _ = demo
    before, after, alone = result.scores
    assert (result.train_pairs, result.held_out_pairs, len(result.losses)) == (40, 10, 16)
    assert after.held_out.mrr > before.held_out.mrr
    assert alone.held_out == after.held_out
    assert alone.library is not None
    assert alone.library.candidates == 50
    assert alone.library.mrr <= alone.held_out.mrr
    assert after.held_out.candidates == 10


def test_scores_are_those_of_the_files(
    demo: tuple[DemoResult, str], small_model: Path, pairs: list[Pair]
) -> None:
    result, _ = demo
    names = [words_of(pair.name) for pair in pairs]
    encoder = load_encoder(small_model)
    load_adapter(encoder.bert, result.adapter)
    with torch.no_grad():
        by_torch = encoder.encode(TextTokenizer(small_model / "tokenizer.json"), names)
    by_onnx = OnnxEncoder(result.onnx, TextTokenizer(result.tokenizer)).encode(names)
    torch.testing.assert_close(torch.from_numpy(by_onnx), by_torch, atol=1e-5, rtol=0)


def test_peft_reads_the_adapter(demo: tuple[DemoResult, str], small_model: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    result, _ = demo
    # The plain model, with the pooler that the demo does without.
    model = peft.PeftModel.from_pretrained(
        transformers.BertModel.from_pretrained(small_model), result.adapter
    )
    adapted = {n for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(adapted) == 2 * 6
    assert not any("pooler" in name for name in adapted)
    ids = torch.tensor([[2, 3, 4]])
    encoder = load_encoder(small_model)
    load_adapter(encoder.bert, result.adapter)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).last_hidden_state
        torch.testing.assert_close(encoder.bert(input_ids=ids).last_hidden_state, expected)


def test_everything_is_printed_and_reported(demo: tuple[DemoResult, str]) -> None:
    result, page = demo
    report: dict[str, Any] = json.loads(result.report.read_text())
    assert report == json.loads(json.dumps(result.to_dict()))
    for path in (result.adapter, result.onnx, result.tokenizer, result.report):
        assert path.exists()
        assert str(path) in page
    for score in result.scores:
        assert f"{score.held_out.recall_at_1:.3f}" in page
        if score.library is not None:
            assert f"{score.library.mrr:.3f}" in page
    for query, hits in result.answers.items():
        assert query in page
        assert len(hits) == 3
        assert all(hit.name in page for hit in hits)
    assert len(result.answers) == 3
    for latency in result.latencies:
        assert f"{latency.ratio('torch', 'onnxruntime'):.2f}" in page
    assert result.export.validation is not None
    assert result.export.validation.passed
    assert set(report["seconds"]) == {"read", "measure", "train", "export", "latency", "search"}
    assert sorted(path.name for path in result.report.parent.iterdir()) == sorted(
        ["adapter", "model.onnx", "tokenizer.json", "report.json"]
    )


def test_an_unwritable_target_is_found_out_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model: Path
) -> None:
    monkeypatch.setattr(run, "model_folder", lambda: small_model)
    monkeypatch.setattr(run, "stdlib_pairs", lambda: pytest.fail("read before the check"))
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"):
        run_demo(tmp_path / "file" / "out")


def test_a_missing_model_is_found_out_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise GaugeError("not installed", hint="pip install")

    monkeypatch.setattr(run, "model_folder", missing)
    monkeypatch.setattr(run, "stdlib_pairs", lambda: pytest.fail("read before the check"))
    with pytest.raises(GaugeError, match="not installed"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()
