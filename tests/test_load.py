"""Loading: every form of a source, weights in other files, and files that must be refused."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxplain.errors import ExternalDataError, ModelError, UnsupportedModelError
from onnxplain.graph.load import load
from tests.evaluate import evaluate

TEXT = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N,4] x) => (float[N,3] y) { h = MatMul (x, w) y = Add (h, b) }
"""
W = np.arange(12, dtype=np.float32).reshape(4, 3)
B = np.asarray([1, 2, 3], np.float32)
X = np.eye(4, dtype=np.float32)[:2]


def proto(**weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(TEXT)
    for name, array in ({"w": W, "b": B} | weights).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def external(folder, location="weights.bin", offset=0, length=48, content=W.tobytes()):
    """The model with ``w`` in a file of its own."""
    model = proto()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    if content is not None:
        (folder / "weights.bin").write_bytes(content)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize("form", ["path", "str", "bytes", "proto", "ir"])
def test_every_form_of_a_source(form, tmp_path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(proto(), path)
    source = {
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "proto": proto(),
        "ir": ir.serde.deserialize_model(proto()),
    }[form]
    np.testing.assert_array_equal(evaluate(load(source), {"x": X})["y"], X @ W + B)


@pytest.mark.parametrize("make", [lambda p: p, ir.serde.deserialize_model], ids=["proto", "ir"])
def test_the_source_is_not_changed(make) -> None:
    source = make(proto())
    before = serialized(source)
    model = load(source)
    for value in list(model.graph.initializers.values()):
        value.name = f"{value.name}.renamed"
    next(iter(model.graph)).name = "other"
    model.graph.outputs[0].shape = ir.Shape([7])
    assert serialized(source) == before


def serialized(model: onnx.ModelProto | ir.Model) -> bytes:
    return (ir.to_proto(model) if isinstance(model, ir.Model) else model).SerializeToString()


def test_tensors_in_typed_fields() -> None:
    t = onnx.TensorProto
    values = {
        t.FLOAT: [1.5, 2],
        t.FLOAT16: [0.5, 1],
        t.BFLOAT16: [1, 2],
        t.DOUBLE: [0.1, 3],
        t.INT64: [-7, 1],
        t.UINT32: [7, 1],
        t.INT8: [-7, 1],
        t.BOOL: [1, 0],
        t.INT4: [-7, 1],
        t.UINT4: [7, 1],
        t.COMPLEX64: [1 + 2j, 0],
        t.STRING: [b"a", b"b"],
    }
    model = proto()
    for dtype, numbers in values.items():
        model.graph.initializer.append(onnx.helper.make_tensor(f"t{dtype}", dtype, [2], numbers))
    loaded = load(model).graph.initializers
    for tensor in model.graph.initializer:
        found, expected = loaded[tensor.name].const_value, onnx.numpy_helper.to_array(tensor)
        assert found.dtype == tensor.data_type
        assert found.numpy().tolist() == expected.astype(found.numpy().dtype).tolist()


def test_unknown_operators_do_not_fail_the_load() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "my.domain" : 3]>
        g (float[2] x) => (float[2] y) { y = my.domain.Thing <level=3> (x) }"""
    assert next(iter(load(onnx.parser.parse_model(text)).graph)).op_type == "Thing"


# ---- files that are no model ----


def test_missing_file(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"no file '.*nothing\.onnx'"):
        load(tmp_path / "nothing.onnx")


def test_folder(tmp_path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(200)), "not an ONNX model"),
        (b"import onnx\nprint('hello')\n", "not an ONNX model"),
        (onnx.TensorProto(name="t").SerializeToString(), "not an ONNX model"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "no ONNX graph"),
    ],
)
def test_not_a_model(content, says, tmp_path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ModelError, match=says):
            load(source)


def test_every_truncation_is_refused(tmp_path) -> None:
    whole = proto().SerializeToString()
    load(whole)
    for length in range(len(whole)):
        with pytest.raises(ModelError):
            load(whole[:length])


def test_other_types() -> None:
    with pytest.raises(ModelError, match="can't be loaded from int"):
        load(3)  # type: ignore[arg-type]


# ---- graphs that don't hold together ----


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: g.ClearField("output"), "no outputs"),
        (lambda g: g.initializer.pop(), "reads the value 'b'"),
        (lambda g: setattr(g.output[0], "name", "z"), "the output reads the value 'z'"),
        (lambda g: g.node[0].output.__setitem__(0, "y"), "(?i)malformed.*y"),
        (lambda g: g.initializer[0].dims.__setitem__(0, -4), "negative dimension"),
        (lambda g: setattr(g.initializer[0], "data_type", 99), "unknown data type 99"),
        (lambda g: setattr(g.initializer[0], "data_type", 0), "data type"),
    ],
)
def test_inconsistent_graphs(change, says) -> None:
    model = proto()
    change(model.graph)
    with pytest.raises(ModelError, match=says):
        load(model)


def test_missing_opset() -> None:
    model = proto()
    del model.opset_import[:]
    with pytest.raises(ModelError, match="which opset"):
        load(model)


@pytest.mark.parametrize("field", ["raw_data", "float_data", None])
def test_sizes_are_compared_before_anything_is_allocated(field) -> None:
    """2^60 elements declared, a few bytes there: in initializers and in node attributes."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1 << 30, 1 << 30])
    if field == "raw_data":
        tensor.raw_data = b"1234"
    elif field == "float_data":
        tensor.float_data.append(1)
    model = proto()
    model.graph.initializer[0].CopyFrom(tensor)
    with pytest.raises(ModelError, match=r"'w'.*needs"):
        load(model)
    model = proto()
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["c"], value=tensor))
    with pytest.raises(ModelError, match=r"'w'.*needs"):
        load(model)


def test_sparse_weights() -> None:
    model = proto()
    sparse = model.graph.sparse_initializer.add()
    sparse.values.name = "sp"
    with pytest.raises(UnsupportedModelError, match="'sp' is sparse"):
        load(model)


# ---- weights in other files ----


def test_external_weights_stay_in_their_file(tmp_path) -> None:
    path = external(tmp_path)
    model = load(path)
    weight = model.graph.initializers["w"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    np.testing.assert_array_equal(weight.numpy(), W)
    for source in (path.read_bytes(), onnx.load(path, load_external_data=False)):
        with pytest.raises(ExternalDataError, match="external_data_dir"):
            load(source)
        found = load(source, external_data_dir=tmp_path).graph.initializers["w"]
        np.testing.assert_array_equal(found.const_value.numpy(), W)
    np.testing.assert_array_equal(
        load(ir.load(path)).graph.initializers["w"].const_value.numpy(), W
    )


def test_offset_and_absent_length(tmp_path) -> None:
    path = external(tmp_path, offset=8, length=None, content=b"12345678" + W.tobytes() + b"more")
    np.testing.assert_array_equal(load(path).graph.initializers["w"].const_value.numpy(), W)


def test_more_than_two_gigabytes_are_not_read(tmp_path) -> None:
    """A sparse file of 3 GiB: neither read nor copied, only mapped."""
    model = proto()
    big = onnx.TensorProto(name="big", data_type=1, dims=[3 << 28])
    big.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "big.bin", "offset": "0", "length": str(3 << 30)}.items():
        big.external_data.add(key=key, value=value)
    model.graph.initializer.append(big)
    with open(tmp_path / "big.bin", "wb") as f:
        f.truncate(3 << 30)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    weight = load(tmp_path / "model.onnx").graph.initializers["big"].const_value
    assert weight.nbytes == 3 << 30
    assert weight.numpy()[-1] == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"location": "/etc/hostname"}, "not a plain path"),
        ({"location": "../weights.bin"}, "not a plain path"),
        ({"location": "a/../../weights.bin"}, "not a plain path"),
        ({"location": "..\\weights.bin"}, "not a plain path"),
        ({"location": "C:\\weights.bin"}, "not a plain path"),
        ({"location": ""}, "not a plain path"),
        ({"location": None}, "not a plain path"),
        ({"content": None}, "no external data file"),
        ({"location": "."}, "no external data file"),
        ({"content": W.tobytes()[:-1]}, "has 47 bytes"),
        ({"offset": 4}, "at offset 4"),
        ({"offset": -4}, "at offset -4"),
        ({"offset": "many"}, "not a number"),
        ({"length": 44}, "stated length: 44"),
        ({"length": 1 << 62}, "stated length"),
        ({"length": -1}, "negative external length"),
    ],
)
def test_external_weights_that_are_refused(change, says, tmp_path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(W.tobytes())
    with pytest.raises(ExternalDataError, match=says):
        load(external(folder, **change))


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="this system has no links")
def test_links(tmp_path) -> None:
    outside, inside = tmp_path / "outside.bin", tmp_path / "inside"
    outside.write_bytes(W.tobytes())
    inside.mkdir()
    path = external(inside, content=None)
    link = inside / "weights.bin"
    link.symlink_to(outside)
    with pytest.raises(ExternalDataError, match="outside the model's folder"):
        load(path)
    link.unlink()
    os.link(outside, link)
    with pytest.raises(ExternalDataError, match="hard-linked"):
        load(path)
    link.unlink()
    (inside / "real.bin").write_bytes(W.tobytes())
    link.symlink_to(inside / "real.bin")
    np.testing.assert_array_equal(load(path).graph.initializers["w"].const_value.numpy(), W)


def test_external_data_of_node_attributes_is_checked_too(tmp_path) -> None:
    model = proto()
    tensor = onnx.TensorProto(name="c", data_type=1, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["k"], value=tensor))
    with pytest.raises(ExternalDataError, match="not a plain path"):
        load(model.SerializeToString(), tmp_path)
