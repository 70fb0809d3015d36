"""Gradients through rounding: those of the real network where nothing saturates, else zero."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxplain.errors import NotDifferentiableError
from onnxplain.graph import shapes
from onnxplain.graph.edit import value_index
from onnxplain.graph.grad import differentiate

rng = np.random.default_rng(0)


def gradient(
    text: str, feeds: Mapping[str, np.ndarray], opset: int = 21
) -> tuple[np.ndarray, np.ndarray]:
    """``y`` and the gradient of its sum with respect to ``x``, by onnxruntime."""
    model = ir.from_proto(
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    )
    shapes.infer(model)
    index = value_index(model.graph)
    back = differentiate(model, index["y"], [index["x"]])
    proto = ir.to_proto(back)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    forward = ir.to_proto(model).SerializeToString()
    (y,) = ort.InferenceSession(forward, providers=["CPUExecutionProvider"]).run(None, dict(feeds))
    cotangent = np.ones_like(y)
    first, g = session.run(None, {**feeds, "cotangent": cotangent})
    np.testing.assert_array_equal(first, y)
    onnx.checker.check_model(proto)
    return y, g


@pytest.mark.parametrize(
    ("kind", "zero", "inside", "outside"),
    [
        ("int8", 0, [-128.0, -0.3, 0.2, 127.0], [-128.4, 127.4, 500.0, -1e9]),
        ("int8", -128, [0.0, 255.0, 3.7], [-0.4, 255.4]),
        ("uint8", 100, [-100.0, 155.0], [-100.3, 155.3]),
        ("int16", 0, [-32768.0, 32767.0], [-32768.5, 32768.0]),
        ("uint16", 1, [-1.0, 65534.0], [-1.5, 65535.0]),
        ("int4", 2, [-10.0, 5.0], [-10.1, 5.1]),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.1, 3.7e-4])
def test_identity_inside_the_range(
    kind: str, zero: int, inside: list[float], outside: list[float], scale: float
) -> None:
    x = (np.asarray(inside + outside) * scale).astype(np.float32)
    text = f"""g (float[N] x) => (float[N] y) <float s = {{{scale}}}, {kind} z = {{{zero}}}> {{
        q = QuantizeLinear(x, s, z)
        y = DequantizeLinear(q, s, z)
    }}"""
    _, g = gradient(text, {"x": x})
    np.testing.assert_allclose(g, [1.0] * len(inside) + [0.0] * len(outside), rtol=1e-6)


def test_zero_point_absent_and_dtype_from_attribute() -> None:
    text = """g (float[N] x) => (float[N] y) <float s = {0.5}> {
        q = QuantizeLinear <output_dtype = 3> (x, s)
        y = DequantizeLinear(q, s)
    }"""
    _, g = gradient(text, {"x": np.float32([-70, -3, 3, 70])})
    np.testing.assert_array_equal(g, [0, 1, 1, 0])


def test_each_channel_has_its_scale() -> None:
    text = """g (float[N, 2, 3] x) => (float[N, 2, 3] y)
        <float[2] s = {0.1, 1.0}, uint8[2] z = {0, 128}> {
        q = QuantizeLinear <axis = 1> (x, s, z)
        y = DequantizeLinear <axis = -2> (q, s, z)
    }"""
    _, g = gradient(text, {"x": np.float32([[[-1, 20, 30], [-129, 20, 130]]])})
    np.testing.assert_allclose(g, [[[0, 1, 0], [0, 1, 0]]], rtol=1e-6)


@pytest.mark.parametrize("shape", ["5, 2", "N, 2"])
def test_each_block_has_its_scale(shape: str) -> None:
    text = f"""g (float[{shape}] x) => (float[{shape}] y)
        <float[3, 2] s = {{0.1, 1.0, 1.0, 0.1, 0.1, 0.1}}, int8[3, 2] z = {{0, 0, 0, 0, 0, 0}}> {{
        q = QuantizeLinear <axis = 0, block_size = 2> (x, s, z)
        y = DequantizeLinear <axis = 0, block_size = 2> (q, s, z)
    }}"""
    _, g = gradient(text, {"x": np.full((5, 2), 50, np.float32)})
    np.testing.assert_allclose(g, [[0, 1], [0, 1], [1, 0], [1, 0], [0, 0]], rtol=1e-6)


def test_integers_between() -> None:
    """Operators on integers, as quantizers write them, pass the gradient on."""
    text = """g (float[N, 6] x) => (float[N, 6] y)
        <float s = {0.1}, int8 z = {0}, int64[3] sh = {0, 1, 6}, int64[2] out = {0, 6}> {
        q = QuantizeLinear(x, s, z)
        r = Relu(q)
        rr = Reshape(r, sh)
        m = MaxPool <kernel_shape = [2], strides = [2]> (rr)
        t = Transpose <perm = [0, 2, 1]> (m)
        c = Concat <axis = 2> (t, t)
        f = Reshape(c, out)
        y = DequantizeLinear(f, s, z)
    }"""
    y, g = gradient(text, {"x": np.float32([[-1, 2, 3, 1, -5, 13]])})
    np.testing.assert_allclose(y, [[2, 2, 3, 3, 12.7, 12.7]], rtol=1e-6)
    np.testing.assert_allclose(g, [[0, 2, 2, 0, 0, 0]], rtol=1e-6)


def test_two_readers_and_other_scale() -> None:
    text = """g (float[N] x) => (float[N] y) <float s = {0.1}, float t = {0.2}, int8 z = {0}> {
        q = QuantizeLinear(x, s, z)
        a = DequantizeLinear(q, s, z)
        b = DequantizeLinear(q, t, z)
        y = Add(a, b)
    }"""
    _, g = gradient(text, {"x": np.float32([1.0, 20.0])})
    np.testing.assert_allclose(g, [3, 0], rtol=1e-6)


def test_half_precision() -> None:
    text = """g (float16[N] x) => (float16[N] y) <float single = {0.0625}, uint8 z = {0}> {
        s = Cast <to = 10> (single)
        q = QuantizeLinear(x, s, z)
        y = DequantizeLinear(q, s, z)
    }"""
    _, g = gradient(text, {"x": np.float16([-1, 0, 3, 15.9375, 20])})
    assert g.dtype == np.float16
    np.testing.assert_array_equal(g, [0, 1, 1, 1, 0])


def test_dynamic_quantization() -> None:
    """The scale comes from the data; the gradient is that of the real product."""
    w = rng.integers(0, 255, (4, 3)).astype(np.uint8)
    x = rng.standard_normal((2, 4)).astype(np.float32)
    text = f"""g (float[N, 4] x) => (float[N, 3] y)
        <uint8[4, 3] w = {{{", ".join(map(str, w.ravel()))}}},
         uint8 wz = {{128}}, float ws = {{0.01}}> {{
        q, qs, qz = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, w, qz, wz)
        f = Cast <to = 1> (i)
        s = Mul(qs, ws)
        y = Mul(f, s)
    }}"""
    _, g = gradient(text, {"x": x})
    want = np.tile((w.astype(np.float64) - 128).sum(1) * 0.01, (2, 1))
    np.testing.assert_allclose(g, want, rtol=1e-5)


def test_integer_convolution() -> None:
    text = """g (float[N, 1, 3] x) => (float[N, 2, 2] y)
        <uint8[2, 1, 2] w = {1, 2, 3, 4}> {
        q, qs, qz = DynamicQuantizeLinear(x)
        i = ConvInteger(q, w, qz)
        f = Cast <to = 1> (i)
        y = Mul(f, qs)
    }"""
    _, g = gradient(text, {"x": np.float32([[[1, 2, -1]]])})
    np.testing.assert_allclose(g, [[[4, 10, 6]]], rtol=1e-6)


def test_quantized_operators_are_expanded() -> None:
    text = """g (float[N, 1, 3] x) => (float[N, 2, 2] y)
        <float s = {0.05}, uint8 z = {128}, uint8[2, 1, 2] w = {129, 130, 131, 132},
         float[2] ws = {1.0, 0.5}, uint8[2] wz = {128, 128}, int32[2] b = {20, 42},
         uint8[2, 2] m = {1, 2, 3, 4}, float one = {1.0}, uint8 zero = {0}> {
        q = QuantizeLinear(x, s, z)
        c = QLinearConv(q, s, z, w, ws, wz, one, z, b)
        p = QLinearMatMul(c, one, z, m, one, zero, one, zero)
        y = DequantizeLinear(p, one, zero)
    }"""
    y, g = gradient(text, {"x": np.float32([[[1, 2, 3]]])})
    np.testing.assert_array_equal(y, [[[33, 48], [37, 54]]])
    np.testing.assert_allclose(g, [[[7.5, 29.5, 28]]], rtol=1e-6)


def test_a_plain_cast_to_integers_still_ends_the_path() -> None:
    text = """g (float[N] x) => (float[N] y) {
        i = Cast <to = 3> (x)
        y = Cast <to = 1> (i)
    }"""
    with pytest.raises(NotDifferentiableError, match="casts to integers"):
        gradient(text, {"x": np.float32([1.0])})
