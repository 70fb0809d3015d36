"""Shapley values beside the shap package: the same function, the same background."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest

import onnxplain as ox

shap = pytest.importorskip("shap", reason="needs shap: pip install 'onnxplain[oracle]'")

FEATURES = 8
RNG = np.random.default_rng(0)
WEIGHTS = [RNG.normal(size=s) for s in ((FEATURES, 12), (12, 12), (12, 3))]
X = RNG.normal(size=(3, FEATURES))
BACKGROUND = RNG.normal(size=(5, FEATURES))


def network(x: np.ndarray) -> np.ndarray:
    """Three outputs, features that interact at every order: [N, 8] -> [N, 3]."""
    hidden = np.tanh(x @ WEIGHTS[0]) * 2
    return np.tanh(hidden @ WEIGHTS[1]) @ WEIGHTS[2]


def pairwise(x: np.ndarray) -> np.ndarray:
    """No more than two features interact: [N, 8] -> [N, 1]."""
    return (x @ WEIGHTS[0] * (x @ WEIGHTS[0])).sum(1, keepdims=True)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("method", ["KernelShap", "ShapleyValues"])
def test_kernel_explainer_with_all_coalitions(method: str) -> None:
    """With every coalition both are the exact Shapley values."""
    options = {"n_samples": 2**FEATURES} if method == "KernelShap" else {}
    explainer = getattr(ox, method)(ox.BlackBox(network))
    for row in BACKGROUND[:2]:
        theirs = shap.KernelExplainer(network, row[None])
        want = theirs.shap_values(X, nsamples=2**FEATURES, l1_reg=0, silent=True)
        for target in range(3):
            got = explainer.attribute(X, baselines=row[None], target=target, **options)
            np.testing.assert_allclose(got, want[:, :, target], rtol=1e-6, atol=1e-7)
            change = network(X) - network(row[None])
            np.testing.assert_allclose(got.sum(1), change[:, target], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n_samples", [40, 100])
@pytest.mark.parametrize("method", ["KernelShap", "ShapleyValueSampling"])
def test_sampled_values_add_up(method: str, n_samples: int) -> None:
    """However few the samples; shap's own do, too."""
    got = getattr(ox, method)(ox.BlackBox(network)).attribute(
        X, baselines=BACKGROUND[:1], target=1, n_samples=n_samples, seed=0
    )
    change = (network(X) - network(BACKGROUND[:1]))[:, 1]
    np.testing.assert_allclose(got.sum(1), change, rtol=1e-6)
    theirs = shap.KernelExplainer(network, BACKGROUND[:1])
    want = theirs.shap_values(X, nsamples=n_samples, l1_reg=0, silent=True)[:, :, 1]
    np.testing.assert_allclose(want.sum(1), change, rtol=1e-6)


def test_a_background_is_the_mean_over_its_rows() -> None:
    theirs = shap.KernelExplainer(network, BACKGROUND)
    want = theirs.shap_values(X, nsamples=2**FEATURES, l1_reg=0, silent=True)[:, :, 2]
    exact = ox.ShapleyValues(ox.BlackBox(network))
    rows = [exact.attribute(X, baselines=row[None], target=2) for row in BACKGROUND]
    np.testing.assert_allclose(np.mean(rows, axis=0), want, rtol=1e-6, atol=1e-7)


def test_permutation_explainer() -> None:
    """Where no more than two features interact, a permutation and its reverse are exact."""
    explainer = shap.PermutationExplainer(
        pairwise, shap.maskers.Independent(BACKGROUND[:1]), seed=1
    )
    want = explainer(X, max_evals=10 * FEATURES, silent=True).values.reshape(X.shape)
    model = ox.BlackBox(pairwise)
    exact = ox.ShapleyValues(model).attribute(X, baselines=BACKGROUND[:1], target=0)
    np.testing.assert_allclose(exact, want, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        exact.sum(1), (pairwise(X) - pairwise(BACKGROUND[:1]))[:, 0], rtol=1e-6
    )


def test_permutation_explainer_within_the_standard_error() -> None:
    explainer = shap.PermutationExplainer(network, shap.maskers.Independent(BACKGROUND[:1]), seed=1)
    theirs = explainer(X, max_evals=600 * FEATURES, silent=True).values[:, :, 0]
    change = network(X) - network(BACKGROUND[:1])
    np.testing.assert_allclose(theirs.sum(1), change[:, 0], rtol=1e-6)
    got, error = ox.ShapleyValueSampling(ox.BlackBox(network)).attribute(
        X, baselines=BACKGROUND[:1], target=0, n_samples=600, seed=0, return_standard_error=True
    )
    assert (error > 0).all() and error.max() < 0.1 * np.abs(got).max()
    # Theirs took as many permutations: both differ from the truth by about one error.
    np.testing.assert_array_less(np.abs(got - theirs), 6 * error)
