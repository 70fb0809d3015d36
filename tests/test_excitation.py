"""Excitation backpropagation against a dense formulation; TorchRay's numbers are in test_maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import onnxplain as ox
from onnxplain import ContrastiveExcitationBackprop, ExcitationBackprop
from onnxplain.errors import LayerError
from tests.helpers import HEAD, model

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape, scale=0.6).astype(np.float32)


# ---- a dense formulation ----------------------------------------------------------------------


def dense(shape: tuple[int, ...], f: Any) -> np.ndarray:
    """The matrix of a linear function of arrays of a shape, [inputs, outputs]."""
    size = int(np.prod(shape))
    return np.stack([np.ravel(f(row.reshape(shape))) for row in np.eye(size)])


def excite(p: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Marginal winning probabilities: ``p`` [out], ``x`` [in] and ``w`` [in, out], one by one."""
    found = np.zeros(len(x))
    for i, out in enumerate(p):
        weighted = x * np.maximum(w[:, i], 0)
        if weighted.sum():
            found += weighted / weighted.sum() * out
    return found


LAYERED = f"""{HEAD}
net (float[N, 2, 5, 5] x) => (float[N, 3] y) {{
    c = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, K, b)
    r = Relu(c)
    a = AveragePool<kernel_shape = [2, 2]>(r)
    flat = Flatten(a)
    h = MatMul(flat, A)
    hb = Add(h, d)
    g = HardSwish(hb)
    e = Relu(g)
    z = Gemm(e, B, o)
    y = Softmax(z)
}}"""
PARTS = {
    "K": normal(4, 2, 3, 3),
    "b": normal(4),
    "A": normal(16, 12),
    "d": np.abs(normal(12)),
    "B": normal(12, 3),
    "o": normal(3),
}


def correlate(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, [(0, 0), (1, 1), (1, 1)]), (3, 3), axis=(1, 2)
    )
    return np.einsum("cijab,ocab->oij", windows[:, ::2, ::2], kernel)


def averaged(x: np.ndarray) -> np.ndarray:
    return (x[:, 1:, 1:] + x[:, 1:, :-1] + x[:, :-1, 1:] + x[:, :-1, :-1]) / 4


@pytest.fixture(scope="module")
def layered() -> ox.Model:
    return model(LAYERED, PARTS)


PHOTOS = RNG.uniform(size=(3, 2, 5, 5)).astype(np.float32)


def walk(made: ox.Model, start: np.ndarray) -> dict[str | None, np.ndarray]:
    """Maps of `a`, `r` and the image; `start` are the weights [12] that lead to the class."""
    values = {n: ox.LayerActivation(made, n).attribute(PHOTOS) for n in ("r", "flat", "e")}
    average = dense((4, 3, 3), averaged)
    conv = dense((2, 5, 5), lambda v: correlate(v, PARTS["K"]))
    found: dict[str | None, list[np.ndarray]] = {"a": [], "r": [], None: []}
    for i, photo in enumerate(PHOTOS):
        p = excite(np.ones(1), values["e"][i], start[:, None])
        p = excite(p, values["flat"][i], PARTS["A"])
        found["a"].append(p.reshape(4, 2, 2))
        p = excite(p, values["r"][i].ravel(), average)
        found["r"].append(p.reshape(4, 3, 3))
        p = excite(p, photo.ravel(), conv)
        found[None].append(p.reshape(2, 5, 5))
    return {k: np.stack(v).sum(1, keepdims=True) for k, v in found.items()}


@pytest.mark.parametrize("target", range(3))
def test_dense_formulation(layered: ox.Model, target: int) -> None:
    towards = walk(layered, PARTS["B"][:, target])
    against = walk(layered, -PARTS["B"][:, target])
    for layer, want in towards.items():
        got = ExcitationBackprop(layered, layer).attribute(PHOTOS, target=target)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(got.sum((1, 2, 3)), 1, rtol=1e-5)
        got = ContrastiveExcitationBackprop(layered, layer).attribute(PHOTOS, target=target)
        assert got.any()
        np.testing.assert_allclose(got, np.maximum(want - against[layer], 0), rtol=1e-3, atol=1e-6)


def test_by_ox_explain_and_its_check(layered: ox.Model) -> None:
    method = ExcitationBackprop(layered, "r")
    result, checks = method.explain(inputs=PHOTOS, target=0, resize=True, smooth=0.1)
    np.testing.assert_array_equal(
        result, method.attribute(PHOTOS, target=0, resize=True, smooth=0.1)
    )
    np.testing.assert_allclose(checks["probability"], 1, rtol=1e-6)
    _, checks = ExcitationBackprop(layered, ["a", "r"]).explain(inputs=PHOTOS, target=0)
    np.testing.assert_allclose(checks["probability"], 1, rtol=1e-6)


# ---- operators that the paper does not name ----------------------------------------------------


def shared(body: str, **weights: np.ndarray) -> tuple[ox.Model, np.ndarray]:
    """A model of one image [N, 2, 2, 2] whose output is a sum behind `body`, which makes `r`."""
    text = f"""{HEAD}
    net (float[N, 2, 2, 2] x) => (float[N, 1] y) {{
        {body}
        flat = Flatten(r) y = MatMul(flat, ones)
    }}"""
    return model(text, {"ones": np.ones((8, 1), np.float32), **weights}), CUBES


CUBES = RNG.uniform(0.2, 1, size=(3, 2, 2, 2)).astype(np.float32)
GAIN = RNG.uniform(0.5, 2, size=(1, 2, 1, 1)).astype(np.float32)


def over(x: np.ndarray, statistic: str) -> np.ndarray:
    return getattr(x, statistic)(axis=(2, 3), keepdims=True)


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("r = Sigmoid(x)", lambda x: 1 / (1 + np.exp(-x))),
        ("r = Tanh(x)", np.tanh),
        ("r = Mul(x, gain)", lambda x: x * GAIN),
        ("b = Add(x, gain) r = Relu(b)", lambda x: x + GAIN),
        ("b = Sub(x, gain) r = Abs(b)", lambda x: abs(x - GAIN)),
        ("s = Sigmoid(x) r = Mul(x, s)", lambda x: x / (1 + np.exp(-x))),
        ("m = ReduceMean(x, axes) d = Sub(x, m) r = Abs(d)", lambda x: abs(x - over(x, "mean"))),
        ("m = ReduceMax(x, axes) r = Div(x, m)", lambda x: x / over(x, "max")),
        ("r = Softmax<axis = 1>(x)", lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)),
        ("t = Tanh(x) r = Add(x, t)", lambda x: x + np.tanh(x)),
        ("t = Tanh(x) r = Mul(x, t)", lambda x: x * np.tanh(x)),
    ],
)  # fmt: skip
def test_stated_rules(body: str, want: Any) -> None:
    """What a place gets is its share of the sum: each of these hands it on as it is."""
    weights = {k: v for k, v in {"gain": GAIN, "axes": np.array([2, 3])}.items() if k in body}
    made, x = shared(body, **weights)
    values = want(x).sum(1, keepdims=True)
    expected = values / values.sum((1, 2, 3), keepdims=True)
    got = ExcitationBackprop(made).attribute(x)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_attention_weights_are_weights() -> None:
    text = f"""{HEAD}
    net (float[N, 4, 2, 2] x) => (float[N, 4] y) {{
        tokens = Reshape(x, shape) q = MatMul(tokens, Q) k = Transpose<perm = [0, 2, 1]>(q)
        s = MatMul(q, k) a = Softmax(s) v = MatMul(a, tokens) y = ReduceMean<keepdims = 0>(v, axes)
    }}"""
    weights = {"shape": np.array([0, 4, 4]), "Q": normal(4, 3), "axes": np.array([2])}
    made = model(text, weights)
    x = RNG.uniform(0.1, 1, size=(2, 4, 2, 2)).astype(np.float32)
    tokens = x.reshape(2, 4, 4)
    attention = ox.LayerActivation(made, "a").attribute(x)
    got = ExcitationBackprop(made).attribute(x, target=2)
    want = attention[:, 2, :, None] * tokens
    want /= want.sum((1, 2), keepdims=True)
    np.testing.assert_allclose(got, want.reshape(2, 4, 2, 2).sum(1, keepdims=True), rtol=1e-4)


def test_a_layer_that_only_inhibits() -> None:
    made, x = shared("m = Exp(x) t = Tanh(x) d = Sub(t, m) r = Relu(d)")
    with pytest.raises(LayerError, match="never visits 'm'"):
        ExcitationBackprop(made, "m", reshape_transform=lambda m: m).attribute(x)


def test_negative_activations() -> None:
    text = f"""{HEAD}
    net (float[N, 1, 2, 2] x) => (float[N, 1] y) {{ flat = Flatten(x) y = MatMul(flat, w) }}"""
    made = model(text, {"w": np.array([[1], [2], [1], [-4]], np.float32)})
    x = np.array([3, -1.499, 0.5, 2], np.float32).reshape(1, 1, 2, 2)
    with pytest.warns(UserWarning, match="ignore_negative=True"):
        got = ExcitationBackprop(made).attribute(x)
    total = 3 - 2 * 1.499 + 0.5
    np.testing.assert_allclose(got.ravel(), np.array([3, -2.998, 0.5, 0]) / total, rtol=1e-5)
    got = ExcitationBackprop(made, ignore_negative=True).attribute(x)
    np.testing.assert_allclose(got.ravel(), np.array([3, 0, 0.5, 0]) / 3.5, rtol=1e-6)


def test_what_nothing_excites_gets_nothing() -> None:
    made, x = shared("r = Mul(x, zero)", zero=np.zeros(1, np.float32))
    result, checks = ExcitationBackprop(made).explain(inputs=x)
    np.testing.assert_array_equal(result, np.zeros((3, 1, 2, 2)))
    np.testing.assert_array_equal(checks["probability"], np.zeros(3))


# ---- the layers of the contrastive form --------------------------------------------------------


def test_half_precision(layered: ox.Model) -> None:
    parts = {k: v.astype(np.float16) for k, v in PARTS.items()}
    half, photos = model(LAYERED.replace("float[", "float16["), parts), PHOTOS.astype(np.float16)
    for method in (ExcitationBackprop, ContrastiveExcitationBackprop):
        for layer in (None, "r"):
            want = method(layered, layer).attribute(PHOTOS, target=1)
            got = method(half, layer).attribute(photos, target=1)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, atol=0.02 * want.max())


@pytest.mark.parametrize("name", [None, "z", "y"])
def test_the_classifier_is_found(layered: ox.Model, name: str | None) -> None:
    method = ContrastiveExcitationBackprop(layered, "r", classifier_layer=name)
    assert method.classifier == "z"
    want = ContrastiveExcitationBackprop(layered, "r", "e").attribute(PHOTOS, target=0)
    np.testing.assert_array_equal(method.attribute(PHOTOS, target=0), want)


def test_another_classifier(layered: ox.Model) -> None:
    method = ContrastiveExcitationBackprop(layered, "r", "a", classifier_layer="hb")
    assert method.classifier == "h"
    usual = ContrastiveExcitationBackprop(layered, "r", "a")
    assert not np.allclose(*(m.attribute(PHOTOS, target=0) for m in (method, usual)))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"contrast_layer": "y"}, "contrast layer 'y' is not before the classifier 'z'"),
        ({"contrast_layer": "e", "classifier_layer": "h"}, "'e' is not before the classifier 'h'"),
        (
            {"saliency_layer": "a", "contrast_layer": "r"},
            "'a' is not before the contrast layer 'r'",
        ),
        ({"classifier_layer": "r2"}, "r2"),
        ({"classifier_layer": "a"}, "no convolution or matrix product.*leave it out for 'z'"),
        ({"saliency_layer": "hb"}, "without spatial axes"),
    ],
)
def test_layers_in_a_wrong_order(layered: ox.Model, layers: dict[str, str], message: str) -> None:
    with pytest.raises(LayerError, match=message):
        ContrastiveExcitationBackprop(layered, **layers).attribute(PHOTOS, target=0)


def test_no_classifier() -> None:
    made = model(
        f"""{HEAD}
        net (float[N, 3, 4, 4] x) => (float[N, 3] y) {{
            m = GlobalAveragePool(x) y = Flatten(m)
        }}"""
    )
    with pytest.raises(LayerError, match="use ExcitationBackprop"):
        ContrastiveExcitationBackprop(made)
