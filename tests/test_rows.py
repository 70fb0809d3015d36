"""Several rows an example: layers and bypasses of every layout."""

from __future__ import annotations

import numpy as np
import pytest

import onnxplain as ox
from onnxplain.methods.path import quadrature
from tests.helpers import HEAD, model

rng = np.random.default_rng(0)


# The layer h has windows of two tokens: [N * 2, 2, 3].
WINDOWS = (
    HEAD
    + """windows (float[N,4,3] x) => (float[N,2] y) {
    split = Constant<value_ints=[-1, 2, 3]>()
    whole = Constant<value_ints=[-1, 4, 3]>()
    h = Reshape(x, split)
    q = Tanh(h)
    r = Mul(q, h)
    back = Reshape(r, whole)
    gate = Sigmoid(x)
    g = Mul(back, gate)
    flat = Flatten(g)
    y = MatMul(flat, w)
}"""
)
# Time first behind the input: [T, N, 3].
TIME_FIRST = (
    HEAD
    + """time (float[N,4,3] x) => (float[N,2] y) {
    h = Transpose<perm = [1, 0, 2]>(x)
    q = Tanh(h)
    r = Mul(q, h)
    back = Transpose<perm = [1, 0, 2]>(r)
    flat = Flatten(back)
    y = MatMul(flat, w)
}"""
)
# Row numbers: the last token of each example is looked up by (row, position).
LAST_TOKEN = (
    HEAD
    + """last (float[N,4,3] x, int64[N] last) => (float[N,2] y) {
    h = Tanh(x)
    q = Mul(h, h)
    shape = Shape(last)
    zero = Constant<value_int=0>()
    one = Constant<value_int=1>()
    n = Squeeze(shape)
    rows = Range(zero, n, one)
    axis = Constant<value_ints=[1]>()
    r = Unsqueeze(rows, axis)
    l = Unsqueeze(last, axis)
    index = Concat<axis = 1>(r, l)
    picked = GatherND(q, index)
    y = MatMul(picked, v)
}"""
)
W = rng.standard_normal((12, 2)).astype(np.float32)
V = rng.standard_normal((3, 2)).astype(np.float32)
X = rng.standard_normal((5, 4, 3)).astype(np.float32)


def by_steps(h, gradient, n_steps: int = 8) -> np.ndarray:
    """The integral of a gradient along t * h, and times h."""
    positions, weights = quadrature("gausslegendre", n_steps)
    return h * sum(w * gradient(p * h) for p, w in zip(positions, weights, strict=True))


def slope(h: np.ndarray) -> np.ndarray:
    """The derivative of tanh(h) h."""
    return np.tanh(h) + h * (1 - np.tanh(h) ** 2)


@pytest.mark.parametrize("n", [1, 3])
def test_windows(n: int) -> None:
    m = model(WINDOWS, {"w": W})
    x = X[:n].astype(np.float64)
    gate = 1 / (1 + np.exp(-x))
    want = by_steps(x, lambda h: slope(h) * gate * W[:, 1].reshape(1, 4, 3))
    got = ox.LayerIntegratedGradients(m, "h").attribute(X[:n], target=1, n_steps=8)
    np.testing.assert_allclose(got, want.reshape(-1, 2, 3), rtol=1e-4, atol=1e-5)
    inner = ox.LayerActivation(m, "h").attribute(X[:n])
    assert inner.shape == (2 * n, 2, 3)


@pytest.mark.parametrize("n", [1, 3])
def test_time_first(n: int) -> None:
    m = model(TIME_FIRST, {"w": W}, memory_limit=1)
    want = by_steps(X[:n].astype(np.float64), lambda h: slope(h) * W[:, 1].reshape(1, 4, 3))
    got, delta = ox.LayerIntegratedGradients(m, "h").attribute(
        X[:n], target=1, n_steps=8, return_convergence_delta=True
    )
    np.testing.assert_allclose(got, want.transpose(1, 0, 2), rtol=1e-4, atol=1e-5)
    difference = m(X[:n])["y"][:, 1]  # the output at the baseline is 0
    np.testing.assert_allclose(delta, got.sum((0, 2)) - difference, atol=1e-4)
    inner = ox.LayerActivation(m, "h").attribute(X[:n])
    np.testing.assert_allclose(inner, X[:n].transpose(1, 0, 2))
    with pytest.raises(ox.UnsupportedModelError, match="axis 1"):
        ox.NeuronGradient(m, "h").attribute(X[:n], (0, 0))


def test_row_numbers_are_counted_anew() -> None:
    m = model(LAST_TOKEN, {"v": V})
    last = np.array([0, 3, 1, 2, 3])
    got = ox.LayerIntegratedGradients(m, "h").attribute(
        X, target=1, additional_forward_args=last, n_steps=8
    )
    h = np.tanh(X)
    want = np.zeros_like(h)
    want[np.arange(5), last] = (h**2 * V[:, 1])[np.arange(5), last]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_one_number_for_the_batch_runs_a_step_at_a_time() -> None:
    mean = (
        HEAD
        + """mean (float[N,4] x) => (float y) {
        q = Mul(x, x)
        y = ReduceMean<keepdims=0>(q)
    }"""
    )
    x = rng.standard_normal((6, 4)).astype(np.float32)
    for limit in (None, 1):
        m = model(mean, memory_limit=limit)
        assert m(x)["y"] == pytest.approx((x * x).mean(), rel=1e-5)
        np.testing.assert_allclose(ox.Saliency(m).attribute(x, abs=False), x / 12, rtol=1e-5)
        for size in (None, 6, 12):
            got = ox.IntegratedGradients(m).attribute(x, internal_batch_size=size)
            np.testing.assert_allclose(got, x * x / 24, rtol=1e-4, atol=1e-7)


def test_a_shared_input_gets_the_sum_over_the_batch() -> None:
    shared = HEAD + "s (float[N,4] x, float[1,4] b) => (float[N,4] y) { y = Mul(x, b) }"
    x, b = rng.standard_normal((6, 4)).astype(np.float32), np.ones((1, 4), np.float32)
    for limit in (None, 1):
        m = model(shared, examples_axis={"b": None}, memory_limit=limit)
        got = ox.Saliency(m).attribute((x, b), target=2, abs=False)
        np.testing.assert_allclose(got[1], x.sum(0, keepdims=True) * np.eye(4)[2], rtol=1e-4)
        with pytest.raises(ox.InputError, match="shared by all examples"):
            ox.IntegratedGradients(m).attribute((x, b), target=2)


def test_layers_one_behind_the_other() -> None:
    """Each layer is integrated with the later ones held on their own paths, as Captum does."""
    text = (
        HEAD
        + """deep (float[N,3] x) => (float[N,3] y) {
        a = Mul(x, x)
        b = Sin(a)
        c = Add(a, b)
        y = Mul(c, b)
    }"""
    )
    m = model(text)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    both = ox.LayerIntegratedGradients(m, ["a", "b"]).attribute(x, target=0, n_steps=30)
    a, b = x * x, np.sin(x * x)
    # y = (a + b) b with a = t A and b = t B: dy/da = b = tB, dy/db = a + 2b = t (A + 2B)
    want_a = np.where(np.arange(3) == 0, a * b / 2, 0)
    want_b = np.where(np.arange(3) == 0, b * (a + 2 * b) / 2, 0)
    np.testing.assert_allclose(both[0], want_a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both[1], want_b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ox.LayerError, match="twice"):
        ox.LayerIntegratedGradients(m, ["a", "a"]).attribute(x, target=0)
    itself = ox.LayerIntegratedGradients(m, "y").attribute(x, target=1)
    np.testing.assert_allclose(itself, m(x)["y"] * np.eye(3)[1], rtol=1e-4, atol=1e-5)


def test_one_baseline_row_in_front_of_a_layer() -> None:
    """The layer joins an explained input, whose baseline is one row, and one that is only fed."""
    text = (
        HEAD
        + """cat (float[N,3] x, float[N,3] z) => (float[N,6] y) {
        h = Concat<axis = 1>(x, z)
        y = Mul(h, h)
    }"""
    )
    m = model(text)
    x, z = rng.standard_normal((2, 4, 3)).astype(np.float32)
    got = ox.LayerIntegratedGradients(m, "h").attribute(x, target=1, additional_forward_args=z)
    want = np.zeros((4, 6), np.float32)
    want[:, 1] = x[:, 1] ** 2
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_layer_between_convolution_and_batch_norm() -> None:
    text = (
        HEAD
        + """bn (float[N,2,4,4] x) => (float[N,3,2,2] y) {
        c = Conv(x, k)
        b = BatchNormalization(c, s, o, mu, var)
        y = Relu(b)
    }"""
    )
    weights = {
        "k": rng.standard_normal((3, 2, 3, 3)),
        "s": rng.random(3) + 0.5,
        "o": rng.standard_normal(3),
        "mu": rng.standard_normal(3),
        "var": rng.random(3) + 0.5,
    }
    m = model(text, {k: v.astype(np.float32) for k, v in weights.items()})
    x = rng.standard_normal((2, 2, 4, 4)).astype(np.float32)
    for layer in ("c", "b"):
        got = ox.LayerGradientXActivation(m, layer).attribute(x, target=(1, 0, 1))
        value = ox.LayerActivation(m, layer).attribute(x)
        factor = weights["s"][1] / np.sqrt(weights["var"][1] + 1e-5) if layer == "c" else 1
        on = m(x)["y"][:, 1, 0, 1] > 0
        np.testing.assert_allclose(
            got[:, 1, 0, 1], value[:, 1, 0, 1] * factor * on, rtol=1e-4, atol=1e-5
        )
        assert np.count_nonzero(got) == np.count_nonzero(on)


def test_names_of_ours_in_the_model() -> None:
    text = (
        HEAD
        + """taken (float[N,3] cotangent, float[N,3] positions) => (float[N,3] weights) {
        weights = Mul(cotangent, positions)
    }"""
    )
    m = model(text)
    a, b = rng.standard_normal((2, 4, 3)).astype(np.float32)
    got = ox.IntegratedGradients(m).attribute((a, b), target=0)
    np.testing.assert_allclose(got[0], a * b / 2 * np.eye(3)[0], rtol=1e-4, atol=1e-6)
    backward = ox.differentiate(m, of="weights", wrt="cotangent")
    again = ox.Saliency(backward).attribute(
        {"positions": b}, 1, False, {"cotangent": a, "cotangent_": np.ones_like(a)}
    )
    np.testing.assert_allclose(again["positions"], np.tile(np.eye(3)[1], (4, 1)), atol=1e-6)


def test_nan_is_not_silent() -> None:
    m = model(HEAD + "log (float[N,3] x) => (float[N,3] y) { y = Log(x) }")
    with pytest.warns(UserWarning, match="NaN or infinite"):
        ox.InputXGradient(m).attribute(np.zeros((1, 3), np.float32), target=0)


def test_second_derivative_with_time_first() -> None:
    text = HEAD + "t (float[T,N] x) => (float[T,N] y) { q = Mul(x, x)  y = Mul(q, x) }"
    m = model(text, examples_axis=1)
    x = rng.standard_normal((3, 5)).astype(np.float32)
    first = ox.differentiate(m, of="y", wrt="x")
    second = ox.differentiate(first, of="x.grad", wrt="x")
    ones = np.ones_like(x)
    names = [i.name for i in second.inputs]
    got = second(dict(zip(names, (x, ones, ones), strict=True)))
    np.testing.assert_allclose(list(got.values())[1], 6 * x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [ox.NeuronGradient, ox.NeuronConductance, ox.NeuronDeepLift])
@pytest.mark.parametrize("count", [1, 5])
def test_neurons_of_several_rows_an_example_are_refused(cls: type, count: int) -> None:
    """One selector would sum the neurons of all windows."""
    text = """g (float[N,4,3] x) => (float[N] y) {
        flat = Constant<value_ints=[-1,3]>()  back = Constant<value_ints=[-1,4,3]>()
        r = Reshape(x, flat)  h = Tanh(r)  u = Reshape(h, back)  t = Transpose<perm=[1,0,2]>(u)
        s = Sin(t)  axes = Constant<value_ints=[0,2]>()  y = ReduceSum<keepdims=0>(s, axes) }"""
    net = model(HEAD + text)
    x = np.random.default_rng(0).standard_normal((count, 4, 3)).astype(np.float32)
    for layer, selector, reason in (("h", 1, "4 rows for one example"), ("s", (0, 1), "axis 1")):
        options = {"target": None} if cls is ox.NeuronConductance else {}
        with pytest.raises(ox.UnsupportedModelError, match=reason):
            cls(net, layer).attribute(x, selector, **options)
