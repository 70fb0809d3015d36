"""The perturbation family on trained models: trees against brute force over every coalition, and
the same numbers for any number of threads and any size of chunk."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import onnxruntime as ort
import pytest
from sklearn.datasets import load_wine

import onnxplain as ox
from tests.helpers import shared

TREES = "wine_xgboost/xgboost_classifier_tree.onnx"
TARGET = 1


def wines() -> np.ndarray:
    """A wine of each kind: [3, 13]."""
    return load_wine().data[[3, 70, 150]].astype(np.float32)


def mean_wine() -> np.ndarray:
    return load_wine().data.mean(0, keepdims=True).astype(np.float32)


@functools.cache
def session() -> ort.InferenceSession:
    return ort.InferenceSession(shared(TREES), providers=["CPUExecutionProvider"])


def probabilities(x: np.ndarray) -> np.ndarray:
    return session().run(["probabilities"], {"input": x.astype(np.float32)})[0]


def brute_force(score: Callable[[np.ndarray], np.ndarray], x: np.ndarray, base: np.ndarray) -> Any:
    """Shapley's formula, word by word: what a feature adds to every coalition without it."""
    features = len(x)
    present = np.arange(2**features)[:, None] >> np.arange(features) & 1 == 1
    value = score(np.where(present, x, base)).astype(np.float64)
    size = present.sum(1)
    weight = np.array([
        math.factorial(k) * math.factorial(features - k - 1) / math.factorial(features)
        for k in range(features)
    ])  # fmt: skip
    found = np.empty(features)
    for f in range(features):
        without = np.flatnonzero(~present[:, f])
        found[f] = (weight[size[without]] * (value[without | 1 << f] - value[without])).sum()
    return found


@functools.cache
def truth() -> np.ndarray:
    base = mean_wine()[0]
    return np.array([brute_force(lambda z: probabilities(z)[:, TARGET], x, base) for x in wines()])


@functools.cache
def explained(kind: str) -> Any:
    return ox.Model(shared(TREES)) if kind == "model" else ox.BlackBox(probabilities)


KINDS = ["model", "callable"]


@pytest.mark.parametrize("kind", KINDS)
def test_shapley_values_of_trees_are_those_of_brute_force(kind: str) -> None:
    assert np.abs(truth()).max() > 0.1
    got = ox.ShapleyValues(explained(kind)).attribute(wines(), baselines=mean_wine(), target=TARGET)
    np.testing.assert_allclose(got, truth(), atol=1e-6)
    shift = probabilities(wines()) - probabilities(mean_wine())
    np.testing.assert_allclose(got.sum(1), shift[:, TARGET], atol=1e-5)


@pytest.mark.parametrize("method", ["KernelShap", "ShapleyValueSampling"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_converge_to_brute_force(method: str, kind: str) -> None:
    """Within the standard errors that are told, which shrink as the samples grow."""
    explainer = getattr(ox, method)(explained(kind))
    sizes = []
    for n_samples in (200, 3200):
        scores = []
        for seed in range(6):
            got, error = explainer.attribute(
                wines(), baselines=mean_wine(), target=TARGET, n_samples=n_samples, seed=seed,
                return_standard_error=True,
            )  # fmt: skip
            assert got.shape == error.shape == wines().shape
            off = np.abs(got - truth())
            assert (off[error < 1e-9] < 1e-5).all()
            scores.append((off / np.maximum(error, 1e-9))[error >= 1e-9])
        z = np.concatenate(scores)
        assert 0.5 < (z**2).mean() < 2, (z**2).mean()
        assert z.max() < 6, z.max()
        sizes.append(error.mean())
    # 3200 of the 8190 coalitions: with them repeated, the error falls faster than by a root.
    assert sizes[1] < 0.35 * sizes[0]


def test_a_model_and_the_function_around_it_are_the_same() -> None:
    options: dict[str, Any] = {
        "baselines": mean_wine(), "target": TARGET, "n_samples": 100, "seed": 3
    }  # fmt: skip
    for method in ("KernelShap", "ShapleyValueSampling", "Lime"):
        with_model, with_function = (
            getattr(ox, method)(explained(kind)).attribute(wines(), **options) for kind in KINDS
        )
        np.testing.assert_allclose(with_model, with_function, atol=1e-6)
    for options in ({}, {"feature_mask": np.arange(13)[None] // 4}):
        ablated = [
            ox.FeatureAblation(explained(kind)).attribute(
                wines(), baselines=mean_wine(), target=TARGET, **options
            )
            for kind in KINDS
        ]
        np.testing.assert_allclose(*ablated, atol=1e-6)


# ------------------------------------------------------------------------ threads and chunks

METHODS: dict[str, dict[str, Any]] = {
    "FeatureAblation": {"baselines": 0.1},
    "FeaturePermutation": {"seed": 1},
    "Occlusion": {"sliding_window_shapes": (1, 16, 16), "strides": (1, 8, 8)},
    "ShapleyValueSampling": {"n_samples": 9, "seed": 1},
    "KernelShap": {"n_samples": 120, "seed": 1},
    "Lime": {"n_samples": 120, "seed": 1},
}
SHAPES = "dianna/geometric_shapes_model.onnx"


def drawings() -> np.ndarray:
    """White shapes on black: [3, 1, 64, 64]."""
    x = np.zeros((3, 1, 64, 64), np.float32)
    y, z = np.mgrid[:64, :64]
    x[0, 0][(y - 20) ** 2 + (z - 40) ** 2 < 100] = 1
    x[1, 0, 30:50, 10:30] = np.tri(20)
    x[2, 0][(y - 44) ** 2 + (z - 18) ** 2 < 150] = 1
    return x


def patches() -> np.ndarray:
    """Sixteen squares of the picture: [1, 1, 64, 64]."""
    y, z = np.mgrid[:64, :64] // 16
    return (4 * y + z)[None, None]


def attribute(method: str, model: Any, x: np.ndarray, **more: Any) -> np.ndarray:
    options = {**METHODS[method], **more}
    if method != "Occlusion":
        options.setdefault("feature_mask", patches())
    return getattr(ox, method)(model).attribute(x, target=0, **options)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_threads(method: str, threads: Callable[[int], None]) -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("this machine has one processor")
    model = ox.Model(shared(SHAPES))
    found = []
    for count in (1, 2):
        threads(count)
        found.append(attribute(method, model, drawings()))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("method", ["Occlusion", "KernelShap", "ShapleyValueSampling"])
def test_any_number_of_threads_of_the_runtime(method: str) -> None:
    found = []
    for count in (1, 2):
        options = ort.SessionOptions()
        options.intra_op_num_threads = count
        model = ox.Model(shared(SHAPES), session_options=options)
        found.append(attribute(method, model, drawings()))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5 * np.abs(found[0]).max())


@pytest.mark.parametrize("method", METHODS)
def test_any_size_of_chunk(method: str) -> None:
    """Of samples and of examples; a convolution rounds otherwise in other batches."""
    model = ox.Model(shared(SHAPES))
    want = attribute(method, model, drawings())
    assert np.abs(want).max() > 1e-3
    within = {"rtol": 1e-4, "atol": 1e-5 * np.abs(want).max()}
    for at_once in (1, 7):
        got = attribute(method, model, drawings(), perturbations_per_eval=at_once)
        np.testing.assert_allclose(got, want, **within)
    small = ox.Model(shared(SHAPES), memory_limit=30 * 10**6)
    np.testing.assert_allclose(attribute(method, small, drawings()), want, **within)
    if method != "FeaturePermutation":  # there, the others are what an example is filled with
        for i in range(3):
            alone = attribute(method, model, drawings()[i : i + 1])
            np.testing.assert_allclose(alone[0], want[i], **within)


@pytest.mark.parametrize("method", ["ShapleyValueSampling", "KernelShap", "Lime"])
def test_trees_in_any_chunk(method: str) -> None:
    want, *others = (
        getattr(ox, method)(explained("model")).attribute(
            wines(), baselines=mean_wine(), target=TARGET, n_samples=50, seed=5,
            perturbations_per_eval=at_once,
        )
        for at_once in (None, 1, 7, 50)
    )  # fmt: skip
    for got in others:
        np.testing.assert_allclose(got, want, atol=1e-6)
