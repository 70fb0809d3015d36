"""Sizes of pools with ceil_mode, which ONNX's own inference overstates."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxplain.graph import shapes
from onnxplain.graph.edit import value_index

# Pools whose last window would start behind an input of 5 x 5, and whether floor mode can say so.
POOLS = [
    ("MaxPool <kernel_shape = [2, 2], strides = [3, 3], pads = [0, 0, 1, 1], ceil_mode = 1>", True),
    ("MaxPool <kernel_shape = [1, 2], strides = [3, 2], ceil_mode = 1>", True),
    (
        "MaxPool <kernel_shape = [2, 2], strides = [2, 3], pads = [0, 0, 1, 1], "
        "dilations = [2, 1], ceil_mode = 1>",
        False,
    ),
    (
        'AveragePool <kernel_shape = [1, 1], strides = [3, 3], auto_pad = "VALID", ceil_mode = 1>',
        True,
    ),
    (
        "AveragePool <kernel_shape = [1, 2], strides = [3, 2], ceil_mode = 1, "
        "count_include_pad = 1>",
        False,
    ),
    ("LpPool <kernel_shape = [1, 1], strides = [3, 3], ceil_mode = 1, p = 1>", True),
]
X = np.random.default_rng(0).standard_normal((2, 3, 5, 5)).astype(np.float32)


def two_pools(pool: str, size: str) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[N, 3, {size}, {size}] x) => (float[N, 3, a, b] z) {{
      y = {pool} (x)
      z = MaxPool <kernel_shape = [1, 1], strides = [2, 2], ceil_mode = 1> (y)
    }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def run(model: ir.Model) -> dict[str, np.ndarray]:
    model = model.clone()
    model.graph.outputs[:] = [value_index(model.graph)[name] for name in "yz"]
    for out in model.graph.outputs:
        out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), None
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings)
    return dict(zip("yz", session.run(None, {"x": X}), strict=True))


@pytest.mark.parametrize(("pool", "floor"), POOLS)
def test_no_window_starts_behind_the_input(pool: str, floor: bool) -> None:
    model = two_pools(pool, "5")
    want = run(model)
    shapes.infer(model)
    values = value_index(model.graph)
    for name in "yz":
        assert values[name].shape[2:] == want[name].shape[2:]
    # Where floor mode gives the same windows, the node says so, and the checker agrees.
    assert ("ceil_mode" not in model.graph[0].attributes) == floor
    got = run(model)
    for name in "yz":
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("pool", [p for p, _ in POOLS])
def test_concrete_sizes(pool: str) -> None:
    model = two_pools(pool, "S")
    shapes.infer(model)
    assert model.graph[0].attributes["ceil_mode"].as_int() == 1  # sizes are unknown
    found = shapes.concrete(model, {"x": X.shape})
    want = run(model)
    assert {name: found[name] for name in "yz"} == {name: (4, want[name].shape) for name in "yz"}
