"""A Python function in place of a model: what reaches it, what it may answer, how it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import onnxplain as ox
from tests.helpers import HEAD, model

rng = np.random.default_rng(0)
W = rng.standard_normal((4, 3)).astype(np.float32)
X = rng.standard_normal((5, 4)).astype(np.float32)


def squares(x: np.ndarray) -> np.ndarray:
    return (x * x) @ W


@pytest.fixture(scope="module")
def net() -> ox.Model:
    text = "net (float[N,4] x) => (float[N,3] y) { h = Mul(x, x)  y = MatMul(h, w) }"
    return model(HEAD + text, {"w": W})


# --- what reaches the function ------------------------------------------------------------------


class Seen:
    """A function that remembers how it was called."""

    def __init__(self) -> None:
        self.positional: list[tuple[int, ...]] = []
        self.named: dict[str, tuple[int, ...]] = {}

    def __call__(self, *args: np.ndarray, **kwargs: np.ndarray) -> np.ndarray:
        self.positional = [np.shape(a) for a in args]
        self.named = {k: np.shape(a) for k, a in kwargs.items()}
        return np.zeros(len([*args, *kwargs.values()][0]))


def test_arrays_are_positional_and_dicts_are_keywords() -> None:
    seen = Seen()
    box = ox.BlackBox(seen)
    box(X)
    assert (seen.positional, seen.named) == ([(5, 4)], {})
    box((X, X[:, :2]))
    assert (seen.positional, seen.named) == ([(5, 4), (5, 2)], {})
    box({"a": X, "b": X[:, :1]})
    assert (seen.positional, seen.named) == ([], {"a": (5, 4), "b": (5, 1)})
    named = ox.BlackBox(seen, names=["ids", "mask"])
    named({"mask": X, "ids": X[:, :1], "more": X[:, :3]})
    assert (seen.positional, seen.named) == ([(5, 1), (5, 4)], {"more": (5, 3)})
    named({"mask": X})  # not the first parameter, so it can't be passed by its place
    assert (seen.positional, seen.named) == ([], {"mask": (5, 4)})


def test_names_are_those_of_the_signature() -> None:
    def score(left: np.ndarray, right: np.ndarray, scale: float = 1.0) -> np.ndarray:
        return (left - right).sum(axis=1) * scale

    box = ox.BlackBox(score)
    assert [i.name for i in box.inputs] == ["left", "right"]
    feeds = box.feeds(X, X + 1)
    assert (list(feeds.arrays), feeds.explained) == (["left", "right"], ("left",))
    np.testing.assert_allclose(box((X, X + 1))["output"], -4)
    np.testing.assert_array_equal(
        box({"right": X, "left": 2 * X})["output"], box((2 * X, X))["output"]
    )
    with pytest.raises(ox.InputError, match=r"4 arrays were given for 3 input\(s\)"):
        box((X, X, X, X))


def test_text_reaches_it_as_objects() -> None:
    box = ox.BlackBox(lambda texts: np.array([len(t) for t in texts]))
    found = box(np.array(["a", "bcd"]))["output"]
    np.testing.assert_array_equal(found, [1, 3])
    assert box.feeds(["a", "bcd"]).arrays["texts"].dtype == object


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X, X[:3]), r"different numbers of rows .*: 5.*: 3"),
        (np.float32([[1, np.nan]]), "1 of its 2 values are NaN"),
        (3.0, "is 3.0, not an array with a row"),
        ([[1, 2], [3]], "can't be made an array"),
    ],
)
def test_inputs_that_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ox.InputError, match=message):
        ox.BlackBox(lambda *a: a[0].sum(axis=1))(inputs)


def test_what_it_writes_on_its_arrays_is_its_own_business() -> None:
    buffer = np.empty(2)

    def careless(x: np.ndarray) -> np.ndarray:
        x *= 0
        buffer[:] = np.arange(2) + len(calls)
        calls.append(1)
        return buffer

    calls: list[int] = []
    x = X[:4].copy()
    np.testing.assert_array_equal(ox.BlackBox(careless, batch_size=2)(x)["output"], [0, 1, 1, 2])
    np.testing.assert_array_equal(x, X[:4])


# --- what it may answer -------------------------------------------------------------------------


def test_pieces_of_batch_size_are_put_together() -> None:
    sizes: list[int] = []

    def score(x: np.ndarray) -> np.ndarray:
        sizes.append(len(x))
        return squares(x)

    found = ox.BlackBox(score, batch_size=2)(X)["output"]
    np.testing.assert_array_equal(found, squares(X))
    assert sizes == [2, 2, 1]


def test_answers_of_other_kinds_become_floats() -> None:
    np.testing.assert_array_equal(ox.BlackBox(lambda x: [True, False])(X[:2])["output"], [1.0, 0.0])
    assert ox.BlackBox(lambda x: x.sum())(X)["output"].shape == ()


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (lambda x: 1 / 0, {}, r"raised ZeroDivisionError for rows 0 to 4 of 5 \(x: float32 \[5, 4"),
        (lambda x: x[:3], {}, r"answered shape \[3, 4\] to rows 0 to 4 of 5: its first axis"),
        (lambda x: ["a"] * 5, {}, r"answered list of <U1 .* return an array of numbers"),
        (
            lambda x: np.where(x[:, 0] == X[3, 0], np.nan, 0),
            {},
            r"NaN or infinity to row\(s\) 3 of",
        ),
        (lambda x: x.sum(), {"batch_size": 2}, "answered one number to rows 0 to 1 of 5.*batch_si"),
        (
            lambda x: x[:, : len(x)],
            {"batch_size": 3},
            r"shape \[2\] a row to rows 3 to 4.*\[3\] bef",
        ),
    ],
)
def test_answers_that_are_refused(
    fn: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ox.EvaluationError, match=message) as caught:
        ox.BlackBox(fn, **options)(X)
    raised = caught.value.__cause__
    assert isinstance(raised, ZeroDivisionError) == ("ZeroDivision" in message)


def test_options_that_are_refused() -> None:
    with pytest.raises(ox.InputError, match="made of a function, not of int"):
        ox.BlackBox(3)  # type: ignore[arg-type]
    with pytest.raises(ox.InputError, match="batch_size must be positive, not 0"):
        ox.BlackBox(squares, batch_size=0)
    with pytest.raises(ox.InputError, match="names is 'xy'"):
        ox.BlackBox(squares, names="xy")


# --- in place of a model ------------------------------------------------------------------------


METHODS = {
    "feature-ablation": {},
    "feature-permutation": {},
    "occlusion": {"sliding_window_shapes": (2,)},
    "shapley-values": {},
    "shapley-value-sampling": {"n_samples": 7},
    "kernel-shap": {"n_samples": 11},
    "lime": {"n_samples": 30, "interpretable_model": "ridge"},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_function_is_explained_like_the_model(
    net: ox.Model, name: str, batch_size: int | None
) -> None:
    baselines = None if name == "feature-permutation" else X[:1] + 0.5
    asked: dict[str, Any] = {"baselines": baselines, "method_options": METHODS[name]}
    if "random" in ox.methods()[name].needs:
        asked["seed"] = 3
    by_graph = ox.explain(net, X, name, **asked)
    by_calls = ox.explain(ox.BlackBox(squares, batch_size=batch_size), X, name, **asked)
    np.testing.assert_allclose(by_calls.attributions, by_graph.attributions, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(by_calls.target, by_graph.target)
    assert by_calls.provenance["model"] == "BlackBox(squares)"
    assert by_calls.checks.keys() == by_graph.checks.keys()


def test_one_number_for_the_whole_batch() -> None:
    found = ox.explain(ox.BlackBox(lambda x: float((x * x).sum())), X, "feature-ablation")
    np.testing.assert_allclose(found.attributions, (X * X).sum(axis=0)[None], rtol=1e-5)


def test_what_needs_the_inside_is_refused() -> None:
    box = ox.BlackBox(squares)
    with pytest.raises(ox.InputError, match=r"Python function.*use a perturbation method"):
        ox.explain(box, X)
    with pytest.raises(ox.LayerError, match=r"has no layer 'h'.*export the model to ONNX"):
        ox.LayerFeatureAblation(box, "h")
    assert box.layers() == []


class Failing:
    """An additive function of [N, 20] that gives up at its 13th call."""

    def __init__(self, error: BaseException) -> None:
        self.calls, self.error = 0, error

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.calls += 1
        if self.calls > 12:
            raise self.error
        return (x * x).sum(axis=1)


WIDE = rng.standard_normal((2, 20)).astype(np.float32)


def test_a_failure_part_way_keeps_what_was_computed() -> None:
    box = ox.BlackBox(Failing(ConnectionError("the endpoint is gone")), batch_size=16)
    method = ox.ShapleyValueSampling(box)
    with pytest.raises(ox.EvaluationError, match="the endpoint is gone") as caught:
        method.attribute(WIDE[:1], n_samples=200, seed=0)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert 0 < caught.value.samples < 12
    np.testing.assert_allclose(caught.value.partial, WIDE[:1] ** 2, rtol=1e-3, atol=1e-5)


def test_an_interrupt_keeps_what_was_computed() -> None:
    box = ox.BlackBox(Failing(KeyboardInterrupt()), batch_size=16)
    with pytest.warns(ox.IncompleteWarning, match="interrupted"):
        found = ox.explain(box, WIDE[:1], "shapley-value-sampling", n_samples=500, seed=0)
    assert 0 < found.checks["completed"][0] < 0.1
    np.testing.assert_allclose(found.attributions, WIDE[:1] ** 2, rtol=1e-3, atol=1e-5)
