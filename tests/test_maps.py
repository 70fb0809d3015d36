"""Saliency maps: TorchRay's numbers on the same network, and the pictures in closed form."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import onnxplain as ox
from onnxplain import (
    ExcitationBackprop,
    GradCAMMap,
    GradientMap,
    GradientTimesImage,
    GuidedBackpropMap,
    LayerActivationGuidedBackprop,
    LinearApproximation,
    NeuronGuidedBackprop,
    VanillaBackprop,
)
from onnxplain.errors import InputError, LayerError, NeuronError
from tests.helpers import HEAD, model

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape, scale=0.6).astype(np.float32)


# A batch norm, a shortcut, both poolings.
TEXT = f"""{HEAD}
net (float[N, 3, 12, 12] x) => (float[N, 5] y) {{
    c1 = Conv<pads = [1, 1, 1, 1]>(x, K1, b1)
    r1 = Relu(c1)
    p1 = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r1)
    c2 = Conv<pads = [1, 1, 1, 1]>(p1, K2)
    n2 = BatchNormalization(c2, gain, shift, mean, variance)
    s2 = Add(n2, p1)
    r2 = Relu(s2)
    p2 = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(r2)
    c3 = Conv(p2, K3, b3)
    r3 = Relu(c3)
    m = GlobalAveragePool(r3)
    f = Flatten(m)
    y = Gemm<transB = 1>(f, F, bf)
}}"""
WEIGHTS = {
    "K1": normal(6, 3, 3, 3),
    "b1": normal(6),
    "K2": normal(6, 6, 3, 3),
    "gain": RNG.uniform(0.5, 1.5, 6).astype(np.float32),
    "shift": normal(6),
    "mean": normal(6),
    "variance": RNG.uniform(0.5, 1.5, 6).astype(np.float32),
    "K3": normal(8, 6, 3, 3),
    "b3": normal(8),
    "F": normal(5, 8),
    "bf": normal(5),
}
IMAGES = RNG.uniform(size=(2, 3, 12, 12)).astype(np.float32)
TARGETS = [1, 3]

# Method, layers, options.
CALLS: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    *((method, {}, {}) for method in ("GradientMap", "DeconvolutionMap", "GuidedBackpropMap")),
    ("GradientMap", {"saliency_layer": "r2"}, {}),
    ("GradientMap", {"saliency_layer": "r2"}, {"resize": True, "smooth": 0.05}),
    ("GuidedBackpropMap", {}, {"resize": (9, 14), "resize_mode": "bicubic", "smooth": 0.1}),
    ("DeconvolutionMap", {"saliency_layer": "c2"}, {"resize": True, "resize_mode": "bicubic"}),
    ("LinearApproximation", {"saliency_layer": "r1"}, {}),
    ("LinearApproximation", {"saliency_layer": "r2"}, {"smooth": 0.2}),
    ("GradCAMMap", {"saliency_layer": "r2"}, {}),
    ("GradCAMMap", {"saliency_layer": "r2"}, {"resize": True, "smooth": 0.01}),
    *(("ExcitationBackprop", {"saliency_layer": v}, {}) for v in ("p2", "r2", "n2", "p1")),
    ("ExcitationBackprop", {}, {}),
    ("ExcitationBackprop", {"saliency_layer": "p1"}, {"resize": True, "smooth": 0.03}),
    *(
        ("ContrastiveExcitationBackprop", {"saliency_layer": s, "contrast_layer": c}, {})
        for s, c in (("p2", "r3"), ("p1", "p2"), ("r1", "n2"))
    ),
    (
        "ContrastiveExcitationBackprop",
        {"saliency_layer": "p1", "contrast_layer": "r3", "classifier_layer": "y"},
        {"resize": (5, 7)},
    ),
]


def name_of(method: str, layers: dict[str, str], options: dict[str, Any]) -> str:
    return " ".join([method, *layers.values(), *map(str, options.values())])


@pytest.fixture(scope="module")
def net() -> ox.Model:
    return model(TEXT, WEIGHTS)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).parent / "oracle" / "golden" / "torchray.npz"))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: name_of(*call))
def test_torchray(call: Any, net: ox.Model, golden: dict[str, np.ndarray]) -> None:
    method, layers, options = call
    got = getattr(ox, method)(net, **layers).attribute(IMAGES, target=TARGETS, **options)
    want = golden[name_of(*call)]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_the_network_is_torchrays(net: ox.Model, golden: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(net(IMAGES)["y"], golden["y"], rtol=1e-4, atol=1e-5)


# ---- resizing and smoothing -------------------------------------------------------------------


def test_smoothing_is_a_gaussian_filter(net: ox.Model) -> None:
    plain = GradientMap(net).attribute(IMAGES, target=0)
    got = GradientMap(net).attribute(IMAGES, target=0, smooth=0.125)
    sigma = 0.125 * 12
    want = gaussian_filter(
        plain, sigma, axes=(2, 3), mode="nearest", radius=int(np.ceil(4 * sigma))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": (5,)}, "positive integers, .width, height."),
        ({"resize": (5, 0)}, "positive integers"),
        ({"resize": 5}, "resize=5"),
        ({"resize": (5, 2.5)}, "positive integers"),
        ({"resize": True, "resize_mode": "linear"}, "resize_mode 'linear' .* there are 2: .*bilin"),
        ({"resize": True, "resize_mode": "lanczos"}, "resize_mode is one of .* not 'lanczos'"),
        ({"resize_mode": "lanczos"}, "resize_mode is one of .* not 'lanczos'"),
        ({"smooth": -0.1}, "smooth=-0.1"),
        ({"smooth": float("nan")}, "smooth=nan"),
    ],
)
def test_sizes_that_are_none(net: ox.Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GradientMap(net).attribute(IMAGES, target=0, **options)


# ---- places -----------------------------------------------------------------------------------


def test_channels_last() -> None:
    text = f"""{HEAD}
    net (float[N, 12, 12, 3] x) => (float[N, 6] y) {{
        t = Transpose<perm = [0, 3, 1, 2]>(x) c = Conv(t, K) r = Relu(c)
        u = Transpose<perm = [0, 2, 3, 1]>(r) m = ReduceMean<keepdims = 0>(u, axes)
        y = Identity(m)
    }}"""
    plain = f"""{HEAD}
    net (float[N, 3, 12, 12] x) => (float[N, 6] y) {{
        c = Conv(x, K) r = Relu(c) m = ReduceMean<keepdims = 0>(r, axes) y = Identity(m)
    }}"""
    first = model(plain, {"K": WEIGHTS["K1"], "axes": np.array([2, 3])})
    last = model(text, {"K": WEIGHTS["K1"], "axes": np.array([1, 2])})
    images = np.moveaxis(IMAGES, 1, -1)
    for method in (GradientMap, GuidedBackpropMap, ExcitationBackprop, VanillaBackprop):
        want = method(first).attribute(IMAGES, target=2)
        got = method(last).attribute(images, target=2)
        np.testing.assert_allclose(got, np.moveaxis(want, 1, -1), rtol=1e-5, atol=1e-9)
    options = {"resize": True, "smooth": 0.05}
    want = LinearApproximation(first, "r").attribute(IMAGES, target=2, **options)
    got = LinearApproximation(last, "u").attribute(images, target=2, **options)
    np.testing.assert_allclose(got, np.moveaxis(want, 1, -1), rtol=1e-4, atol=1e-8)


def test_no_channels() -> None:
    text = f"""{HEAD}
    net (float[N, 12, 12] x) => (float[N, 6] y) {{
        u = Unsqueeze(x, one) c = Conv(u, K) r = Relu(c) m = GlobalAveragePool(r) y = Flatten(m)
    }}"""
    made = model(text, {"K": WEIGHTS["K1"][:, :1].copy(), "one": np.array([1])})
    x = IMAGES[:, 0]
    got = GradientMap(made).attribute(x, target=1)
    np.testing.assert_array_equal(got, ox.Saliency(made).attribute(x, target=1))
    got = GradCAMMap(made, "r").attribute(x, target=1, resize=True)
    assert got.shape == x.shape


def test_layers_neurons_and_other_inputs() -> None:
    text = f"""{HEAD}
    net (float[N, 3, 12, 12] x, float[N, 4] row) => (float[N, 5] y) {{
        c = Conv(x, K) r = Relu(c) m = GlobalAveragePool(r) f = Flatten(m) t = MatMul(row, W)
        j = Concat<axis = 1>(f, t) y = MatMul(j, V)
    }}"""
    made = model(text, {"K": WEIGHTS["K1"], "W": normal(4, 2), "V": normal(8, 5)})
    row = normal(2, 4)
    with pytest.raises(LayerError, match=r"'row' has shape \[N, 4\], without .*in additional_for"):
        GradientMap(made).attribute((IMAGES, row), target=0)
    alone = GradientMap(made).attribute(IMAGES, target=0, additional_forward_args=(row,))
    assert alone.shape == (2, 1, 12, 12)
    both = GradCAMMap(made, ["c", "r"]).attribute((IMAGES, row), target=0, resize=True)
    assert [m.shape for m in both] == [(2, 1, 12, 12)] * 2
    assert not np.allclose(*both)
    with pytest.raises(LayerError, match="without spatial axes"):
        LinearApproximation(made, "f").attribute((IMAGES, row), target=0)
    neuron = GradientMap(made, of="f").attribute(
        IMAGES, target=(3,), additional_forward_args=(row,)
    )
    gradient = ox.NeuronGradient(made, "f").attribute(IMAGES, (3,), additional_forward_args=(row,))
    np.testing.assert_array_equal(neuron, np.abs(gradient).max(1, keepdims=True))


def test_grad_cam_is_of_the_last_spatial_layer(
    net: ox.Model, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "onnxplain"):
        method = GradCAMMap(net)
    assert method.layer == "p2"  # what the last convolution makes of it has one place
    assert "grad-cam-map explains by layer 'p2'" in caplog.text
    want = GradCAMMap(net, "p2").attribute(IMAGES, target=TARGETS, resize=True)
    np.testing.assert_array_equal(method.attribute(IMAGES, target=TARGETS, resize=True), want)
    np.testing.assert_allclose(
        want, ox.GradCAM(net).attribute(IMAGES, target=TARGETS), rtol=1e-4, atol=1e-6
    )
    explanation = ox.explain(net, IMAGES, "grad-cam-map", target=TARGETS, resize=True)
    assert explanation.layer == "p2"
    assert list(explanation.arrays) == ["x"]
    np.testing.assert_array_equal(explanation.arrays["x"], want)
    # of a neuron: the last layer before it
    assert GradCAMMap(net, of="c2").layer == "p1"
    # other maps are of the inputs
    assert GradientMap(net).layer is None
    assert ox.explain(net, IMAGES, "gradient-map", target=TARGETS).layer is None


def test_a_map_of_a_layer_on_record() -> None:
    text = f"""{HEAD}
    net (float[N, 4] row, float[N, 3, 12, 12] x) => (float[N, 6] y) {{
        c = Conv(x, K) r = Relu(c) m = GlobalAveragePool(r) f = Flatten(m) t = MatMul(row, W)
        y = Add(f, t)
    }}"""
    made = model(text, {"K": WEIGHTS["K1"], "W": normal(4, 6)})
    inputs = (normal(2, 4), IMAGES)
    found = ox.explain(made, inputs, "grad-cam-map", target=1, layer="r")
    assert (found.layer, list(found.arrays)) == ("r", ["x"])
    want = GradCAMMap(made, "r").attribute(inputs, target=1)
    np.testing.assert_array_equal(found.arrays["x"], want)
    neuron = ox.explain(made, inputs, "grad-cam-map", layer="f", neuron=1)  # found before it
    np.testing.assert_allclose(neuron.arrays["x"], want, rtol=1e-5)


def test_half_precision() -> None:
    text = TEXT.replace("float[", "float16[")
    half = model(text, {k: v.astype(np.float16) for k, v in WEIGHTS.items()})
    whole = model(TEXT, WEIGHTS)
    got = LinearApproximation(half, "r2").attribute(IMAGES.astype(np.float16), target=1)
    want = LinearApproximation(whole, "r2").attribute(IMAGES, target=1)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0.05, atol=0.02 * np.abs(want).max())


# ---- pictures ---------------------------------------------------------------------------------


def brightness(colors: np.ndarray) -> np.ndarray:
    """Grayscale as the collection of CNN visualizations makes it."""
    total = np.abs(colors).sum(1, keepdims=True)
    out = []
    for image in total:
        low, high = image.min(), np.percentile(image, 99)
        out.append(np.clip((image - low) / (high - low), 0, 1))
    return np.stack(out)


def test_vanilla_backprop_and_gradient_times_image(net: ox.Model) -> None:
    gradient = ox.Saliency(net).attribute(IMAGES, target=TARGETS, abs=False)
    for method, colors in ((VanillaBackprop, gradient), (GradientTimesImage, gradient * IMAGES)):
        got = method(net).attribute(IMAGES, target=TARGETS)
        np.testing.assert_allclose(got, colors, rtol=1e-5, atol=1e-8)
        got = method(net).attribute(IMAGES, target=TARGETS, grayscale=True)
        np.testing.assert_allclose(got, brightness(colors), atol=1e-5)


def test_a_flat_picture_is_black() -> None:
    text = (
        f"{HEAD} net (float[N, 1, 4, 4] x) => (float[N, 1] y) {{ f = Flatten(x) y = MatMul(f, W) }}"
    )
    made = model(text, {"W": np.ones((16, 1), np.float32)})
    got = VanillaBackprop(made).attribute(np.ones((2, 1, 4, 4), np.float32), grayscale=True)
    np.testing.assert_array_equal(got, np.zeros((2, 1, 4, 4)))


def test_a_filter_of_a_layer(net: ox.Model) -> None:
    everywhere = (4, slice(None), slice(None))
    # Behind a ReLU the sizes are the values.
    want = NeuronGuidedBackprop(net, "r2").attribute(IMAGES, everywhere)
    method = LayerActivationGuidedBackprop(net, "r2")
    np.testing.assert_allclose(method.attribute(IMAGES, 4), want, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(method.attribute(IMAGES, everywhere), want, rtol=1e-5, atol=1e-8)
    got = method.attribute(IMAGES, 4, grayscale=True)
    np.testing.assert_allclose(got, brightness(want), atol=1e-5)
    # Before it, negative values count with their sign.
    values = ox.LayerActivation(net, "c1").attribute(IMAGES)
    cotangent = np.zeros_like(values)
    cotangent[:, 4] = np.sign(values[:, 4])
    backward = ox.differentiate(net, "c1", ["x"])({"x": IMAGES, "cotangent": cotangent})
    with pytest.warns(UserWarning, match="plain gradient"):
        got = LayerActivationGuidedBackprop(net, "c1").attribute(IMAGES, 4)
    np.testing.assert_allclose(got, backward["x.grad"], rtol=1e-5, atol=1e-6)
    with pytest.raises(NeuronError, match="out of range"):
        method.attribute(IMAGES, 6)
