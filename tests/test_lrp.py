"""LRP against a dense formulation: every layer a matrix, every contribution a number in a table."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

import onnxplain as ox
from onnxplain.errors import InputError, LayerError, NoRuleError
from onnxplain.methods.lrp import LRP, LayerLRP
from onnxplain.rules import lrp
from tests.evaluate import evaluate
from tests.helpers import HEAD, model, proto, shared
from tests.test_real_models import MODELS, QUANTIZED, examples

RNG = np.random.default_rng(0)
ALL = slice(None)

# ---- linear layers as matrices ------------------------------------------------------------------


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# name -> (type and shape of x, of y, the layer, its weights); `b` is the bias
LAYERS: dict[str, tuple[str, str, str, dict[str, np.ndarray]]] = {
    "gemm": (
        *("double[N, 6]", "double[N, 4]", "y = Gemm(x, w, b)"),
        {"w": RNG.standard_normal((6, 4)), "b": RNG.standard_normal(4)},
    ),
    "scaled gemm": (
        *("double[N, 6]", "double[N, 4]", "y = Gemm<transB=1, alpha=-0.5, beta=2.0>(x, w, b)"),
        {"w": RNG.standard_normal((4, 6)), "b": RNG.standard_normal((1, 4))},
    ),
    "matmul and add": (
        *("double[N, 3, 2]", "double[N, 3, 4]", "h = MatMul(x, w) y = Add(b, h)"),
        {"w": RNG.standard_normal((2, 4)), "b": RNG.standard_normal(4)},
    ),
    "einsum": (
        *("double[N, 3, 2]", "double[N, 4]", 'y = Einsum<equation="oij,nij->no">(w, x)'),
        {"w": RNG.standard_normal((4, 3, 2))},
    ),
    "matrix on the left": (
        *("double[N, 3, 2]", "double[N, 4, 2]", "y = MatMul(w, x)"),
        {"w": RNG.standard_normal((4, 3))},
    ),
    "conv": (
        *("float[N, 4, 7]", "float[N, 2, 4]"),
        "y = Conv<group=2, strides=[2], pads=[1, 1]>(x, w, b)",
        {"w": floats(2, 2, 3), "b": floats(2)},
    ),
    "conv and add": (
        *("float[N, 1, 5, 4]", "float[N, 2, 3, 3]"),
        "h = Conv<dilations=[2, 1]>(x, w) y = Add(h, b)",
        {"w": floats(2, 1, 2, 2), "b": floats(2, 1, 1)},
    ),
    "transposed conv": (
        *("float[N, 3, 4]", "float[N, 2, 9]"),
        "y = ConvTranspose<strides=[2]>(x, w, b)",
        {"w": floats(3, 2, 3), "b": floats(2)},
    ),
}


def layer(name: str) -> tuple[onnx.ModelProto, tuple[int, ...]]:
    x, y, body, weights = LAYERS[name]
    text = f"{HEAD}\n net ({x} x) => ({y} y) {{ {body} }}"
    shape = tuple(int(d) for d in x.split("[N, ")[1].rstrip("]").split(", "))
    return proto(text, **weights), shape


def matrix(net: onnx.ModelProto, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A linear layer as ``x @ W + b``, from what it makes of the unit vectors."""
    size = int(np.prod(shape))
    units = np.concatenate([np.zeros((1, size)), np.eye(size)]).reshape(-1, *shape)
    is_double = net.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
    (y,) = evaluate(net, {"x": units.astype(np.float64 if is_double else np.float32)}).values()
    y = y.reshape(size + 1, -1).astype(np.float64)
    return y[1:] - y[0], y[0]


Table = tuple[np.ndarray, np.ndarray]
"""Contributions [N, inputs, outputs], and what the bias contributes [outputs]."""


def dense(rule: lrp.PropagationRule, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> list[Any]:
    """A rule's shares: (factor, gate [N, outputs], table), each normalized for itself."""
    z, y = x[:, :, None] * w, x @ w + b
    if getattr(rule, "set_bias_to_zero", False):
        b = 0 * b
    up, down = (lambda v: np.maximum(v, 0)), (lambda v: np.minimum(v, 0))
    match rule:
        case lrp.Epsilon() | lrp.Norm():
            return [(1, 1, (z, b))]
        case lrp.ZPlus(_, _, True):
            return [(1, 1, (up(z), up(b)))]
        case lrp.ZPlus(_, _, False):
            return [(1, 1, (x[:, :, None] * up(w), b))]
        case lrp.AlphaBeta(alpha, beta):
            return [(alpha, 1, (up(z), up(b))), (-beta, 1, (down(z), down(b)))]
        case lrp.Gamma(gamma, _, _, True):
            return [
                (1, sign * y > 0, (z + gamma * part(z), b + gamma * part(b)))
                for sign, part in ((1, up), (-1, down))
            ]
        case lrp.Gamma(gamma, _, _, False):
            return [(1, 1, (z + gamma * x[:, :, None] * up(w), b))]
        case lrp.ZBox():
            low, high = (np.broadcast_to(v, x.shape)[:, :, None] for v in (rule.low, rule.high))
            return [(1, 1, (z - low * up(w) - high * down(w), 0 * b))]
        case lrp.WSquare():
            return [(1, 1, (np.broadcast_to(w**2, z.shape), b**2))]
        case lrp.Flat():
            return [(1, 1, (np.broadcast_to((w != 0) * 1.0, z.shape), 0 * b))]
    raise AssertionError(rule)


def expected(rule: lrp.PropagationRule, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The relevance of the inputs when every output's is its value."""
    relevance, total = x @ w + b, np.zeros_like(x)
    for factor, gate, (table, bias) in dense(rule, x, w, b):
        sums = table.sum(1) + bias
        sums = sums + rule.stabilizer * np.where(sums >= 0, 1, -1)
        total += factor * (table / sums[:, None] * (relevance * gate)[:, None]).sum(2)
    return total


RULES = [
    lrp.Epsilon(),
    lrp.Epsilon(0.5),
    lrp.Epsilon(1e-3, set_bias_to_zero=True),
    lrp.Norm(0.1),
    lrp.Gamma(),
    lrp.Gamma(2.0, 0.1, set_bias_to_zero=True),
    lrp.Gamma(0.5, 1e-9, signed=False),
    lrp.Gamma(0.5, 0.1, set_bias_to_zero=True, signed=False),
    lrp.AlphaBeta(),
    lrp.AlphaBeta(1.0, 0.0, 0.1),
    lrp.AlphaBeta(1.5, 0.5, set_bias_to_zero=True),
    lrp.ZPlus(),
    lrp.ZPlus(0.1, set_bias_to_zero=True),
    lrp.ZPlus(0.1, signed=False),
    lrp.ZBox(-3.0, 2.5),
    lrp.WSquare(),
    lrp.WSquare(0.1, set_bias_to_zero=True),
    lrp.Flat(),
    lrp.Flat(0.5),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "behind a ReLU"])
def test_rules_are_dense(name: str, rule: lrp.PropagationRule, unsigned: bool) -> None:
    net, shape = layer(name)
    w, b = matrix(net, shape)
    x = np.random.default_rng(1).uniform(-1, 2, (3, *shape))
    if unsigned:  # half of the terms are known to vanish
        relu = onnx.helper.make_node("Relu", ["x"], ["r"])
        for node in net.graph.node:
            node.input[:] = ["r" if v == "x" else v for v in node.input]
        net.graph.node.insert(0, relu)
    made = ox.Model(net)
    double = made.inputs[0].dtype == np.float64
    x = x.astype(made.inputs[0].dtype)
    everything = (ALL,) * (len(net.graph.output[0].type.tensor_type.shape.dim) - 1)
    got = LRP(made, [(lrp.LINEAR, rule)], of="y").attribute(x, everything)
    entering = np.maximum(x, 0) if unsigned else x
    want = expected(rule, entering.reshape(3, -1).astype(np.float64), w, b).reshape(x.shape)
    assert got.shape == x.shape
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=(1e-11 if double else 3e-5) * scale)


def test_a_box_by_channel() -> None:
    net, shape = layer("conv and add")
    low, high = np.full((1, 1, 1, 1), -1.0), RNG.uniform(2, 3, (5, 4))
    w, b = matrix(net, shape)
    x = np.random.default_rng(1).uniform(-1, 2, (3, *shape)).astype(np.float32)
    got = LRP(ox.Model(net), [("first", lrp.ZBox(low, high))], of="y").attribute(x, (ALL,) * 3)
    box = lrp.ZBox(low.reshape(1, 1), high.reshape(1, -1))
    want = expected(box, x.reshape(3, -1).astype(np.float64), w, b).reshape(x.shape)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())


def test_layers_hand_on_what_they_got() -> None:
    """Two layers: the relevance of the hidden neurons is that of the inputs of the second."""
    w, b = RNG.standard_normal((6, 5)), RNG.standard_normal(5)
    v, c = RNG.standard_normal((5, 3)), RNG.standard_normal(3)
    made = mlp(w, b, v, c)
    x = RNG.standard_normal((4, 6))
    h = np.maximum(x @ w + b, 0)
    y, target = h @ v + c, [2, 0, 1, 1]
    top, below = lrp.Gamma(0.5), lrp.AlphaBeta()
    got = LRP(made, [("second", top), ("Gemm", below)]).attribute(x, target=target)
    onehot = np.eye(3)[target]
    hidden = np.zeros_like(h)
    for factor, gate, (table, bias) in dense(top, h, v, c):
        sums = table.sum(1) + bias
        sums = sums + 1e-6 * np.where(sums >= 0, 1, -1)
        hidden += factor * (table / sums[:, None] * (y * onehot * gate)[:, None]).sum(2)
    np.testing.assert_allclose(
        LayerLRP(made, "r", [("second", top)]).attribute(x, target), hidden, rtol=1e-9, atol=1e-12
    )
    want = np.zeros_like(x)
    for factor, gate, (table, bias) in dense(below, x, w, b):
        sums = table.sum(1) + bias
        sums = sums + 1e-6 * np.where(sums >= 0, 1, -1)
        want += factor * (table / sums[:, None] * (hidden * gate)[:, None]).sum(2)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def mlp(w: np.ndarray, b: np.ndarray, v: np.ndarray, c: np.ndarray) -> ox.Model:
    text = f"""{HEAD}
    net (double[N, {len(w)}] x) => (double[N, {len(c)}] y) {{
        [first_layer] h = Gemm(x, w, b) r = Relu(h) [second] y = Gemm(r, v, c) }}"""
    return model(text, {"w": w, "b": b, "v": v, "c": c})


# ---- Captum's own expectations, as facts --------------------------------------------------------


def simple(**changed: float) -> ox.Model:
    """Captum's SimpleLRPModel: two layers without bias, weights 2 and 3."""
    w = np.full((3, 3), 2.0)
    w[0, 0] = changed.get("w00", 2.0)
    text = f"""{HEAD}
    net (double[N, 3] x) => (double[N, 1] y) {{
        [linear] h = MatMul(x, w) r = Relu(h) [linear2] y = MatMul(r, v) }}"""
    return model(text, {"w": w, "v": np.full((3, 1), 3.0)})


SIMPLE = np.array([[1.0, 2.0, 3.0]])
POSITIVE = lrp.ZPlus(1e-9, signed=False)
FACTS: dict[str, tuple[float, Any, list[float]]] = {
    "epsilon": (2.0, [("MatMul", lrp.Epsilon(1e-9))], [18, 36, 54]),
    "default": (2.0, None, [18, 36, 54]),
    "gamma": (
        -2.0,
        [("linear", lrp.Gamma(1.0, 1e-9, signed=False)), ("linear2", lrp.Gamma(signed=False))],
        [28 / 3, 104 / 3, 52],
    ),
    "alpha 1 beta 0": (-2.0, [("MatMul", POSITIVE)], [12, 33.6, 50.4]),
    "identity": (-2.0, [("linear", lrp.Pass())], [24, 36, 36]),
}


@pytest.mark.parametrize("name", FACTS)
def test_captums_facts(name: str) -> None:
    w00, rules, want = FACTS[name]
    np.testing.assert_allclose(LRP(simple(w00=w00), rules).attribute(SIMPLE), [want], rtol=1e-6)


def test_captums_facts_of_layers() -> None:
    x = np.concatenate([SIMPLE, 2 * SIMPLE])
    method = LayerLRP(simple(), ["linear", "linear2"])
    relevance, delta = method.attribute(
        x, return_convergence_delta=True, attribute_to_layer_input=True
    )
    np.testing.assert_allclose(relevance[0], [[18, 36, 54], [36, 72, 108]])
    np.testing.assert_allclose(relevance[1], [[36, 36, 36], [72, 72, 72]])
    assert [d.shape for d in delta] == [(2,), (2,)]
    np.testing.assert_allclose(delta, 0, atol=1e-6)
    positive = LayerLRP(simple(w00=-2.0), "linear", [("MatMul", POSITIVE)])
    np.testing.assert_allclose(positive.attribute(SIMPLE), [[24, 36, 36]])


def test_captums_convolution() -> None:
    """Its BasicModel_ConvNet_One_Conv."""
    text = f"""{HEAD}
    net (float[N, 1, 4, 4] x) => (float[N, 4] y) {{
        c = Conv(x, w, b) r = Relu(c) f = Flatten(r) d = Gemm<transB=1>(f, v) y = Relu(d) }}"""
    weights = {
        "w": np.ones((2, 1, 3, 3), np.float32),
        "b": np.array([-50, -75], np.float32),
        "v": np.concatenate([np.ones((4, 5)), -np.ones((4, 3))], 1).astype(np.float32),
    }
    made, x = model(text, weights), np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    relevance, delta = LRP(made).attribute(x, 0, return_convergence_delta=True)
    want = [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11], [0, 0, 0, 0]]
    np.testing.assert_allclose(relevance, [[want]], atol=1e-4)
    np.testing.assert_allclose(delta, 0, atol=1e-4)
    layer, delta = LayerLRP(made, "c").attribute(x, 0, return_convergence_delta=True)
    np.testing.assert_allclose(layer, [[[[0, 4], [31, 40]], [[0, 0], [-6, -15]]]], atol=1e-4)
    np.testing.assert_allclose(delta, 0, atol=1e-4)


def test_captums_tanh_pooling_and_sum() -> None:
    text = f"""{HEAD}
    net (double[N, 3] x) => (double[N, 1] y) {{
        h = MatMul(x, w) t = Tanh(h) y = MatMul(t, v) }}"""
    tanh = model(text, {"w": np.full((3, 3), 0.1), "v": np.full((3, 1), 0.1)})
    want = [[0.0269, 0.0537, 0.0806]]
    np.testing.assert_allclose(LRP(tanh).attribute(SIMPLE), want, atol=1e-4)
    text = f"""{HEAD}
    net (float[N, 1, 2, 2, 2] x) => (float[N, 1, 1, 1, 1] y) {{
        y = MaxPool<kernel_shape=[2, 2, 2]>(x) }}"""
    x = np.array([1, 2, 5, 6, 3, 4, 7, 8], np.float32).reshape(1, 1, 2, 2, 2)
    np.testing.assert_allclose(LRP(model(text)).attribute(x, (0, 0, 0, 0)), x * (x == 8))
    text = f"""{HEAD}
    net (double[N, 2] x) => (double[N, 2] y) {{ h = MatMul(x, w) y = Add(h, x) }}"""
    skip = model(text, {"w": np.full((2, 2), 5.0)})
    np.testing.assert_allclose(LRP(skip).attribute(np.array([[2.0, 3.0]]), 1), [[10, 18]])


# ---- what is handed on where no rule is chosen --------------------------------------------------

X = np.random.default_rng(3).uniform(-1, 2, (2, 3, 4)).astype(np.float32)


def relevance(body: str, x: np.ndarray = X, rules: Any = None, **weights: np.ndarray) -> Any:
    """Of all values of y = body(x), the relevance of x; and y."""
    shape = ", ".join(map(str, x.shape[1:]))
    text = f"{HEAD}\n net (float[N, {shape}] x) => (float y) {{ {body} }}"
    made = model(text, {k: np.asarray(v, np.float32) for k, v in weights.items()})
    y = made(x)["y"]
    return LRP(made, rules, of="y").attribute(x, (ALL,) * (y.ndim - 1)), y


PASSED = {
    "activations": "a = LeakyRelu(x) b = Tanh(a) y = Sigmoid(b)",
    "negation": "y = Neg(x)",
    "constant factor": "y = Mul(two, x)",
    "constant divisor": "y = Div(x, two)",
    "constant exponent": "y = Pow(x, two)",
    "square": "y = Mul(x, x)",
    "own gate": "s = Sigmoid(x) y = Mul(s, x)",
    "gelu in parts": "d = Div(x, two) e = Erf(d) a = Add(e, two) h = Mul(x, a) y = Mul(h, two)",
    "hard swish in parts": "a = Add(x, two) c = Clip(a, zero, two) h = Mul(x, c) y = Div(h, two)",
    "own gate last": "t = Tanh(x) s = Mul(x, two) y = Mul(s, t)",
    "a maximum that is an activation": "y = Max(x, zero)",
    "a softmax": "y = Softmax(x)",
    "a divisor of its own": "a = Abs(x) d = Add(a, two) y = Div(x, d)",
    "LRN": "y = LRN<size=3>(x)",
}


@pytest.mark.parametrize("name", PASSED)
def test_functions_pass(name: str) -> None:
    used = {k: v for k, v in {"two": 2.0, "zero": 0.0}.items() if k in PASSED[name]}
    x = X[..., None] if name == "LRN" else X
    got, y = relevance(PASSED[name], x, **used)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-6)


def test_a_broadcast_value_gets_the_relevance_of_its_copies() -> None:
    got, y = relevance("y = Mul(x, c)", X[:, :, :1], c=np.ones((2, 1, 4)))
    np.testing.assert_allclose(got, y.sum(-1, keepdims=True), rtol=1e-6)


MOVED: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "transpose": ("y = Transpose<perm=[0, 2, 1]>(x)", lambda r: r.transpose(0, 2, 1)),
    "flatten": ("y = Flatten(x)", lambda r: r.reshape(2, 3, 4)),
    "two ways": ("a = Neg(x) y = Concat<axis=1>(a, x)", lambda r: r[:, :3] + r[:, 3:]),
    "maximum of two": ("a = Neg(x) y = Max(x, a)", lambda r: r),
}


@pytest.mark.parametrize("name", MOVED)
def test_moves(name: str) -> None:
    body, back = MOVED[name]
    got, y = relevance(body)
    np.testing.assert_allclose(got, back(y), rtol=1e-6)


def test_pooling_gives_all_to_the_winner() -> None:
    x = RNG.permutation(np.arange(32.0, dtype=np.float32)).reshape(2, 1, 4, 4) - 8
    got, y = relevance("y = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(x)", x)
    cells = x.reshape(2, 2, 2, 2, 2)
    best = cells == cells.max((2, 4), keepdims=True)
    np.testing.assert_allclose(got, (cells * best).reshape(x.shape))
    np.testing.assert_allclose(got.sum((1, 2, 3)), y.sum((1, 2, 3)))


AVERAGED = {
    "sum over an axis": "axes = Constant<value_ints=[2]>() y = ReduceSum(x, axes)",
    "mean": "axes = Constant<value_ints=[1]>() y = ReduceMean<keepdims=0>(x, axes)",
    "running sum": "axis = Constant<value_int=2>() y = CumSum(x, axis)",
    "average pooling": "y = AveragePool<kernel_shape=[2], strides=[2]>(x)",
    "global average": "y = GlobalAveragePool(x)",
    "length": "axes = Constant<value_ints=[2]>() y = ReduceL2(x, axes)",
    "sums of what is explained": "a = Tanh(x) b = Sub(x, a) c = Sum(a, b, x) y = Mean(c, x)",
}


@pytest.mark.parametrize("name", AVERAGED)
def test_sums_conserve(name: str) -> None:
    got, y = relevance(AVERAGED[name])
    np.testing.assert_allclose(got.sum((1, 2)), y.reshape(2, -1).sum(1), rtol=1e-5)


def test_a_sum_is_in_proportion_and_a_constant_absorbs_its_share() -> None:
    got, _ = relevance("a = Sigmoid(x) y = Add(a, c)", c=np.full(4, 0.5))
    a = 1 / (1 + np.exp(-X))
    np.testing.assert_allclose(got, a, rtol=1e-5)
    got, _ = relevance("y = Sub(c, x)", c=np.full((3, 4), 5.0))
    np.testing.assert_allclose(got, -X, rtol=1e-5)


NORMALIZED = {
    "layer": ("y = LayerNormalization(x, g, b)", (2,), True),
    "layer, two axes": ("y = LayerNormalization<axis=1>(x, g, b)", (1, 2), True),
    "instance": ("y = InstanceNormalization(x, gc, bc)", (2,), True),
    "rms in parts": (
        "q = Mul(x, x) m = ReduceMean(q, axes) e = Add(m, tiny) s = Sqrt(e) d = Div(x, s) "
        "y = Mul(d, g)",
        *((2,), False),
    ),
    "layer in parts": (
        "m = ReduceMean(x, axes) c = Sub(x, m) q = Pow(c, two) v = ReduceMean(q, axes) "
        "e = Add(v, tiny) s = Sqrt(e) d = Div(c, s) h = Mul(d, g) y = Add(h, b)",
        *((2,), True),
    ),
    "layer, as TensorFlow": (
        "m = ReduceMean(x, axes) c = Sub(x, m) q = Mul(c, c) v = ReduceMean(q, axes) "
        "e = Add(v, tiny) s = Sqrt(e) i = Reciprocal(s) k = Mul(i, g) h = Mul(x, k) "
        "n = Mul(m, k) o = Sub(b, n) y = Add(h, o)",
        *((2,), True),
    ),
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_the_scale_of_a_normalization_is_constant(name: str) -> None:
    """Input times the slope of a normalization of which only the scale is held."""
    body, axes, centered = NORMALIZED[name]
    weights: dict[str, Any] = {
        "g": RNG.uniform(0.5, 2, X.shape[-len(axes) :]),
        "b": RNG.standard_normal(X.shape[-len(axes) :]),
        "gc": RNG.uniform(0.5, 2, 3),
        "bc": RNG.standard_normal(3),
        "tiny": 1e-5,
        "two": 2.0,
    }
    prefix = "axes = Constant<value_ints=[-1]>() " if "axes" in body else ""
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    got, _ = relevance(prefix + body, **{k: v for k, v in weights.items() if k in words})
    x = X.astype(np.float64)
    mean = x.mean(axes, keepdims=True) if centered else 0.0
    scale = 1 / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + 1e-5)
    slope = (
        np.ones_like(x) * scale * (weights["gc"][:, None] if name == "instance" else weights["g"])
    )
    if centered:
        slope = slope - slope.mean(axes, keepdims=True)
    np.testing.assert_allclose(got, x * slope, rtol=1e-3, atol=1e-4)


def test_batch_normalization_alone_is_linear_and_passes_in_presets() -> None:
    weights = {k: RNG.uniform(0.5, 2, 3) for k in ("s", "b", "m", "v")}
    got, y = relevance("y = BatchNormalization(x, s, b, m, v)", **weights)
    slope = weights["s"] / np.sqrt(weights["v"] + 1e-5)
    np.testing.assert_allclose(got, X * slope[:, None], rtol=1e-4)
    got, y = relevance("y = BatchNormalization(x, s, b, m, v)", rules="epsilon-plus", **weights)
    np.testing.assert_allclose(got, y)


# ---- products -----------------------------------------------------------------------------------


def two(body: str, rules: Any = None, **options: Any) -> tuple[Any, Any]:
    """Relevance of a and b [N, 3, 3] for all values of y."""
    text = f"""{HEAD}
    net (double[N, 3, 3] a, double[N, 3, 3] b) => (double[N, 3, 3] y) {{ {body} }}"""
    made = model(text)
    found = LRP(made, rules, of="y").attribute((A, B), (ALL, ALL), **options)
    return found, made((A, B))["y"]


A, B = RNG.standard_normal((2, 2, 3, 3))
GATED = {
    "sigmoid": "s = Sigmoid(a) t = Tanh(b) y = Mul(s, t)",
    "softmax": "s = Softmax(a) y = MatMul(s, b)",
    "softmax, shaped and masked": """t = Transpose<perm=[0, 2, 1]>(a) u = Softmax(t)
        n = Constant<value=double {0.5}>() s = Mul(u, n) y = MatMul(s, b)""",
    "divisor": "s = Exp(a) y = Div(b, s)",
    "einsum": 's = Softmax(a) y = Einsum<equation="nij,njk->nik">(s, b)',
}


@pytest.mark.parametrize("name", GATED)
def test_the_signal_takes_all(name: str) -> None:
    with pytest.warns(UserWarning, match=r"no relevance goes from 'y' to 'a': .* zero"):
        (a, b), y = two(GATED[name])
    assert not a.any()
    np.testing.assert_allclose(b.sum((1, 2)), y.sum((1, 2)), rtol=1e-6)


def test_factors_that_nothing_tells_apart_share_alike() -> None:
    for body in ("y = Mul(a, b)", "y = MatMul(a, b)", GATED["softmax"]):
        (a, b), y = two(body, [(("Mul", "MatMul"), lrp.Uniform())])
        np.testing.assert_allclose(b.sum((1, 2)), y.sum((1, 2)) / 2, rtol=1e-7)
        np.testing.assert_allclose(a.sum((1, 2)), y.sum((1, 2)) / 2, rtol=1e-7)
    np.testing.assert_allclose(two("y = MatMul(a, b)")[0][0].sum((1, 2)), (A @ B).sum((1, 2)) / 2)


def test_attnlrp_of_a_softmax() -> None:
    """Epsilon on a softmax is AttnLRP's rule: x_i (R_i - s_i sum_j R_j)."""
    got, _ = relevance("y = Softmax(x)", rules=[("Softmax", lrp.Epsilon(1e-9))])
    s = np.exp(X) / np.exp(X).sum(-1, keepdims=True)
    np.testing.assert_allclose(got, X * (s - s * s.sum(-1, keepdims=True)), atol=1e-6)


def test_a_layer_behind_gates_is_refused() -> None:
    text = f"""{HEAD}
    net (double[N, 3, 3] x) => (double[N, 3, 3] y) {{
        q = MatMul(x, w) k = MatMul(q, x) s = Softmax(k) y = MatMul(s, x) }}"""
    made = model(text, {"w": RNG.standard_normal((3, 3))})
    with pytest.raises(LayerError, match=r"'q'.*holds constant.*Uniform"):
        LayerLRP(made, "q").attribute(A, (0, 0))
    alike = [("MatMul", lrp.Uniform())]
    found, delta = LayerLRP(made, "q", alike).attribute(A, (0, 0), return_convergence_delta=True)
    # Of the two factors the weights get half, and of their scores q gets half.
    np.testing.assert_allclose(delta, 3 * found.sum((1, 2)), rtol=1e-5)


# ---- conservation -------------------------------------------------------------------------------


def test_what_is_missing_is_what_the_biases_got() -> None:
    """A convolutional net whose biases are inputs, explained with the image: the sum is exact."""
    text = f"""{HEAD}
    net (float[N, 2, 8, 8] x, float[4] b, float[4] c, float[3] d) => (float[N, 3] y) {{
        h = Conv<pads=[1, 1, 1, 1]>(x, w, b) r = Relu(h) k = Conv<pads=[1, 1, 1, 1]>(r, v, c)
        s = Add(k, r) t = Relu(s) p = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(t)
        a = GlobalAveragePool(p) f = Flatten(a) y = Gemm(f, u, d) }}"""
    weights = {"w": floats(4, 2, 3, 3), "v": floats(4, 4, 3, 3), "u": floats(4, 3)}
    shared_biases = {"x": 0, "b": None, "c": None, "d": None}
    made = model(text, weights, examples_axis=shared_biases)
    fed = {"x": floats(1, 2, 8, 8), "b": floats(4), "c": floats(4), "d": floats(3)}
    found = LRP(made).attribute(fed, target=1)
    total = sum(float(v.sum(dtype=np.float64)) for v in found.values())
    np.testing.assert_allclose(total, made(fed)["y"][0, 1], rtol=1e-5)
    frozen = {k: v for k, v in fed.items() if k != "x"}
    only, delta = LRP(made).attribute(
        {"x": fed["x"]}, 1, additional_forward_args=frozen, return_convergence_delta=True
    )
    np.testing.assert_allclose(only["x"], found["x"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(delta, sum(found[k].sum() for k in frozen), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("preset", [None, *(p for p in lrp.PRESETS if "box" not in p)])
def test_without_biases_every_preset_conserves(preset: str | None) -> None:
    text = f"""{HEAD}
    net (float[N, 2, 8, 8] x) => (float[N, 3] y) {{
        h = Conv<pads=[1, 1, 1, 1]>(x, w) r = Relu(h) k = Conv<pads=[1, 1, 1, 1]>(r, v)
        s = Add(k, r) t = Relu(s) p = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(t)
        a = GlobalAveragePool(p) f = Flatten(a) y = Gemm(f, u) }}"""
    weights = {"w": floats(4, 2, 3, 3), "v": floats(4, 4, 3, 3), "u": np.abs(floats(4, 3))}
    made, x = model(text, weights), floats(3, 2, 8, 8)
    found, delta = LRP(made, preset).attribute(x, [0, 1, 2], return_convergence_delta=True)
    y = made(x)["y"][np.arange(3), [0, 1, 2]]
    np.testing.assert_allclose(delta, y - found.reshape(3, -1).sum(1, dtype=np.float64), atol=1e-5)
    # Alpha-beta loses what has no negative (or no positive) contribution to go to.
    if "alpha" not in (preset or ""):
        assert (np.abs(delta) < 2e-5 * np.abs(found).reshape(3, -1).sum(1)).all()
    method = LRP(made, preset)
    np.testing.assert_allclose(method.compute_convergence_delta(found, y), delta, atol=1e-5)
    assert method.has_convergence_delta()


REAL = [*MODELS, QUANTIZED]


@pytest.mark.parametrize("preset", [None, "epsilon-plus-flat"])
@pytest.mark.parametrize("name", REAL)
def test_real_models(name: str, preset: str | None) -> None:
    """Whatever exported them: all relevance is finite, and with the delta it is the output."""
    made = ox.Model(shared(name))
    x = examples(name, 2, seed=3)
    score = made(x)[made.output.name or ""]
    target = score.argmax(1)
    method = LRP(made, preset)
    found, delta = method.attribute(x, target.tolist(), return_convergence_delta=True)
    assert found.shape == x.shape
    assert np.isfinite(found).all()
    want = score[np.arange(2), target]
    size = np.abs(found).reshape(2, -1).sum(1) + np.abs(want)
    total = found.reshape(2, -1).sum(1, dtype=np.float64) + delta
    assert (np.abs(total - want) <= 1e-5 * size).all()
    alone = method.attribute(x[1:], int(target[1]))
    np.testing.assert_allclose(found[1], alone[0], rtol=1e-2, atol=1e-4 * np.abs(alone).max())


# ---- layouts, inputs, dtypes, questions ---------------------------------------------------------


def test_channels_last_is_channels_first() -> None:
    inner = """h = Conv<pads=[1, 1, 1, 1]>(i, w, b) r = Relu(h) a = GlobalAveragePool(r)
        f = Flatten(a) y = Gemm(f, u)"""
    weights = {"w": floats(4, 2, 3, 3), "b": floats(4), "u": floats(4, 3)}
    first = model(f"{HEAD} net (float[N, 2, 5, 6] i) => (float[N, 3] y) {{ {inner} }}", weights)
    last = model(
        f"{HEAD} net (float[N, 5, 6, 2] x) => (float[N, 3] y) {{"
        f" i = Transpose<perm=[0, 3, 1, 2]>(x) {inner} }}",
        weights,
    )
    x = floats(3, 2, 5, 6)
    box = lrp.preset("epsilon-gamma-box", low=np.full((1, 2, 1, 1), -4.0), high=4)
    for rules in (None, "epsilon-alpha2-beta1-flat", box):
        want = LRP(first, rules).attribute(x, [2, 0, 1])
        got = LRP(last, rules).attribute(np.moveaxis(x, 1, -1), [2, 0, 1])
        np.testing.assert_allclose(np.moveaxis(got, -1, 1), want, rtol=1e-4, atol=1e-6)


EMBEDDED = f"""{HEAD}
net (int64[N, 5] ids, double[N, 2] row) => (double[N, 3] y) {{
    e = Gather(table, ids) h = MatMul(e, w) m = ReduceSum<keepdims=0>(h, axes)
    k = MatMul(row, v) s = Add(m, k) y = Tanh(s) }}"""


def test_token_ids_and_a_table_row() -> None:
    weights = {
        "table": RNG.standard_normal((9, 4)),
        "w": RNG.standard_normal((4, 3)),
        "v": RNG.standard_normal((2, 3)),
        "axes": np.array([1]),
    }
    made = model(EMBEDDED, weights)
    ids, row = RNG.integers(0, 9, (4, 5)), RNG.standard_normal((4, 2))
    target = np.array([0, 2, 1, 1])
    method = LayerLRP(made, "e")
    found, delta = method.attribute((ids, row), target, return_convergence_delta=True)
    e, rows = weights["table"][ids], np.arange(4)
    s = (e @ weights["w"]).sum(1) + row @ weights["v"]
    slope = (np.tanh(s) / s)[rows, target]
    want = e * weights["w"].T[target][:, None] * slope[:, None, None]
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-9)
    missing = np.tanh(s)[rows, target] - want.sum((1, 2))
    np.testing.assert_allclose(delta, missing, rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match="embedding layer 'e'"):
        LRP(made).attribute((ids, row), target)


def test_half_precision_keeps_small_stabilizers() -> None:
    w, v = RNG.uniform(-1, 1, (6, 8)), RNG.uniform(-1, 1, (8, 3))
    text = """{head} net ({kind}[N, 6] x) => ({kind}[N, 3] y) {{
        h = Gemm(x, w) r = Relu(h) y = Gemm(r, v) }}"""
    x = RNG.uniform(-1, 1, (4, 6)).astype(np.float16)
    found = []
    for kind, dtype in (("float16", np.float16), ("float", np.float32)):
        made = model(
            text.format(head=HEAD, kind=kind), {"w": w.astype(dtype), "v": v.astype(dtype)}
        )
        found.append(LRP(made, "epsilon-plus").attribute(x.astype(dtype), target=[0, 1, 2, 0]))
    assert found[0].dtype == np.float32
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2e-2 * np.abs(found[1]).max())


def test_every_output_of_a_neuron_question() -> None:
    """`of` a hidden layer, with a slice of its neurons."""
    w, b = RNG.standard_normal((6, 5)), RNG.standard_normal(5)
    made = mlp(w, b, RNG.standard_normal((5, 3)), RNG.standard_normal(3))
    x = RNG.standard_normal((2, 6))
    got = LRP(made, of="h").attribute(x, slice(1, 3))
    np.testing.assert_allclose(got, x * w[:, 1:3].sum(1), rtol=1e-5)


def test_one_number_for_the_batch() -> None:
    made = model(f"{HEAD} net (double[N, 3] x) => (double y) {{ y = ReduceSum<keepdims=0>(x) }}")
    x = RNG.standard_normal((4, 3))
    found, delta = LRP(made).attribute(x, return_convergence_delta=True)
    np.testing.assert_allclose(found, x, rtol=1e-6)
    np.testing.assert_allclose(delta, [0], atol=1e-6)


def test_a_fixed_batch_runs_in_groups() -> None:
    k = floats(2, 3)
    made = model(f"{HEAD} net (float[2, 3] x) => (float[2, 3] y) {{ y = Add(x, k) }}", {"k": k})
    assert made.fixed_batch == 2
    x = floats(5, 3)
    found, delta = LRP(made).attribute(x, [0, 1, 2, 0, 1], return_convergence_delta=True)
    rows, target = np.arange(5), [0, 1, 2, 0, 1]
    np.testing.assert_allclose(found[rows, target], x[rows, target], rtol=1e-5)
    np.testing.assert_allclose(delta, k[rows % 2, target], rtol=1e-4, atol=1e-6)


def test_layers_of_one_branch_and_the_input_of_a_layer() -> None:
    """A bias behind a matrix product belongs to it, unless the product itself is asked for."""
    w, b = RNG.standard_normal((3, 4)), RNG.standard_normal(4)
    text = f"{HEAD} net (double[N, 3] x) => (double[N, 4] y) {{ h = MatMul(x, w) y = Add(h, b) }}"
    made, x = model(text, {"w": w, "b": b}), RNG.standard_normal((2, 3))
    h = x @ w
    got = LayerLRP(made, "h").attribute(x, target=1)
    np.testing.assert_allclose(got[:, 1], h[:, 1], rtol=1e-6)
    np.testing.assert_allclose(LayerLRP(made, "x").attribute(x, target=1), x * w[:, 1], rtol=1e-6)


def test_verbose_says_what_is_applied(capsys: pytest.CaptureFixture[str]) -> None:
    method = LRP(simple(), [("linear2", lrp.Gamma())])
    for _ in range(2):  # compiled or not
        method.attribute(SIMPLE, verbose=True)
        said = capsys.readouterr().err
        assert "Applied Gamma(gamma=0.25" in said and "on layer linear2" in said
        assert "Applied Epsilon(epsilon=1e-09" in said and "Applied Pass() on layer" in said
    method.attribute(SIMPLE)
    assert not capsys.readouterr().err


# ---- selectors ----------------------------------------------------------------------------------


def chain() -> ox.Model:
    """Three layers: two that see x first, and one behind both."""
    weights = {
        k: np.random.default_rng(5).uniform(-0.5, 1, (3, 3)) * (i + 1) for i, k in enumerate("abc")
    }
    text = f"""{HEAD}
    net (double[N, 3] x) => (double[N, 3] y) {{
        h = MatMul(x, a) k = MatMul(x, b) s = Add(h, k) r = Relu(s) y = Gemm(r, c) }}"""
    made = proto(text, **weights)
    for node, scope in zip(made.graph.node, ("left", "right", "join", "act", "head"), strict=True):
        node.name = f"/{scope}/{node.op_type}"
    return ox.Model(made)


SPECIAL = lrp.Flat()


@pytest.mark.parametrize(
    ("selector", "picked"),
    [
        ("first", "first"),
        ("MatMul", "first"),
        (["left", "/right/MatMul"], "first"),
        (("h", "right"), "first"),
        (lambda node: node.op_type == "MatMul", "first"),
        ("head", "head"),
        ("Gemm", "head"),
        ("y", "head"),
    ],
)
def test_selectors(selector: Any, picked: str) -> None:
    made, x = chain(), np.array([[1.0, -0.5, 0.5]])
    named = {"first": ["h", "k"], "head": ["/head/Gemm"]}[picked]
    want = LRP(made, [(named, SPECIAL)]).attribute(x, 1)
    assert not np.allclose(want, LRP(made).attribute(x, 1))
    np.testing.assert_array_equal(LRP(made, [(selector, SPECIAL)]).attribute(x, 1), want)
    # The first that matches wins, and one that fits no node of the kind is passed over.
    rules = [(selector, SPECIAL), (("MatMul", "Gemm"), lrp.Epsilon(1e-9))]
    np.testing.assert_allclose(LRP(made, rules).attribute(x, 1), want, rtol=1e-6)
    rules.reverse()
    assert not np.allclose(LRP(made, rules).attribute(x, 1), want)
    rules = [(lambda node: True, lrp.ZPlus()), ("Relu", lrp.Pass())]
    assert np.isfinite(LRP(made, rules).attribute(x, 1)).all()


def test_first_is_what_is_reached_first_from_the_explained_layer() -> None:
    made, x = chain(), np.array([[1.0, -0.5, 0.5]])
    got = LayerLRP(made, "r", [("first", SPECIAL)]).attribute(x, 1)
    want = LayerLRP(made, "r", [("head", SPECIAL)]).attribute(x, 1)
    np.testing.assert_array_equal(got, want)


def test_a_folded_batch_norm_has_the_rule_of_its_convolution() -> None:
    text = f"""{HEAD}
    net (float[N, 2, 5] x) => (float[N, 3, 3] y) {{
        [conv] c = Conv(x, w) [norm] y = BatchNormalization(c, s, b, m, v) }}"""
    weights = {k: RNG.uniform(0.5, 2, 3).astype(np.float32) for k in ("s", "b", "m", "v")}
    weights["w"] = floats(3, 2, 3)
    made, x = model(text, weights), floats(2, 2, 5)
    scale = weights["s"] / np.sqrt(weights["v"] + 1e-5)
    folded = {
        "w": weights["w"] * scale[:, None, None],
        "b": weights["b"] - weights["m"] * scale,
    }
    text = f"{HEAD} net (float[N, 2, 5] x) => (float[N, 3, 3] y) {{ y = Conv(x, w, b) }}"
    one = model(text, folded)
    for rules in ("epsilon-alpha2-beta1", [("conv", lrp.Gamma()), ("norm", lrp.Pass())]):
        got = LRP(made, rules).attribute(x, (1, 2))
        rules = rules if isinstance(rules, str) else [("Conv", lrp.Gamma())]
        want = LRP(one, rules).attribute(x, (1, 2))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "error", "says"),
    [
        ("epsilon-box", InputError, "no preset 'epsilon-box'.*epsilon-gamma-box"),
        ("epsilon-gamma-box", InputError, "needs the lowest and highest.*low=.*high="),
        (lrp.Epsilon(), InputError, "give None, a preset"),
        ([lrp.Epsilon()], InputError, "pairs"),
        ([], InputError, r"rules=\[\]: give None, a preset .*at least one"),
        ([("first", lrp.Epsilon)], InputError, "make one"),
        ([("first", "epsilon")], InputError, "not a rule"),
        ([(3, lrp.Epsilon())], InputError, "selector 3"),
        ([([], lrp.Epsilon())], InputError, "selector"),
        ([("lefd", lrp.Epsilon())], LayerError, "no layer 'lefd'.*did you mean 'left'"),
        ([("Conv", lrp.ZPlus())], LayerError, "none of the rules.*Add, Gemm, MatMul, Relu"),
        ([(lambda node: False, lrp.ZPlus())], LayerError, "none of the rules"),
    ],
)
def test_refused_rules(rules: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"(?s){says}"):
        LRP(chain(), rules)


def test_a_preset_that_names_no_layer_of_the_model() -> None:
    made = model(f"{HEAD} net (double[N, 3] x) => (double[N, 3] y) {{ y = Tanh(x) }}")
    for preset in lrp.PRESETS:
        rules = lrp.preset(preset, low=0, high=1)
        with pytest.raises(LayerError, match=r"none of the rules.*Tanh"):
            LRP(made, rules)
    np.testing.assert_allclose(LRP(made).attribute(SIMPLE, 0), [[np.tanh(1.0), 0, 0]])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lrp.AlphaBeta(2, 2), "alpha - beta = 1"),
        (lambda: lrp.AlphaBeta(0.5, -0.5), "beta=-0.5 is not a finite number >= 0"),
        (lambda: lrp.Gamma(-1), "gamma=-1"),
        (lambda: lrp.Epsilon(float("nan")), "epsilon=nan"),
        (lambda: lrp.ZPlus("small"), "stabilizer='small'"),
        (lambda: lrp.ZBox(1, 0), "low must not be above high"),
        (lambda: lrp.ZBox(np.zeros(2), np.ones(3)), "must broadcast against each other"),
        (lambda: lrp.ZBox("low", 1), "low is not a number"),
    ],
)
def test_refused_options(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


def test_rules_that_do_not_fit_a_named_layer() -> None:
    made, x = chain(), SIMPLE
    with pytest.raises(InputError, match=r"ZPlus.*layer 'act'.*\(Relu\).*linear layers"):
        LRP(made, [("act", lrp.ZPlus())]).attribute(x, 0)
    with pytest.raises(InputError, match=r"Uniform.*layer 'left'"):
        LRP(made, [("left", lrp.Uniform())]).attribute(x, 0)
    with pytest.raises(InputError, match=r"ZBox: low has shape \(2,\).*enters MatMul '/"):
        LRP(made, [("first", lrp.ZBox(np.zeros(2), 1))]).attribute(x, 0)
    text = f"{HEAD} net (double[N, 3] x) => (double[N, 2] y) {{ [fc] y = MatMul(x, w) }}"
    narrow = model(text, {"w": np.ones((3, 2))})
    with pytest.raises(InputError, match=r"Pass needs an output of the input's shape.*'fc'"):
        LRP(narrow, [("fc", lrp.Pass())]).attribute(x, 0)


@pytest.mark.parametrize(
    ("selector", "rule", "says"),
    [
        ("Relu", lrp.ZPlus(), r"ZPlus.*for 'Relu', but.*\(Relu\).*linear layers.*Conv, .*Pass is"),
        (("Relu", "Add"), lrp.ZPlus(), r"for 'Relu', 'Add', but.*\(Add, Relu\)"),
        (("MatMul", "act"), lrp.Flat(), r"layer 'act', but.*sums and averages"),
        ("MatMul", lrp.Uniform(), "products of explained values"),
        ("first", lrp.Uniform(), r"'first', but.*\(MatMul\)"),
        (lambda node: node.op_type == "Add", lrp.Pass(), "predicate, but.*one input is explained"),
        ("Gemm", lrp.Signal(), "Mul, Div, Pow"),
    ],
)
def test_a_rule_that_fits_nothing_it_was_chosen_for(selector: Any, rule: Any, says: str) -> None:
    with pytest.raises(InputError, match=f"(?s){says}"):
        LRP(chain(), [(selector, rule)]).attribute(SIMPLE, 0)


def test_a_rule_that_fits_some_of_what_it_was_chosen_for() -> None:
    """Others are passed over; a preset may fit nothing."""
    text = f"""{HEAD}
    net (double[N, 3] x) => (double[N, 3] y) {{
        h = MatMul(x, a) r = Relu(h) k = Transpose(r) s = MatMul(r, k) y = MatMul(s, r) }}"""
    made = proto(text, a=np.random.default_rng(5).uniform(-0.5, 1, (3, 3)))
    for node in made.graph.node:
        node.name = f"/block/{node.op_type}.{node.output[0]}"
    net, x = ox.Model(made), np.array([[1.0, -0.5, 0.5]])
    want = LRP(net, [("h", SPECIAL)]).attribute(x, 1)
    assert not np.allclose(want, LRP(net).attribute(x, 1))
    for selector in ("block", "MatMul", ("MatMul", "Relu", "Conv"), lambda node: True):
        np.testing.assert_array_equal(LRP(net, [(selector, SPECIAL)]).attribute(x, 1), want)
    layer = LayerLRP(net, "r", lrp.preset("epsilon-plus"))  # no dense layer above, only products
    np.testing.assert_allclose(layer.attribute(x, 1), LayerLRP(net, "r").attribute(x, 1))
    with pytest.raises(InputError, match="fits none"):
        LayerLRP(net, "r", [("MatMul", lrp.Epsilon())]).attribute(x, 1)


def test_a_single_channel_that_is_broadcast_up_has_no_bias() -> None:
    w, c = RNG.standard_normal((3, 1)), RNG.standard_normal(4)
    text = f"{HEAD} net (double[N, 3] x) => (double[N, 4] y) {{ h = MatMul(x, w) y = Add(h, c) }}"
    x = RNG.standard_normal((2, 3))
    got, gap = LRP(model(text, {"w": w, "c": c})).attribute(x, 2, return_convergence_delta=True)
    np.testing.assert_allclose(got, x * w[:, 0], rtol=1e-6)
    np.testing.assert_allclose(gap, c[2], rtol=1e-5)


def test_completion_shows_the_public_names() -> None:
    assert dir(ox.lrp) == sorted(ox.lrp.__all__)
    assert all(hasattr(ox.lrp, name) for name in dir(ox.lrp))


def test_an_operator_without_a_rule_is_refused() -> None:
    text = f"{HEAD} net (float[N, 3] x) => (float[N, 1] y) {{ y = ReduceProd<keepdims=1>(x, a) }}"
    made, x = model(text, {"a": np.array([1])}), SIMPLE.astype(np.float32)
    says = r"operator ReduceProd.*no lrp rule and no.*rules=\[\(its operator, ox.lrp.Epsilon\(\)"
    with pytest.raises(NoRuleError, match=says):
        LRP(made).attribute(x)
    forced = LRP(made, [("ReduceProd", lrp.Epsilon())]).attribute(x)
    np.testing.assert_allclose(forced, [[6, 6, 6]], rtol=1e-5)


def test_an_operator_without_a_rule_goes_by_its_function_body() -> None:
    text = f"""{HEAD}
    net (float[N, 3] x) => (float[N, 1] y) {{ y = ReduceLogSumExp<keepdims=1>(x, a) }}"""
    got = LRP(model(text, {"a": np.array([1])})).attribute(SIMPLE.astype(np.float32))
    share = np.exp(SIMPLE) / np.exp(SIMPLE).sum()
    np.testing.assert_allclose(got, share * np.log(np.exp(SIMPLE).sum()), rtol=1e-5)


def test_a_zero_denominator() -> None:
    """LRP-0 hands on nothing from an output that is zero; other stabilizers keep it finite."""
    for epsilon in (0.0, 1e-9):
        got, _ = relevance(
            "h = MatMul(x, w) y = Sigmoid(h)",
            rules=[("MatMul", lrp.Epsilon(epsilon))],
            w=np.zeros((4, 2)),
        )
        np.testing.assert_array_equal(got, np.zeros_like(got))


def test_explain_tells_what_biases_absorbed() -> None:
    w, b = RNG.standard_normal((6, 5)), RNG.standard_normal(5)
    made = mlp(w, b, RNG.standard_normal((5, 3)), RNG.standard_normal(3))
    x = RNG.standard_normal((4, 6))
    found, checks = LRP(made, "epsilon").explain(inputs=x, target=1)
    want, delta = LRP(made, "epsilon").attribute(x, 1, return_convergence_delta=True)
    np.testing.assert_array_equal(found, want)
    np.testing.assert_allclose(checks["convergence_delta"], delta)
    y = made(x)["y"][:, 1]
    np.testing.assert_allclose(checks["absorbed"], np.abs(delta / y))


def test_same_rules_share_a_program() -> None:
    made = simple()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LRP(made, [("MatMul", lrp.ZBox(np.zeros(3), 1))]).attribute(SIMPLE)
        count = len(made._programs)
        LRP(made, [("MatMul", lrp.ZBox(np.zeros(3), 1))]).attribute(SIMPLE)
        assert len(made._programs) == count
        LRP(made, [("MatMul", lrp.ZBox(np.ones(3), 1))]).attribute(SIMPLE)
        assert len(made._programs) == count + 1


@pytest.mark.parametrize("name", ["a", "h1"])
def test_a_layer_is_named_by_its_product_or_by_the_sum_with_its_bias(name: str) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 5)), "b": rng.normal(size=5), "v": rng.normal(size=(5, 3))}
    text = """g (float[N,4] x) => (float[N,3] y) {
        a = MatMul(x, w)  h1 = Add(a, b)  h = Relu(h1)  y = MatMul(h, v) }"""
    net = model(HEAD + text, {k: v.astype(np.float32) for k, v in weights.items()})
    x = rng.normal(size=(2, 4)).astype(np.float32)
    got = ox.LRP(net, [(name, ox.lrp.ZPlus())]).attribute(x, target=1)
    both = ox.LRP(net, [(("a", "h1"), ox.lrp.ZPlus())]).attribute(x, target=1)
    np.testing.assert_array_equal(got, both)
    assert not np.allclose(got, ox.LRP(net).attribute(x, target=1))
