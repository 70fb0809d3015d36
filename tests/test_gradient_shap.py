"""Gradient SHAP against closed forms of what it draws, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import onnxplain as ox
from onnxplain.errors import InputError, LayerError
from onnxplain.methods import noise
from onnxplain.methods.noise import stream
from tests.helpers import HEAD, model
from tests.test_methods import BYPASS, PRODUCT, SQUARE, TOKENS, W, X

rng = np.random.default_rng(1)
POOL = rng.standard_normal((6, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def square() -> ox.Model:
    """y = (x * x) w: the gradient is 2 x w."""
    return model(SQUARE, {"w": W})


def draws(
    seed: int, count: int, stdev: float = 0.0, pool: np.ndarray = POOL
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions [count, 1, 1], baselines and noise [count, 1, ...] of the samples."""
    positions, starts, noises = [], [], []
    for sample in range(count):
        random = stream(seed)(sample)
        positions.append(random.random())
        starts.append(pool[random.integers(len(pool))])
        shape = pool.shape[1:]
        noises.append(random.standard_normal(shape, np.float32) if stdev else np.zeros(shape))
    by_sample = (np.stack(v)[:, None].astype(np.float32) for v in (starts, noises))
    starts, noises = by_sample
    return np.array(positions, np.float32)[:, None, None], starts, stdev * noises


@pytest.mark.parametrize("stdev", [0.0, 0.3])
@pytest.mark.parametrize("factor", [True, False])
def test_samples(square: ox.Model, stdev: float, factor: bool) -> None:
    position, start, noises = draws(5, 9, stdev)
    ends, w = X + noises, W[:, [0, 1, 2, 1, 0]].T
    each = 2 * (position * ends + (1 - position) * start) * w
    each = each * (ends - start) if factor else each
    got, deltas = ox.GradientShap(square, multiply_by_inputs=factor).attribute(
        X,
        POOL,
        n_samples=9,
        stdevs=stdev,
        target=[0, 1, 2, 1, 0],
        return_convergence_delta=True,
        seed=5,
    )
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, each.mean(0), rtol=1e-4, atol=1e-5)
    want = each.sum(2) - ((ends**2 - start**2) * w).sum(2)
    assert deltas.shape == (5 * 9,)
    np.testing.assert_allclose(deltas, want.T.ravel(), rtol=1e-3, atol=1e-4)


def test_linear_models_leave_no_chance() -> None:
    """Captum's facts: equal baselines and an affine net give the difference times the weights."""
    linear = model(HEAD + "l (float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }", {"w": W})
    start = np.repeat(POOL[:1], 20, axis=0)
    shap = ox.GradientShap(linear)
    got, deltas = shap.attribute(X, start, n_samples=50, target=1, return_convergence_delta=True)
    np.testing.assert_allclose(got, (X - POOL[0]) * W[:, 1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(deltas, 0, atol=1e-5)
    delta = shap.compute_convergence_delta(got, POOL[0], X, target=1)
    np.testing.assert_allclose(delta, 0, atol=1e-5)


@pytest.mark.parametrize("room", [1, 1000, 1 << 26])
def test_same_alone_in_a_batch_and_in_any_chunk(
    square: ox.Model, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    shap = ox.GradientShap(square)
    options: dict[str, Any] = {"n_samples": 11, "stdevs": 0.2, "target": 2, "seed": 7}
    whole = shap.attribute(X, POOL, **options)
    monkeypatch.setattr(noise, "_BLOCK_BYTES", room)
    np.testing.assert_allclose(shap.attribute(X, POOL, **options), whole, rtol=1e-4, atol=1e-6)
    alone = shap.attribute(X[2:3], POOL, **options)
    np.testing.assert_allclose(alone, whole[2:3], rtol=1e-4, atol=1e-6)


def test_many_samples_tend_to_the_mean_of_integrated_gradients(square: ox.Model) -> None:
    want = ((X**2 - (POOL[:, None]) ** 2) * W[:, 0]).mean(0)
    got = ox.explain(square, X, "gradient-shap", target=0, baselines=POOL, n_samples=4000, seed=0)
    error = np.abs(got.attributions - want).sum(1) / np.abs(want).sum(1)
    assert (error < 3 * got.checks["standard_error"]).all()
    assert (got.checks["standard_error"] < 0.2).all()


def test_several_inputs_draw_their_baselines_by_themselves() -> None:
    """As Captum: the expectation is over all pairs of baselines, and one point for both lines."""
    product = model(PRODUCT)  # y = sum(a * b) + 3 sum(a)
    a, b, starts = X, X[::-1].copy(), (POOL, POOL[::-1] + 1)
    got, deltas = ox.GradientShap(product).attribute(
        (a, b), starts, n_samples=3, return_convergence_delta=True, seed=2
    )
    want_a, want_b = np.zeros_like(a), np.zeros_like(b)
    for sample in range(3):
        random = stream(2)(sample)
        at = np.float32(random.random())
        begin_a, begin_b = (s[random.integers(6)] for s in starts)
        want_a += (begin_b + at * (b - begin_b) + 3) * (a - begin_a) / 3
        want_b += (begin_a + at * (a - begin_a)) * (b - begin_b) / 3
    np.testing.assert_allclose(got[0], want_a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], want_b, rtol=1e-4, atol=1e-5)
    assert deltas.shape == (15,)
    named = ox.GradientShap(product).attribute(
        {"a": a, "b": b}, dict(zip("ab", starts, strict=True)), n_samples=3, seed=2
    )
    np.testing.assert_allclose(named["b"], want_b, rtol=1e-4, atol=1e-5)
    alone = ox.GradientShap(product).attribute(a, POOL, additional_forward_args=b, n_samples=40)
    assert alone.shape == a.shape


@pytest.mark.parametrize("entering", [False, True])
def test_by_a_layer(entering: bool) -> None:
    """y = h x with h = x x: the gradient by h is x on the line, times h at the ends of it."""
    bypass = model(BYPASS)
    position, start, noises = draws(3, 6, 0.2)
    ends = X + noises
    point = position * ends + (1 - position) * start
    unit = np.array([0, 1, 0, 0], np.float32)
    each = unit * (point * (ends**2 - start**2) if not entering else 3 * point**2 * (ends - start))
    got, deltas = ox.LayerGradientShap(bypass, "h").attribute(
        X, POOL, 6, 0.2, 1, None, True, entering, seed=3
    )
    np.testing.assert_allclose(got, each.mean(0), rtol=1e-3, atol=1e-4)
    want = each.sum(2) - (ends**3 - start**3)[..., 1]
    np.testing.assert_allclose(deltas, want.T.ravel(), rtol=1e-3, atol=1e-3)
    if not entering:
        bare = ox.LayerGradientShap(bypass, ["h"], multiply_by_inputs=False)
        (got,) = bare.attribute(X, POOL, n_samples=6, stdevs=0.2, target=1, seed=3)
        np.testing.assert_allclose(got, (unit * point).mean(0), rtol=1e-3, atol=1e-4)


def test_of_a_neuron(square: ox.Model) -> None:
    position, start, _ = draws(3, 6)
    point = position * X + (1 - position) * start
    each = np.array([0, 1, 1, 0], np.float32) * 2 * point * (X - start)
    got = ox.NeuronGradientShap(square, "h").attribute(X, (slice(1, 3),), POOL, 6, seed=3)
    np.testing.assert_allclose(got, each.mean(0), rtol=1e-4, atol=1e-5)


def test_one_number_for_the_whole_batch() -> None:
    whole = model(
        HEAD + "mean (float[N,4] x) => (float y) { h = Mul(x, x)  y = ReduceMean<keepdims=0>(h) }"
    )
    got, deltas = ox.GradientShap(whole).attribute(
        X, POOL, n_samples=4, return_convergence_delta=True, seed=1
    )
    position, start, _ = draws(1, 4)
    each = 2 * (position * X + (1 - position) * start) * (X - start) / 20
    np.testing.assert_allclose(got, each.mean(0), rtol=1e-4, atol=1e-6)
    want = each.sum((1, 2)) - (X**2 - start**2).mean((1, 2))
    np.testing.assert_allclose(deltas, want, rtol=1e-3, atol=1e-5)


def test_half_precision() -> None:
    half = model(SQUARE.replace("float[", "float16["), {"w": W.astype(np.float16)})
    x, pool = X.astype(np.float16), POOL.astype(np.float16)
    got = ox.GradientShap(half).attribute(x, pool, n_samples=5, target=0, seed=5)
    position, start, _ = draws(5, 5)
    each = 2 * (position * X + (1 - position) * start) * (X - start) * W[:, 0]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, each.mean(0), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"baselines": POOL[:1]}, "one baseline is no distribution.*integrated-gradients"),
        ({"baselines": POOL[0]}, "one baseline is no distribution"),
        ({"baselines": 0.0}, "one baseline is no distribution"),
        ({"baselines": None}, "no baselines were given"),
        ({"baselines": POOL[:, :3]}, r"shape \[6, 3\] was given"),
        ({"n_samples": 0}, "n_samples must be an integer of at least 1"),
        ({"stdevs": -0.1}, "stdevs must be numbers of at least 0"),
        ({"stdevs": float("nan")}, "stdevs"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_refused(square: ox.Model, options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        ox.GradientShap(square).attribute(X, **{"baselines": POOL, "target": 0, **options})


def test_refused_questions(square: ox.Model) -> None:
    table = rng.standard_normal((9, 4)).astype(np.float32)
    tokens = model(TOKENS, {"table": table, "w": W})
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(InputError, match=r"'ids' holds int64 values.*layer-integrated-gradients"):
        ox.LayerGradientShap(tokens, "e").attribute(ids, ids, target=0)
    with pytest.raises(InputError, match="embedding layer 'e'"):
        ox.GradientShap(tokens).attribute(ids, ids, target=0)
    with pytest.raises(LayerError):
        ox.LayerGradientShap(square, "nothing")
