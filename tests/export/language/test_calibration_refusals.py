"""What calibrates no model that generates is refused, before any work."""

from __future__ import annotations

import numpy as np
import pytest
from language_models import VOCABULARY, build

from gauge_ext.errors import ConfigError
from gauge_ext.export import QuantizationOptions, export_causal_lm, export_seq2seq
from gauge_ext.export.language import calibration as language_calibration
from gauge_ext.export.language.calibration_prompts import CalibrationError

pytest.importorskip("transformers")

X = [[9, 10, 11]]


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ([], "none are given"),
        ([{}], "calibration set 1 has no arrays, expected input_ids"),
        ([{"input_ids": X}, {"pixels": X}], "calibration set 2 has pixels, expected input_ids"),
        ([{"input_ids": X, "position_ids": X}], "input_ids, position_ids, expected input_ids"),
        ([{"input_ids": []}], "at least one in each"),
        ([{"input_ids": [[]]}], "at least one in each"),
        ([{"input_ids": 3}], "at least one in each"),
        ([{"input_ids": np.ones((1, 3))}], r"rows of integers.*float64 \(3,\).*batch of one"),
        ([{"input_ids": X[0]}], "A single text is a batch of one"),
        ([{"input_ids": [[9, VOCABULARY]]}], "row 1 of input_ids has the token 50.*0 to 49"),
        ([{"input_ids": [[9], [9, -1]]}], "row 2 of input_ids has the token -1"),
        ([{"input_ids": [[9] * 65]}], "65 tokens, and the model has 64 positions"),
        ([{"input_ids": X, "attention_mask": [[0, 0, 0]]}], "row 1 is empty"),
        ([{"input_ids": X, "attention_mask": [[1, 0, 1]]}], "has a 0 between tokens"),
        ([{"input_ids": X, "attention_mask": [[1, 1]]}], "rows of other lengths"),
    ],
)
def test_what_is_refused_before_any_work(sets, said, exported_llama, tmp_path):
    model, _, _ = exported_llama
    with pytest.raises(ConfigError, match=said) as found:
        export_causal_lm(
            model,
            tmp_path / "out",
            precision="int8-static",
            quantization=QuantizationOptions(calibration=sets),
        )
    assert not sets or isinstance(found.value, CalibrationError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "sets", "said"),
    [
        ("t5", {"input_ids": X, "decoder_input_ids": [[0], [0]]}, "1 rows of input_ids and 2"),
        ("t5", {"input_ids": X, "decoder_input_ids": [[50]]}, "decoder_input_ids has the token 50"),
        ("bart", {"input_ids": X, "decoder_input_ids": [[1] * 41]}, "has 40 positions"),
        ("whisper", {"input_ids": X}, "has input_ids, expected input_features"),
        ("whisper", {"input_features": np.ones((1, 8, 23))}, r"floats \(batch, 8, 24\)"),
        ("whisper", {"input_features": np.full((1, 8, 24), np.nan)}, "holds NaN"),
    ],
)
def test_what_is_refused_of_an_encoder_decoder_model(kind, sets, said, tmp_path):
    with pytest.raises(CalibrationError, match=said):
        export_seq2seq(
            build(kind),
            tmp_path / "out",
            precision="int8-static",
            quantization=QuantizationOptions(calibration=[sets]),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_names_no_first_token(tmp_path):
    model = build("t5")
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = None
    with pytest.raises(CalibrationError, match="Give decoder_input_ids"):
        export_seq2seq(
            model,
            tmp_path / "out",
            precision="int8-static",
            quantization=QuantizationOptions(calibration=[{"input_ids": X}]),
        )


def test_a_prompt_that_onnxruntime_refuses(exported_llama):
    model, folder, _ = exported_llama
    odd = language_calibration.Prompt(np.array([[VOCABULARY]]), None, 16)
    held = language_calibration.Calibration(folder, model, [odd])
    with pytest.raises(CalibrationError, match="calibration prompt 1 cannot be run"):
        list(held.feeds("model.onnx"))
