"""Perturbation methods against closed forms and brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

import onnxplain as ox
from onnxplain.perturb import graph_game
from tests.helpers import HEAD, model

rng = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


W, X, B = f32(4, 3), f32(5, 4), f32(5, 4)
LINEAR = "linear (float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }"
# y = tanh(x w) v: no closed form but brute force.
CURVED = """curved (float[N,4] x) => (float[N,2] y) {
    h = MatMul(x, w)
    t = Tanh(h)
    y = MatMul(t, v)
}"""
V = f32(3, 2)


def onnx(text: str, **weights: np.ndarray) -> ox.Model:
    return model(HEAD + text, weights)


@pytest.fixture(scope="module")
def linear() -> ox.Model:
    return onnx(LINEAR, w=W)


@pytest.fixture(scope="module")
def curved() -> ox.Model:
    return onnx(CURVED, w=W, v=V)


def bend(x: np.ndarray) -> np.ndarray:
    return np.tanh(x.astype(np.float64) @ W) @ V


def ablated(
    score: Callable[[np.ndarray], np.ndarray], x: np.ndarray, base: Any = 0, mask: Any = None
) -> np.ndarray:
    """Feature ablation, element by element: [N, ...]."""
    ids = np.arange(x[0].size).reshape(x.shape[1:]) if mask is None else np.asarray(mask)
    ids = np.broadcast_to(ids, x.shape)
    found = np.empty(x.shape)
    for place in np.ndindex(x.shape):
        off = np.where(ids[place[0]] == ids[place], np.broadcast_to(base, x.shape)[place[0]], 0)
        copy = np.where(ids[place[0]] == ids[place], off, x[place[0]])[None]
        found[place] = (score(x[place[0] : place[0] + 1]) - score(copy.astype(x.dtype)))[0]
    return found


def shapley(value: Callable[[np.ndarray], float], features: int) -> np.ndarray:
    """Shapley values of a game on boolean coalitions, by the formula."""
    found = np.zeros(features)
    for number in range(1 << features):
        present = np.array([number >> f & 1 for f in range(features)], bool)
        size = present.sum()
        for f in np.flatnonzero(~present):
            with_f = present.copy()
            with_f[f] = True
            weight = math.factorial(size) * math.factorial(features - size - 1)
            found[f] += weight / math.factorial(features) * (value(with_f) - value(present))
    return found


def shapley_of(
    score: Callable[[np.ndarray], np.ndarray], x: np.ndarray, base: Any = 0, mask: Any = None
) -> np.ndarray:
    """Shapley values of each example, [N, ...], by brute force."""
    ids = np.arange(x[0].size).reshape(x.shape[1:]) if mask is None else np.asarray(mask)
    ids, off = np.broadcast_to(ids, x.shape), np.broadcast_to(base, x.shape)
    found = np.empty(x.shape)
    for e, (row, own) in enumerate(zip(x, ids, strict=True)):
        numbers, local = np.unique(own, return_inverse=True)
        local = local.reshape(own.shape)

        def value(present: np.ndarray, row: Any = row, local: Any = local, e: int = e) -> float:
            return float(score(np.where(present[local], row, off[e])[None])[0])

        found[e] = shapley(value, len(numbers))[local]
    return found


# Methods that give w * (x - b) for a linear model, and their options.
EXACT: dict[str, dict[str, Any]] = {
    "FeatureAblation": {},
    "Occlusion": {"sliding_window_shapes": (1,)},
    "ShapleyValues": {},
    "ShapleyValueSampling": {"n_samples": 3, "seed": 0},
    "KernelShap": {"n_samples": 15, "seed": 0},
    "Lime": {"n_samples": 60, "seed": 0, "made": {"interpretable_model": "linear"}},
}
SAMPLED = ("ShapleyValueSampling", "KernelShap", "Lime")


def attribute(method: str, m: Any, x: Any, **more: Any) -> Any:
    options = {**EXACT[method], **more}
    return getattr(ox, method)(m, **options.pop("made", {})).attribute(x, **options)


# ------------------------------------------------------------------------ linear models


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("kind", ["model", "callable"])
def test_a_linear_model_gives_weights_times_the_difference(
    method: str, kind: str, linear: ox.Model
) -> None:
    m = linear if kind == "model" else ox.BlackBox(lambda x: x @ W)
    targets = [0, 2, 1, 0, 2]
    for base in (0, 0.5, B, B[:1]):
        got = attribute(method, m, X, baselines=base, target=targets)
        np.testing.assert_allclose(got, (X - base) * W[:, targets].T, rtol=1e-4, atol=1e-5)
        assert got.dtype == np.float32


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("float16", 2e-2), ("float64", 1e-9), ("int64", 1e-4), ("int8", 1e-4)]
)
def test_inputs_of_any_type(method: str, kind: str, tolerance: float) -> None:
    out = "float16" if kind == "float16" else "double" if kind == "float64" else "float"
    number = {"float16": 10, "float64": 11}.get(kind, 1)
    declared = {"float64": "double"}.get(kind, kind)
    m = onnx(
        f"g ({declared}[N,4] x) => ({out}[N,3] y) {{ f = Cast<to={number}>(x) y = MatMul(f, w) }}",
        w=W.astype({"float16": np.float16, "float64": np.float64}.get(kind, np.float32)),
    )
    x = (3 * X).round().astype(kind)
    base = np.array([1, -1, 0, 2], kind)
    got = attribute(method, m, x, baselines=base, target=1)
    assert got.dtype == (np.float64 if kind == "float64" else np.float32)
    scale = np.abs(x).max()
    w = W.astype(np.float64)
    np.testing.assert_allclose(
        got, (x.astype(float) - base) * w[:, 1], rtol=tolerance, atol=tolerance * scale
    )


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("kind", ["model", "callable"])
def test_boolean_inputs(method: str, kind: str) -> None:
    m: Any = onnx("g (bool[N,4] x) => (float[N,3] y) { f = Cast<to=1>(x) y = MatMul(f, w) }", w=W)
    if kind == "callable":
        m = ox.BlackBox(lambda x: x.astype(np.float32) @ W)
    x = X > 0
    for base in (False, True):
        got = attribute(method, m, x, baselines=base, target=0)
        np.testing.assert_allclose(got, (x.astype(float) - base) * W[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", EXACT)
def test_other_inputs_go_with_their_example(method: str) -> None:
    """y = gate * (x w), where the gate is fed and not explained."""
    m = onnx(
        "g (float[N,4] x, float[N,1] gate) => (float[N,3] y) { h = MatMul(x, w) y = Mul(h, gate) }",
        w=W,
    )
    gate = f32(5, 1)
    got = attribute(method, m, X, target=2, additional_forward_args=gate)
    np.testing.assert_allclose(got, X * W[:, 2] * gate, rtol=1e-4, atol=1e-5)
    box = ox.BlackBox(lambda x, g: (x @ W) * g)
    again = attribute(method, box, X, target=2, additional_forward_args=gate)
    np.testing.assert_allclose(again, got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", EXACT)
def test_examples_on_another_axis(method: str) -> None:
    m = model(
        HEAD + "g (float[4,N] x) => (float[N,3] y) { t = Transpose<perm=[1,0]>(x) "
        "y = MatMul(t, w) }",
        {"w": W},
        examples_axis=1,
    )
    got = attribute(method, m, X.T, baselines=B.T, target=1)
    np.testing.assert_allclose(got, ((X - B) * W[:, 1]).T, rtol=1e-4, atol=1e-5)
    if method == "Occlusion":
        return
    square = X[:4]
    mask = np.array([[0, 0, 1, 1], [0, 1, 2, 3], [5, 5, 5, 2], [0, 0, 0, 0]])
    want = ablated(lambda x: x @ W[:, 1], square, 0, mask)
    for x, given, expected in ((square.T, mask.T, want.T), (square[:1].T, mask[:1].T, want[:1].T)):
        got = attribute(method, m, x, target=1, feature_mask=given)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", EXACT)
def test_a_model_of_one_example(method: str) -> None:
    """It takes its example out, so nothing else fits into a run."""
    m = onnx(
        "g (float[1,4] x) => (float[1,1] y) { a = Gather<axis=0>(x, i) b = MatMul(a, w) "
        "y = Unsqueeze(b, z) }",
        i=np.asarray(0),
        w=W[:, :1],
        z=np.array([0]),
    )
    assert m.fixed_batch == 1
    got = attribute(method, m, X, baselines=B)
    np.testing.assert_allclose(got, (X - B) * W[:, 0], rtol=1e-4, atol=1e-5)


ATTENTION = """g (float[B,5,4] x, float[B,1] gate) => (float[B,1] y) {
    a = Reshape(x, s)
    k = Transpose<perm=[1,0]>(a)
    e = MatMul(a, k)
    p = Softmax(e)
    v = MatMul(p, a)
    f = Reshape(v, t)
    h = MatMul(f, w)
    y = Mul(h, gate)
}"""


def attention(x: np.ndarray, gate: np.ndarray, w: np.ndarray) -> np.ndarray:
    """One row at a time."""
    found = []
    for row in x.astype(np.float64):
        e = np.exp(row @ row.T - (row @ row.T).max(axis=1, keepdims=True))
        found.append(((e / e.sum(axis=1, keepdims=True)) @ row).ravel() @ w)
    return np.concatenate(found) * gate[:, 0]


@pytest.mark.parametrize("gated", [False, True])
def test_a_model_of_one_row_at_a_time(gated: bool) -> None:
    text = ATTENTION.replace("B,", "1,")
    w, x, gate = f32(20, 1), f32(3, 5, 4), f32(3, 1)
    if not gated:
        text = text.replace(", float[1,1] gate", "").replace("y = Mul(h, gate)", "y = Identity(h)")
        gate = np.ones((3, 1), np.float32)
    m = onnx(text, s=np.array([5, 4]), t=np.array([1, 20]), w=w)
    assert m.fixed_batch == 1
    more = {"additional_forward_args": gate} if gated else {}
    mask = np.arange(5)[:, None]
    got = ox.FeatureAblation(m).attribute(x, feature_mask=mask, target=0, **more)
    for e in range(3):
        want = ablated(lambda z, e=e: attention(z, gate[e : e + 1], w), x[e : e + 1], 0, mask)
        np.testing.assert_allclose(got[e : e + 1], want, rtol=1e-3, atol=1e-4)
    exact = ox.ShapleyValues(m).attribute(x, 0.1, feature_mask=mask, target=0, **more)
    for e in range(3):
        want = shapley_of(lambda z, e=e: attention(z, gate[e : e + 1], w), x[e : e + 1], 0.1, mask)
        np.testing.assert_allclose(exact[e : e + 1], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_a_model_of_two_rows_at_a_time(gated: bool) -> None:
    """Rows of a run don't influence each other, but nothing proves it: the row is kept apart."""
    mixed = (
        "g (float[2,4] x, float[2,1] gate) => (float[2,3] y) { a = Gather<axis=0>(x, first) "
        "b = Gather<axis=0>(x, second) c = Concat<axis=0>(a, b) h = MatMul(c, w) y = Mul(h, gate) }"
    )
    gate = f32(5, 1)
    if not gated:
        mixed = mixed.replace(", float[2,1] gate", "").replace("Mul(h, gate)", "Identity(h)")
        gate = np.ones((5, 1), np.float32)
    m = onnx(mixed, first=np.array([0]), second=np.array([1]), w=W)
    assert m.fixed_batch == 2
    more = {"additional_forward_args": gate} if gated else {}
    for method in EXACT:
        got = attribute(method, m, X, baselines=B, target=1, **more)
        np.testing.assert_allclose(got, (X - B) * W[:, 1] * gate, rtol=1e-4, atol=1e-5)
    mask = [[0, 0, 1, 1], [0, 1, 2, 3], [5, 5, 5, 2], [0, 0, 0, 0], [1, 2, 3, 4]]
    got = ox.FeatureAblation(m).attribute(X, target=1, feature_mask=mask, **more)
    want = ablated(lambda x: x @ W[:, 1], X, 0, mask) * gate
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ masks


MASKS = {
    "groups": [0, 0, 1, 1],
    "gaps": [7, 7, 100, 3],
    "one": [[5]],
    "per example": [[0, 0, 1, 1], [0, 1, 2, 3], [5, 5, 5, 2], [0, 0, 0, 0], [4, 3, 4, 3]],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["model", "callable"])
def test_groups_of_features(mask: str, kind: str, curved: ox.Model) -> None:
    m = curved if kind == "model" else ox.BlackBox(bend)
    ids = np.asarray(MASKS[mask])
    options = {"baselines": B, "target": 1, "feature_mask": ids}
    got = ox.FeatureAblation(m).attribute(X, **options)
    want = ablated(lambda x: bend(x)[:, 1], X, B, ids)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    exact = ox.ShapleyValues(m).attribute(X, **options)
    want = shapley_of(lambda x: bend(x)[:, 1], X, B, ids)
    np.testing.assert_allclose(exact, want, rtol=1e-4, atol=1e-5)
    counted = ox.KernelShap(m).attribute(X, n_samples=16, seed=0, **options)
    np.testing.assert_allclose(counted, want, rtol=1e-4, atol=1e-5)


def test_coefficients_by_feature_number(linear: ox.Model) -> None:
    ids = np.asarray(MASKS["per example"])
    options = {"feature_mask": ids, "target": 0, "n_samples": 60, "seed": 0}
    for method in (ox.KernelShap(linear), ox.Lime(linear, "linear")):
        spread = method.attribute(X, **options)
        got = method.attribute(X, return_input_shape=False, **options)
        assert got.shape == (5, 6)  # numbers 0 to 5
        for row, own, found in zip(spread, ids, got, strict=True):
            for number in range(6):
                want = row[own == number][0] if (own == number).any() else 0
                assert found[number] == pytest.approx(want, rel=1e-6)


TWO = """two (float[N,4] a, float[N,2,2] b) => (float[N] y) {
    f = Flatten(b)
    m = Mul(a, f)
    axes = Constant<value_ints=[1]>()
    y = ReduceSum<keepdims=0>(m, axes)
}"""


@pytest.mark.parametrize("kind", ["model", "callable"])
def test_a_number_in_several_inputs_is_one_feature(kind: str) -> None:
    def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b.reshape(len(b), -1)).sum(1)

    m = onnx(TWO) if kind == "model" else ox.BlackBox(dot)
    a, b = X, B.reshape(5, 2, 2)
    masks = (np.array([0, 0, 1, 2]), np.array([[0, 0], [1, 3]]))
    products = X * B
    # Together, 0 takes the first two products away and 2 the last; 3 the last as well.
    first, third, last = products[:, :2].sum(1), products[:, 2], products[:, 3]
    together = (np.stack([first, first, third, last], 1), np.stack([first, first, third, last], 1))
    got = ox.FeatureAblation(m).attribute((a, b), feature_mask=masks)
    assert isinstance(got, tuple)
    for found, want in zip(got, together, strict=True):
        np.testing.assert_allclose(found.reshape(5, 4), want, rtol=1e-4, atol=1e-5)
    # The Shapley values of a product: shared where its factors are two features.
    got = ox.ShapleyValues(m).attribute({"a": a, "b": b}, feature_mask=dict(zip("ab", masks)))
    want = np.stack([first, first, third, last / 2], 1)
    np.testing.assert_allclose(got["a"], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["b"].reshape(5, 4), want, rtol=1e-4, atol=1e-5)
    apart = ox.FeatureAblation(m).attribute(
        (a, b), feature_mask=masks, enable_cross_tensor_attribution=False
    )
    np.testing.assert_allclose(apart[0], together[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(apart[1].reshape(5, 4), together[1], rtol=1e-4, atol=1e-5)
    masks = (np.array([0, 0, 0, 0]), np.array([[0, 1], [2, 3]]))
    whole = products.sum(1)
    for across, want in ((True, whole), (False, products[:, 0])):
        got = ox.FeatureAblation(m).attribute(
            (a, b), feature_mask=masks, enable_cross_tensor_attribution=across
        )
        np.testing.assert_allclose(got[1][:, 0, 0], want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ games in closed form

GAMES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], list[float]]] = {
    # what the features are worth at x = 1, baseline 0
    "product": (lambda x: x.prod(1), [1 / 3] * 3),
    "exclusive or": (lambda x: x.sum(1) % 2, [1 / 3] * 3),
    # The airport game: one part of the runway is for all, one for two, one for one alone.
    "maximum": (lambda x: (x * [3.0, 2, 1]).max(1), [1 / 3 + 1 / 2 + 1, 1 / 3 + 1 / 2, 1 / 3]),
    "majority": (lambda x: (x.sum(1) >= 2) * 1.0, [1 / 3] * 3),
    "gloves": (lambda x: np.minimum(x[:, 0], np.maximum(x[:, 1], x[:, 2])), [2 / 3, 1 / 6, 1 / 6]),
}


def test_shapley_values_of_many_features_are_told_and_of_too_many_refused() -> None:
    box = ox.BlackBox(lambda x: x.sum(1))
    with pytest.warns(UserWarning, match=r"17 features have 2\^17 = 131,072 coalitions"):
        found = ox.ShapleyValues(box).attribute(np.arange(17.0)[None])
    np.testing.assert_allclose(found, np.arange(17.0)[None], atol=1e-9)
    with pytest.raises(
        ox.InputError, match=r"2\^25 = 33,554,432 .*kernel-shap.* at most 24 groups"
    ):
        ox.ShapleyValues(box).attribute(np.ones((1, 25)))
    with pytest.raises(ox.InputError, match=r"2\^70000 coalitions"):
        ox.ShapleyValues(box).attribute(np.ones((1, 70000)))


@pytest.mark.parametrize("game", GAMES)
def test_shapley_values_in_closed_form(game: str) -> None:
    score, want = GAMES[game]
    x = np.ones((2, 3))
    box = ox.BlackBox(score)
    got = ox.ShapleyValues(box).attribute(x)
    np.testing.assert_allclose(got, np.tile(want, (2, 1)), rtol=1e-9)
    assert got.dtype == np.float64
    counted = ox.KernelShap(box).attribute(x, n_samples=8)
    np.testing.assert_allclose(counted, got, rtol=1e-9)
    stratified, error = ox.ShapleyValueSampling(box).attribute(
        x, n_samples=3000, sampling="stratified", seed=0, return_standard_error=True
    )
    np.testing.assert_allclose(stratified.sum(1), got.sum(1), rtol=1e-9)
    assert (np.abs(stratified - got) <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize("method", SAMPLED)
def test_samples_add_up(method: str, curved: ox.Model) -> None:
    """To the difference of the scores, for any number of samples (but Lime's)."""
    for n_samples in (3, 7, 14):
        got = attribute(method, curved, X, baselines=B, target=0, n_samples=n_samples)
        assert np.isfinite(got).all()
        if method != "Lime":
            shift = (bend(X) - bend(B))[:, 0]
            np.testing.assert_allclose(got.sum(1), shift, rtol=1e-4, atol=1e-5)


def test_one_feature_gets_it_all(curved: ox.Model) -> None:
    shift = np.tile((bend(X) - bend(B))[:, :1], 4)
    for method in ("FeatureAblation", "ShapleyValues", "ShapleyValueSampling", "KernelShap"):
        got = attribute(method, curved, X, baselines=B, target=0, feature_mask=0)
        np.testing.assert_allclose(got, shift, rtol=1e-4, atol=1e-5)
    got, error = ox.ShapleyValueSampling(curved).attribute(
        X, feature_mask=0, target=0, n_samples=4, return_standard_error=True
    )
    np.testing.assert_array_equal(error, 0)


@pytest.mark.parametrize("method", ["KernelShap", "Lime"])
def test_more_features_than_samples(method: str) -> None:
    """Equal shares where nothing is known, and no wait for a matrix of all features."""
    wide = f32(1, 3072)
    box = ox.BlackBox(lambda x: x.sum(1))
    if method == "Lime":
        assert np.isfinite(ox.Lime(box).attribute(wide, seed=0)).all()
        return
    with pytest.warns(UserWarning, match="don't determine the Shapley values of 3072 features"):
        got = ox.KernelShap(box).attribute(wide, n_samples=40, seed=0)
    np.testing.assert_allclose(got.sum(), wide.sum(), rtol=1e-3)


@pytest.mark.parametrize("piece", [None, 4])
def test_kernel_shap_is_the_regression_of_its_samples(
    piece: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against least squares with the constraint put in by substitution, and its sandwich."""
    from onnxplain.kernels.coalitions import kernel_shap, unpack

    from onnxplain.perturb import surrogates

    features, n_samples = 9, 120
    if piece is not None:  # the numbers don't depend on how many samples are taken at a time
        monkeypatch.setattr(surrogates, "_TALL", piece * features)
    x = f32(1, features).astype(np.float64)

    def score(z: np.ndarray) -> np.ndarray:
        return np.sin(z @ np.arange(1, features + 1)) + z.prod(1)

    got, error = ox.KernelShap(ox.BlackBox(score)).attribute(
        x, n_samples=n_samples, seed=5, return_standard_error=True
    )
    z = unpack(kernel_shap(5, 0, n_samples - 2, features), features).astype(float)
    y = score(z * x)
    total = score(x)[0]
    rest, seen = z[:, :-1] - z[:, -1:], y - z[:, -1] * total
    found = np.linalg.lstsq(rest, seen, rcond=None)[0]
    np.testing.assert_allclose(got[0], [*found, total - found.sum()], rtol=1e-6, atol=1e-8)
    # The two of a pair are one observation; leverage as HC3 has it, equal pairs being one.
    same = [tuple(sorted(map(bytes, z[p : p + 2].astype(bool)))) for p in range(0, len(z), 2)]
    assert len(set(same)) < len(same)
    bread = np.linalg.inv(rest.T @ rest)
    meat = np.zeros_like(bread)
    for p in range(0, len(rest), 2):
        r, left = rest[p : p + 2], (seen - rest @ found)[p : p + 2]
        moved = r.T @ left / (1 - same.count(same[p // 2]) * np.trace(r @ bread @ r.T))
        meat += np.outer(moved, moved)
    spread = np.diag(bread @ meat @ bread)
    last = np.ones(features - 1) @ bread @ meat @ bread @ np.ones(features - 1)
    np.testing.assert_allclose(error[0] ** 2, [*spread, last], rtol=1e-6)


# ------------------------------------------------------------------------ lime


def test_lime_is_the_weighted_fit_of_its_samples() -> None:
    from onnxplain.kernels.coalitions import bernoulli, unpack
    from sklearn.linear_model import Lasso, LinearRegression, Ridge

    x, base = f32(2, 6).astype(np.float64), f32(2, 6).astype(np.float64)

    def score(z: np.ndarray) -> np.ndarray:
        return np.sin(2 * z).sum(1) + z[:, 0] * z[:, 1]

    z = unpack(bernoulli(3, 0, 80, 6), 6)
    kernels = {
        "cosine": lambda a, b: 1 - (a * b).sum(1) / np.linalg.norm(a) / np.linalg.norm(b, axis=1),
        "euclidean": lambda a, b: np.linalg.norm(a - b, axis=1),
    }
    surrogates = {"lasso": Lasso(0.01), "ridge": Ridge(), "linear": LinearRegression()}
    for name, surrogate in surrogates.items():
        for kernel, distance in kernels.items():
            similar = ox.get_exp_kernel_similarity_function(kernel, 1.5)
            got = ox.Lime(ox.BlackBox(score), name, similar).attribute(
                x, base, n_samples=80, seed=3
            )
            by_hand = ox.Lime(
                ox.BlackBox(score), name, lambda a, b, s, similar=similar, **k: similar(a, b, s)
            ).attribute(x, base, n_samples=80, seed=3)
            np.testing.assert_allclose(by_hand, got, rtol=1e-7, atol=1e-10)
            for e in range(2):
                copies = np.where(z, x[e], base[e])
                weights = np.exp(-(distance(x[e : e + 1], copies) ** 2) / (2 * 1.5**2))
                surrogate.fit(z.astype(float), score(copies), sample_weight=weights)
                np.testing.assert_allclose(got[e], surrogate.coef_, rtol=1e-6, atol=1e-9)


def test_lime_of_your_own_samples_and_model(linear: ox.Model) -> None:
    class Means:
        """The difference of the mean scores with and without a feature."""

        coef_: np.ndarray

        def fit(self, z: np.ndarray, y: np.ndarray, sample_weight: np.ndarray) -> None:
            self.coef_ = np.array([y[c == 1].mean() - y[c == 0].mean() for c in z.T])

        def predict(self, z: np.ndarray) -> np.ndarray:
            return z @ self.coef_

    def each(x: np.ndarray, **told: Any) -> Any:
        assert x.shape == (1, 4) and told["num_interp_features"] == 4
        assert told["feature_mask"].shape == (1, 4) and told["baselines"].shape == (1, 4)
        for number in range(16):
            yield np.array([[number >> f & 1 for f in range(4)]])

    method = ox.Lime(linear, Means(), lambda *a, **k: 1.0, each)
    got = method.attribute(X, B, target=2, n_samples=1000)
    np.testing.assert_allclose(got, (X - B) * W[:, 2], rtol=1e-4, atol=1e-5)


def test_lime_base_maps_samples_by_your_functions(linear: ox.Model) -> None:
    """Two interpretable features: the halves of the input."""
    x = X[:1]

    def halves(x: np.ndarray, **told: Any) -> np.ndarray:
        assert told == {"told": 3}
        return generator.integers(0, 2, (1, 2))

    def onto(sample: np.ndarray, x: np.ndarray, **told: Any) -> np.ndarray:
        return x * np.repeat(sample, 2, axis=1)

    def back(copy: np.ndarray, x: np.ndarray, **told: Any) -> np.ndarray:
        return (copy != 0)[:, ::2]

    generator = np.random.default_rng(0)
    want = (x * W[:, 1]).reshape(1, 2, 2).sum(2)
    same = lambda a, b, s, **told: 1.0  # noqa: E731
    there = ox.LimeBase(linear, "linear", same, halves, True, onto)
    got = there.attribute(x, target=1, n_samples=30, told=3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    copies = lambda x, **told: onto(halves(x, **told), x)  # noqa: E731
    here = ox.LimeBase(linear, "linear", same, copies, False, None, back)
    got = here.attribute(x, target=1, n_samples=30, told=3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ox.InputError, match="one example at a time"):
        there.attribute(X, target=1, told=3)
    with pytest.raises(ox.InputError, match="give perturb_func"):
        ox.LimeBase(linear, perturb_interpretable_space=False)
    plain, error = ox.LimeBase(linear, "linear").attribute(
        x, target=1, n_samples=60, seed=0, return_standard_error=True
    )
    np.testing.assert_allclose(plain, x * W[:, 1], rtol=1e-4, atol=1e-5)
    assert error.shape == plain.shape and (error < 1e-4).all()


def boom(*args: Any, **more: Any) -> Any:
    raise ZeroDivisionError("no")


@pytest.mark.parametrize(
    ("name", "explain"),
    [
        ("perturb_func", lambda m: ox.Lime(m, "linear", perturb_func=boom).attribute(X)),
        ("similarity_func", lambda m: ox.Lime(m, "linear", boom).attribute(X)),
        ("similarity_func", lambda m: ox.LimeBase(m, "linear", boom).attribute(X[:1])),
        (
            "from_interp_rep_transform",
            lambda m: ox.LimeBase(m, from_interp_rep_transform=boom).attribute(X[:1]),
        ),
        ("perm_func", lambda m: ox.FeaturePermutation(m, boom).attribute(X)),
    ],
)
def test_functions_of_your_own_that_fail_are_named(name: str, explain: Any) -> None:
    with pytest.raises(ox.EvaluationError, match=f"{name} raised ZeroDivisionError"):
        explain(ox.BlackBox(lambda x: x.sum(1)))


def test_similarities_that_leave_nothing_to_fit() -> None:
    box = ox.BlackBox(lambda x: x.sum(1))
    narrow = ox.get_exp_kernel_similarity_function("euclidean", 1e-3)
    with pytest.raises(ox.EvaluationError, match="wider kernel"):
        ox.Lime(box, "linear", narrow, lambda x, **k: np.zeros((1, 4))).attribute(X)
    for weight in (-1.0, np.nan):
        with pytest.raises(ox.EvaluationError, match="negative, NaN or infinite"):
            ox.Lime(box, "linear", lambda *a, weight=weight, **k: weight).attribute(X)


def test_fit_of_a_surrogate(linear: ox.Model, curved: ox.Model) -> None:
    good = ox.Lime(linear, "linear").answer(inputs=X, target=0, n_samples=100, seed=0)
    np.testing.assert_allclose(good.checks["fit"], 1, rtol=1e-6)
    poor = ox.Lime(curved, "linear").answer(inputs=3 * X, target=0, n_samples=100, seed=0)
    assert (poor.checks["fit"] < 0.9999).all() and (poor.checks["fit"] > 0).all()
    np.testing.assert_array_equal(poor.checks["samples"], 100)
    sums = ox.KernelShap(linear).answer(inputs=X, target=0, n_samples=14, seed=0)
    np.testing.assert_allclose(sums.checks["r_squared"], 1, rtol=1e-6)


# ------------------------------------------------------------------------ occlusion


def occluded(
    score: Callable[[np.ndarray], np.ndarray], x: np.ndarray, size: Any, stride: Any, base: Any
) -> np.ndarray:
    """The mean of what windows take away over those that cover an element."""
    total, count = np.zeros(x.shape), np.zeros(x.shape)
    steps = [-(-(n - w) // s) + 1 for n, w, s in zip(x.shape[1:], size, stride, strict=True)]
    for at in np.ndindex(*steps):
        box = tuple(slice(i * s, i * s + w) for i, s, w in zip(at, stride, size, strict=True))
        copy = x.copy()
        copy[(slice(None), *box)] = np.broadcast_to(base, x.shape)[(slice(None), *box)]
        lost = (score(x) - score(copy)).reshape(-1, *[1] * len(box))
        total[(slice(None), *box)] += lost
        count[(slice(None), *box)] += 1
    return total / count


IMAGE = """image (float[N,2,6,5] x) => (float[N,3] y) {
    c = Conv(x, k)
    t = Tanh(c)
    f = Flatten(t)
    y = MatMul(f, w)
}"""
K, WIDE, PICTURES = f32(2, 2, 3, 3), f32(24, 3), f32(3, 2, 6, 5)


@pytest.fixture(scope="module")
def image() -> ox.Model:
    return onnx(IMAGE, k=K, w=WIDE)


@pytest.mark.parametrize(
    ("size", "stride"), [((2, 3, 2), (1, 2, 1)), ((1, 2, 2), (1, 2, 2)), ((2, 6, 5), None)]
)
@pytest.mark.parametrize("kind", ["model", "callable"])
def test_occlusion(size: Any, stride: Any, kind: str, image: ox.Model) -> None:
    score = lambda x: image(x.astype(np.float32))["y"]  # noqa: E731
    m = image if kind == "model" else ox.BlackBox(score)
    for base in (0, 0.5, PICTURES[:1]):
        got = ox.Occlusion(m).attribute(PICTURES, size, stride, base, target=2)
        want = occluded(lambda x: score(x)[:, 2], PICTURES, size, stride or (1, 1, 1), base)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_what_the_same_windows_cover_is_one_feature(image: ox.Model) -> None:
    size, stride = (2, 3, 2), (2, 2, 2)
    options = {"sliding_window_shapes": size, "strides": stride}
    found = ox.explain(image, PICTURES, "occlusion", 0, method_options=options)
    windows = np.zeros((2, 6, 5), int)
    for number, (row, column) in enumerate(np.ndindex(3, 3)):
        windows[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 2] += 1 << number
    cells = found.features["x"][0].ravel()
    assert ((cells[:, None] == cells) == (windows.reshape(-1, 1) == windows.ravel())).all()
    single = ox.explain(image, PICTURES, "occlusion", 0, sliding_window_shapes=(1, 1, 1))
    assert single.features == {}


def test_occlusion_of_two_inputs() -> None:
    m = onnx(TWO)
    a, b = X, B.reshape(5, 2, 2)
    got = ox.Occlusion(m).attribute((a, b), ((2,), (1, 2)), (1, (1, 1)))
    dot = lambda a, b: (a * b.reshape(5, 4)).sum(1)  # noqa: E731
    want = occluded(lambda z: dot(z, b), a, (2,), (1,), 0)
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5)
    want = occluded(lambda z: dot(a, z), b, (1, 2), (1, 1), 0)
    np.testing.assert_allclose(got[1], want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ permutation


def test_permutation_takes_values_from_other_examples(linear: ox.Model) -> None:
    """Linear: w * (x - another example's x), and every column is one permutation."""
    got = ox.FeaturePermutation(linear).attribute(X, target=1, seed=0)
    other = X - got / W[:, 1]
    for column, values in zip(other.T, X.T, strict=True):
        np.testing.assert_allclose(np.sort(column), np.sort(values), atol=1e-4)
        assert not np.allclose(column, values, atol=1e-4)
    again = ox.FeaturePermutation(linear).attribute(X, target=1, seed=0)
    np.testing.assert_array_equal(again, got)
    apart = ox.FeaturePermutation(linear).attribute(X, target=1, seed=1)
    assert not np.allclose(apart, got)
    grouped = ox.FeaturePermutation(linear).attribute(
        X, target=1, seed=0, feature_mask=[0, 0, 1, 1]
    )
    assert (grouped[:, 0] == grouped[:, 1]).all() and (grouped[:, 2] == grouped[:, 3]).all()


@pytest.mark.parametrize("kind", ["model", "callable"])
def test_permutation_by_a_function(
    kind: str, linear: ox.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = linear if kind == "model" else ox.BlackBox(lambda x: x @ W)
    calls = []

    def rolled(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        assert x.shape == (5, 4) and mask.shape == (1, 4) and mask.dtype == bool
        calls.append(mask)
        return np.where(mask, np.roll(x, 1, axis=0), x)

    want = (X - np.roll(X, 1, axis=0)) * W[:, 2]
    got = ox.FeaturePermutation(m, rolled).attribute(X, target=2)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.concatenate(calls), np.eye(4, dtype=bool))  # each feature once
    # Once, too, where the batch has not room for all features.
    calls.clear()
    if kind == "callable":
        m = ox.BlackBox(lambda x: x @ W, batch_size=8)
    monkeypatch.setattr(graph_game.Graph, "fitting", lambda self: 8)
    got = ox.FeaturePermutation(m, rolled).attribute(X, target=2, perturbations_per_eval=1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.concatenate(calls), np.eye(4, dtype=bool))
    with pytest.raises(ox.EvaluationError, match="perm_func returned shape"):
        ox.FeaturePermutation(m, lambda x, mask: x[:2]).attribute(X, target=2)


# ------------------------------------------------------------------------ outputs


def test_every_output_where_none_is_named(linear: ox.Model) -> None:
    want = X[:, None, :] * W.T[None]
    for method in ("FeatureAblation", "ShapleyValues", "ShapleyValueSampling", "Occlusion"):
        got = attribute(method, linear, X)
        assert got.shape == (5, 3, 4)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for method in ("KernelShap", "Lime"):
        with pytest.raises(ox.TargetError):
            attribute(method, linear, X)
    grid = onnx('g (float[N,2] x) => (float[N,2,2] y) { y = Einsum<equation="ni,nj->nij">(x, x) }')
    got = ox.FeatureAblation(grid).attribute(X[:, :2])
    assert got.shape == (5, 2, 2, 2)
    np.testing.assert_allclose(got[:, 0, 1, 1], X[:, 0] * X[:, 1], rtol=1e-5)
    np.testing.assert_allclose(got[:, 1, 1, 0], 0)
    one = ox.FeatureAblation(grid).attribute(X[:, :2], target=(0, 1))
    np.testing.assert_allclose(one, got[:, 0, 1])


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("kind", ["model", "callable"])
def test_one_number_for_the_whole_batch(method: str, kind: str) -> None:
    """A feature goes in all examples at once; the first dimension is 1."""
    m: Any = onnx(
        "g (float[N,4] x) => (float y) { h = MatMul(x, w) y = ReduceSum<keepdims=0>(h) }",
        w=W[:, :1],
    )
    if kind == "callable":
        m = ox.BlackBox(lambda x: float((x @ W[:, 0]).sum()))
    got = attribute(method, m, X, baselines=B)
    assert got.shape == (1, 4)
    want = ((X - B) * W[:, 0]).sum(0, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    if method != "Occlusion":
        with pytest.raises(ox.InputError, match="must share one mask"):
            attribute(method, m, X, feature_mask=np.arange(20).reshape(5, 4))


# ------------------------------------------------------------------------ layers and neurons

BLOCK = """block (float[N,4] x) => (float[N,3] y) {
    h = MatMul(x, a)
    r = Tanh(h)
    s = Add(r, x)
    gate = Sigmoid(x)
    g = Mul(s, gate)
    shape = Shape(g)
    zero = Constant<value_ints=[0]>()
    n = Gather(shape, zero)
    two = Constant<value_ints=[2, 2]>()
    to = Concat<axis=0>(n, two)
    wide = Reshape(g, to)
    flat = Flatten(wide)
    y = MatMul(flat, w)
}"""
A = f32(4, 4)


def tail(r: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What follows r, in a residual block with a gate."""
    return ((r + x) / (1 + np.exp(-x))) @ W


@pytest.fixture(scope="module")
def block() -> ox.Model:
    return onnx(BLOCK, a=A, w=W)


def test_a_layer_of_a_residual_block(block: ox.Model) -> None:
    """What goes around the layer stays as it is."""
    r = np.tanh(X @ A)
    slope = W[:, 1] / (1 + np.exp(-X))
    for base in (0, 0.3, f32(4), f32(5, 4)):
        got = ox.LayerFeatureAblation(block, "r").attribute(X, base, target=1)
        np.testing.assert_allclose(got, (r - base) * slope, rtol=1e-4, atol=1e-5)
    entering = ox.LayerFeatureAblation(block, "r").attribute(
        X, target=1, attribute_to_layer_input=True
    )
    want = np.stack([
        (tail(r, X) - tail(np.where(np.arange(4) == f, 0, r), X))[:, 1] for f in range(4)
    ], 1)  # fmt: skip
    np.testing.assert_allclose(entering, want, rtol=1e-4, atol=1e-5)  # tanh(0) = 0
    mask = [[0, 0, 1, 1], [0, 1, 2, 3], [5, 5, 5, 2], [0, 0, 0, 0], [4, 3, 4, 3]]
    got = ox.LayerFeatureAblation(block, "r").attribute(X, target=1, layer_mask=mask)
    for row, own, found in zip(r * slope, np.array(mask), got, strict=True):
        np.testing.assert_allclose(found, [row[own == k].sum() for k in own], rtol=1e-4, atol=1e-5)
    wide = ox.LayerFeatureAblation(block, "wide").attribute(X, target=1)
    s = (r + X) / (1 + np.exp(-X))
    np.testing.assert_allclose(wide, (s * W[:, 1]).reshape(5, 2, 2), rtol=1e-4, atol=1e-5)


def test_what_comes_before_the_layer_runs_once(block: ox.Model) -> None:
    method = ox.LayerFeatureAblation(block, "r")
    method.attribute(X, target=1)
    key = next(k for k in reversed(block._programs) if k[0][0] == "perturb")
    written = {node.op_type for node in block._programs[key].model.graph}
    assert "Tanh" not in written and "Sigmoid" not in written


def test_a_list_of_layers(block: ox.Model) -> None:
    got = ox.LayerFeatureAblation(block, ["r", "gate"]).attribute(X, target=1)
    assert isinstance(got, list) and len(got) == 2
    r, gate = np.tanh(X @ A), 1 / (1 + np.exp(-X))
    np.testing.assert_allclose(got[0], r * gate * W[:, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], (r + X) * gate * W[:, 1], rtol=1e-4, atol=1e-5)
    grouped = ox.LayerFeatureAblation(block, ["r", "gate"]).attribute(
        X, target=1, layer_mask=(0, [0, 1, 1, 1])
    )
    whole = np.tile((r * gate * W[:, 1]).sum(1, keepdims=True), 4)
    np.testing.assert_allclose(grouped[0], whole, rtol=1e-4, atol=1e-5)
    want = (r + X) * gate * W[:, 1]
    want[:, 1:] = want[:, 1:].sum(1, keepdims=True)
    np.testing.assert_allclose(grouped[1], want, rtol=1e-4, atol=1e-5)
    # One behind the other: each is taken by itself.
    one, two = ox.LayerFeatureAblation(block, ["r", "wide"]).attribute(X, target=1)
    np.testing.assert_allclose(one, got[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(two.reshape(5, 4), got[1], rtol=1e-4, atol=1e-5)


def test_a_layer_permuted(block: ox.Model) -> None:
    def rolled(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.where(mask, np.roll(x, 1, axis=0), x)

    r = np.tanh(X @ A)
    want = (r - np.roll(r, 1, axis=0)) * W[:, 1] / (1 + np.exp(-X))
    got = ox.LayerFeaturePermutation(block, "r", rolled).attribute(X, target=1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    drawn = ox.LayerFeaturePermutation(block, "r").attribute(X, target=1, seed=2)
    other = r - drawn / (W[:, 1] / (1 + np.exp(-X)))
    for column, values in zip(other.T, r.T, strict=True):
        np.testing.assert_allclose(np.sort(column), np.sort(values), atol=1e-3)


def test_neurons(block: ox.Model) -> None:
    def score(x: np.ndarray) -> np.ndarray:
        return np.tanh(x.astype(np.float64) @ A)

    for selector, pick in (
        (2, lambda h: h[:, 2]),
        ((slice(1, 3),), lambda h: h[:, 1:3].sum(1)),
        (lambda h: h[:, 0] * h[:, 3], lambda h: h[:, 0] * h[:, 3]),
        (lambda h: h.max(axis=1, keepdims=True), lambda h: h.max(axis=1)),
    ):
        got = ox.NeuronFeatureAblation(block, "r").attribute(X, selector, B)
        want = ablated(lambda x, pick=pick: pick(score(x)), X, B)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    entering = ox.NeuronFeatureAblation(block, "r").attribute(X, 1, attribute_to_neuron_input=True)
    np.testing.assert_allclose(entering, X * A[:, 1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ox.EvaluationError, match="one number for each row"):
        ox.NeuronFeatureAblation(block, "r").attribute(X, lambda h: h)
    with pytest.raises(ox.EvaluationError, match="neuron_selector raised"):
        ox.NeuronFeatureAblation(block, "r").attribute(X, boom)
    with pytest.raises(ox.InputError, match="neuron_selector is None"):
        ox.NeuronFeatureAblation(block, "r").attribute(X, None)


def test_a_function_of_a_layer_of_one_value() -> None:
    m = onnx("g (float[N,4] x) => (float[N,1] y) { h = MatMul(x, w) y = Tanh(h) }", w=W[:, :1])
    got = ox.NeuronFeatureAblation(m, "h").attribute(X, lambda h: 2 * h[:, 0])
    np.testing.assert_allclose(got, 2 * X * W[:, 0], rtol=1e-4, atol=1e-5)


def test_a_layer_without_a_row_for_each_example_is_refused() -> None:
    windows = onnx(
        "g (float[N,4] x) => (float[N,3] y) { h = Reshape(x, s) q = Tanh(h) "
        "b = Reshape(q, t) y = MatMul(b, w) }",
        s=np.array([-1, 2]), t=np.array([-1, 4]), w=W,
    )  # fmt: skip
    with pytest.raises(ox.UnsupportedModelError, match="row"):
        ox.LayerFeatureAblation(windows, "h").attribute(X, target=0)


# ------------------------------------------------------------------------ what "off" means


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("kind", ["model", "callable"])
def test_a_background_is_averaged_over(kind: str, limit: int | None, curved: ox.Model) -> None:
    """Scores, not inputs; more rows than fit one run where memory is short."""
    rows = f32(70, 4)
    if kind == "callable":
        m: Any = ox.BlackBox(bend, memory_limit=limit)
    else:
        m = curved if limit is None else model(HEAD + CURVED, {"w": W, "v": V}, memory_limit=limit)
    for method in ("FeatureAblation", "ShapleyValues", "KernelShap"):
        options = {"n_samples": 16} if method == "KernelShap" else {}
        got = getattr(ox, method)(m).attribute(X[:2], ox.Background(rows), target=0, **options)
        brute = ablated if method == "FeatureAblation" else shapley_of
        each = [brute(lambda z: bend(z)[:, 0], X[:2], row) for row in rows]
        np.testing.assert_allclose(got, np.mean(each, axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 3, 5])
def test_backgrounds_in_pieces(
    at_once: int, curved: ox.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five rows in runs of so many, for pieces of five samples."""
    options = {"baselines": ox.Background(B), "target": 0}
    want = ox.ShapleyValues(curved).attribute(X, **options)
    monkeypatch.setattr(graph_game, "_PIECE", 5)
    monkeypatch.setattr(graph_game.Graph, "backgrounds_at_once", lambda *_: at_once)
    got = ox.ShapleyValues(curved).attribute(X, **options)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_maskers_by_name(image: ox.Model) -> None:
    regions = (np.arange(6)[:, None] // 3 * 2 + np.arange(5) // 3)[None, None]
    for name in ("mean", "blur", "noise", "segment-mean"):
        got = ox.FeatureAblation(image).attribute(PICTURES, name, target=0, feature_mask=regions)
        if name == "mean":
            base = np.broadcast_to(PICTURES.mean(axis=(2, 3), keepdims=True), PICTURES.shape)
            want = ablated(lambda x: image(x)["y"][:, 0], PICTURES, base, regions)
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
        assert np.isfinite(got).all() and np.abs(got).max() > 0
    with pytest.raises(ox.InputError, match="no baseline 'fog'"):
        ox.FeatureAblation(image).attribute(PICTURES, "fog", target=0)


def test_zero_and_other_baselines_of_integers() -> None:
    """Tokens are looked up: only whole numbers make sense."""
    table = f32(9, 3)
    m = onnx(
        "g (int64[N,4] ids) => (float[N,3] y) { e = Gather(table, ids) "
        "a = Constant<value_ints=[1]>() y = ReduceSum<keepdims=0>(e, a) }",
        table=table,
    )
    ids = rng.integers(1, 9, (5, 4))
    for base in (0, 7, np.array([1, 2, 3, 4])):
        got = ox.ShapleyValues(m).attribute(ids, base, target=1)
        want = table[ids, 1] - np.broadcast_to(table[base, 1], (5, 4))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ chunks and threads

CHUNKED: dict[str, dict[str, Any]] = {
    "FeatureAblation": {},
    "FeaturePermutation": {"seed": 1},
    "Occlusion": {"sliding_window_shapes": (1, 2, 2)},
    "ShapleyValueSampling": {"n_samples": 4, "seed": 1},
    "KernelShap": {"n_samples": 200, "seed": 1},
    "Lime": {"n_samples": 90, "seed": 1},
}


def chunked(method: str, m: Any, **more: Any) -> np.ndarray:
    return getattr(ox, method)(m).attribute(PICTURES, target=0, **{**CHUNKED[method], **more})


@pytest.mark.parametrize("method", CHUNKED)
def test_chunks_do_not_change_the_numbers(method: str, image: ox.Model) -> None:
    want = chunked(method, image)
    small = onnx(IMAGE, k=K, w=WIDE)
    small.settings = type(small.settings)(memory_limit=1)
    for m in (image, small):
        for at_once in (None, 1, 7, 10**6):
            got = chunked(method, m, perturbations_per_eval=at_once)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    box = ox.BlackBox(lambda x: image(x)["y"], batch_size=4)
    np.testing.assert_allclose(chunked(method, box), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", CHUNKED)
def test_threads_do_not_change_the_numbers(method: str, image: ox.Model) -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("this machine has one processor")
    before, found = numba.get_num_threads(), []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            found.append(chunked(method, image))
    finally:
        numba.set_num_threads(before)
    np.testing.assert_array_equal(*found)


def test_seeds(linear: ox.Model) -> None:
    for method in SAMPLED:
        m = ox.BlackBox(lambda x: np.sin(3 * x).prod(1) + x[:, 0])
        first, same, other = (attribute(method, m, X, n_samples=12, seed=s) for s in (5, 5, 6))
        np.testing.assert_array_equal(first, same)
        assert not np.allclose(first, other)
        assert np.isfinite(attribute(method, m, X, seed=None)).all()


# ------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("FeatureAblation", {"feature_mask": [0.0, 1, 2, 3]}, "numbered by integers"),
        ("FeatureAblation", {"feature_mask": [0, -1, 2, 3]}, "numbered from 0"),
        ("FeatureAblation", {"feature_mask": [0, 1, 2]}, "shape \\[3\\]"),
        ("FeatureAblation", {"perturbations_per_eval": 0}, "perturbations_per_eval"),
        ("FeatureAblation", {"perturbations_per_eval": 1.5}, "perturbations_per_eval"),
        ("FeatureAblation", {"baselines": np.zeros((2, 4))}, "baseline"),
        ("FeatureAblation", {"target": 3}, "target"),
        ("Occlusion", {"sliding_window_shapes": (5,)}, "larger than the input"),
        ("Occlusion", {"sliding_window_shapes": (2,), "strides": 3}, "leaves out values"),
        ("ShapleyValueSampling", {"n_samples": 0}, "n_samples"),
        ("ShapleyValueSampling", {"n_samples": 2.5}, "n_samples"),
        ("ShapleyValueSampling", {"sampling": "sobol"}, "sampling"),
        ("ShapleyValueSampling", {"n_samples": 3, "sampling": "antithetic"}, "give 4"),
        ("ShapleyValueSampling", {"n_samples": 5, "sampling": "stratified"}, "give 8"),
        ("ShapleyValueSampling", {"seed": -1}, "seed"),
        ("KernelShap", {"n_samples": 2}, "n_samples"),
        ("Lime", {"n_samples": -1}, "n_samples"),
        ("Lime", {"tolerance": 0}, "tolerance"),
        ("Lime", {"tolerance": -0.1}, "tolerance"),
        ("KernelShap", {"tolerance": float("nan")}, "tolerance"),
        ("ShapleyValueSampling", {"tolerance": "low"}, "tolerance"),
    ],
)
def test_refusals(method: str, options: dict[str, Any], says: str, linear: ox.Model) -> None:
    with pytest.raises(ox.InputError, match=says):
        attribute(method, linear, X, **{"target": 0, **options})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ShapleyValueSampling", {"n_samples": 1}),
        ("Lime", {"n_samples": 19}),
        ("KernelShap", {"n_samples": 6}),
        ("KernelShap", {"n_samples": 6, "return_input_shape": False}),
    ],
)
def test_too_few_samples_for_standard_errors(
    method: str, options: dict[str, Any], linear: ox.Model
) -> None:
    with pytest.warns(UserWarning, match="too few samples"):
        got, error = attribute(
            method, linear, X, target=0, seed=0, return_standard_error=True, **options
        )
    assert np.isfinite(got).all()
    assert error.shape == X.shape and np.isnan(error).all()


def test_more_refusals(linear: ox.Model) -> None:
    with pytest.raises(ox.InputError, match="two or more"):
        ox.FeaturePermutation(linear).attribute(X[:1], target=0)
    with pytest.raises(ox.InputError, match=r"31 features have 2\^31 = .* coalitions"):
        ox.ShapleyValues(ox.BlackBox(lambda x: x.sum(1))).attribute(f32(1, 31))
    with pytest.raises(ox.InputError, match="perm_func must be a function"):
        ox.FeaturePermutation(linear, 3)  # type: ignore[arg-type]
    with pytest.raises(ox.InputError, match="interpretable_model 'tree' is not known"):
        ox.Lime(linear, "tree")
    for m in (linear, ox.BlackBox(lambda x: x @ W)):
        with pytest.raises(ox.InputError, match="no example"):
            ox.FeatureAblation(m).attribute(X[:0], target=0)
    with pytest.raises(ox.LayerError):
        ox.LayerFeatureAblation(linear, "nothing")
    with pytest.raises(ox.LayerError, match="Python function"):
        ox.LayerFeatureAblation(ox.BlackBox(lambda x: x), "h")


def test_rows_that_change_each_other() -> None:
    """Where an answer depends on the other rows, these are the other examples, in every run."""
    net = model(f"""{HEAD} net (float[N, 3] x) => (float[N] y) {{
        first = Constant<value_ints = [0]>() mean = ReduceMean(x, first)
        gap = Sub(x, mean) e = Exp(gap)
        second = Constant<value_ints = [1]>() y = ReduceSum<keepdims = 0>(e, second) }}""")
    x = f32(4, 3)

    def score(x: np.ndarray) -> np.ndarray:
        return np.exp(x - x.mean(0)).sum(1)

    gone = [score(np.where(np.arange(3) == f, 0, x)) for f in range(3)]
    want = score(x)[:, None] - np.stack(gone, axis=1)
    for at_most in (None, 1, 2):
        got = ox.FeatureAblation(net).attribute(x, perturbations_per_eval=at_most)
        np.testing.assert_allclose(got, want, atol=1e-5)
    exact = ox.ShapleyValues(net).attribute(x)
    options: dict[str, Any] = {"n_samples": 500, "seed": 0, "tolerance": 0.1}
    answer = ox.ShapleyValueSampling(net).answer(inputs=x, **options)
    assert len(set(answer.checks["samples"])) == 1
    assert (np.abs(answer.result - exact) <= 5 * answer.standard_errors + 1e-6).all()
    with pytest.raises(ox.InputError, match="depends on the others"):
        ox.FeatureAblation(net).attribute(x, feature_mask=[[0, 1, 1], *[[0, 1, 2]] * 3])


def test_batches_that_are_quantized_together() -> None:
    net = model(f"""{HEAD} net (float[N, 3] x) => (float[N, 3] y) {{
        q, scale, zero = DynamicQuantizeLinear(x) y = DequantizeLinear(q, scale, zero) }}""")
    x = f32(4, 3) * np.array([[1], [10], [100], [1]], np.float32)
    together = ox.FeatureAblation(net).attribute(x, target=1)
    for i in range(4):
        alone = ox.FeatureAblation(net).attribute(x[i : i + 1], target=1, perturbations_per_eval=1)
        np.testing.assert_array_equal(together[i : i + 1], alone)


def test_what_explains_nothing_is_refused() -> None:
    net = model(f"{HEAD} net (float[N, 3] x, float[N, 3] z) => (float[N, 3] y) {{ y = Exp(z) }}")
    with pytest.raises(ox.LayerError, match="'y' does not depend on 'x'"):
        ox.FeatureAblation(net).attribute(f32(2, 3), target=0, additional_forward_args=f32(2, 3))
