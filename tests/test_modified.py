"""Guided backpropagation and deconvolution in closed form, and Captum's own expectations."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import skimage.data
from skimage.transform import resize

import onnxplain as ox
from onnxplain import (
    Deconvolution,
    GuidedBackprop,
    NeuronDeconvolution,
    NeuronGuidedBackprop,
)
from onnxplain.errors import InputError, NeuronError, NotDifferentiableError
from tests.helpers import HEAD, model, shared

RNG = np.random.default_rng(0)
W = RNG.standard_normal((5, 7))
V = RNG.standard_normal((7, 3))
X = RNG.standard_normal((4, 5))
H = X @ W

# A ReLU, written in every way that counts as one.
RELUS = {
    "relu": "r = Relu(h)",
    "clip": "r = Clip(h, zero, six)",
    "clip without maximum": "r = Clip(h, zero)",
    "thresholded": "r = ThresholdedRelu<alpha = 0.0>(h)",
    "max": "r = Max(h, zero)",
    "max, other way round": "r = Max(zero, h)",
    "where": "mask = Greater(h, zero) r = Where(mask, h, zero)",
}
CONSTANTS = {"zero": np.array(0.0), "six": np.array(60.0)}


def net(body: str, **weights: np.ndarray) -> ox.Model:
    """x [N, 5] -> h = x W -> r = body(h) -> y = r V [N, 3]."""
    used = {k: v for k, v in {**CONSTANTS, **weights}.items() if k in body}
    text = f"""{HEAD}
    net (double[N, 5] x) => (double[N, 3] y) {{ h = MatMul(x, W) {body} y = MatMul(r, V) }}"""
    return model(text, {"W": W, "V": V, **used})


@pytest.mark.parametrize("body", RELUS.values(), ids=RELUS)
def test_every_relu(body: str) -> None:
    made, target = net(body), np.array([2, 0, 1, 1])
    back = V[:, target].T
    got = GuidedBackprop(made).attribute(X, target=target)
    np.testing.assert_allclose(got, (np.maximum(back, 0) * (H > 0)) @ W.T, rtol=1e-12)
    got = Deconvolution(made).attribute(X, target=target)
    np.testing.assert_allclose(got, np.maximum(back, 0) @ W.T, rtol=1e-12)


def test_a_clip_that_is_no_relu_stays() -> None:
    made = net("r = Clip(h, low, six)", low=np.array(-1.0), six=np.array(1.0))
    with pytest.warns(UserWarning, match="plain gradient"):
        got = GuidedBackprop(made).attribute(X, target=0)
    np.testing.assert_allclose(got, ox.Saliency(made).attribute(X, target=0, abs=False))


@pytest.mark.parametrize("method", [GuidedBackprop, ox.GuidedBackpropMap])
def test_what_can_not_be_explained_is_refused_without_a_warning(
    method: type[ox.Attribution],
) -> None:
    made = model(f"{HEAD} net (float[N, 1, 4, 4] x) => (float[N, 1, 4, 4] y) {{ y = Floor(x) }}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NotDifferentiableError):
            method(made).attribute(np.zeros((1, 1, 4, 4), np.float32), target=(0, 0, 0))  # type: ignore[attr-defined]


@pytest.mark.parametrize("activations", ["all", ["Tanh"], ("LeakyRelu", "Tanh")])
def test_other_activations_where_asked_for(activations: object) -> None:
    made, back = net("r = Tanh(h)"), V[:, 1]
    got = GuidedBackprop(made, activations=activations).attribute(X, target=1)
    np.testing.assert_allclose(got, np.maximum(back * (1 - np.tanh(H) ** 2), 0) @ W.T, rtol=1e-12)
    got = Deconvolution(made, activations=activations).attribute(X, target=1)
    want = np.broadcast_to(np.maximum(back, 0) @ W.T, X.shape)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_leaky_activations_are_not_relus_by_default() -> None:
    made = net("f = Cast<to = 1>(h) l = LeakyRelu(f) r = Cast<to = 11>(l)")
    with pytest.warns(UserWarning, match="activations='all'"):
        plain = GuidedBackprop(made).attribute(X, target=0)
    np.testing.assert_allclose(plain, ox.Saliency(made).attribute(X, target=0, abs=False))
    got = GuidedBackprop(made, activations="all").attribute(X, target=0)
    want = np.maximum(V[:, 0] * np.where(H > 0, 1, 0.01), 0) @ W.T
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_learned_slope_is_not_touched() -> None:
    made = net("r = PRelu(h, slope)", slope=np.array([0.5]))
    got = Deconvolution(made, activations=["PRelu"]).attribute(X, target=0)
    want = np.broadcast_to(np.maximum(V[:, 0], 0) @ W.T, X.shape)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("activations", ["silu", [], ["Relu", "Conv"], ["MaxPool"]])
def test_unknown_activations_are_refused(activations: object) -> None:
    with pytest.raises(InputError, match="give 'relu', 'all', or a list of Relu"):
        GuidedBackprop(net("r = Relu(h)"), activations=activations)


def test_of_and_by_layers() -> None:
    made = net("r = Relu(h)")
    by_layer = GuidedBackprop(made, wrt="h").attribute(X, target=1)
    np.testing.assert_allclose(by_layer, np.maximum(V[:, 1], 0) * (H > 0), rtol=1e-12)
    of_neuron = NeuronGuidedBackprop(made, "r").attribute(X, (3,))
    np.testing.assert_allclose(of_neuron, (H[:, 3:4] > 0) * W[:, 3], rtol=1e-12)
    of_two = NeuronDeconvolution(made, "r").attribute(X, neuron_selector=(slice(1, 3),))
    np.testing.assert_allclose(of_two, np.broadcast_to(W[:, 1:3].sum(1), X.shape), rtol=1e-12)
    # Nothing is between the layer's input and the inputs.
    with pytest.warns(UserWarning, match="between 'x' and 'h'"):
        entering = NeuronDeconvolution(made, "r").attribute(X, 3, attribute_to_neuron_input=True)
    np.testing.assert_allclose(entering, np.broadcast_to(W[:, 3], X.shape), rtol=1e-12)
    with pytest.raises(NeuronError):
        NeuronGuidedBackprop(made, "r").attribute(X, 7)


# ---- Captum's expectations (its tests of guided backpropagation and deconvolution) -----------

ONE_CONV = f"""{HEAD}
net (float[N, 1, 4, 4] x, float[N, 1, 4, 4] more) => (float[N, 4] y) {{
    z = Add(x, more)
    c = Conv(z, K, b)
    r = Relu(c)
    flat = Flatten(r)
    fc = Gemm<transB = 1>(flat, F)
    y = Relu(fc)
}}"""
ONE_CONV_WEIGHTS = {
    "K": np.ones((2, 1, 3, 3), np.float32),
    "b": np.array([-50, -75], np.float32),
    "F": np.repeat([[1.0] * 5 + [-1.0] * 3], 4, axis=0).astype(np.float32),
}
IMAGE = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
GUIDED = [[0, 1, 1, 1], [1, 3, 3, 2], [1, 3, 3, 2], [1, 2, 2, 1]]
GUIDED_OF_TWO = [[1, 2, 2, 1], [2, 4, 4, 2], [2, 4, 4, 2], [1, 2, 2, 1]]
DECONVOLVED = [[2, 3, 3, 1], [3, 5, 5, 2], [3, 5, 5, 2], [1, 2, 2, 1]]


@pytest.mark.parametrize(
    ("method", "neuron", "second", "want"),
    [
        (GuidedBackprop, NeuronGuidedBackprop, 0, GUIDED),
        (GuidedBackprop, NeuronGuidedBackprop, 1, GUIDED_OF_TWO),
        (Deconvolution, NeuronDeconvolution, 0, DECONVOLVED),
        (Deconvolution, NeuronDeconvolution, 1, DECONVOLVED),
    ],
)
def test_what_captum_expects(method, neuron, second, want) -> None:
    made = model(ONE_CONV, ONE_CONV_WEIGHTS)
    more = np.full_like(IMAGE, second)
    for got in (
        *method(made).attribute((IMAGE, more), target=0),
        *neuron(made, "fc").attribute((IMAGE, more), (3,)),
        *neuron(made, "fc").attribute((IMAGE, more), (slice(0, 1),)),
        method(made).attribute(IMAGE, target=0, additional_forward_args=(more,)),
    ):
        np.testing.assert_array_equal(got[0, 0], want)


def test_the_last_layer_is_the_output() -> None:
    made = model(ONE_CONV, ONE_CONV_WEIGHTS)
    x = 100 * np.random.default_rng(1).standard_normal((3, 1, 4, 4)).astype(np.float32)
    inputs = (x, np.zeros_like(x))
    for method, neuron in (
        (GuidedBackprop, NeuronGuidedBackprop),
        (Deconvolution, NeuronDeconvolution),
    ):
        assert not method(made).multiplies_by_inputs
        for i in range(4):
            whole = method(made).attribute(inputs, target=i)
            part = neuron(made, "y").attribute(inputs, (i,))
            np.testing.assert_array_equal(whole, part)


# ---- quantized models -------------------------------------------------------------------------


def quantized(between: str, zero: int = 0, dtype: type = np.uint8) -> ox.Model:
    """x [N, 5] -> a = x W -> between -> y = (its last value) V [N, 3]."""
    constants = {
        "s": np.float32(0.05),
        "z": np.array(zero, dtype),
        "zero": np.float32(0),
        "middle": np.array(128, np.uint8),
        "floor": np.array(0, np.uint8),
    }
    last = re.findall(r"(\w+) =", between)[-1]
    body = f"a = MatMul(x, W) {between} y = MatMul({last}, V)"
    text = f"{HEAD} net (float[N, 5] x) => (float[N, 3] y) {{ {body} }}"
    used = {k: v for k, v in constants.items() if k in re.findall(r"\w+", between)}
    return model(text, {"W": W.astype(np.float32), "V": V.astype(np.float32), **used})


CUT = "q = QuantizeLinear(a, s, z) b = DequantizeLinear(q, s, z)"
PLAIN = quantized("b = Relu(a)")


@pytest.mark.parametrize("method", [GuidedBackprop, Deconvolution])
@pytest.mark.parametrize(
    ("between", "zero", "dtype"),
    [
        (CUT, 0, np.uint8),
        (CUT, -128, np.int8),
        (CUT, 0, np.uint16),
        ("q = QuantizeLinear(a, s) b = DequantizeLinear(q, s)", 0, np.uint8),
        # the ReLU is there: what quantizes its result again is none
        ("r = Relu(a) q = QuantizeLinear(r, s, z) b = DequantizeLinear(q, s, z)", 0, np.uint8),
        (f"{CUT} p = QuantizeLinear(b, s, z) c = DequantizeLinear(p, s, z)", 0, np.uint8),
        # signed before it
        (
            """m = QuantizeLinear(a, s, middle) n = DequantizeLinear(m, s, middle)
            q = QuantizeLinear(n, s, z) b = DequantizeLinear(q, s, z)""",
            0,
            np.uint8,
        ),
    ],
)
def test_a_quantizer_that_cuts_off_is_the_relu_before_it(
    method: type[ox.Attribution], between: str, zero: int, dtype: type
) -> None:
    x, target = X.astype(np.float32) / 3, np.array([2, 0, 1, 1])
    made = quantized(between, zero, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = method(made).attribute(x, target=target)  # type: ignore[attr-defined]
    want = method(PLAIN).attribute(x, target=target)  # type: ignore[attr-defined]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_by_the_layer_that_a_quantizer_cuts_off() -> None:
    x = X.astype(np.float32) / 3
    for method in (GuidedBackprop, Deconvolution):
        got = method(quantized(CUT), wrt="a").attribute(x, target=1)
        want = method(PLAIN, wrt="a").attribute(x, target=1)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_guided_map_of_a_quantized_model_is_that_of_its_parent() -> None:
    """The quantizer of onnxruntime dropped all 26 ReLUs of SqueezeNet."""
    parent, small = (
        ox.Model(shared(f"squeezenet/squeezenet1.0-dc{kind}.onnx")) for kind in ("", "-qdq-int8")
    )
    picture = resize(skimage.data.chelsea(), (227, 227), preserve_range=True)[..., ::-1]
    x = (picture - [104, 117, 123]).transpose(2, 0, 1)[None].astype(np.float32)
    of_both = [GuidedBackprop(made).attribute(x, target=285) for made in (parent, small)]
    assert np.corrcoef(*(a.ravel() for a in of_both))[0, 1] > 0.95


QUANTIZE_B = "q = QuantizeLinear({}, s, z) b = DequantizeLinear(q, s, z)"


@pytest.mark.parametrize(
    ("between", "zero"),
    [
        (CUT, 3),  # its least number is negative
        ("h = Sigmoid(a) " + QUANTIZE_B.format("h"), 0),
        ("h = Exp(a) g = Sigmoid(a) i = Mul(h, g) " + QUANTIZE_B.format("i"), 0),
        ("h = Exp(a) g = Sigmoid(a) i = Max(g, h) " + QUANTIZE_B.format("i"), 0),
        ("h = Abs(a) g = Concat<axis = 1>(h) i = Identity(g) " + QUANTIZE_B.format("i"), 0),
    ],
)
def test_a_quantizer_of_what_is_not_negative_only_rounds(between: str, zero: int) -> None:
    made, x = quantized(between, zero), X.astype(np.float32) / 3
    with pytest.warns(UserWarning, match="plain gradient"):
        got = GuidedBackprop(made).attribute(x, target=0)
    np.testing.assert_allclose(got, ox.Saliency(made).attribute(x, target=0, abs=False))


def test_a_quantized_input_is_no_relu() -> None:
    text = f"""{HEAD} net (float[N, 5] x) => (float[N, 3] y) {{
        q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) y = MatMul(d, V) }}"""
    made = model(text, {"s": np.float32(0.05), "V": V[:5].astype(np.float32)})
    with pytest.warns(UserWarning, match="plain gradient"):
        got = GuidedBackprop(made).attribute(np.abs(X).astype(np.float32), target=2)
    np.testing.assert_allclose(got, np.broadcast_to(V[:5, 2], X.shape), rtol=1e-5)
    assert (got < 0).any()


def test_quantized_operators_have_their_relu_inside() -> None:
    text = f"""{HEAD} net (float[N, 5] x) => (float[N, 3] y) {{
        q = QuantizeLinear(x, s, m) r = QLinearMatMul(q, s, m, W, t, m, u, z)
        d = DequantizeLinear(r, u, z) y = MatMul(d, V) }}"""
    weights = RNG.integers(100, 156, (5, 7)).astype(np.uint8)
    scales = {"s": np.float32(0.03), "t": np.float32(0.02), "u": np.float32(0.05)}
    points = {"m": np.array(128, np.uint8), "z": np.array(0, np.uint8)}
    made = model(text, {"W": weights, "V": V.astype(np.float32), **scales, **points})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = GuidedBackprop(made).attribute(X.astype(np.float32), target=1)
    real = (weights - 128.0) * 0.02
    stepped = np.clip(np.round(X / 0.03), -128, 127) * 0.03
    on = (stepped @ real > 0) & (stepped @ real < 255 * 0.05)
    want = (np.maximum(V[:, 1], 0) * on) @ real.T
    np.testing.assert_allclose(got, want * (np.abs(X / 0.03) < 127), rtol=1e-4, atol=1e-5)


# ---- other kinds of models --------------------------------------------------------------------


def test_max_pooling_before_and_after_a_relu_differ() -> None:
    """Overlapping windows: a ReLU may not move through its pooling when its rule is changed."""
    text = f"""{HEAD}
    net (double[N, 1, 4] x) => (double[N, 3] y) {{
        r = Relu(x) p = MaxPool<kernel_shape = [2]>(r) y = Flatten(p)
    }}"""
    made = model(text)
    x = np.array([[[1.0, 3.0, 2.0, -1.0]]])
    back = np.array([5.0, -2.0, 1.0])
    graph = ox.differentiate(made, None, ["x"], GuidedBackprop(made).rules)
    got = graph({"x": x, "cotangent": back[None]})["x.grad"]
    np.testing.assert_array_equal(got[0, 0], [0, 3, 1, 0])  # not 5 at the second


def test_channels_last() -> None:
    text = f"""{HEAD}
    net (float[N, 4, 4, 2] x) => (float[N, 3] y) {{
        t = Transpose<perm = [0, 3, 1, 2]>(x) c = Conv(t, K) r = Relu(c)
        p = GlobalAveragePool(r) y = Flatten(p)
    }}"""
    kernel = RNG.standard_normal((3, 2, 3, 3)).astype(np.float32)
    made = model(text, {"K": kernel})
    x = RNG.standard_normal((2, 4, 4, 2)).astype(np.float32)
    got = GuidedBackprop(made).attribute(x, target=1)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    on = np.einsum("nijcab,cab->nij", windows, kernel[1]) > 0
    want = np.zeros_like(x)
    for i, j in np.ndindex(2, 2):
        want[:, i : i + 3, j : j + 3] += on[:, i, j, None, None, None] * np.moveaxis(
            kernel[1], 0, -1
        )
    np.testing.assert_allclose(got, want / 4, rtol=1e-4, atol=1e-6)


def test_token_ids_are_explained_by_their_embedding() -> None:
    text = f"""{HEAD}
    net (int64[N, 6] ids) => (double[N, 2] y) {{
        e = Gather(E, ids) h = MatMul(e, A) r = Relu(h) m = ReduceMean<keepdims = 0>(r, one)
        y = MatMul(m, B)
    }}"""
    weights = {
        "E": RNG.standard_normal((9, 4)),
        "A": RNG.standard_normal((4, 5)),
        "B": RNG.standard_normal((5, 2)),
        "one": np.array([1]),
    }
    made = model(text, weights)
    ids = RNG.integers(0, 9, (3, 6))
    with pytest.raises(InputError, match="embedding layer 'e'"):
        GuidedBackprop(made).attribute(ids, target=0)
    got = GuidedBackprop(made, wrt="e").attribute(ids, target=0)
    on = weights["E"][ids] @ weights["A"] > 0
    back = np.maximum(weights["B"][:, 0] / 6, 0)
    np.testing.assert_allclose(got, (back * on) @ weights["A"].T, rtol=1e-6)
