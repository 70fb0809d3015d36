"""Conductance and internal influence against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

import onnxplain as ox
from onnxplain.methods.path import QUADRATURES, quadrature
from tests.helpers import HEAD, model
from tests.test_methods import BYPASS, TOKENS, W, X

B = np.random.default_rng(7).standard_normal(X.shape).astype(np.float32)
# The layer h meets the input again: y = h x, so dy/dh changes along the path of the inputs.
BOTH = {"rtol": 1e-4, "atol": 1e-5}
# Rows of windows: the first axis of h counts examples times windows. y = sum of h^2.
WINDOWS = (
    HEAD
    + """windows (float[N,4,3] x) => (float[N] y) {
    flat = Constant<value_ints=[-1,3]>()  back = Constant<value_ints=[-1,4,3]>()
    r = Reshape(x, flat)  h = Tanh(r)  s = Mul(h, h)  u = Reshape(s, back)
    axes = Constant<value_ints=[1,2]>()  y = ReduceSum<keepdims=0>(u, axes) }"""
)
METHODS = {
    "internal-influence": ox.InternalInfluence,
    "layer-conductance": ox.LayerConductance,
}


def along(positions: np.ndarray) -> np.ndarray:
    """Points on the line from B to X, [S, N, 4]."""
    return B + positions.reshape(-1, 1, 1) * (X - B)


@pytest.mark.parametrize("method", QUADRATURES)
@pytest.mark.parametrize("size", [None, 1, 6, 13])
def test_the_path_lies_in_the_inputs(method: str, size: int | None) -> None:
    """y_1 = h_1 x_1 with h = x^2: dy/dh = x, and dh = 2 x dx."""
    net = model(BYPASS)
    given = {
        "baselines": B, "target": 1, "n_steps": 12, "method": method, "internal_batch_size": size,
    }  # fmt: skip
    one = np.eye(4)[1]
    positions, weights = quadrature(method, 12)
    x = along(positions)
    got = ox.InternalInfluence(net, "h").attribute(X, **given)
    np.testing.assert_allclose(got, np.tensordot(weights, x, 1) * one, **BOTH)
    got = ox.NeuronConductance(net, "h").attribute(X, 1, **given)
    want = np.tensordot(weights, x * 2 * x, 1) * (X - B) * one
    np.testing.assert_allclose(got, want, **BOTH)
    bare = ox.NeuronConductance(net, "h", multiply_by_inputs=False).attribute(X, 1, **given)
    np.testing.assert_allclose(bare * (X - B), want, **BOTH)

    x = along(quadrature(method, 13)[0])
    got, delta = ox.LayerConductance(net, "h").attribute(X, **given, return_convergence_delta=True)
    want = (x[:-1] * np.diff(x * x, axis=0)).sum(0) * one
    np.testing.assert_allclose(got, want, **BOTH)
    np.testing.assert_allclose(delta, (want - (X**3 - B**3) * one).sum(1), atol=1e-4)


def test_conductance_of_all_neurons_is_integrated_gradients() -> None:
    net = model(BYPASS)
    given = {"baselines": B, "target": 2, "n_steps": 30, "method": "gausslegendre"}
    total = sum(ox.NeuronConductance(net, "h").attribute(X, j, **given) for j in range(4))
    every = ox.NeuronConductance(net, "h").attribute(X, (slice(None),), **given)
    np.testing.assert_allclose(every, total, **BOTH)
    np.testing.assert_allclose(every, (X**3 - B**3) * 2 / 3 * np.eye(4)[2], **BOTH)


def test_what_goes_around_the_layer_is_no_gap() -> None:
    assert ox.explain(model(BYPASS), X, "layer-conductance", 1, layer="h").checks == {}
    through = HEAD + "g (float[N,4] x) => (float[N,3] y) { h = Mul(x, x)  y = MatMul(h, w) }"
    checks = ox.explain(model(through, {"w": W}), X, "layer-conductance", 1, layer="h").checks
    assert (checks["relative_convergence_delta"] < 0.01).all()


@pytest.mark.parametrize("n_steps", [1, 9])
@pytest.mark.parametrize("limit", [None, 20_000])
def test_layers_of_windows(n_steps: int, limit: int | None) -> None:
    x = np.random.default_rng(3).standard_normal((5, 4, 3)).astype(np.float32)
    net = model(WINDOWS, memory_limit=limit)
    positions, weights = quadrature("riemann_middle", 9)
    h = np.tanh(positions.reshape(-1, 1, 1, 1) * x)
    got = ox.InternalInfluence(net, "h").attribute(x, n_steps=9, method="riemann_middle")
    np.testing.assert_allclose(got, np.tensordot(weights, 2 * h, 1).reshape(20, 3), **BOTH)
    h = np.tanh(quadrature("gausslegendre", n_steps + 1)[0].reshape(-1, 1, 1, 1) * x)
    got = ox.LayerConductance(net, "h").attribute(x, n_steps=n_steps)
    want = (2 * h[:-1] * np.diff(h, axis=0)).sum(0).reshape(20, 3)
    np.testing.assert_allclose(got, want, **BOTH)


@pytest.mark.parametrize("name", METHODS)
def test_token_numbers_have_their_path_in_the_embedding(name: str) -> None:
    table = np.random.default_rng(1).standard_normal((7, 4)).astype(np.float32)
    net = model(TOKENS, {"table": table, "w": W})
    ids = np.array([[1, 2, 3], [4, 0, 6]])
    got = METHODS[name](net, "s").attribute(ids, target=2, n_steps=20, method="riemann_left")
    slope = np.broadcast_to(W[:, 2], (2, 4))
    ends = quadrature("riemann_left", 21)[0][[0, -1]]
    rise = (table[ids].mean(1) - table[0]) * np.diff(ends)
    want = slope if name == "internal-influence" else slope * rise
    np.testing.assert_allclose(got, want, **BOTH)
    explanation = ox.explain(net, ids, "neuron-conductance", 2, layer="s", neuron=0)
    want = (table[ids] - table[0])[..., 0] * W[0, 2] / 3 * (1 - 1 / 50)  # of the trapezoid
    np.testing.assert_allclose(explanation.attributions, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_lists_of_layers_and_what_enters_them(name: str) -> None:
    net = model(BYPASS)
    both = METHODS[name](net, ["h", "x"]).attribute(X, B, 1)
    assert isinstance(both, list)
    for got, layer in zip(both, ("h", "x"), strict=True):
        np.testing.assert_allclose(got, METHODS[name](net, layer).attribute(X, B, 1), **BOTH)
    entering = METHODS[name](net, "h").attribute(X, B, 1, attribute_to_layer_input=True)
    np.testing.assert_allclose(entering, both[1], **BOTH)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision(name: str) -> None:
    head = HEAD + "g (float16[N,4] x) => (float16[N,3] y) { h = Mul(x, x)  y = MatMul(h, w) }"
    net = model(head, {"w": W.astype(np.float16)})
    got = METHODS[name](net, "h").attribute(X.astype(np.float16), target=1, n_steps=20)
    assert got.dtype == np.float32
    want = W[:, 1] * np.ones_like(X) if name == "internal-influence" else W[:, 1] * X * X
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=1e-2)


def test_bad_layers_and_neurons_are_refused() -> None:
    text = (
        HEAD
        + """g (float[N,4] x, float[N,4] z) => (float[N,4] y, float[N,4] d) {
        a = Exp(x)  b = Exp(z)  c = Exp(z)  d = Exp(c)  y = Add(a, b) }"""
    )
    net = model(text)
    with pytest.raises(ox.LayerError, match="does not depend on the explained input"):
        ox.LayerConductance(net, "b").attribute(X, target=0, additional_forward_args=B)
    with pytest.raises(ox.LayerError, match="nothing to explain"):
        ox.InternalInfluence(net, "c").attribute((X, B), target=0)
    with pytest.raises(ox.NeuronError, match="out of range"):
        ox.NeuronConductance(net, "a").attribute((X, B), 9, target=0)
    with pytest.raises(ox.LayerError, match="no layer"):
        ox.NeuronConductance(net, "nothing")
    with pytest.raises(ox.TargetError, match="no target"):
        ox.NeuronConductance(net, "a").attribute((X, B), 0)


def test_layers_that_cover_each_other_are_refused_by_name() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) { a = Exp(x)  b = Tanh(a)  y = Sin(b) }"""
    with pytest.raises(ox.LayerError, match=r"layer 'a' reaches 'y' through other layers"):
        ox.LayerIntegratedGradients(model(HEAD + text), ["a", "b"]).attribute(X, target=0)


@pytest.mark.parametrize(
    "cls", [ox.LayerConductance, ox.LayerDeepLift, ox.NeuronIntegratedGradients]
)
def test_a_layer_must_be_named(cls: type) -> None:
    with pytest.raises(ox.LayerError, match="no layer was given"):
        cls(model(BYPASS), None)


@pytest.mark.parametrize("cls", [ox.IntegratedGradients, ox.DeepLift, ox.GradientShap])
def test_flags_are_true_or_false(cls: type) -> None:
    """Captum has device_ids where layer forms have this one."""
    with pytest.raises(ox.InputError, match="multiply_by_inputs is True or False, not None"):
        cls(model(BYPASS), None)
