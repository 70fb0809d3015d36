"""The CAM family against dense formulas in numpy; where it finds channels, grids and layers."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest

import onnxplain as ox
from onnxplain.errors import InputError, LayerError
from onnxplain.methods import spatial
from onnxplain.methods.cam import (
    ClassActivationMap,
    EigenCAM,
    EigenGradCAM,
    GradCAM,
    GradCAMPlusPlus,
    GuidedGradCam,
    HiResCAM,
    LayerCAM,
    LayerGradCam,
    XGradCAM,
)
from onnxplain.methods.excitation import ExcitationBackprop
from onnxplain.methods.fullgrad import FullGrad
from onnxplain.methods.interpolate import interpolate
from onnxplain.methods.maps import GradCAMMap, VanillaBackprop
from onnxplain.methods.modified import GuidedBackprop
from onnxplain.methods.spatial import channel_axis
from onnxplain.model import single
from tests.helpers import HEAD, model

RNG = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


WEIGHTS = {
    "k": draw(5, 3, 3, 3) / 3,
    "b": draw(5),
    "w": draw(5 * 4 * 6, 7) / 5,
    "c": draw(7),
    "v": draw(7, 3),
    "flat": np.array([0, 120]),
}
X = draw(4, 3, 8, 12)
TARGET = np.array([2, 0, 1, 1])

# a [N, 5, 4, 6] -> y [N, 3]; what differs is how the values are laid out on the way
CONV = "h = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, k, b) a = Relu(h)"
TAIL = "f = Reshape(m, flat) d = MatMul(f, w) e = Add(d, c) r = Relu(e) y = MatMul(r, v)"
LAYOUTS = {
    "m": "m = Identity(a)",
    "last": "last = Transpose<perm = [0, 2, 3, 1]>(a) m = Transpose<perm = [0, 3, 1, 2]>(last)",
    "tokens": """g = Reshape(a, grid) t = Transpose<perm = [0, 2, 1]>(g)
        cls = ReduceMean<keepdims = 1>(t, one) tokens = Concat<axis = 1>(cls, t)
        s = Slice(tokens, one, end, one) u = Transpose<perm = [0, 2, 1]>(s) m = Reshape(u, back)""",
}
SHAPES = {
    "grid": np.array([0, 5, 24]),
    "one": np.array([1]),
    "end": np.array([25]),
    "back": np.array([0, 5, 4, 6]),
}


def net(layout: str = "m") -> ox.Model:
    body = f"{CONV} {LAYOUTS[layout]} {TAIL}"
    used = WEIGHTS | {k: v for k, v in SHAPES.items() if f"{k})" in body or f"{k}," in body}
    return model(f"{HEAD} net (float[N, 3, 8, 12] x) => (float[N, 3] y) {{ {body} }}", used)


def activations(x: np.ndarray = X) -> tuple[np.ndarray, np.ndarray]:
    """Activations and gradients of `a`, [N, 5, 4, 6] in float64."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    a = np.einsum("nchwij,ocij->nohw", windows, WEIGHTS["k"]) + WEIGHTS["b"][:, None, None]
    a = np.maximum(a, 0)
    hidden = a.reshape(len(x), -1) @ WEIGHTS["w"] + WEIGHTS["c"]
    g = ((hidden > 0) * WEIGHTS["v"][:, TARGET].T) @ WEIGHTS["w"].T
    return a, g.reshape(a.shape)


def plus_plus(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    total = a.sum((2, 3), keepdims=True)
    alpha = np.where(g != 0, g**2 / (2 * g**2 + total * g**3 + 1e-6), 0)
    return (alpha * np.maximum(g, 0)).sum((2, 3), keepdims=True) * a


def component(maps: np.ndarray) -> np.ndarray:
    """Projection on the eigenvector of the covariance of channels, up to its sign."""
    found = []
    for example in maps:
        flat = example.reshape(len(example), -1).T
        flat = flat - flat.mean(0)
        _, vectors = np.linalg.eigh(flat.T @ flat)
        found.append((flat @ vectors[:, -1]).reshape(1, *maps.shape[2:]))
    return np.array(found)


def summed(maps: np.ndarray) -> np.ndarray:
    return maps.sum(1, keepdims=True)


DENSE = {
    GradCAM: lambda a, g: summed(a * g.mean((2, 3), keepdims=True)),
    GradCAMPlusPlus: lambda a, g: summed(plus_plus(a, g)),
    HiResCAM: lambda a, g: summed(a * g),
    XGradCAM: lambda a, g: summed(
        a * (a * g).sum((2, 3), keepdims=True) / (a.sum((2, 3), keepdims=True) + 1e-7)
    ),
    LayerCAM: lambda a, g: summed(a * np.maximum(g, 0)),
    EigenCAM: lambda a, g: component(a),
    EigenGradCAM: lambda a, g: component(a * g),
}


def same_sign(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """`want`, turned to the sign of `got` example by example."""
    return want * np.sign((want * got).sum((1, 2, 3), keepdims=True))


@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_formula_in_every_layout(method: type[ClassActivationMap], layout: str) -> None:
    want = interpolate(DENSE[method](*activations()), (8, 12), "bilinear")
    got = method(net(layout), layout).attribute(X, target=TARGET, relu=False)
    if method.eigen:
        want = same_sign(want, got)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("method", DENSE)
def test_eigen_smoothing_projects_what_would_be_summed(method: type[ClassActivationMap]) -> None:
    a, g = activations()
    weighted = {
        GradCAM: a * g.mean((2, 3), keepdims=True),
        GradCAMPlusPlus: plus_plus(a, g),
        XGradCAM: a * (a * g).sum((2, 3), keepdims=True) / (a.sum((2, 3), keepdims=True) + 1e-7),
        LayerCAM: a * np.maximum(g, 0),
        EigenCAM: a,
    }.get(method, a * g)
    made = method(net(), "a")
    got = made.attribute(X, target=TARGET, relu=False, eigen_smooth=True)
    want = same_sign(interpolate(component(weighted), (8, 12), "bilinear"), got)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_the_sign_of_a_component_is_that_of_the_singular_value_decomposition() -> None:
    a, _ = activations()
    got = EigenCAM(net(), "a").attribute(X, relu=False)
    for found, example in zip(got, a, strict=True):
        flat = example.reshape(5, -1).T.astype(np.float32)
        flat = flat - flat.mean(0)
        want = (flat @ np.linalg.svd(flat)[2][0]).reshape(1, 1, 4, 6)
        np.testing.assert_allclose(found, interpolate(want, (8, 12), "bilinear")[0], atol=1e-4)


def test_options_of_a_map() -> None:
    want = DENSE[GradCAM](*activations())
    made = GradCAM(net(), "a")
    tight = {"rtol": 1e-4, "atol": 1e-5}
    got = made.attribute(X, target=TARGET, interpolate_mode="nearest")
    np.testing.assert_allclose(got, np.maximum(want, 0).repeat(2, 2).repeat(2, 3), **tight)
    got = made.attribute(X, target=TARGET, normalize=True)
    up = interpolate(np.maximum(want, 0), (8, 12), "bilinear")
    low, high = up.min((1, 2, 3), keepdims=True), up.max((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(got, (up - low) / np.maximum(high - low, 1e-30), **tight)
    # one example alone has the numbers that it has in a batch
    alone = made.attribute(X[2:3], target=1, normalize=True)
    np.testing.assert_allclose(alone[0], got[2], rtol=1e-5, atol=1e-6)


def test_a_flat_map_is_zero_when_scaled() -> None:
    got = GradCAM(net(), "a").attribute(X * 0 - 100, target=0, normalize=True)
    assert np.isfinite(got).all()
    assert got.max() <= 1


def test_a_list_of_layers_gives_a_list_of_maps() -> None:
    made = net()
    got = GradCAM(made, ["a", "h"]).attribute(X, target=TARGET)
    assert isinstance(got, list)
    for layer, found in zip(("a", "h"), got, strict=True):
        want = GradCAM(made, layer).attribute(X, target=TARGET)
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    entering = GradCAM(made, "a").attribute(X, target=TARGET, attribute_to_layer_input=True)
    np.testing.assert_allclose(entering, got[1], rtol=1e-5, atol=1e-6)


def test_hires_cam_adds_up_to_the_output_behind_a_linear_head() -> None:
    made = model(
        f"""{HEAD} net (float[N, 3, 8, 12] x) => (float[N, 7] d) {{
          {CONV} f = Reshape(a, flat) d = MatMul(f, w) }}""",
        {k: WEIGHTS[k] for k in ("k", "b", "w", "flat")},
    )
    maps = HiResCAM(made, "a").attribute(X, target=3, relu=False, interpolate_mode="nearest")
    # nearest repeats each place 2 x 2 times
    np.testing.assert_allclose(maps.sum((1, 2, 3)) / 4, made(X)["d"][:, 3], rtol=1e-4)


def test_layouts_of_the_input() -> None:
    want = GradCAM(net(), "a").attribute(X, target=TARGET)
    last = model(
        f"""{HEAD} net (float[N, 8, 12, 3] z) => (float[N, 3] y) {{
          x = Transpose<perm = [0, 3, 1, 2]>(z) {CONV} {LAYOUTS["m"]} {TAIL} }}""",
        WEIGHTS,
    )
    got = GradCAM(last, "a").attribute(np.moveaxis(X, 1, -1), target=TARGET)
    assert got.shape == (4, 8, 12, 1)
    np.testing.assert_allclose(got[..., 0], want[:, 0], rtol=1e-5, atol=1e-6)


def test_an_input_without_channels() -> None:
    made = model(
        f"""{HEAD} net (float[N, 8, 12] z) => (float[N, 3] y) {{
          x = Unsqueeze(z, one) h = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, k, b)
          a = Relu(h) {LAYOUTS["m"]} {TAIL} }}""",
        {**WEIGHTS, "k": WEIGHTS["k"][:, :1], "one": np.array([1])},
    )
    got = GradCAM(made).attribute(X[:, 0], target=TARGET)
    assert got.shape == (4, 8, 12)
    (values,) = made.resolve("a")
    mean = ox.LayerGradientXActivation(made, "a", multiply_by_inputs=False)
    g = mean.attribute(X[:, 0], target=TARGET).mean((2, 3), keepdims=True)
    a = ox.LayerActivation(made, values.name).attribute(X[:, 0])
    want = interpolate(np.maximum(summed(a * g), 0), (8, 12), "bilinear")
    np.testing.assert_allclose(got, want[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 3])
def test_series_and_volumes(axes: int) -> None:
    shape = (6, 4, 5)[:axes]
    weights = {
        "k": draw(4, 2, *[3] * axes),
        "w": draw(4 * int(np.prod(shape)), 2),
        "flat": np.array([0, 4 * int(np.prod(shape))]),
    }
    made = model(
        f"""{HEAD} net (float[N, 2, {", ".join(map(str, shape))}] x) => (float[N, 2] y) {{
          h = Conv<auto_pad = "SAME_UPPER">(x, k) a = Relu(h)
          f = Reshape(a, flat) y = MatMul(f, w) }}""",
        weights,
    )
    x = draw(3, 2, *shape)
    made_by = LayerCAM(made)
    assert made_by.layer == "a"
    a = ox.LayerActivation(made, "a").attribute(x)
    g = np.broadcast_to(weights["w"][:, 1].reshape(a.shape[1:]), a.shape)
    want = np.maximum(summed(a * np.maximum(g, 0)), 0)
    np.testing.assert_allclose(made_by.attribute(x, target=1), want, rtol=1e-4, atol=1e-5)


def test_sizes_that_the_model_leaves_open() -> None:
    made = model(
        f"""{HEAD} net (float[N, 3, H, W] x) => (float[N, 5] y) {{
          {CONV} p = GlobalAveragePool(a) y = Flatten(p) }}""",
        {k: WEIGHTS[k] for k in "kb"},
    )
    method = GradCAM(made)
    assert method.layer == "a"
    for x in (X, X[:, :, :6, :10]):
        a = ox.LayerActivation(made, "a").attribute(x)
        want = interpolate(a[:, 2:3] / a[0, 0].size, x.shape[2:], "bilinear")
        np.testing.assert_allclose(method.attribute(x, target=2), want, rtol=1e-4, atol=1e-6)
        guided = GuidedGradCam(made, "a").attribute(x, target=2)
        assert guided.shape == x.shape


def test_half_precision_is_computed_in_single() -> None:
    weights = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in WEIGHTS.items()}
    text = f"""{HEAD} net (float16[N, 3, 8, 12] x) => (float16[N, 3] y) {{
      {CONV} {LAYOUTS["m"]} {TAIL} }}"""
    half = GradCAM(model(text, weights), "a").attribute(X.astype(np.float16), target=TARGET)
    assert half.dtype == np.float32
    want = GradCAM(net(), "a").attribute(X, target=TARGET)
    np.testing.assert_allclose(half, want, atol=2e-2 * want.max())


# ---- which layer ------------------------------------------------------------------------------

ATTENTION = """
    h = Conv<strides = [2, 2]>(x, k) g = Reshape(h, grid) t = Transpose<perm = [0, 2, 1]>(g)
    cls = ReduceMean<keepdims = 1>(t, one) tokens = Concat<axis = 1>(cls, t)
    q = MatMul(tokens, wq) kk = MatMul(tokens, wk) kt = Transpose<perm = [0, 2, 1]>(kk)
    s = MatMul(q, kt) p = Softmax(s) o = MatMul(p, tokens) seen = Add(tokens, o)
    m1 = MatMul(seen, wm) m2 = Relu(m1) block = Add(seen, m2)"""
HEADS = {
    "tokens": "one_token = Gather<axis = 1>(block, first) y = MatMul(one_token, v)",
    "block": "mean = ReduceMean<keepdims = 0>(block, one) y = MatMul(mean, v)",
}


@pytest.mark.parametrize("layer", HEADS)
def test_the_last_tokens_that_the_output_still_looks_at(layer: str) -> None:
    weights = {
        **{"k": draw(4, 3, 2, 2), "wq": draw(4, 4), "wk": draw(4, 4), "wm": draw(4, 4)},
        **{"v": draw(4, 3), "grid": np.array([0, 4, 24]), "one": np.array([1])},
    }
    if layer == "tokens":
        weights["first"] = np.array(0)
    text = f"{HEAD} net (float[N, 3, 8, 12] x) => (float[N, 3] y) {{ {ATTENTION} {HEADS[layer]} }}"
    made = model(text, weights)
    assert GradCAM(made).layer == layer
    assert GradCAM(made).attribute(X, target=TARGET).any(axis=(1, 2, 3)).all()


def test_the_last_layer_that_all_of_the_image_passes(caplog: pytest.LogCaptureFixture) -> None:
    # Branches meet in `s`; beside it goes the mean of the input, so only values behind `y` would do
    branches = "l = Conv(x, k, b) r = Tanh(l) q = Relu(l) s = Add(r, q) p = GlobalAveragePool(s)"
    text = f"{HEAD} net (float[N, 3, 8, 12] x) => (float[N, 5] y) {{ {branches} y = Flatten(p) }}"
    weights = {k: WEIGHTS[k] for k in "kb"}
    with caplog.at_level(logging.INFO, "onnxplain"):
        method = GradCAM(model(text, weights))
    assert method.layer == "s"
    assert "grad-cam explains by layer 's'" in caplog.text
    beside = text.replace("y = Flatten(p)", "f = Flatten(p) u = ReduceMax(x) y = Mul(f, u)")
    with pytest.raises(LayerError, match="no layer with spatial axes that all"):
        GradCAM(model(beside, weights))


def test_a_transform_of_the_users() -> None:
    a, _ = activations()
    want = GradCAM(net("tokens"), "tokens").attribute(X, target=TARGET)

    def grid(x: np.ndarray) -> np.ndarray:
        return x[:, 1:].reshape(len(x), 4, 6, 5).transpose(0, 3, 1, 2)

    got = GradCAM(net("tokens"), "tokens", grid).attribute(X, target=TARGET)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

    def mirrored(x: np.ndarray) -> np.ndarray:
        return grid(x)[..., ::-1]

    got = EigenCAM(net("tokens"), "tokens", mirrored).attribute(X, relu=False)
    want = same_sign(interpolate(component(a[..., ::-1]), (8, 12), "bilinear"), got)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda x: x[:, 1:], r"makes \[1, 24, 5\] of \[1, 25, 5\]"),
        (lambda x: x[:, 1:].reshape(1, 4, 6, 5).astype(float) / 2, "computes new values"),
    ],
)
def test_a_transform_that_does_something_else(transform: object, message: str) -> None:
    made = GradCAM(net("tokens"), "tokens", transform)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        made.attribute(X, target=TARGET)


@pytest.mark.parametrize("method", [GradCAM, GradCAMMap, ExcitationBackprop])
def test_a_transform_that_is_no_function(method: type[ox.Attribution]) -> None:
    with pytest.raises(InputError, match=r"reshape_transform is a function that .*, not 3"):
        method(net("tokens"), "tokens", reshape_transform=3)  # type: ignore[call-arg]


def test_layers_that_can_not_be_laid_over_the_image() -> None:
    with pytest.raises(LayerError, match=r"shape \[N, 7\], without spatial.*some are 'a', 'h'"):
        GradCAM(net(), "r").attribute(X, target=TARGET)
    with pytest.raises(LayerError, match=r"shape \[N, 7\], without spatial.*some are 'a', 'h'"):
        GuidedGradCam(net(), "r").attribute(X, target=TARGET)
    odd = model(
        f"""{HEAD} net (float[N, 3, 8, 12] x) => (float[N, 13, 5] tokens) {{
          {CONV} g = Reshape(a, grid) t = Transpose<perm = [0, 2, 1]>(g)
          c = Slice(t, one, end, one) tokens = Relu(c) }}""",
        {**{k: WEIGHTS[k] for k in "kb"}, **{k: SHAPES[k] for k in ("grid", "one")}}
        | {"end": np.array([14])},
    )
    with pytest.raises(LayerError, match=r"13 tokens are no grid.*reshape_transform"):
        GradCAM(odd, "c").attribute(X, target=(0, 0))
    with pytest.raises(InputError, match="and there are 2: use nearest"):
        GradCAM(net(), "a").attribute(X, target=TARGET, interpolate_mode="trilinear")
    with pytest.raises(InputError, match="interpolate_mode is one of"):
        GuidedGradCam(net(), "a").attribute(X, target=TARGET, interpolate_mode="sinc")
    with pytest.raises(LayerError, match="no layer 'nowhere'"):
        GuidedGradCam(net(), "nowhere")
    table = model(f"{HEAD} net (float[N, 7] x) => (float[N, 3] y) {{ y = MatMul(x, v) }}", V)
    deep = model(
        f"""{HEAD} net (float[N, 7] x) => (float[N, 3] y) {{
          h = MatMul(x, v) r = Relu(h) y = Identity(r) }}""",
        V,
    )
    for cam in (GradCAM, GradCAMMap):
        with pytest.raises(LayerError, match=FOR_TABLES):
            cam(table)
        with pytest.raises(LayerError, match=FOR_TABLES):
            cam(deep, "h").attribute(draw(2, 7), target=0)
    with pytest.raises(LayerError, match=FOR_TABLES):
        GuidedGradCam(table, "y").attribute(draw(2, 7), target=0)
    with pytest.raises(InputError, match=f"no spatial axes to lay a map over; {FOR_TABLES}"):
        FullGrad(table).attribute(draw(2, 7), target=0)
    for walk in (ExcitationBackprop, VanillaBackprop):
        with pytest.raises(LayerError, match=FOR_TABLES):
            walk(table).attribute(draw(2, 7), target=0)


FOR_TABLES = "this method is for images and series: for tables take integrated-gradients"


V = {"v": WEIGHTS["v"]}


# ---- Captum's ---------------------------------------------------------------------------------


def test_layer_grad_cam() -> None:
    a, g = activations()
    weighted = a * g.mean((2, 3), keepdims=True)
    tight = {"rtol": 1e-4, "atol": 1e-5}
    made = LayerGradCam(net(), "a")
    np.testing.assert_allclose(made.attribute(X, target=TARGET), summed(weighted), **tight)
    got = made.attribute(X, target=TARGET, attr_dim_summation=False, relu_attributions=True)
    np.testing.assert_allclose(got, np.maximum(weighted, 0), **tight)
    # four axes with channels last keep their layout
    got = LayerGradCam(net("last"), "last").attribute(X, target=TARGET)
    np.testing.assert_allclose(got, np.moveaxis(summed(weighted), 1, -1), **tight)
    # without spatial axes: activation times gradient
    got = LayerGradCam(net(), "r").attribute(X, target=TARGET, attr_dim_summation=False)
    want = ox.LayerGradientXActivation(net(), "r").attribute(X, target=TARGET)
    np.testing.assert_allclose(got, want, **tight)
    summed_up = LayerGradCam(net(), "r").attribute(X, target=TARGET)
    np.testing.assert_allclose(summed_up, want.sum(1, keepdims=True), **tight)


TIME_FIRST = f"""{HEAD}
net (float[B, 3, 4] x) => (float[B, 2] y) {{
    t = Transpose<perm = [1, 0, 2]>(x) h = MatMul(t, w) b = Transpose<perm = [1, 0, 2]>(h)
    f = Flatten(b) y = MatMul(f, v)
}}"""
# Windows of an example are rows: no shape tells, as the exporter's sizes are computed.
WINDOWS = f"""{HEAD}
net (float[B, 12] x) => (float[B, 2] y) {{
    r = Reshape(x, rows) h = MatMul(r, w) f = Reshape(h, back) y = MatMul(f, v)
}}"""


@pytest.mark.parametrize("examples", ["N", "1"])
def test_a_layer_whose_first_axis_counts_something_else(examples: str) -> None:
    weights = {"w": draw(4, 5), "v": draw(15, 2)}
    first = model(TIME_FIRST.replace("B", examples), weights)
    x = draw(3, 3, 4)
    with pytest.raises(LayerError, match=r"layer 'h' \(shape \[3, .* are 'b', 'f'; LayerGradientX"):
        LayerGradCam(first, "h").attribute(x, target=0)
    want = ox.LayerGradientXActivation(first, "b", multiply_by_inputs=False).attribute(x, target=0)
    a = ox.LayerActivation(first, "b").attribute(x)
    got = LayerGradCam(first, "b").attribute(x, target=0)
    np.testing.assert_allclose(got, summed(a * want.mean(2, keepdims=True)), rtol=1e-4, atol=1e-5)
    rows = {"rows": np.array([-1, 4]), "back": np.array([-1, 15])}
    merged = model(WINDOWS.replace("B", examples), {**weights, **rows})
    with pytest.raises(LayerError, match=r"layer 'h' .* does not count the examples"):
        LayerGradCam(merged, "h").attribute(x.reshape(3, 12), target=0)


def test_maps_of_tokens_that_come_before_the_examples() -> None:
    made = model(
        f"""{HEAD} net (float[N, 3, 8, 12] x) => (float[N, 3] y) {{
          {CONV} g = Reshape(a, grid) t = Transpose<perm = [2, 0, 1]>(g)
          back = Transpose<perm = [1, 2, 0]>(t) f = Flatten(back) d = MatMul(f, w)
          y = MatMul(d, v) }}""",
        {k: (WEIGHTS | SHAPES)[k] for k in ("k", "b", "grid", "w", "v")},
    )
    for method in (GradCAM(made, "t"), GuidedGradCam(made, "t"), GradCAMMap(made, "t")):
        with pytest.raises(LayerError, match=r"layer 't' .* does not count the examples"):
            method.attribute(X, target=TARGET)  # type: ignore[attr-defined]


def test_a_layer_of_a_batch_that_stays_fixed() -> None:
    made = model(
        f"""{HEAD} net (float[2, 3, 8, 12] x) => (float[2, 5] y) {{
          {CONV} s = Sub(a, c) p = GlobalAveragePool(s) y = Flatten(p) }}""",
        {"k": WEIGHTS["k"], "b": WEIGHTS["b"], "c": draw(2, 1, 1, 1)},
    )
    assert made.fixed_batch == 2
    a = ox.LayerActivation(made, "a").attribute(X[:3])
    got = LayerGradCam(made, "a").attribute(X[:3], target=2)
    np.testing.assert_allclose(got, a[:, 2:3] / 24, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("layout", ["m", "tokens"])
def test_guided_grad_cam_is_a_product(mode: str, layout: str) -> None:
    guided = GuidedBackprop(net()).attribute(X, target=TARGET)
    cam = LayerGradCam(net(), "a").attribute(X, target=TARGET, relu_attributions=True)
    got = GuidedGradCam(net(layout), layout).attribute(X, target=TARGET, interpolate_mode=mode)
    want = guided * interpolate(cam, (8, 12), mode)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_guided_grad_cam_of_inputs_that_are_no_image() -> None:
    made = model(
        f"""{HEAD} net (float[N, 3, 8, 12] x, float[N, 7] z) => (float[N, 3] y) {{
          {CONV} {LAYOUTS["m"]} f = Reshape(m, flat) d = MatMul(f, w) e = Add(d, c)
          r = Mul(e, z) y = MatMul(r, v) }}""",
        WEIGHTS,
    )
    z = draw(4, 7)
    with pytest.warns(UserWarning, match=r"input\(s\) z"):
        image, row = GuidedGradCam(made, "a").attribute((X, z), target=TARGET)
    assert row.shape == (0,)
    alone = GuidedGradCam(made, "a").attribute(X, target=TARGET, additional_forward_args=z)
    np.testing.assert_allclose(image, alone, rtol=1e-5, atol=1e-6)


# ---- FullGrad ---------------------------------------------------------------------------------


def scaled(maps: np.ndarray) -> np.ndarray:
    maps = np.abs(maps)
    maps = maps - maps.min((2, 3), keepdims=True)
    return summed(maps / (maps.max((2, 3), keepdims=True) + 1e-7))


def test_full_grad() -> None:
    made = net()
    a, g = activations()
    by_input = X * ox.Saliency(made).attribute(X, target=TARGET, abs=False)
    by_bias = WEIGHTS["b"][:, None, None] * g * (a > 0)
    want = scaled(by_input) + interpolate(scaled(by_bias), (8, 12), "bilinear")
    got = FullGrad(made).attribute(X, target=TARGET)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    unit = FullGrad(made).attribute(X, target=TARGET, normalize=True)
    assert unit.min() == 0
    assert unit.max() == 1


def test_the_parts_of_full_grad_add_up_to_the_output() -> None:
    weights = {
        **{"mean": draw(3, 1, 1), "half": np.float32(0.5), "k": draw(5, 3, 3, 3) / 3, "b": draw(5)},
        **{"s": 1 + draw(5) / 9, "t": draw(5), "mu": draw(5), "var": 1 + draw(5) ** 2},
        **{"up": draw(5, 2, 2, 2), "bu": draw(2), "w": draw(2 * 16 * 24, 7) / 9, "c": draw(7)},
        **{"wide": draw(7), "v": draw(7, 3)},
    }
    made = model(
        f"""{HEAD} net (float[N, 3, 16, 24] x, float[N, 7] z) => (float[N, 3] y) {{
          x0 = Sub(x, mean) x1 = Sub(half, x0)
          h = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x1, k, b)
          n = BatchNormalization(h, s, t, mu, var) a = Relu(n)
          u = ConvTranspose<strides = [2, 2]>(a, up, bu) l = LeakyRelu(u) f = Flatten(l)
          d = Gemm<beta = 0.3>(f, w, c) d1 = Add(wide, d) d2 = Add(d1, z) r = Relu(d2)
          y = MatMul(r, v) }}""",
        weights,
    )
    x, z = draw(4, 3, 16, 24), draw(4, 7)
    method = FullGrad(made)
    maps, checks = method.explain(inputs=x, target=TARGET, additional_forward_args=z)
    assert maps.shape == (4, 1, 16, 24)
    assert (checks["completeness_gap"] < 1e-4).all()


def test_activations_written_out_are_no_biases() -> None:
    made = model(
        f"""{HEAD} net (float[N, 3, 8, 12] x) => (float[N, 5] y) {{
          h = Conv(x, k) e = Erf(h) one_more = Add(e, one) a = Mul(h, one_more)
          p = GlobalAveragePool(a) y = Flatten(p) }}""",
        {"k": WEIGHTS["k"], "one": np.float32(1)},
    )
    by_input = X * ox.Saliency(made).attribute(X, target=0, abs=False)
    got = FullGrad(made).attribute(X, target=0)
    np.testing.assert_allclose(got, scaled(by_input), rtol=1e-4, atol=1e-4)


# ---- which axis counts the channels ----------------------------------------------------------

IN, SQUARE = "Conv<pads = [1, 1, 1, 1]>(x, k)", (6, 6)
POOLS = {
    "first": "p = GlobalAveragePool(a) f = Flatten(p) y = MatMul(f, v)",
    "last": "p = ReduceMean<keepdims = 0>(a, places) y = MatMul(p, v)",
}


def channels(body: str, head: str = "first", size: tuple[int, int] = SQUARE) -> ox.Model:
    """x [N, 6, 6, 6] -> body: a, with 6 channels, -> head: y [N, 3]."""
    height, width = size
    weights = {
        "k": draw(6, 6, 3, 3) / 5,
        "gain": draw(6, height, width) + 1,
        "even": draw(6) + 1,
        "w": draw(width, width),
        "v": draw(6, 3),
        "places": np.array([1, 2]),
        "s": np.float32(0.05),
        "q": np.arange(-18, 18, dtype=np.int8).reshape(6, 6),
    }
    text = f"net (float[N, 6, {height}, {width}] x) => (float[N, 3] y) {{ {body} {POOLS[head]} }}"
    used = {k: w for k, w in weights.items() if k in re.findall(r"\w+", f"{body} {POOLS[head]}")}
    return model(f"{HEAD} {text}", used)


TO_LAST, TO_FIRST = "Transpose<perm = [0, 2, 3, 1]>", "Transpose<perm = [0, 3, 1, 2]>"
EVIDENCE = {
    # a normalization of all of [C, H, W] tells nothing of the channels
    "norm of all": (f"c = {IN} n = LayerNormalization<axis = 1>(c, gain) a = Relu(n)", "first", 1),
    "norm of the last three": (f"c = {IN} a = LayerNormalization<axis = -3>(c, gain)", "first", 1),
    "norm of the width": (f"c = {IN} n = LayerNormalization(c, even) a = Relu(n)", "first", 1),
    # a product mixes the width, or the channels
    "width": (f"c = {IN} m = MatMul(c, w) a = Relu(m)", "first", 1),
    "width, before anything": ("m = MatMul(x, w) a = Relu(m)", "first", 1),
    "quantized width": (
        f"c = {IN} d = DequantizeLinear(q, s) m = MatMul(c, d) a = Relu(m)",
        "first",
        1,
    ),
    # ConvNeXt: channels last between the convolutions
    "norm, then dense": (
        f"c = {IN} t = {TO_LAST}(c) n = LayerNormalization(t, even) a = MatMul(n, w)",
        "last",
        3,
    ),
    "dense alone": (f"t = {TO_LAST}(x) a = MatMul(t, w)", "last", 3),
    "quantized dense alone": (
        f"t = {TO_LAST}(x) d = DequantizeLinear(q, s) a = MatMul(t, d)",
        "last",
        3,
    ),
    "norm of the last, product of the height": (
        f"""t = {TO_LAST}(x) n = LayerNormalization(t, even)
        u = Transpose<perm = [0, 3, 2, 1]>(n) m = MatMul(u, w)
        a = Transpose<perm = [0, 3, 2, 1]>(m)""",
        "last",
        3,
    ),
}


@pytest.mark.parametrize(("body", "head", "axis"), EVIDENCE.values(), ids=EVIDENCE)
def test_channels_are_where_the_strongest_evidence_has_them(
    body: str, head: str, axis: int
) -> None:
    """All sizes are 6, so a wrong axis would give a map of the right size."""
    made, x = channels(body, head), draw(2, 6, 6, 6)
    a = ox.LayerActivation(made, "a").attribute(x)
    g = ox.LayerGradientXActivation(made, "a").attribute(x, target=1)
    assert channel_axis(single(made, "a")) == axis
    a, product = np.moveaxis(a, axis, 1), np.moveaxis(g, axis, 1)
    got = HiResCAM(made, "a").attribute(x, target=1, relu=False)
    np.testing.assert_allclose(got, product.sum(1, keepdims=True), rtol=1e-4, atol=1e-5)


CONTRADICTING = f"""t = Transpose<perm = [0, 3, 2, 1]>(x) c = Conv<pads = [1, 1, 1, 1]>(t, k)
    u = Transpose<perm = [0, 3, 2, 1]>(c) h = Relu(u) a = {IN.replace("x", "h")}"""


def test_evidence_that_contradicts_itself_is_refused() -> None:
    made, x = channels(CONTRADICTING), draw(2, 6, 6, 6)
    with pytest.raises(LayerError, match=r"channels can't be told .*reshape_transform"):
        GradCAM(made, "h").attribute(x, target=1)
    got = GradCAM(made, "h", reshape_transform=lambda h: h).attribute(x, target=1)
    assert got.shape == (2, 6, 6, 1)  # as the image, whose channels the first convolution tells
    assert GradCAM(made).layer == "a"
    # two products, neither of which is the only one
    both = "m = MatMul(x, w) t = Transpose<perm = [0, 3, 2, 1]>(m) n = MatMul(t, w) a = Relu(n)"
    made = channels(both, "last")
    with pytest.raises(LayerError, match="reshape_transform"):
        GradCAM(made, "m").attribute(x, target=1)


def mixer(norm: bool) -> ox.Model:
    """Patches of an image [N, 3, 8, 8] as tokens that a product mixes, as in an MLP-Mixer."""
    between = "n = LayerNormalization(t, even)" if norm else "n = Mul(t, even)"
    weights = {
        "k": draw(9, 3, 2, 2) / 3,
        "even": draw(9) + 1,
        "flat": np.array([0, 9, 16]),
        "w": draw(16, 16) / 4,
        "v": draw(9, 3),
        "one": np.array([1]),
    }
    text = f"""net (float[N, 3, 8, 8] x) => (float[N, 3] y) {{
        c = Conv<strides = [2, 2]>(x, k) r = Reshape(c, flat) t = Transpose<perm = [0, 2, 1]>(r)
        {between} u = Transpose<perm = [0, 2, 1]>(n) m = MatMul(u, w) h = Relu(m)
        b = Transpose<perm = [0, 2, 1]>(h) a = Add(t, b) p = ReduceMean<keepdims = 0>(a, one)
        y = MatMul(p, v) }}"""
    return model(f"{HEAD} {text}", weights)


@pytest.mark.parametrize("norm", [True, False])
def test_tokens_behind_the_channels(norm: bool) -> None:
    """[N, 9, 16]: 9 tokens would be a grid too."""
    made, x = mixer(norm), draw(2, 3, 8, 8)
    want = HiResCAM(made, "b").attribute(x, target=1, relu=False)  # [N, 16, 9]
    got = HiResCAM(made, "h").attribute(x, target=1, relu=False)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    product = ox.LayerGradientXActivation(made, "h").attribute(x, target=1)
    want = interpolate(product.sum(1).reshape(2, 1, 4, 4), (8, 8), "bilinear")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert GradCAM(made).layer == "a"


def test_axes_across_a_reshape() -> None:
    reshaped = spatial._reshaped
    assert reshaped(("N", 6, 4, 4), ("N", 6, 16)) == (0, 1, None)
    assert reshaped(("N", 16, 6), ("N", 4, 4, 6)) == (0, None, None, 2)
    assert reshaped(("N", 4, 4, 6), ("M", 16, 6)) == (None, None, 3)  # windows
    assert reshaped(("N", 6, "h", "w"), ("N", 6, "p")) == (0, 1, None)
    assert reshaped(("N", 6, 6), ("N", 1, 6, 6)) == (0, -1, 1, 2)
    assert reshaped(("N", 6, 6, 1), ("N", 1, 6, 6)) == (0, None, 1, 2)
    assert reshaped(("N", 6, 4, 4), ("N", 1, 96)) == (0, None, None)
    assert reshaped(("N", 1, 4, 4), ("N", 1, 16)) == (0, 1, None)
    assert reshaped(("N", None, 6), (None, None, 6)) == (None, None, 2)
