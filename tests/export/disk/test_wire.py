"""Protobuf walked by hand, against onnx's own parser, and against whatever bytes there are."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_layouts import LAYOUTS, random_weights, write_model

from gauge_ext.errors import ConfigError
from gauge_ext.export.disk.spans import Span, read
from gauge_ext.export.disk.splice import Hole, splice
from gauge_ext.export.disk.wire import Message, scan, varint

SHAPES = {"enc.a": (12, 8), "enc.b": (20, 12), "enc.c": (20, 20), "enc.d": (6, 20)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Four layers, a large constant in a node, an inner graph with a weight, and a long note."""
    path = write_model(tmp_path / "m.onnx", random_weights(SHAPES), LAYOUTS, metadata={"a": "b"})
    proto = onnx.load(str(path))
    big = numpy_helper.from_array(np.arange(600, dtype="f4"), "big")
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], value=big))
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["i"])],
        "inner",
        [],
        [helper.make_tensor_value_info("i", 1, [500])],
        [numpy_helper.from_array(np.arange(500, dtype="f4"), "w")],
    )
    branch = helper.make_node("If", ["x"], ["f"], then_branch=inner, else_branch=inner)
    branch.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="line\n" * 500)
    branch.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(["", "m" * 400]))
    proto.graph.node.append(branch)
    onnx.save(proto, str(path))
    return path


def test_the_skeleton_is_the_model_without_numbers_and_long_notes(model):
    found = scan(model)
    assert found.size == model.stat().st_size
    assert len(found.skeleton) < 3000 < 1000 * 4
    skeleton, whole = onnx.ModelProto.FromString(found.skeleton), onnx.load(str(model))
    assert [t.name for t in skeleton.graph.initializer] == [t.name for t in whole.graph.initializer]
    branch = skeleton.graph.node[-1]
    assert [p.key for p in branch.metadata_props] == ["pkg.torch.onnx.name_scopes"]
    numbers = {
        onnx.TensorProto.FromString(t.head).name: read(
            Span(model, t.payloads[0].start, t.payloads[0].end - t.payloads[0].start)
        )
        for t in found.tensors
    }
    for tensor in whole.graph.initializer:
        assert numbers[tensor.name] == tensor.raw_data
    assert numbers["big"] == np.arange(600, dtype="f4").tobytes()
    assert numbers["w"] == np.arange(500, dtype="f4").tobytes()
    assert len(found.metadata) == 1


def joined(pieces) -> bytes:
    return b"".join(
        piece
        if isinstance(piece, bytes)
        else read(piece.span if isinstance(piece, Hole) else piece)
        for piece in pieces
    )


def test_splicing_nothing_and_something(model):
    found = scan(model)
    assert joined(splice(found, [])) == model.read_bytes()
    holes = [
        ((*t.chain, t.payloads[0]), Hole(Span(model, t.payloads[0].start, 4)))
        for t in found.tensors
    ]
    assert sum(isinstance(piece, Hole) for piece in splice(found, holes)) == len(found.tensors)
    edits = []
    for tensor in found.tensors:
        proto = onnx.TensorProto.FromString(tensor.head)
        proto.name += "_with_a_longer_name" * 20  # lengths of all messages around it change too
        edits.append((tensor.chain, proto.SerializeToString()))
    extra = onnx.ModelProto(producer_name="new").SerializeToString()
    changed = onnx.ModelProto.FromString(joined(splice(found, edits, extra)))
    whole = onnx.load(str(model))
    assert changed.producer_name == "new"
    assert [t.name[:5] for t in changed.graph.initializer] == [
        t.name[:5] for t in whole.graph.initializer
    ]
    assert all(t.name.endswith("name" * 1) for t in changed.graph.initializer)
    inner = changed.graph.node[-1].attribute[0].g.initializer[0]
    assert inner.name.startswith("w_with_a_longer_name")
    assert changed.graph.node[:-2] == whole.graph.node[:-2]


def test_every_truncation_is_an_error_or_a_shorter_message(model):
    content = model.read_bytes()
    broken = model.with_name("broken.onnx")
    said = []
    lengths = range(0, len(content), 37)
    for length in lengths:
        broken.write_bytes(content[:length])
        try:
            scan(broken)
        except ConfigError as error:
            said.append(str(error))
    assert len(said) > 0.9 * len(lengths)
    assert all("is not a whole ONNX file" in text for text in said)


def test_garbage_never_gives_another_error(tmp_path):
    draw = random.Random(0)
    path = tmp_path / "g.onnx"
    errors = 0
    for _ in range(300):
        path.write_bytes(b"\x3a" + draw.randbytes(draw.randrange(200)))
        try:
            scan(path)
        except ConfigError:
            errors += 1
    assert errors > 250


def test_lengths_beyond_the_file_and_endless_nesting(tmp_path):
    path = tmp_path / "g.onnx"
    path.write_bytes(b"\x3a" + varint(2**62) + b"x")
    with pytest.raises(ConfigError, match=r"should have 4,611,686,018,427,387,904 bytes and 1 are"):
        scan(path)
    path.write_bytes(b"\x3a" + b"\xff" * 11)
    with pytest.raises(ConfigError, match="does not end"):
        scan(path)
    body = b"\0" * 2000
    for _ in range(100):  # Graph in Attribute in Node in Graph ...
        body = b"\x32" + varint(len(body)) + body
        body = b"\x2a" + varint(len(body)) + body
        body = b"\x0a" + varint(len(body)) + body
    path.write_bytes(b"\x3a" + varint(len(body)) + body)
    with pytest.raises(ConfigError, match="nested too deep"):
        scan(path)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**32, 2**63 - 1])
def test_varint(value):
    # A field of StringStringEntryProto is long enough to have its length in several bytes.
    number, shift = 0, 0
    for byte in varint(value):
        number |= (byte & 127) << shift
        shift += 7
    assert number == value
    assert all(byte > 127 for byte in varint(value)[:-1])
    assert varint(value)[-1] < 128


def test_edits_are_sorted_by_place(model):
    found = scan(model)
    first, last = found.tensors[0], found.tensors[-1]
    edits = [(last.chain, last.head), (first.chain, first.head)]
    whole = onnx.ModelProto.FromString(joined(splice(found, edits)))
    assert len(whole.graph.initializer) == 4
    assert isinstance(first.chain[0], Message)
