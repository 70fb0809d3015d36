"""DeepLIFT: facts of other implementations, closed forms, a dense formulation, exact sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import pytest

import onnxplain as ox
from tests.helpers import HEAD, model, shared
from tests.test_real_models import MODELS, examples

RULES = ("rescale", "reveal-cancel")
RNG = np.random.default_rng(0)


def f32(values: object) -> np.ndarray:
    return np.asarray(values, np.float32)


# ---- what Captum's tests expect --------------------------------------------------------------

# 2 relu(x1) + 2 relu(x2 - 1.5)
RELUS = f"""{HEAD}
    g (float[N, 1] a, float[N, 1] b) => (float[N, 1] y) <float two = {{2}}, float half = {{1.5}}> {{
        c = Sub(b, half)
        d = Relu(a)
        e = Relu(c)
        f = Mul(d, two)
        h = Mul(e, two)
        y = Add(f, h)
    }}"""
# l3(relu([l1(a), l2(b)]))
LINEAR = f"""{HEAD}
    g (float[N, 3] a, float[N, 3] b, float[N, 1] scale) => (float[N, 1] y)
    <float[3, 1] l1 = {{3, 1, 0}}, float[3, 1] l2 = {{2, 3, 0}}, float[2, 1] l3 = {{1, 1}}> {{
        p = MatMul(a, l1)
        q = MatMul(b, l2)
        r = Mul(q, scale)
        s = Concat<axis = 1>(p, r)
        t = Relu(s)
        y = MatMul(t, l3)
    }}"""
POOLED = f"""{HEAD}
    g (float[N, 4] x) => (float[N, 1] y) <int64[1] one = {{1}}, float[1, 1] w = {{1}}> {{
        u = Unsqueeze(x, one)
        p = MaxPool<kernel_shape = [4], strides = [4]>(u)
        q = Squeeze(p, one)
        y = MatMul(q, w)
    }}"""
A, B = f32([[-10, 1, -5]]), f32([[3, 3, 1]])
ONE = f32([[1]])


def test_facts_of_relus() -> None:
    net, x = model(RELUS), (f32([[1]]), f32([[2]]))
    for rule in RULES:
        got, delta = ox.DeepLift(net, rule=rule).attribute(x, (0, 0), return_convergence_delta=True)
        assert [g.item() for g in got] == [2, 1]
        assert delta == 0
    got = ox.DeepLift(net, multiply_by_inputs=False).attribute(x)
    assert [g.item() for g in got] == [2, 0.5]
    many = tuple(np.repeat(v, 4, 0) for v in x)
    starts = tuple(np.zeros((4, 1), np.float32) for _ in x)
    got, delta = ox.DeepLiftShap(net, multiply_by_inputs=False).attribute(
        many, starts, return_convergence_delta=True
    )
    np.testing.assert_array_equal(np.hstack(got), np.repeat([[2, 0.5]], 4, 0))
    assert delta.shape == (16,)


def test_facts_of_linear_layers() -> None:
    net = model(LINEAR)
    fed = {"additional_forward_args": ONE}
    layer = ox.LayerDeepLift(net, "t")
    got, delta = layer.attribute(
        (A, B), target=0, return_convergence_delta=True, attribute_to_layer_input=True, **fed
    )
    np.testing.assert_allclose(got, [[0, 15]])
    np.testing.assert_allclose(delta, 0, atol=1e-5)
    got = layer.attribute(
        (A, B), target=0, attribute_to_layer_input=True, additional_forward_args=3 * ONE
    )
    np.testing.assert_allclose(got, [[0, 45]])
    got = ox.LayerDeepLift(net, "t", multiply_by_inputs=False).attribute(
        (A, B), target=0, attribute_to_layer_input=True, **fed
    )
    np.testing.assert_allclose(got, [[0, 1]])
    got = ox.LayerDeepLift(net, "y").attribute((A, B), target=0, **fed)
    np.testing.assert_allclose(got, [[15]])
    for factor, wanted in ((True, [[6, 9, 0]]), (False, [[2, 3, 0]])):
        neuron = ox.NeuronDeepLift(net, "y", multiply_by_inputs=factor)
        a, b = neuron.attribute((A, B), 0, **fed)
        np.testing.assert_allclose(a, [[0, 0, 0]])
        np.testing.assert_allclose(b, wanted)
        starts = tuple(np.zeros((2, 3), np.float32) for _ in range(2))
        shap = ox.NeuronDeepLiftShap(net, "y", multiply_by_inputs=factor)
        np.testing.assert_allclose(shap.attribute((A, B), 0, starts, **fed)[1], wanted)
    a, b = ox.NeuronDeepLift(net, "t").attribute((A, B), 0, **fed)
    assert not a.any()
    assert not b.any()


def test_facts_of_max_pooling() -> None:
    x, start = np.ones((2, 4), np.float32), f32([[1, 2, 3, 9], [4, 8, 6, 7]])
    net = model(POOLED)
    got, delta = ox.DeepLift(net).attribute(x, start, return_convergence_delta=True)
    np.testing.assert_allclose(got, [[0, 0, 0, -8], [0, -7, 0, 0]])
    np.testing.assert_allclose(delta, 0, atol=1e-6)
    np.testing.assert_allclose(ox.LayerDeepLift(net, "p").attribute(x, start).ravel(), [-8, -7])
    pool = ox.NeuronDeepLift(net, "p").attribute(x, (0, 0), start)
    np.testing.assert_allclose(pool, ox.NeuronDeepLift(net, "q").attribute(x, 0, start))


# ---- what the authors' tests expect ----------------------------------------------------------


def test_facts_of_the_authors_relu() -> None:
    w = f32([[1, -1], [2, -2], [3, -3], [4, -4]])
    net = model(
        f"{HEAD} g (float[N, 4] x) => (float[N, 2] y) {{ a = Gemm(x, w, b) y = Relu(a) }}",
        {"w": w, "b": f32([-1, 1])},
    )
    x = f32([[1, 1, 1, 1], [2, 2, 2, 2]])
    lift = ox.DeepLift(net, multiply_by_inputs=False)
    for target, scales in ((0, [9 / 10, 19 / 20]), (1, [1 / 10, 1 / 20])):
        want = np.outer(scales, w[:, target])
        np.testing.assert_allclose(lift.attribute(x, target=target), want, rtol=1e-6)


def test_facts_of_the_authors_average_pool() -> None:
    net = model(
        f"""{HEAD} g (float[N, 1, 4, 4] x) => (float[N, 1, 1, 1] y) <int64[2] axes = {{2, 3}}> {{
            a = AveragePool<kernel_shape = [2, 2]>(x)
            y = ReduceSum(a, axes)
        }}"""
    )
    x = RNG.random((2, 1, 4, 4)).astype(np.float32)
    row = np.asarray([1, 2, 2, 1])
    got = ox.DeepLift(net, multiply_by_inputs=False).attribute(x, 0.5, target=(0, 0, 0))
    np.testing.assert_allclose(got[:, 0], [np.outer(row, row) / 4] * 2, rtol=1e-6)


# ---- every rule keeps the sum, and becomes the derivative when the reference comes near -------

ONE_OPERAND = {
    **{
        op: f"y = {op}(x)"
        for op in (
            "Abs Exp Sin Cos Atan Sinh Cosh Tanh Asinh Erf Neg Identity Relu LeakyRelu Elu Selu "
            "Celu ThresholdedRelu Shrink Sigmoid HardSigmoid Softplus Softsign Gelu HardSwish Mish"
        ).split()
    },
    **{
        op: f"p = Sigmoid(x) y = {op}(p)"
        for op in "Log Sqrt Reciprocal Tan Asin Acos Atanh".split()
    },
    "Acosh": "e = Exp(x) p = Add(e, one) y = Acosh(p)",
    "square": "y = Mul(x, x)",
    "cube": "s = Mul(x, x) y = Mul(s, x)",
    "Pow": "y = Pow(x, two)",
    "Pow-wide": "s = ReduceMean<keepdims = 1>(x, last) p = Abs(s) y = Pow(p, powers)",
    "Clip": "y = Clip(x, zero, one)",
    "Max-constant": "y = Max(x, zero)",
    "Min-constant": "y = Min(one, x)",
    "PRelu": "y = PRelu(x, powers)",
    "constant-over": "p = Sigmoid(x) y = Div(one, p)",
    "over-constant": "y = Div(x, two)",
    "Softmax": "y = Softmax(x)",
    "LogSoftmax": "y = LogSoftmax(x)",
    "Softmax-axis": "y = Softmax<axis = 1>(x)",
    "ReduceMax": "m = ReduceMax<keepdims = 0>(x, last) y = Unsqueeze(m, last)",
    "ReduceMin": "y = ReduceMin(x, last)",
    "ReduceSumSquare": "y = ReduceSumSquare(x, last)",
    "ReduceL1": "y = ReduceL1(x, last)",
    "ReduceL2": "y = ReduceL2(x, last)",
    "ReduceLogSumExp": "y = ReduceLogSumExp(x, last)",
    "LayerNormalization": "y = LayerNormalization(x, scale)",
    "LayerNormalization-1": "y = LayerNormalization<axis = 1>(x, scale, powers)",
    "InstanceNormalization": "y = InstanceNormalization(x, channels, channels)",
    "GroupNormalization": "y = GroupNormalization<num_groups = 2>(x, channels, channels)",
    "MeanVarianceNormalization": "y = MeanVarianceNormalization<axes = [1, 2]>(x)",
    "LpNormalization": "s = ReduceL2(x, last) y = Div(x, s)",
    "MaxPool": "y = MaxPool<kernel_shape = [3], strides = [2], pads = [1, 1]>(x)",
    "GlobalMaxPool": "y = GlobalMaxPool(x)",
    "AveragePool": "y = AveragePool<kernel_shape = [3]>(x)",
    "Conv": "y = Conv<pads = [1, 1]>(x, kernel)",
    "CumSum": "y = CumSum(x, axis)",
}
TWO_OPERANDS = {
    "Mul": "y = Mul(x, z)",
    "Mul-wide": "s = ReduceSum(z, last) y = Mul(s, x)",
    "Div": "p = Sigmoid(z) y = Div(x, p)",
    "Div-wide": "s = ReduceSum(x, last) p = Exp(z) y = Div(s, p)",
    "MatMul": "t = Transpose<perm = [0, 2, 1]>(z) y = MatMul(x, t)",
    "attention": """t = Transpose<perm = [0, 2, 1]>(z) s = MatMul(x, t) a = Softmax(s)
        y = MatMul(a, x)""",
    "Einsum": 'y = Einsum<equation = "nij,nkj->nik">(x, z)',
    "Max": "y = Max(x, z)",
    "Min-wide": "s = ReduceMax(z, last) y = Min(x, s)",
    "Max-three": "q = Mul(x, z) y = Max(x, z, q)",
    "Pow-both": "p = Sigmoid(x) y = Pow(p, z)",
    "PRelu-both": "y = PRelu(x, z)",
    "Where": "y = Where(chosen, x, z)",
    "sum": "s = Sub(x, z) t = Sum(s, x, z) y = Mean(t, s)",
    "gate": "a = Sigmoid(x) b = Tanh(z) y = Mul(a, b)",
}
WEIGHTS = {
    "w": RNG.standard_normal((4, 6)).astype(np.float32),
    "scale": f32([0.5, 1.5, -1, 2, 1, 0.3]),
    "powers": f32([1, 2, 3, 0.5, 1.5, 2.5]),
    "channels": f32([1, 0.5, 2, -1]),
    "kernel": RNG.standard_normal((4, 4, 3)).astype(np.float32),
    "zero": f32(0),
    "one": f32(1),
    "two": f32(2),
    "last": np.asarray([-1]),
    "axis": np.asarray(2),
    "chosen": RNG.random((4, 6)) < 0.5,
}


def operator(body: str, two: bool) -> ox.Model:
    """One number of an operator's result, weighted."""
    inputs = "float[N, 4, 6] x" + (", float[N, 4, 6] z" if two else "")
    weighted = {k: v for k, v in WEIGHTS.items() if k in body} | {"w": WEIGHTS["w"]}
    if any(name in body for name in ("Reduce", "Global", "MatMul", "Pool", "Einsum")):
        del weighted["w"]
        tail = "total = ReduceSum<keepdims = 0>(y, axes)"
    else:
        tail = "v = Mul(y, w) total = ReduceSum<keepdims = 0>(v, axes)"
    text = f"{HEAD} g ({inputs}) => (float[N] total) {{ {body} {tail} }}"
    return model(text, weighted | {"axes": np.asarray([1, 2])})


def draws(two: bool, seed: int = 1) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((3, 4, 6)).astype(np.float32) for _ in range(1 + two))


BODIES = [
    *((name, "rescale") for name in (*ONE_OPERAND, *TWO_OPERANDS)),
    # One operator alone has one part, and the rescale rule's multiplier.
    *((name, "reveal-cancel") for name in ONE_OPERAND if ONE_OPERAND[name].count("=") > 1),
    *((name, "reveal-cancel") for name in ("Gelu", "PRelu", "Clip", *TWO_OPERANDS)),
]


@pytest.mark.parametrize(("name", "rule"), BODIES)
def test_sum_and_limit(name: str, rule: str) -> None:
    two = name in TWO_OPERANDS
    net = operator((TWO_OPERANDS if two else ONE_OPERAND)[name], two)
    x, start = draws(two), draws(two, seed=2)
    start[0][0, 0] = x[0][0, 0]  # where nothing differs
    lift = ox.DeepLift(net, rule=rule)
    got, delta = lift.attribute(x, start, return_convergence_delta=True)
    size = max(np.abs(g).sum() for g in got)
    np.testing.assert_allclose(delta, 0, atol=3e-6 * size)
    assert size > 0.1
    near = tuple(v + f32(1e-3) * s for v, s in zip(x, start, strict=True))
    slopes = ox.DeepLift(net, False, rule=rule).attribute(x, near)
    gradients = ox.Saliency(net).attribute(x, abs=False)
    for slope, gradient in zip(slopes, gradients, strict=True):
        error = np.abs(slope - gradient)  # a kink may lie between
        assert np.quantile(error, 0.9) < 0.02 * np.abs(gradient).max()


def test_equal_inputs_give_the_gradient() -> None:
    for body in (ONE_OPERAND["Gelu"], ONE_OPERAND["MaxPool"], ONE_OPERAND["Softmax"]):
        net, (x,) = operator(body, False), draws(False)
        for rule in RULES:
            got = ox.DeepLift(net, False, rule=rule).attribute(x, x)
            want = ox.Saliency(net).attribute(x, abs=False)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", "Softplus Sigmoid Tanh Erf Gelu Elu LeakyRelu Relu Mish".split())
def test_differences_that_are_rounding_noise(act: str) -> None:
    """A hidden layer that ignores a common shift of the inputs differs by rounding alone."""
    rng = np.random.default_rng(3)
    w, v = rng.standard_normal((8, 16)), rng.standard_normal((16, 2))
    weights = {"w": f32(w - w.mean(0)), "v": f32(v)}
    body = f"h = MatMul(x, w) a = {act}(h) y = MatMul(a, v)"
    net = model(f"{HEAD} g (float[N, 8] x) => (float[N, 2] y) {{ {body} }}", weights)
    x = f32(rng.standard_normal((4, 8)))
    got = ox.DeepLift(net, False).attribute(x, x + f32(1), target=1)
    want = ox.Saliency(net).attribute(x, target=1, abs=False)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_softmax_is_shift_invariant_and_does_not_overflow() -> None:
    net = model(f"{HEAD} g (float[N, 4] x) => (float[N, 4] y) {{ y = Softmax(x) }}")
    x, start = f32([[1, 2, 3, 4], [300, 0, -300, 7]]), f32([[0, 1, 0, 2], [-300, 0, 300, 6]])
    lift = ox.DeepLift(net, multiply_by_inputs=False)
    got = lift.attribute(x, start, target=[3, 0])
    np.testing.assert_allclose(got.sum(1), 0, atol=1e-6)
    np.testing.assert_allclose(got[:1], lift.attribute(x[:1] + 5, start[:1], target=3), rtol=1e-4)
    sums = (got * (x - start)).sum(1)
    want = net(x)["y"] - net(start)["y"]
    np.testing.assert_allclose(sums, [want[0, 3], want[1, 0]], rtol=1e-5)
    net = model(
        f"{HEAD} g (float[N, 4] x) => (float[N, 4] y) {{ m = Add(x, mask) y = Softmax(m) }}",
        {"mask": f32([0, 0, -np.inf, 0])},
    )
    got = ox.DeepLift(net, multiply_by_inputs=False).attribute(x[:1], start[:1], target=0)
    assert np.isfinite(got).all()
    assert got[0, 2] == 0


def test_centered_softmax_is_the_rescaled_slope_less_its_mean() -> None:
    net = model(f"{HEAD} g (float[N, 3] x) => (float[N, 3] y) {{ y = Softmax(x) }}")
    x, start = f32([[1, 2, 0.5]]), f32([[0, 0.5, 1]])
    slope = np.zeros(3)
    slope[1] = ((net(x)["y"] - net(start)["y"]) / (x - start))[0, 1]
    got = ox.DeepLift(net, False, softmax="centered").attribute(x, start, target=1)
    np.testing.assert_allclose(got[0], slope - slope.mean(), rtol=1e-5)


# ---- RevealCancel, by a second formulation ---------------------------------------------------

Function = Callable[[np.ndarray], np.ndarray]
FUNCTIONS: dict[str, tuple[Function, Function]] = {  # with their derivatives
    "Relu": (lambda v: np.maximum(v, 0), lambda v: (v > 0) * 1.0),
    "Tanh": (np.tanh, lambda v: 1 / np.cosh(v) ** 2),
    "Sigmoid": (lambda v: 1 / (1 + np.exp(-v)), lambda v: 1 / (2 + 2 * np.cosh(v))),
}


def reveal_cancel(
    layers: Sequence[tuple[np.ndarray, np.ndarray, str | None]], x: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """Contributions [inputs, outputs] for one example, by the chain rule forwards.

    `m[i, k]` is the multiplier of input i for neuron k: sections 3.3, 3.5.1 and 3.5.3, neuron by
    neuron. The paper's parts: `dz+` and `dz-` with multipliers of their own.
    """
    a, a0, m = x, start, np.eye(len(x))
    for w, b, function in layers:
        z, z0, d = a @ w + b, a0 @ w + b, a - a0
        up, down = np.zeros((len(x), len(z))), np.zeros((len(x), len(z)))
        plus, minus = np.zeros(len(z)), np.zeros(len(z))
        for k in range(len(z)):
            for j in range(len(a)):
                term = w[j, k] * d[j]
                plus[k] += max(term, 0)
                minus[k] += min(term, 0)
                share = 1.0 if term > 0 else 0.5 if d[j] == 0 else 0.0
                up[:, k] += share * w[j, k] * m[:, j]
                down[:, k] += (1 - share) * w[j, k] * m[:, j]
        if function is None:
            a, a0, m = z, z0, up + down
            continue
        f, slope = FUNCTIONS[function]
        y_plus = (f(z0 + plus) - f(z0) + f(z0 + minus + plus) - f(z0 + minus)) / 2
        y_minus = (f(z0 + minus) - f(z0) + f(z0 + plus + minus) - f(z0 + plus)) / 2
        limit, no = (slope(z0) + slope(z)) / 2, np.ones(len(z))
        m = up * np.where(plus == 0, limit, y_plus / np.where(plus == 0, no, plus))
        m = m + down * np.where(minus == 0, limit, y_minus / np.where(minus == 0, no, minus))
        a, a0 = f(z), f(z0)
    return m * (x - start)[:, None]


def dense(layers: Sequence[tuple[np.ndarray, np.ndarray, str | None]], form: str) -> ox.Model:
    """The same layers as ONNX, the product and the bias written in one of several ways."""
    weights, text, last = {}, "", "x"
    for k, (w, b, function) in enumerate(layers):
        weights |= {f"w{k}": f32(w), f"b{k}": f32(b)}
        if form == "Gemm":
            text += f"z{k} = Gemm({last}, w{k}, b{k}) "
        elif form == "MatMul":
            text += f"p{k} = MatMul({last}, w{k}) z{k} = Add(b{k}, p{k}) "
        elif form == "minus":
            text += f"p{k} = MatMul({last}, w{k}) n{k} = Neg(p{k}) z{k} = Sub(b{k}, n{k}) "
        else:  # convolutions of one position between transpositions
            weights[f"w{k}"] = f32(w.T[:, :, None])
            text += f"""u{k} = Unsqueeze({last}, one) t{k} = Transpose<perm = [0, 2, 1]>(u{k})
                c{k} = Conv(t{k}, w{k}, b{k}) v{k} = Transpose<perm = [0, 2, 1]>(c{k})
                z{k} = Squeeze(v{k}, one) """
            weights["one"] = np.asarray([1])
        last = f"z{k}"
        if function is not None:
            text += f"a{k} = {function}(z{k}) "
            last = f"a{k}"
    size, out = layers[0][0].shape[0], layers[-1][0].shape[1]
    text += f"y = Identity({last})"
    return model(f"{HEAD} g (float[N, {size}] x) => (float[N, {out}] y) {{ {text} }}", weights)


@pytest.mark.parametrize("form", ["Gemm", "MatMul", "minus", "Conv"])
def test_reveal_cancel_is_the_dense_formulation(form: str) -> None:
    rng = np.random.default_rng(5)
    for functions in (["Relu", "Relu", None], ["Tanh", "Relu", "Sigmoid"], ["Relu", None, "Tanh"]):
        sizes = [5, 7, 6, 3]
        layers = [
            (rng.standard_normal((i, o)), 0.5 * rng.standard_normal(o), f)
            for i, o, f in zip(sizes, sizes[1:], functions, strict=False)
        ]
        x, start = rng.standard_normal((2, 4, 5))
        x[0, 1] = start[0, 1]
        net = dense(layers, form)
        lift = ox.DeepLift(net, rule="reveal-cancel")
        for target in range(3):
            got = lift.attribute(f32(x), f32(start), target=target)
            want = [reveal_cancel(layers, *pair)[:, target] for pair in zip(x, start, strict=True)]
            np.testing.assert_allclose(got, want, atol=2e-5)
    rescaled = ox.DeepLift(net).attribute(f32(x), f32(start), target=0)
    assert np.abs(rescaled - lift.attribute(f32(x), f32(start), target=0)).max() > 1e-2


FORMS = {
    "Split": "a, b = Split<axis = 1, num_outputs = 2>(h) c = Relu(a) d = Relu(b) "
    "r = Concat<axis = 1>(c, d)",
    "Div": "a = Div(h, minus) b = Neg(a) c = Mul(b, two) r = Relu(c)",
    "computed divisor": "s = ReduceMax<keepdims = 1>(z) t = Div(s, minus) a = Div(h, t) "
    "b = Mul(a, t) r = Relu(b)",
    "Pad": "a = Pad(h, pads, one) b = Relu(a) r = Slice(b, zero, six, axis)",
    "Tile": "a = Tile(h, twice) b = Relu(a) r = Slice(b, zero, six, axis)",
    "Where": "c = Greater(h, zeros) r = Where(c, h, zeros)",
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_the_same_function_written_otherwise(form: str, rule: str) -> None:
    weights = {
        **{"w": WEIGHTS["w"], "v": WEIGHTS["w"].T, "two": f32(2), "minus": f32(-2)},
        **{"pads": np.asarray([0, 0, 0, 3]), "one": f32(1), "zero": np.asarray([0])},
        **{"six": np.asarray([6]), "axis": np.asarray([1]), "twice": np.asarray([1, 2])},
        "zeros": f32(0),
    }

    def explained(middle: str) -> np.ndarray:
        body = f"h = MatMul(x, w) {middle} q = MatMul(r, v) y = Relu(q)"
        words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
        text = f"{HEAD} g (float[N, 4] x, float[N, 1] z) => (float[N, 4] y) {{ {body} }}"
        lift = ox.DeepLift(model(text, {k: v for k, v in weights.items() if k in words}), rule=rule)
        more = {"additional_forward_args": np.full((3, 1), -3, np.float32)}
        return lift.attribute(X[:3], STARTS, target=1, **more)

    scaled = explained("k = Mul(h, two) l = Div(k, two) r = Relu(h)")
    np.testing.assert_allclose(explained(FORMS[form]), scaled, rtol=1e-4, atol=1e-5)


def test_reveal_cancel_splits_an_and() -> None:
    """min(a, b) = a - relu(a - b), section 3.5.3's example: both inputs count alike."""
    net = model(
        f"""{HEAD} g (float[N, 1] a, float[N, 1] b) => (float[N, 1] y) {{
            d = Sub(a, b)
            r = Relu(d)
            y = Sub(a, r)
        }}"""
    )
    a, b = f32([[3], [1], [2], [7]]), f32([[5], [4], [2], [1]])
    least = np.minimum(a, b)
    got = ox.DeepLift(net, rule="reveal-cancel").attribute((a, b))
    np.testing.assert_allclose(np.hstack(got), np.hstack([least, least]) / 2, atol=1e-6)
    alone = ox.DeepLift(net).attribute((a, b))  # all to the smaller one
    np.testing.assert_allclose(np.hstack(alone), np.hstack([a * (a <= b), b * (b < a)]), atol=1e-6)


PARTIAL = {op: f"y = {op}(h)" for op in "Log Sqrt Reciprocal Tan Asin Acos Atanh".split()} | {
    "root": "y = Pow(h, half)",
    "inverse": "y = Pow(h, minus)",
}


@pytest.mark.parametrize("name", PARTIAL)
def test_reveal_cancel_is_for_functions_defined_everywhere(name: str) -> None:
    """The reference plus one part may lie outside of the domain: others are rescaled."""
    weights = {"w": 0.1 * np.abs(WEIGHTS["w"]), "three": f32(3), "half": f32(0.5), "minus": f32(-1)}

    def explained(body: str, rule: str) -> np.ndarray:
        given = {k: v for k, v in weights.items() if k in body}
        text = f"{HEAD} g (float[N, 4] x) => (float[N, 6] y) {{ {body} }}"
        x, start = np.abs(X[:3]) + f32(0.2), np.abs(STARTS) + f32(0.2)
        lift = ox.DeepLift(model(text, given), rule=rule)
        got, delta = lift.attribute(x, start, target=2, return_convergence_delta=True)
        np.testing.assert_allclose(delta, 0, atol=1e-5 * np.abs(got).sum())
        return got

    linear, function = "h = MatMul(x, w) ", PARTIAL[name]
    got, want = (explained(linear + function, rule) for rule in ("reveal-cancel", "rescale"))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    curved = "g = MatMul(x, w) h = Softplus(g) "  # whose own parts reach below zero
    assert np.isfinite(explained(curved + function, "reveal-cancel")).all()
    for total in ("y = Pow(h, three)", "y = Pow(three, h)"):
        got, want = (explained(linear + total, rule) for rule in ("reveal-cancel", "rescale"))
        assert np.abs(got - want).max() > 1e-4 * np.abs(want).max()


def test_reveal_cancel_of_masked_scores() -> None:
    """A constant of minus infinity has no difference."""
    net = model(
        f"""{HEAD} g (float[N, 4] x) => (float[N, 6] y) {{
            h = MatMul(x, w) m = Add(h, mask) y = Exp(m) }}""",
        {"w": WEIGHTS["w"], "mask": f32([0, -np.inf, 0, 0, 0, -np.inf])},
    )
    for target, some in ((0, True), (1, False)):
        got = ox.DeepLift(net, rule="reveal-cancel").attribute(X[:3], STARTS, target=target)
        assert np.isfinite(got).all()
        assert got.any() == some


def test_reveal_cancel_of_a_layer_merges_both_parts() -> None:
    net = dense([(np.asarray([[1.0], [-1.0]]), np.zeros(1), "Relu")], "MatMul")
    x = f32([[3, 5]])
    lift = ox.LayerDeepLift(net, "p0", rule="reveal-cancel")
    np.testing.assert_allclose(lift.attribute(x, target=0), [[0]], atol=1e-6)
    one_by_one = ox.DeepLift(net, rule="reveal-cancel").attribute(x, target=0)
    np.testing.assert_allclose(one_by_one, [[1.5, -1.5]], atol=1e-6)


# ---- baselines, distributions, custom attributions -------------------------------------------

NET = dense(
    [
        (RNG.standard_normal((4, 6)), RNG.standard_normal(6), "Relu"),
        (RNG.standard_normal((6, 3)), RNG.standard_normal(3), "Sigmoid"),
    ],
    "Gemm",
)
X = RNG.standard_normal((5, 4)).astype(np.float32)
STARTS = RNG.standard_normal((3, 4)).astype(np.float32)
TARGETS = [0, 2, 1, 1, 0]


@pytest.mark.parametrize("bytes_at_once", [1, 200, 1 << 26])
@pytest.mark.parametrize("rule", RULES)
def test_distribution_is_the_mean_of_its_baselines(rule: str, bytes_at_once: int) -> None:
    lift = ox.DeepLift(NET, rule=rule)
    each = [lift.attribute(X, b, TARGETS, return_convergence_delta=True) for b in STARTS]
    with mock.patch(f"{ox.DeepLiftShap.__module__}._PAIRS_BYTES", bytes_at_once):
        got, delta = ox.DeepLiftShap(NET, rule=rule).attribute(
            X, STARTS, TARGETS, return_convergence_delta=True
        )
        hidden, layers = ox.LayerDeepLiftShap(NET, "a0", rule=rule).attribute(
            X, STARTS, TARGETS, return_convergence_delta=True
        )
    np.testing.assert_allclose(got, np.mean([a for a, _ in each], axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(delta, np.stack([d for _, d in each], 1).ravel(), atol=1e-6)
    assert hidden.shape == (5, 6)
    assert layers.shape == (15,)
    np.testing.assert_allclose(layers, 0, atol=1e-6)


@pytest.mark.parametrize("bytes_at_once", [1, 1 << 26])
@pytest.mark.parametrize("windows_first", [True, False])
def test_layers_without_one_row_for_each_example(windows_first: bool, bytes_at_once: int) -> None:
    """[windows, N, ...], and [N * windows, ...]: baselines and groups go by example."""
    turn = "t = Transpose<perm = [1, 0, 2]>(r)" if windows_first else "t = Identity(r)"
    back = turn.replace("t =", "b =").replace("(r)", "(a)")
    net = model(
        f"""{HEAD} g (float[N, 12] x) => (float[N, 2] y) {{
            r = Reshape(x, apart) {turn} h = MatMul(t, w) a = Tanh(h) {back}
            f = Reshape(b, wide) y = MatMul(f, v) }}""",
        {
            "apart": np.asarray([-1, 3, 4] if windows_first else [-1, 4]),
            "wide": np.asarray([-1, 15]),
            "w": RNG.standard_normal((4, 5)).astype(np.float32),
            "v": RNG.standard_normal((15, 2)).astype(np.float32),
        },
    )
    x, starts = RNG.standard_normal((2, 4, 12)).astype(np.float32)
    each = [ox.LayerDeepLift(net, "h").attribute(x, s[None], 1) for s in starts]
    with mock.patch(f"{ox.DeepLiftShap.__module__}._PAIRS_BYTES", bytes_at_once):
        got = ox.LayerDeepLiftShap(net, "h").attribute(x, starts, 1)
    assert got.shape == ((3, 4, 5) if windows_first else (12, 5))
    np.testing.assert_allclose(got, np.mean(each, axis=0), rtol=1e-4, atol=1e-6)


def test_checks() -> None:
    for method, start in ((ox.DeepLift, STARTS[:1]), (ox.DeepLiftShap, STARTS)):
        lift = method(NET)
        got, checks = lift.explain(inputs=X, baselines=start, target=TARGETS)
        np.testing.assert_allclose(got, lift.attribute(X, start, TARGETS), rtol=1e-5)
        assert checks["convergence_delta"].shape == (5,)
        assert checks["relative_convergence_delta"].max() < 1e-4
    lift = ox.DeepLift(NET)
    got, delta = lift.attribute(X, STARTS[:1], TARGETS, return_convergence_delta=True)
    again = lift.compute_convergence_delta(got + 1, STARTS[:1], X, TARGETS)
    np.testing.assert_allclose(again, delta + 4, atol=1e-5)
    assert lift.has_convergence_delta()
    assert ox.DeepLift(NET, False).explain(inputs=X, target=0)[1] == {}
    layer = ox.LayerDeepLift(NET, ["a0", "z1"])
    assert layer.explain(inputs=X, target=0)[1] == {}
    assert ox.LayerDeepLift(NET, "a0").explain(inputs=X, target=0)[1]


def test_custom_attribution_function() -> None:
    multipliers = ox.DeepLift(NET, False).attribute(X, STARTS[:1], 0)
    lift = ox.DeepLift(NET)
    for function, want in (
        (lambda m: (2 * m[0],), 2 * multipliers),
        (lambda m, x: (m[0] * x[0],), multipliers * X),
        (lambda m, x, b: (m[0] * (x[0] - b[0]),), lift.attribute(X, STARTS[:1], 0)),
    ):
        got = lift.attribute(X, STARTS[:1], 0, custom_attribution_func=function)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)

    def differences(m: tuple, x: tuple, b: tuple) -> tuple:
        assert x[0].shape == b[0].shape == m[0].shape == (15, 4)
        return (x[0] - b[0],)

    got = ox.DeepLiftShap(NET).attribute(X, STARTS, 0, custom_attribution_func=differences)
    np.testing.assert_allclose(got, X - STARTS.mean(0), rtol=1e-4, atol=1e-6)
    seen = ox.LayerActivation(NET, "a0")

    def of_layer(m: tuple, x: tuple, b: tuple) -> tuple:
        np.testing.assert_allclose(x[0], seen.attribute(X), rtol=1e-6)
        np.testing.assert_allclose(b[0][0], seen.attribute(STARTS[:1])[0], rtol=1e-6)
        return m

    layer = ox.LayerDeepLift(NET, "a0")
    got = layer.attribute(X, STARTS[:1], 0, custom_attribution_func=of_layer)
    np.testing.assert_allclose(
        got, ox.LayerDeepLift(NET, "a0", False).attribute(X, STARTS[:1], 0), rtol=1e-6
    )
    got = lift.attribute(X, target=0, custom_attribution_func=lambda m, x, b, scale=2: m)
    np.testing.assert_allclose(got, ox.DeepLift(NET, False).attribute(X, target=0), rtol=1e-6)
    got = lift.attribute(X, target=0, custom_attribution_func=lambda *sides: (sides[2][0][:, :2],))
    np.testing.assert_array_equal(got, np.zeros((5, 2)))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (3, "custom_attribution_func is 3: give None or a function"),
        (lambda a, b, c, d: a, r"custom_attribution_func takes \(a, b, c, d\).*one to three"),
        (lambda: 0, r"takes \(\)"),
        (lambda m: m[0], "tuple of 1 array.*not ndarray"),
        (lambda m: (m[0], m[0]), "tuple of 1 array.*not tuple of 2"),
        (lambda m: (m[0].sum(),), r"float32 \[\] for 'x'.*one row for each row.*\[5, 4\]"),
        (lambda m: (m[0][1:],), r"float32 \[4, 4\] for 'x'"),
        (lambda m: (np.full(5, "a"),), r"<U1 \[5\].*wanted are numbers"),
    ],
)
def test_refused_custom_attribution_functions(function: object, says: str) -> None:
    with pytest.raises(ox.InputError, match=f"(?s){says}"):
        ox.DeepLift(NET).attribute(X, target=0, custom_attribution_func=function)


def test_an_operator_without_a_rule_says_what_would_work() -> None:
    has = operator("y = ReduceProd(x, last)", False)
    says = r"operator ReduceProd .* has no deeplift rule and no function body.*IntegratedGradients"
    with pytest.raises(ox.NoRuleError, match=f"(?s){says}"):
        ox.DeepLift(has).attribute(draws(False))
    assert ox.Saliency(has).attribute(draws(False)[0]).any()
    none = operator("k = Constant<value_ints = [6]>() y, i = TopK(x, k)", False)
    with pytest.raises(ox.NoRuleError, match=r"no derivative rule and no.*perturbation method"):
        ox.DeepLift(none).attribute(draws(False))


def test_axes_beyond_the_rank() -> None:
    """onnxruntime runs it; by the standard it means nothing."""
    net = model(
        f"{HEAD} g (float[N, 4] x) => (float[N, 4] y) {{ y = MeanVarianceNormalization(x) }}"
    )
    for rule in RULES:
        with pytest.raises(ox.UnsupportedModelError, match=r"MeanVarianceNorm.*axes beyond"):
            ox.DeepLift(net, rule=rule).attribute(X, STARTS[:1], 0)


def test_refusals() -> None:
    with pytest.raises(ox.InputError, match="at least two"):
        ox.DeepLiftShap(NET).attribute(X, STARTS[:1], 0)
    with pytest.raises(ox.InputError, match="reveal-cancel"):
        ox.DeepLift(NET, rule="reveal")
    with pytest.raises(ox.InputError, match="eps"):
        ox.DeepLift(NET, eps=-1.0)
    for op_type, body, two in (
        ("LRN", "l = LRN<size = 3>(x) y = Relu(l)", False),
        ("ReduceProd", "y = ReduceProd(x, last)", False),
        ("Einsum", 'q = Mul(x, z) y = Einsum<equation = "nij,nij,nij->nij">(x, z, q)', True),
    ):
        lift = ox.DeepLift(operator(body, two))
        with pytest.raises(ox.NoRuleError, match=op_type):
            lift.attribute(draws(two))
    with pytest.raises(ox.LayerError, match="does not depend"):
        ox.LayerDeepLift(model(LINEAR), "r").attribute(
            A, target=0, additional_forward_args=(B, ONE)
        )
    whole = model(f"{HEAD} g (float[N, 2] x) => (float y) {{ y = ReduceMean<keepdims = 0>(x) }}")
    x = f32([[1, 2], [3, 4]])
    got, delta = ox.DeepLift(whole).attribute(x, return_convergence_delta=True)
    np.testing.assert_allclose(got, x / 4)
    np.testing.assert_allclose(delta, [0], atol=1e-6)
    with pytest.raises(ox.UnsupportedModelError, match="whole batch"):
        ox.DeepLiftShap(whole).attribute(x, x)


# ---- models of all kinds ---------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_embeddings(rule: str) -> None:
    net = model(
        f"""{HEAD} g (int64[N, 3] ids) => (float[N, 2] y) {{
            e = Gather(table, ids)
            f = Flatten(e)
            h = Gemm(f, w)
            r = Relu(h)
            y = Gemm(r, v)
        }}""",
        {
            "table": RNG.standard_normal((7, 4)).astype(np.float32),
            "w": RNG.standard_normal((12, 8)).astype(np.float32),
            "v": RNG.standard_normal((8, 2)).astype(np.float32),
        },
    )
    ids = np.asarray([[1, 2, 3], [6, 0, 5]])
    lift = ox.LayerDeepLift(net, "e", rule=rule)
    got, delta = lift.attribute(ids, target=1, return_convergence_delta=True)
    assert got.shape == (2, 3, 4)
    assert not got[1, 1].any()  # the baseline's token
    np.testing.assert_allclose(delta, 0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "gates", "rule"),
    [("LSTM", 4, "rescale"), ("GRU", 3, "reveal-cancel"), ("RNN", 1, "rescale")],
)
def test_recurrent(kind: str, gates: int, rule: str) -> None:
    """Gates are products."""
    net = model(
        f"""{HEAD} g (float[N, 5, 3] x) => (float[N, 4] y) {{
            t = Transpose<perm = [1, 0, 2]>(x)
            all, last = {kind}<hidden_size = 4>(t, w, r)
            y = Squeeze(last, zero)
        }}""",
        {
            "w": RNG.standard_normal((1, 4 * gates, 3)).astype(np.float32),
            "r": RNG.standard_normal((1, 4 * gates, 4)).astype(np.float32),
            "zero": np.asarray([0]),
        },
    )
    x, start = RNG.standard_normal((2, 3, 5, 3)).astype(np.float32)
    got, delta = ox.DeepLift(net, rule=rule).attribute(x, start, 1, return_convergence_delta=True)
    np.testing.assert_allclose(delta, 0, atol=3e-6 * np.abs(got).sum())


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_precisions(dtype: str) -> None:
    net = model(
        f"""{HEAD} g ({dtype}[N, 4] x) => ({dtype}[N, 3] y) {{
            h = MatMul(x, w) r = Relu(h) n = LayerNormalization(r, s) y = Softmax(n)
        }}""",
        {
            "w": RNG.standard_normal((4, 3)).astype(np.dtype(dtype)),
            "s": np.ones(3, np.dtype(dtype)),
        },
    )
    x = X.astype(np.dtype(dtype))
    got, delta = ox.DeepLift(net).attribute(x, 0.5, target=1, return_convergence_delta=True)
    assert np.isfinite(got).all()
    assert got.dtype == (np.float32 if dtype == "float16" else np.float64)
    np.testing.assert_allclose(delta, 0, atol=0.01 if dtype == "float16" else 1e-14)


def test_fixed_batch() -> None:
    def net(batch: str) -> ox.Model:
        return model(
            f"""{HEAD} g (float[{batch}, 4] x) => (float[{batch}, 3] y) {{
                r = Reshape(x, flat) s = Reshape(r, back) h = MatMul(s, w) y = Tanh(h)
            }}""",
            {
                "w": WEIGHTS["w"][:, :3],
                "flat": np.asarray([8 if batch == "2" else -1]),
                "back": np.asarray([2 if batch == "2" else -1, 4]),
            },
        )

    fixed, free = net("2"), net("N")
    want = ox.DeepLift(free).attribute(X, STARTS[0], TARGETS)
    np.testing.assert_allclose(ox.DeepLift(fixed).attribute(X, STARTS[0], TARGETS), want, rtol=1e-5)
    want = ox.DeepLiftShap(free).attribute(X, STARTS, TARGETS)
    got = ox.DeepLiftShap(fixed).attribute(X, STARTS, TARGETS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (name, rule)
        for rule in RULES
        for name in MODELS
        if rule == "rescale" or "squeeze" not in name
    ],
)
def test_real_models(name: str, rule: str) -> None:
    net = ox.Model(shared(name))
    x, start = examples(name, 2, seed=1), 0.5 * examples(name, 2, seed=2)
    target = [0, 1]
    got, delta = ox.DeepLift(net, rule=rule).attribute(
        x, start, target, return_convergence_delta=True
    )
    output = net.output.name
    values = net(x)[output], net(start)[output]
    change = [abs(float(values[0][i, t] - values[1][i, t])) for i, t in enumerate(target)]
    # Probabilities are rounded to a few units of 6e-8, whatever their difference.
    assert (np.abs(delta) < 1e-4 * np.asarray(change) + 1e-7).all(), (delta, change)
    assert np.abs(got).max() > 0
