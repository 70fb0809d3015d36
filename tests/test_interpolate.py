"""Interpolation against onnxruntime's own Resize, closed forms, and what must be refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from onnxplain.errors import InputError
from onnxplain.graph.emit import Emitter
from onnxplain.methods.interpolate import (
    MODES,
    LayerAttribution,
    emit_interpolate,
    interpolate,
    matrices,
)
from tests.helpers import HEAD, proto

RNG = np.random.default_rng(0)

# How the standard's Resize says what a mode means.
RESIZE = {
    "nearest": 'mode = "nearest", nearest_mode = "floor", '
    'coordinate_transformation_mode = "asymmetric"',
    "linear": 'mode = "linear", coordinate_transformation_mode = "half_pixel"',
    "bilinear": 'mode = "linear", coordinate_transformation_mode = "half_pixel"',
    "trilinear": 'mode = "linear", coordinate_transformation_mode = "half_pixel"',
    "bicubic": 'mode = "cubic", cubic_coeff_a = -0.75, '
    'coordinate_transformation_mode = "half_pixel"',
}


@pytest.mark.parametrize("mode", RESIZE)
@pytest.mark.parametrize("factor", [0.4, 1.0, 1.6, 3.3])
def test_every_mode_is_what_resize_makes(mode: str, factor: float) -> None:
    axes = MODES[mode][1] or 2
    shape = (2, 3, *[5, 9, 7][:axes])
    sizes = tuple(max(1, int(s * factor)) for s in shape[2:])
    x = RNG.standard_normal(shape).astype(np.float32)
    dims = ", ".join(map(str, shape))
    text = f"""{HEAD}
    net (float[{dims}] x) => (float[a, b, {", ".join("cde"[:axes])}] y) {{
      y = Resize<{RESIZE[mode]}>(x, , , size)
    }}"""
    made = proto(text, size=np.array([2, 3, *sizes]))
    (want,) = onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(interpolate(x, sizes, mode), want, atol=2e-5)


def test_area_is_adaptive_average_pooling() -> None:
    x = RNG.standard_normal((2, 3, 6, 5))
    got = interpolate(x, (3, 5), "area")
    np.testing.assert_allclose(got, x.reshape(2, 3, 3, 2, 5).mean(3))
    # 5 -> 3: windows 0..2, 1..4, 3..5; 6 -> 4: windows 0..2, 1..3, 3..5, 4..6
    got = interpolate(x, (4, 3), "area")
    rows, columns = ((0, 2), (1, 3), (3, 5), (4, 6)), ((0, 2), (1, 4), (3, 5))
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            want = x[:, :, top:bottom, left:right].mean((2, 3))
            np.testing.assert_allclose(got[:, :, i, j], want)


def test_known_values() -> None:
    x = np.array([[[0.0, 1.0]]])
    np.testing.assert_allclose(interpolate(x, 4, "linear")[0, 0], [0, 0.25, 0.75, 1])
    np.testing.assert_array_equal(interpolate(x, 4)[0, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(interpolate(x[..., ::-1], 5, "area")[0, 0], [1, 1, 0.5, 0, 0])


@pytest.mark.parametrize("mode", MODES)
def test_weights_sum_to_one(mode: str) -> None:
    axes = MODES[mode][1] or 1
    for old, new in ((1, 6), (4, 11), (13, 5)):
        for matrix in matrices([old] * axes, [new] * axes, mode):
            assert matrix.shape == (new, old)
            np.testing.assert_allclose(matrix.sum(1), 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_computes_the_same(mode: str) -> None:
    axes = MODES[mode][1] or 3
    shape, sizes = (2, 2, 4, 3, 2)[: 2 + axes], (7, 2, 5)[:axes]
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g")
    out = emit_interpolate(Emitter(graph), x, shape[2:], sizes, mode)
    graph.outputs.append(out)
    made = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    given = RNG.standard_normal(shape).astype(np.float32)
    (got,) = onnxruntime.InferenceSession(made).run(None, {"x": given})
    np.testing.assert_allclose(got, interpolate(given, sizes, mode), atol=1e-5)


def test_captums_static_method() -> None:
    x = RNG.standard_normal((2, 1, 3, 4)).astype(np.float32)
    got = LayerAttribution.interpolate(x, (6, 8))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, x.repeat(2, 2).repeat(2, 3))
    assert LayerAttribution.interpolate(x, 5, "bilinear").shape == (2, 1, 5, 5)
    assert LayerAttribution.interpolate(x[0], 5, interpolate_mode="linear").shape == (1, 3, 5)


@pytest.mark.parametrize(
    ("shape", "sizes", "mode", "message"),
    [
        ((1, 1, 4), 8, "bilinear", "2 spatial axes, and there are 1: use nearest, area, linear"),
        ((1, 1, 4, 4, 4), 8, "bicubic", "and there are 3: use nearest, area, trilinear"),
        ((1, 1, 4, 4), 8, "lanczos", "one of nearest, area"),
        ((1, 1, 4, 4), (8,), "bilinear", r"\[4, 4\] to \[8\]"),
        ((1, 1, 4, 4), (8, 0), "bilinear", r"to \[8, 0\]"),
        ((1, 4), 8, "nearest", "no spatial axes"),
    ],
)
def test_what_is_refused(shape: tuple, sizes: object, mode: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        interpolate(np.zeros(shape), sizes, mode)  # type: ignore[arg-type]
