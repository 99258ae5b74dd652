"""Graphs with adapter inputs: the base bit for bit without, the merged model with an adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import gauge_ext
from gauge_ext.errors import AdapterStateError, ConfigError, ExportError, TargetError
from gauge_ext.export import export_onnx, write_onnx_adapter
from gauge_ext.export.adapters.file import read_table
from gauge_ext.export.adapters.layers import open_layers
from gauge_ext.export.adapters.read import read_arrays

transformers = pytest.importorskip("transformers")

AXES = {0: "batch", 1: "sequence"}
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def session(path: Path, level: str = "ORT_ENABLE_ALL") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options)


def run(path: Path, feeds: dict[str, np.ndarray], level: str = "ORT_ENABLE_ALL") -> np.ndarray:
    return session(path, level).run(None, feeds)[0]


class Wide(nn.Module):
    """A layer on three axes and one on two, with an activation after each that may be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(12, 200)
        self.plain = nn.Linear(200, 12, bias=False)
        self.pooled = nn.Linear(12, 300)
        self.head = nn.Linear(300, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x + self.plain(nn.functional.gelu(self.tokens(x)))
        return self.head(torch.relu(self.pooled(hidden.mean(1))))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, use_cache=False
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def model_and_inputs(kind: str, request: pytest.FixtureRequest) -> tuple[nn.Module, dict, dict]:
    if kind == "wide":
        return Wide().eval(), {"x": torch.randn(2, 7, 12)}, {"x": AXES}
    model = gpt2() if kind == "gpt2" else request.getfixturevalue(kind)
    ids = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, inputs, dict.fromkeys(inputs, AXES)


@pytest.mark.parametrize("kind", ["wide", "llama", "gpt2"])
def test_without_an_adapter_the_plain_base_bit_for_bit(kind, request, tmp_path):
    model, inputs, axes = model_and_inputs(kind, request)
    plain, graph = tmp_path / "plain.onnx", tmp_path / "graph.onnx"
    export_onnx(model, inputs, plain, dynamic_shapes=axes, validate=False)
    # Every layer that can: transformers' Conv1D has to be named.
    targets = ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else "all-linear"
    if kind == "gpt2":
        pytest.importorskip("gauge_ext.adapters.layer", reason="no adapters on Conv1D yet")
    report = export_onnx(
        model,
        inputs,
        graph,
        dynamic_shapes=axes,
        mode="adapters",
        adapter_targets=targets,
        random_cases=0,
    )
    assert report.validation.passed
    assert set(report.inputs) == set(inputs)
    assert len(report.adapter_inputs) >= 8
    for level in LEVELS:
        ones, others = session(plain, level), session(graph, level)
        for rows, columns in ((1, 1), (3, 7), (4, 30)):
            feeds = {
                name: np.resize(t.numpy(), (rows, columns, *t.shape[2:]))
                for name, t in inputs.items()
            }
            for one, other in zip(ones.run(None, feeds), others.run(None, feeds), strict=True):
                assert one.tobytes() == other.tobytes(), (level, rows, columns)


def test_with_a_peft_adapter_the_merged_model(bert, make_peft_adapter, merge_by_hand, tmp_path):
    folder = make_peft_adapter(
        bert,
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["query", "value", "intermediate.dense"],
        rank_pattern={"layer.0.attention.self.query": 7, "value": 2},
        alpha_pattern={"intermediate.dense": 3},
    )

    def scaling(name: str) -> float:
        rank = 7 if name.endswith("0.attention.self.query") else 2 if "value" in name else 4
        return (3 if "intermediate" in name else 6) / rank**0.5

    oracle = merge_by_hand(bert, folder, scaling)
    ids = torch.randint(50, (3, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    graph = tmp_path / "graph.onnx"
    report = export_onnx(
        gauge_ext.load_adapter(copy.deepcopy(bert), folder),
        inputs,
        graph,
        dynamic_shapes=dict.fromkeys(inputs, AXES),
        mode="adapters",
        random_cases=0,
    )
    names = [case.name for case in report.validation.cases]
    assert names[:2] == ["example", "smallest"]
    assert "example, with adapter" in names
    layer = "encoder.layer.0.attention.self.query"
    assert report.adapter_inputs[f"{layer}.lora_A"][0] == 16
    assert report.adapter_inputs[f"{layer}.lora_B"][1] == 16

    stored = onnx.load(graph)
    weights = {tensor.name for tensor in stored.graph.initializer}
    assert {f"{layer}.lora_A", f"{layer}.weight"} <= weights
    said = {entry.key: entry.value for entry in stored.metadata_props}
    entry = json.loads(said["gauge_ext.adapter_inputs"])["layers"][layer]
    assert entry["inputs"] == [f"{layer}.lora_A", f"{layer}.lora_B"]
    assert (entry["in"], entry["out"]) == (16, 16)
    assert "gauge_ext.adapter_sha256" not in said  # the file holds no adapter

    write_onnx_adapter(folder, graph, tmp_path / "a.onnx_adapter")
    arrays = read_arrays(read_table(graph), tmp_path / "a.onnx_adapter", "a")
    other = torch.randint(50, (5, 11))
    feeds = {"input_ids": other.numpy(), "attention_mask": np.ones((5, 11), np.int64)}
    with torch.no_grad():
        expected = oracle(other, torch.ones_like(other)).last_hidden_state.numpy()
        plain = bert(other, torch.ones_like(other)).last_hidden_state.numpy()
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(run(graph, feeds | arrays), expected, atol=1e-5)


def test_required_inputs_have_no_defaults(mlp, make_peft_adapter, merge_by_hand, tmp_path):
    folder = make_peft_adapter(mlp, r=3, lora_alpha=5, target_modules=["up"])
    path = tmp_path / "m.onnx"
    report = export_onnx(
        gauge_ext.load_adapter(copy.deepcopy(mlp), folder),
        (torch.randn(2, 12),),
        path,
        dynamic_shapes=({0: "batch"},),
        mode="adapters",
        adapter_targets="all-linear",
        adapter_form="required",
    )
    assert report.validation.passed
    assert [value.name for value in session(path).get_inputs()] == ["x", *report.adapter_inputs]
    stored = {tensor.name for tensor in onnx.load(path).graph.initializer}
    assert not stored.intersection(report.adapter_inputs)

    write_onnx_adapter(folder, path, tmp_path / "a.safetensors")
    arrays = read_arrays(read_table(path), tmp_path / "a.safetensors", "a")
    assert arrays["block.down.lora_A"].shape == (20, 1)  # the layer without an adapter
    x = torch.randn(4, 12)
    expected = merge_by_hand(mlp, folder, 5 / 3)(x).detach().numpy()
    np.testing.assert_allclose(run(path, {"x": x.numpy()} | arrays), expected, atol=1e-5)
    zeros = {name: np.zeros_like(array) for name, array in arrays.items()}
    np.testing.assert_allclose(
        run(path, {"x": x.numpy()} | zeros), mlp(x).detach().numpy(), atol=1e-6
    )


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_narrow_factors_are_widened_in_the_graph(precision, mlp, adapted, tmp_path):
    base = copy.deepcopy(mlp).double()
    adapted(mlp)
    path = tmp_path / "m.onnx"
    report = export_onnx(
        mlp,
        (torch.randn(2, 12),),
        path,
        dynamic_shapes=({0: "batch"},),
        mode="adapters",
        adapter_precision=precision,
    )
    assert report.validation.passed
    inputs = {value.name: value for value in onnx.load(path).graph.input}
    kind = getattr(onnx.TensorProto, precision.upper())
    assert inputs["up.lora_A"].type.tensor_type.elem_type == kind
    # By hand: the very numbers that are fed, in float64.
    a, b = np.array([[3], [-2]] * 6), np.array([[1, 0, -4, 2] * 5])
    feeds = {"up.lora_A": a, "up.lora_B": b}
    feeds = {name: array.astype(precision) for name, array in feeds.items()}
    factor = 1.0
    if precision == "int8":
        feeds |= {"up.lora_A.scale": np.float32([0.5]), "up.lora_B.scale": np.float32([0.25])}
        factor = 0.125
    x = torch.randn(3, 12)
    base.up.weight.data += factor * torch.from_numpy(b.T @ a.T)
    expected = base(x.double()).detach().numpy()
    found = run(path, {"x": x.numpy(), **feeds})
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_half_precision_model_takes_half_precision_factors(mlp, tmp_path):
    path = tmp_path / "m.onnx"
    options = {"mode": "adapters", "adapter_targets": "all-linear"}
    report = export_onnx(mlp.half(), (torch.randn(2, 12).half(),), path, **options)
    assert report.validation.passed
    inputs = {value.name: value for value in onnx.load(path).graph.input}
    assert inputs["up.lora_A"].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert "Cast" not in nodes


def test_the_callers_model_stays_as_it_is(mlp, adapted, tmp_path):
    adapted(mlp)
    before = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    flags = {name: p.requires_grad for name, p in mlp.named_parameters()}
    opened = open_layers(mlp, None)
    assert list(opened.inputs) == ["up", "block.down"]
    assert {name: p.requires_grad for name, p in mlp.named_parameters()} == flags
    assert type(mlp.up) is gauge_ext.LoRALinear
    for name, tensor in mlp.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert opened.base.up.weight.data_ptr() == mlp.up.weight.data_ptr()


class TestRefusals:
    def refuse(self, error, match, model, tmp_path, **options):
        path = tmp_path / "m.onnx"
        with pytest.raises(error, match=match):
            export_onnx(model, (torch.randn(2, 12),), path, **{"mode": "adapters"} | options)
        assert list(tmp_path.iterdir()) == []

    def test_no_layer_is_named(self, mlp, tmp_path):
        self.refuse(ConfigError, "adapter_targets", mlp, tmp_path)

    def test_targets_leave_out_an_adapted_layer(self, mlp, adapted, tmp_path):
        model = adapted(mlp)
        self.refuse(TargetError, "block.down", model, tmp_path, adapter_targets=["up"])

    def test_the_adapter_is_merged(self, mlp, adapted, tmp_path):
        model = gauge_ext.merge(adapted(mlp))
        self.refuse(AdapterStateError, r"unmerge\(\)", model, tmp_path)

    def test_an_adapter_of_another_kind(self, mlp, tmp_path):
        mlp.up = gauge_ext.LoRAGaugeField(mlp.up, 2)
        self.refuse(ExportError, "LoRAGaugeField", mlp, tmp_path, adapter_targets=["down"])

    def test_float64(self, mlp, tmp_path):
        options = {"adapter_targets": "all-linear"}
        with pytest.raises(ExportError, match="float64"):
            export_onnx(
                mlp.double(),
                (torch.randn(2, 12).double(),),
                tmp_path / "m.onnx",
                mode="adapters",
                **options,
            )

    def test_a_layer_that_no_output_needs(self, two_inputs, tmp_path):
        inputs = (torch.randn(2, 4), torch.randn(2, 3))
        with pytest.raises(ExportError, match="'unused'"):
            export_onnx(
                two_inputs,
                inputs,
                tmp_path / "m.onnx",
                mode="adapters",
                adapter_targets="all-linear",
            )
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"mode": "both"}, "mode must be"),
            ({"adapter_form": "maybe"}, "adapter_form must be"),
            ({"adapter_precision": "int3"}, "adapter_precision must be"),
            ({"adapter_precision": "bfloat16"}, "numpy has no such dtype"),
            ({"mode": "merged", "adapter_targets": ["up"]}, "mode='adapters'"),
        ],
    )
    def test_options(self, options, match, mlp, tmp_path):
        self.refuse(ConfigError, match, mlp, tmp_path, **options)
