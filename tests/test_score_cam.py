"""Score-CAM and Ablation-CAM against dense formulas in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import onnxplain as ox
from onnxplain import AblationCAM, ScoreCAM
from onnxplain.errors import EvaluationError, InputError, LayerError, TargetError
from onnxplain.methods.interpolate import interpolate
from tests.helpers import HEAD, model
from tests.test_cam import CONV, LAYOUTS, TAIL, TARGET, WEIGHTS, X, activations, draw, net

SIZES = X.shape[2:]
BOTH = [ScoreCAM, AblationCAM]


def head(a: np.ndarray) -> np.ndarray:
    """The targets' scores behind the layer `a`, [N]."""
    hidden = a.reshape(len(a), -1) @ WEIGHTS["w"] + WEIGHTS["c"]
    return (np.maximum(hidden, 0) @ WEIGHTS["v"])[np.arange(len(a)), TARGET]


def stretched(maps: np.ndarray) -> np.ndarray:
    """Maps [N, C, h, w] at the image's size, corners on corners."""
    for axis in (2, 3):
        size = SIZES[axis - 2]
        at = np.linspace(0, maps.shape[axis] - 1, size)
        low = np.minimum(at.astype(int), maps.shape[axis] - 2)
        share = (at - low).reshape([-1 if k == axis else 1 for k in range(4)])
        maps = maps.take(low, axis) * (1 - share) + maps.take(low + 1, axis) * share
    return maps


def score_weights() -> np.ndarray:
    a = stretched(activations()[0])
    low, high = (f(axis=(2, 3), keepdims=True) for f in (a.min, a.max))
    masks = (a - low) / (high - low + 1e-8)
    scores = [head(activations((X * masks[:, c, None]).astype(np.float32))[0]) for c in range(5)]
    share = np.exp(np.stack(scores, axis=1))
    return share / share.sum(axis=1, keepdims=True)


def ablation_weights(value: float = 0.0) -> np.ndarray:
    a = activations()[0]
    full, found = head(a), []
    for c in range(5):
        without = a.copy()
        without[:, c] = value
        found.append((full - head(without)) / full)
    return np.stack(found, axis=1)


def weighted(weights: np.ndarray) -> np.ndarray:
    maps = (activations()[0] * weights[:, :, None, None]).sum(1, keepdims=True)
    return interpolate(maps, SIZES, "bilinear")


WANT = {ScoreCAM: score_weights, AblationCAM: ablation_weights}


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_formula_in_every_layout(method: Any, layout: str) -> None:
    want = weighted(WANT[method]())
    got = method(net(layout), layout).attribute(X, target=TARGET, relu=False)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    positive = method(net(layout), layout).attribute(X, target=TARGET)
    smallest = (activations()[0] * WANT[method]()[:, :, None, None]).sum(1, keepdims=True)
    want = interpolate(np.maximum(smallest, 0), SIZES, "bilinear")
    np.testing.assert_allclose(positive, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("method", BOTH)
def test_same_numbers_alone_and_in_any_chunk(method: Any) -> None:
    want = method(net(), "a").attribute(X, target=TARGET)
    np.testing.assert_allclose(
        method(net(), "a").attribute(X, target=TARGET, perturbations_per_eval=2), want, atol=1e-6
    )
    alone = method(net(), "a").attribute(X[1:2], target=TARGET[1:2])
    np.testing.assert_allclose(alone, want[1:2], atol=1e-6)


@pytest.mark.parametrize("method", BOTH)
def test_a_list_of_layers_gives_a_list_of_maps(method: Any) -> None:
    several = method(net(), ["h", "a"]).attribute(X, target=TARGET)
    assert len(several) == 2
    alone = method(net(), "a").attribute(X, target=TARGET)
    np.testing.assert_allclose(several[1], alone, atol=1e-6)
    assert not np.allclose(several[0], several[1])


def test_values_that_channels_go_to() -> None:
    made = AblationCAM(net(), "a")
    want = weighted(ablation_weights(0.5))
    got = made.attribute(X, target=TARGET, relu=False, ablation_value=0.5)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    # A layer that goes below 0: its channels go far below that, which the ReLU behind makes 0.
    values = ox.LayerActivation(net(), "h").attribute(X)
    assert values.min(axis=(1, 2, 3)).max() < 0
    got = AblationCAM(net(), "h").attribute(X, target=TARGET, relu=False)
    maps = (values * ablation_weights()[:, :, None, None]).sum(1, keepdims=True)
    want = interpolate(maps, SIZES, "bilinear")
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_a_score_of_zero() -> None:
    """Then the drop itself is the weight: its share of nothing is not known."""
    made = model(
        f"""{HEAD} net (float[N, 2, 4, 4] x) => (float[N, 1] y) {{
            a = Relu(x) m = GlobalAveragePool(a) f = Flatten(m) y = MatMul(f, w) }}""",
        {"w": np.array([[1], [-1]], np.float32)},
    )
    x = np.zeros((1, 2, 4, 4), np.float32)
    x[0, 0, 0, 0] = x[0, 1, 3, 3] = 8
    got = AblationCAM(made, "a").attribute(x, relu=False)
    want = np.zeros((1, 1, 4, 4))
    want[0, 0, 0, 0], want[0, 0, 3, 3] = 8 * 0.5, -8 * 0.5
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_what_comes_before_the_layer_runs_once() -> None:
    made = net()
    AblationCAM(made, "a").attribute(X, target=TARGET)
    (behind,) = (p.model for key, p in made._programs.items() if "perturb" in str(key))
    assert {"MatMul", "Add"} <= {n.op_type for n in behind.graph}
    assert "Conv" not in {n.op_type for n in behind.graph}


@pytest.mark.parametrize("method", BOTH)
def test_layouts_of_the_input(method: Any) -> None:
    last = model(
        f"""{HEAD} net (float[N, 8, 12, 3] z) => (float[N, 3] y) {{
          x = Transpose<perm = [0, 3, 1, 2]>(z) {CONV} {LAYOUTS["m"]} {TAIL} }}""",
        WEIGHTS,
    )
    got = method(last, "a").attribute(np.moveaxis(X, 1, -1), target=TARGET, relu=False)
    assert got.shape == (4, 8, 12, 1)
    want = weighted(WANT[method]())
    np.testing.assert_allclose(got[..., 0], want[:, 0], atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("axes", [1, 3])
def test_series_and_volumes(axes: int) -> None:
    shape = (6, 4, 5)[:axes]
    size = int(np.prod(shape))
    weights = {"k": draw(4, 2, *[3] * axes), "w": draw(4 * size, 2)}
    weights["flat"] = np.array([0, 4 * size])
    made = model(
        f"""{HEAD} net (float[N, 2, {", ".join(map(str, shape))}] x) => (float[N, 2] y) {{
          h = Conv<auto_pad = "SAME_UPPER">(x, k) a = Relu(h)
          f = Reshape(a, flat) y = MatMul(f, w) }}""",
        weights,
    )
    x = draw(3, 2, *shape)
    a = ox.LayerActivation(made, "a").attribute(x)
    terms = (a.reshape(3, 4, size) * weights["w"][:, 1].reshape(4, size)).sum(2)
    share = (terms / terms.sum(1, keepdims=True)).reshape(3, 4, *[1] * axes)
    assert AblationCAM(made).layer == "a"
    got = AblationCAM(made).attribute(x, target=1, relu=False)
    want = (a * share).sum(1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    assert ScoreCAM(made).attribute(x, target=1).shape == (3, 1, *shape)


@pytest.mark.parametrize("method", BOTH)
def test_bad_input(method: Any) -> None:
    with pytest.raises(TargetError, match="no target was given"):
        method(net(), "a").attribute(X)
    with pytest.raises(LayerError, match="without spatial axes"):
        method(net(), "d").attribute(X, target=TARGET)
    with pytest.raises(LayerError, match="nowhere"):
        method(net(), "nowhere")
    with pytest.raises(InputError, match="a BlackBox is a Python function"):
        method(ox.BlackBox(lambda x: x))
    with pytest.raises(InputError, match="perturbations_per_eval must be an integer"):
        method(net(), "a").attribute(X, target=TARGET, perturbations_per_eval=0)
    with pytest.raises(InputError, match="interpolate_mode is one of"):
        method(net(), "a").attribute(X, target=TARGET, interpolate_mode="lanczos")
    with pytest.raises(LayerError, match="no input with spatial axes"):
        method(model(f"{HEAD} net (float[N, 4] x) => (float[N, 4] y) {{ y = Relu(x) }}"))


@pytest.mark.parametrize("value", [np.nan, "low"])
def test_a_value_that_is_none(value: Any) -> None:
    with pytest.raises(InputError, match="ablation_value is a finite number"):
        AblationCAM(net(), "a").attribute(X, target=TARGET, ablation_value=value)


def test_scores_that_are_not_finite() -> None:
    made = model(
        f"""{HEAD} net (float[N, 1, 4, 4] x) => (float[N, 1] y) {{
            a = Relu(x) s = ReduceSum<keepdims = 0>(a, axes) y = Log(s) }}""",
        {"axes": np.array([2, 3])},
    )
    with pytest.raises(EvaluationError, match="NaN or infinite") as caught:
        AblationCAM(made, "a").attribute(np.ones((1, 1, 4, 4), np.float32))
    assert caught.value.partial is None


def test_an_interrupt_leaves_what_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's maps; those of the second are NaN."""
    from onnxplain.perturb import engine

    play, runs = engine.run, []

    def run(*args: Any, **options: Any) -> Any:
        runs.append(args)
        if len(runs) == 1:
            return play(*args, **options)
        outcome = play(*args, **options)
        outcome.values[:] = np.nan
        outcome.completed[:] = 0.5
        return outcome

    monkeypatch.setattr(engine, "run", run)
    first, second = ScoreCAM(net(), ["h", "a"]).attribute(X, target=TARGET)
    assert np.isfinite(first).all() and np.isnan(second).all()
