"""Methods against closed forms, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

import onnxplain as ox
from onnxplain.methods.path import QUADRATURES, quadrature
from tests.helpers import HEAD, model

rng = np.random.default_rng(0)
W = rng.standard_normal((4, 3)).astype(np.float32)
X = rng.standard_normal((5, 4)).astype(np.float32)

LINEAR = HEAD + "linear (float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }"
# y = (x * x) w: gradient 2 x w, integrated from b to x: (x^2 - b^2) w.
SQUARE = HEAD + "square (float[N,4] x) => (float[N,3] y) { h = Mul(x, x)  y = MatMul(h, w) }"
# Two inputs, one value per example: y = sum(a * b) + 3 sum(a).
PRODUCT = (
    HEAD
    + """product (float[N,4] a, float[N,4] b) => (float[N] y) {
    three = Constant<value_float=3.0>()
    m = Mul(a, b)
    t = Mul(a, three)
    s = Add(m, t)
    axes = Constant<value_ints=[1]>()
    y = ReduceSum<keepdims=0>(s, axes)
}"""
)
# A bypass: the layer h and its input x meet again; y = h * x with h = x * x, so y = x^3.
BYPASS = HEAD + "bypass (float[N,4] x) => (float[N,4] y) { h = Mul(x, x)  y = Mul(h, x) }"
TOKENS = (
    HEAD
    + """tokens (int64[N,T] ids) => (float[N,3] y) {
    e = Gather(table, ids)
    axes = Constant<value_ints=[1]>()
    s = ReduceMean<keepdims=0>(e, axes)
    y = MatMul(s, w)
}"""
)


@pytest.fixture(scope="module")
def linear() -> ox.Model:
    return model(LINEAR, {"w": W})


@pytest.fixture(scope="module")
def square() -> ox.Model:
    return model(SQUARE, {"w": W})


@pytest.fixture(scope="module")
def product() -> ox.Model:
    return model(PRODUCT)


@pytest.fixture(scope="module")
def tokens() -> ox.Model:
    return model(TOKENS, {"table": rng.standard_normal((7, 4)).astype(np.float32), "w": W})


def test_saliency_of_a_linear_model_is_its_weights(linear: ox.Model) -> None:
    got = ox.Saliency(linear).attribute(X, target=2)
    np.testing.assert_allclose(got, np.tile(np.abs(W[:, 2]), (5, 1)), rtol=1e-6)
    signed = ox.Saliency(linear).attribute(X, target=2, abs=False)
    np.testing.assert_allclose(signed, np.tile(W[:, 2], (5, 1)), rtol=1e-6)


def test_target_per_example(linear: ox.Model) -> None:
    targets = [0, 2, 1, 0, 2]
    for given in (targets, np.array(targets), [(t,) for t in targets]):
        got = ox.Saliency(linear).attribute(X, target=given, abs=False)
        np.testing.assert_allclose(got, W[:, targets].T, rtol=1e-6)


def test_input_x_gradient(square: ox.Model) -> None:
    got = ox.InputXGradient(square).attribute(X, target=1)
    np.testing.assert_allclose(got, 2 * X * X * W[:, 1], rtol=1e-5)


@pytest.mark.parametrize("method", QUADRATURES)
def test_integrated_gradients_of_a_square(square: ox.Model, method: str) -> None:
    """The gradient is linear in the position, so the rule of integration decides the result."""
    n, b = 10, rng.standard_normal((5, 4)).astype(np.float32)
    positions, weights = quadrature(method, n)
    points = b[:, None] + positions[:, None] * (X - b)[:, None]
    want = (X - b) * (2 * points * weights[:, None]).sum(axis=1) * W[:, 0]
    got, delta = ox.IntegratedGradients(square).attribute(
        X, b, target=0, n_steps=n, method=method, return_convergence_delta=True
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    exact = ((X * X - b * b) * W[:, 0]).sum(axis=1)
    np.testing.assert_allclose(delta, want.sum(axis=1) - exact, atol=1e-4)
    again = ox.IntegratedGradients(square).compute_convergence_delta(got, b, X, target=0)
    np.testing.assert_allclose(again, delta, atol=1e-5)
    if method in ("gausslegendre", "riemann_middle"):
        np.testing.assert_allclose(got, (X * X - b * b) * W[:, 0], rtol=1e-4, atol=1e-5)


def test_quadratures_are_captums() -> None:
    for method in QUADRATURES:
        positions, weights = quadrature(method, 8)
        assert len(positions) == len(weights) == 8
        assert (np.diff(positions) > 0).all()
        assert weights.sum() == pytest.approx(1 - 1 / 8 if "trapezoid" in method else 1)
    assert quadrature("riemann_left", 4)[0].tolist() == [0, 0.25, 0.5, 0.75]
    assert quadrature("riemann_right", 4)[0].tolist() == [0.25, 0.5, 0.75, 1]
    assert quadrature("riemann_trapezoid", 3)[0].tolist() == [0, 0.5, 1]


def test_without_the_factor(square: ox.Model) -> None:
    got = ox.IntegratedGradients(square, multiply_by_inputs=False).attribute(X, target=0)
    np.testing.assert_allclose(got, X * W[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 7, 50, 1000])
def test_chunks_do_not_change_the_result(square: ox.Model, size: int) -> None:
    whole = ox.IntegratedGradients(square).attribute(X, 0.5, target=0)
    got = ox.IntegratedGradients(square).attribute(X, 0.5, target=0, internal_batch_size=size)
    np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-6)


def test_baseline_forms(square: ox.Model, product: ox.Model) -> None:
    ig = ox.IntegratedGradients(square)
    want = ig.attribute(X, np.full((5, 4), 0.5, np.float32), target=0)
    for baseline in (0.5, np.full((1, 4), 0.5), np.full(4, 0.5), (0.5,), {"x": 0.5}):
        np.testing.assert_allclose(ig.attribute(X, baseline, target=0), want, rtol=1e-5, atol=1e-6)
    a, b = X, X[::-1].copy()
    got = ox.IntegratedGradients(product).attribute((a, b), (1.0, None))
    # y = sum(ab) + 3 sum(a) along a(t) = 1 + t(a-1), b(t) = tb
    np.testing.assert_allclose(got[0], (a - 1) * (b / 2 + 3), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], b * (1 + (a - 1) / 2), rtol=1e-4, atol=1e-5)


def test_forms_of_inputs(product: ox.Model) -> None:
    saliency = ox.Saliency(product)
    a, b = X, X[::-1].copy()
    as_tuple = saliency.attribute((a, b), abs=False)
    as_dict = saliency.attribute({"b": b, "a": a}, abs=False)
    alone = saliency.attribute(a, abs=False, additional_forward_args=b)
    by_name = saliency.attribute(a, abs=False, additional_forward_args={"b": b})
    assert isinstance(as_tuple, tuple)
    assert list(as_dict) == ["a", "b"]
    for got in (as_tuple[0], as_dict["a"], alone, by_name):
        np.testing.assert_allclose(got, b + 3, rtol=1e-6)
    np.testing.assert_allclose(as_tuple[1], a, rtol=1e-6)


def test_layer_and_neuron(square: ox.Model) -> None:
    h = X * X
    np.testing.assert_allclose(ox.LayerActivation(square, "h").attribute(X), h, rtol=1e-6)
    entering = ox.LayerActivation(square, "y").attribute(X, attribute_to_layer_input=True)
    np.testing.assert_allclose(entering, h, rtol=1e-6)
    got = ox.LayerGradientXActivation(square, "h").attribute(X, target=1)
    np.testing.assert_allclose(got, h * W[:, 1], rtol=1e-5)
    bare = ox.LayerGradientXActivation(square, "h", multiply_by_inputs=False)
    np.testing.assert_allclose(bare.attribute(X, target=1), np.tile(W[:, 1], (5, 1)), rtol=1e-6)
    got, delta = ox.LayerIntegratedGradients(square, "h").attribute(
        X, 1.0, target=1, return_convergence_delta=True
    )
    np.testing.assert_allclose(got, (h - 1) * W[:, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(delta, 0, atol=1e-4)
    neuron = ox.NeuronGradient(square, "h").attribute(X, 2)
    np.testing.assert_allclose(neuron, 2 * X * np.eye(4)[2], rtol=1e-6)
    several = ox.NeuronGradient(square, "h").attribute(X, (slice(0, 2),))
    np.testing.assert_allclose(several, 2 * X * [1, 1, 0, 0], rtol=1e-6)
    got = ox.NeuronIntegratedGradients(square, "h").attribute(X, 2, baselines=0.5)
    np.testing.assert_allclose(got, (h - 0.25) * np.eye(4)[2], rtol=1e-4, atol=1e-5)
    both = ox.LayerGradientXActivation(square, ["h", "x"]).attribute(X, target=0)
    assert isinstance(both, list)
    np.testing.assert_allclose(both[1], 2 * X * X * W[:, 0], rtol=1e-5)


def test_layer_integral_with_a_bypass() -> None:
    """What goes around the layer keeps the value of the input: y = h x is linear in h."""
    m = model(BYPASS)
    got = ox.LayerIntegratedGradients(m, "h").attribute(X, target=3)
    want = np.zeros_like(X)
    want[:, 3] = X[:, 3] ** 3
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_tokens_go_through_the_embedding(tokens: ox.Model) -> None:
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ox.InputError, match="embedding layer 'e'"):
        ox.Saliency(tokens).attribute(ids, target=0)
    got, _ = ox.LayerIntegratedGradients(tokens, "e").attribute(
        ids, target=1, return_convergence_delta=True
    )
    table = tokens.graph.graph.initializers["table"].const_value.numpy()
    want = (table[ids] - table[0]) * W[:, 1] / 3
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    explanation = ox.explain(tokens, ids, target=1)
    np.testing.assert_allclose(explanation.attributions, want.sum(-1), rtol=1e-4, atol=1e-5)


def test_an_output_without_examples_axis() -> None:
    text = (
        HEAD
        + """total (float[N,4] x) => (float y) {
        h = Mul(x, x)
        y = ReduceSum<keepdims=0>(h)
    }"""
    )
    m = model(text)
    np.testing.assert_allclose(ox.Saliency(m).attribute(X, abs=False), 2 * X, rtol=1e-6)
    got, delta = ox.IntegratedGradients(m).attribute(X, return_convergence_delta=True)
    np.testing.assert_allclose(got, X * X, rtol=1e-4, atol=1e-6)
    assert delta.shape == (1,)


def test_one_session_serves_every_class(square: ox.Model) -> None:
    saliency = ox.Saliency(square)
    saliency.attribute(X, target=0)
    before = dict(square._programs)
    for target in (1, 2, [0, 1, 2, 0, 1]):
        saliency.attribute(X, target=target)
    assert dict(square._programs) == before


def test_half_precision_is_attributed_in_float32() -> None:
    half = LINEAR.replace("float[", "float16[")
    m = model(half, {"w": W.astype(np.float16)})
    for method in (ox.Saliency(m), ox.InputXGradient(m), ox.IntegratedGradients(m)):
        got = method.attribute(X.astype(np.float16), target=0)
        assert got.dtype == np.float32
    np.testing.assert_allclose(got, X * W[:, 0], rtol=1e-2, atol=1e-2)


def test_double_precision_stays() -> None:
    m = model(SQUARE.replace("float[", "double["), {"w": W.astype(np.float64)})
    x = rng.standard_normal((3, 4))
    got = ox.IntegratedGradients(m).attribute(x, target=0)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, x * x * W[:, 0].astype(np.float64), rtol=1e-12)


def test_differentiate_is_a_model_that_differentiates_again(square: ox.Model, tmp_path) -> None:
    backward = ox.differentiate(square, of="y", wrt=["x"])
    v = rng.standard_normal((5, 3)).astype(np.float32)
    got = backward({"x": X, "cotangent": v})
    np.testing.assert_allclose(got["x.grad"], 2 * X * (v @ W.T), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["y"], (X * X) @ W, rtol=1e-5, atol=1e-6)
    backward.save(tmp_path / "backward.onnx")
    again = ox.differentiate(ox.Model(tmp_path / "backward.onnx"), of="x.grad", wrt=["x"])
    u = rng.standard_normal((5, 4)).astype(np.float32)
    got = again({"x": X, "cotangent": v, "cotangent_": u})
    np.testing.assert_allclose(got["x.grad_"], 2 * u * (v @ W.T), rtol=1e-4, atol=1e-5)


BAD_TARGETS = [None, 3, -1, (0, 1), [0, 1], "cat", 1.5, True, [[0, 1]] * 5]


@pytest.mark.parametrize("target", BAD_TARGETS, ids=repr)
def test_bad_targets_name_the_outputs_shape(linear: ox.Model, target: object) -> None:
    with pytest.raises(ox.TargetError) as caught:
        ox.Saliency(linear).attribute(X, target=target)
    assert (
        "[N, 3]" in str(caught.value)
        or "integer" in str(caught.value)
        or "targets" in str(caught.value)
    )


BAD_INPUTS = {
    "rank": X[0],
    "columns": X[:, :3],
    "nan": np.where(X > 0, np.nan, X),
    "infinite": np.where(X > 0, np.inf, X),
    "text": np.array([["a"] * 4]),
    "complex": X.astype(complex),
    "empty": X[:0],
    "unknown name": {"z": X},
    "too many": (X, X),
    "ragged": [[1.0, 2.0], [3.0]],
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs(linear: ox.Model, name: str) -> None:
    with pytest.raises(ox.InputError):
        ox.Saliency(linear).attribute(BAD_INPUTS[name], target=0)


def test_bad_options(linear: ox.Model, product: ox.Model) -> None:
    ig = ox.IntegratedGradients(linear)
    for options in (
        {"n_steps": 0},
        {"n_steps": 2.5},
        {"method": "simpson"},
        {"internal_batch_size": 0},
        {"n_steps": 1, "method": "riemann_left"},
        {"baselines": np.zeros((2, 4))},
        {"baselines": {"z": 0}},
        {"baselines": np.nan},
    ):
        with pytest.raises(ox.InputError):
            ig.attribute(X, target=0, **options)
    with pytest.raises(ox.InputError, match="additional_forward_args"):
        ox.Saliency(product).attribute(X)
    with pytest.raises(ox.InputError, match="different numbers of examples"):
        ox.Saliency(product).attribute((X, X[:2]))
    with pytest.raises(ox.InputError):
        ox.Saliency("model.onnx")  # type: ignore[arg-type]


def test_bad_layers_and_neurons(square: ox.Model) -> None:
    with pytest.raises(ox.LayerError, match="no layer 'hh'"):
        ox.LayerActivation(square, "hh")
    two = model(
        HEAD
        + """g (float[N,4] x) => (float[N,4] y, float[N,4] w) {
        y = Exp(x)
        z = Sin(x)
        w = Cos(z)
    }"""
    )
    with pytest.raises(ox.LayerError, match="does not depend on 'z'"):
        ox.LayerGradientXActivation(two, "z").attribute(X, target=0)
    for selector in (4, -1, (0, 0), "a", 1.0, (slice(4, 9),), True):
        with pytest.raises(ox.NeuronError):
            ox.NeuronGradient(square, "h").attribute(X, selector)


def test_no_silent_zeros() -> None:
    rounded = model(HEAD + "g (float[N,4] x) => (float[N,4] y) { r = Floor(x)  y = Mul(r, r) }")
    with pytest.raises(ox.NotDifferentiableError, match="Floor"):
        ox.Saliency(rounded).attribute(X, target=0)


def test_seven_rows_equal_one_by_one(square: ox.Model) -> None:
    x = rng.standard_normal((7, 4)).astype(np.float32)
    ig = ox.IntegratedGradients(square)
    together = ig.attribute(x, target=2)
    alone = np.concatenate([ig.attribute(row[None], target=2) for row in x])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_examples_axis_elsewhere() -> None:
    """Sequence-first models: the examples axis is where the user has it, on the way in and out."""
    text = (
        HEAD
        + """g (float[T,N,4] state, float[4] rate) => (float[N] y) {
        m = Mul(state, rate)
        q = Mul(m, m)
        axes = Constant<value_ints=[0, 2]>()
        y = ReduceSum<keepdims=0>(q, axes)
    }"""
    )
    m = model(text, examples_axis={"state": 1, "rate": None})
    state = rng.standard_normal((3, 6, 4)).astype(np.float32)
    rate = rng.standard_normal(4).astype(np.float32)
    assert m.inputs[0].shape == ("T", "examples", 4)
    np.testing.assert_allclose(m((state, rate))["y"], ((state * rate) ** 2).sum((0, 2)), rtol=1e-4)
    want = 2 * state * rate**2
    got = ox.Saliency(m).attribute(state, abs=False, additional_forward_args=rate)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    got, delta = ox.IntegratedGradients(m).attribute(
        state, state * 0.5, additional_forward_args=rate, return_convergence_delta=True
    )
    np.testing.assert_allclose(got, 0.75 * (state * rate) ** 2, rtol=1e-3, atol=1e-5)
    assert delta.shape == (6,)
    backward = ox.differentiate(m, of="y", wrt=["state"])
    found = backward({"state": state, "rate": rate, "cotangent": np.ones(6, np.float32)})
    assert backward.inputs[0].shape == ("T", "examples", 4)
    np.testing.assert_allclose(found["state.grad"], want, rtol=1e-4, atol=1e-6)


def test_no_examples_axis() -> None:
    m = model(SQUARE, {"w": W}, examples_axis=None)
    np.testing.assert_allclose(m(X)["y"], (X * X) @ W, rtol=1e-4, atol=1e-5)
    with pytest.raises(ox.UnsupportedModelError, match="examples_axis=None"):
        ox.Saliency(m)
    backward = ox.differentiate(m, of="y", wrt=["x"])
    got = backward({"x": X, "cotangent": np.ones((5, 3), np.float32)})
    np.testing.assert_allclose(got["x.grad"], 2 * X * W.sum(1), rtol=1e-4, atol=1e-5)
