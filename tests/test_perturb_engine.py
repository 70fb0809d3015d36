"""The engine of the perturbation methods: features, forms, games, and where they stop."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxplain.kernels.coalitions import bernoulli, pack, unpack

import onnxplain as ox
from onnxplain.graph.emit import Emitter
from onnxplain.methods.perturbation import derangements, without_each
from onnxplain.perturb import engine, game
from onnxplain.perturb.features import Features, features_of
from onnxplain.perturb.forms import Coalitions, Form, Whole, Windows
from onnxplain.perturb.windows import sliding_windows
from onnxplain.run.session import Session
from tests.helpers import HEAD, model

rng = np.random.default_rng(0)
W = rng.standard_normal((4, 3)).astype(np.float32)
X = rng.standard_normal((5, 4)).astype(np.float32)
LINEAR = HEAD + "linear (float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }"


@pytest.fixture(scope="module")
def linear() -> ox.Model:
    return model(LINEAR, {"w": W})


# ------------------------------------------------------------------------ features


def test_features_are_numbered_from_zero_whatever_numbers_are_given() -> None:
    (found,) = features_of({"a": (3, 4), "b": (3, 2)}, ([7, 7, 100, 3], [[3, 8]]))
    assert found.count == 4
    np.testing.assert_array_equal(found.given, [[3, 7, 8, 100]])
    np.testing.assert_array_equal(found.ids["a"], [[1, 1, 3, 0]])
    np.testing.assert_array_equal(found.ids["b"], [[0, 2]])
    np.testing.assert_array_equal(found.examples, [0, 1, 2])


def test_numbers_of_two_inputs_are_apart_where_that_is_wanted() -> None:
    shapes = {"a": (3, 2), "b": (3, 2)}
    (shared,) = features_of(shapes, ([0, 1], [1, 2]))
    (apart,) = features_of(shapes, ([0, 1], [1, 2]), across=False)
    assert (shared.count, apart.count) == (3, 4)
    assert set(apart.ids["a"].ravel()).isdisjoint(apart.ids["b"].ravel())


def test_examples_with_as_many_features_are_a_group() -> None:
    mask = np.array([[0, 1, 2, 2], [5, 5, 5, 5], [9, 0, 4, 4], [1, 1, 1, 1]])
    one, three = features_of({"x": (4, 4)}, mask)
    np.testing.assert_array_equal(one.examples, [1, 3])
    np.testing.assert_array_equal(three.examples, [0, 2])
    np.testing.assert_array_equal(one.given, [[5], [1]])
    np.testing.assert_array_equal(three.given, [[0, 1, 2], [0, 4, 9]])
    np.testing.assert_array_equal(three.ids["x"], [[0, 1, 2, 2], [2, 0, 1, 1]])
    np.testing.assert_array_equal(three.of(np.array([1]))["x"], [[2, 0, 1, 1]])
    values = np.arange(6.0).reshape(2, 1, 3)
    np.testing.assert_array_equal(three.spread(values)[0][:, 0], [[0, 1, 2, 2], [5, 3, 4, 4]])
    (whole,) = features_of({"x": (4, 4)}, mask, together=True)
    np.testing.assert_array_equal(whole.given, [[0, 1, 2, 4, 5, 9]])


def test_sums_over_features() -> None:
    (found,) = features_of({"a": (2, 3), "b": (2, 2)}, ([[0, 1, 1], [1, 1, 0]], [1, 0]))
    a, b = np.arange(6.0).reshape(2, 3), 10 * np.arange(4.0).reshape(2, 2)
    np.testing.assert_array_equal(found.sums({"a": a, "b": b}), [[0 + 10, 3 + 0], [5 + 30, 7 + 20]])


def test_each_element_of_all_sources_is_a_feature_without_a_mask() -> None:
    (found,) = features_of({"a": (2, 3), "b": (2, 1, 2)})
    np.testing.assert_array_equal(found.ids["a"], [[0, 1, 2]])
    np.testing.assert_array_equal(found.ids["b"], [[[3, 4]]])


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ([0.0, 1.0, 1.0, 2.0], "numbered by integers"),
        ([0, -1, 1, 2], "numbered from 0"),
        ([0, 1, 2], "shape \\[3\\]"),
        (np.zeros((2, 4), int), "shape \\[2, 4\\]"),
        (np.zeros((1, 1, 4), int), "shape \\[1, 1, 4\\]"),
        ([2**40, 0, 0, 1], "number the features anew"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Any, says: str) -> None:
    with pytest.raises(ox.InputError, match=says):
        features_of({"x": (5, 4)}, mask)


def test_a_mask_for_each_source() -> None:
    with pytest.raises(ox.InputError, match="none was given for 'b'"):
        features_of({"a": (5, 4), "b": (5, 2)}, ([0, 1, 2, 3],))
    with pytest.raises(ox.InputError, match="no input 'c'"):
        features_of({"a": (5, 4)}, {"c": 0})
    with pytest.raises(ox.InputError, match="empty"):
        features_of({"a": (5, 0)})


# ------------------------------------------------------------------------ windows


def test_windows_go_over_each_axis_and_are_cut_off_at_its_end() -> None:
    windows = sliding_windows({"x": (5, 4)}, (2, 4), (2, 1))
    assert windows.count == 3
    assert windows.whole == {"x": (False, True)}
    block = windows.sampler(slice(0, 4))
    np.testing.assert_array_equal(block["lo.x"], [[0, 0], [0, 0], [2, 0], [4, 0]])
    np.testing.assert_array_equal(block["hi.x"], [[0, 0], [2, 4], [4, 4], [5, 4]])


def test_windows_of_one_source_come_after_those_of_the_other() -> None:
    windows = sliding_windows({"a": (3,), "b": (2, 2)}, ((2,), (1, 2)), (1, (1, 1)))
    assert windows.count == 2 + 2
    whole = windows.sampler(slice(0, 5))
    assert (whole["hi.a"] > whole["lo.a"])[:, 0].tolist() == [False, True, True, False, False]
    assert (whole["hi.b"] > whole["lo.b"]).all(1).tolist() == [False] * 3 + [True] * 2
    for start in range(5):  # pieces are what the whole says
        part = windows.sampler(slice(start, start + 1))
        for name, array in part.items():
            np.testing.assert_array_equal(array[0], whole[name][start])


@pytest.mark.parametrize(
    ("sizes", "strides", "says"),
    [
        ((6, 1), None, "larger than the input"),
        ((2, 1), (3, 1), "leaves out values"),
        ((2,), None, "give 2 positive integers"),
        ((0, 1), None, "positive"),
        ((1.5, 1), None, "positive integers"),
        ((2, 1), 0, "positive"),
        ("ab", None, "tuple of lengths"),
        (((2, 1), (1, 1)), None, "2 windows or strides were given for 1|positive integers"),
    ],
)
def test_windows_that_do_not_fit_are_refused(sizes: Any, strides: Any, says: str) -> None:
    with pytest.raises(ox.InputError, match=says):
        sliding_windows({"x": (5, 4)}, sizes, strides)


def test_no_window_slides_over_one_number() -> None:
    with pytest.raises(ox.InputError, match="one number for each example"):
        sliding_windows({"x": ()}, ())


# ------------------------------------------------------------------------ forms


def emitted(
    form: Form, name: str, x: np.ndarray, rows: dict[str, Any], shared: dict[str, Any]
) -> np.ndarray:
    """The mask that a form writes into a graph."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g")
    op = Emitter(graph, "t")

    def new(key: str, array: np.ndarray) -> ir.Value:
        shape = [None] * array.ndim
        dtype = ir.DataType.from_numpy(array.dtype)
        value = ir.Value(name=key, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        graph.inputs.append(value)
        return value

    fed = {key: new(key, array) for key, array in {**rows, **shared}.items()}
    mask = form.emit(op, fed, name, new("like", x))
    graph.outputs.append(op.Identity(mask))
    for value in [v for v in graph.inputs if not v.uses()]:
        graph.inputs.remove(value)
    session = Session(ir.Model(graph, ir_version=10), ["cpu"])
    return next(iter(session({**rows, **shared}).values()))


DTYPES = [np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_example", [False, True])
def test_coalitions_in_the_graph_are_those_on_the_host(dtype: Any, per_example: bool) -> None:
    count = 70  # more than one word
    ids = rng.integers(0, count, (3 if per_example else 1, 4, 30))
    ids.reshape(len(ids), -1)[:, :count] = np.arange(count)
    (features,) = features_of({"x": (3, 4, 30)}, ids)
    form, x = Coalitions(features), np.zeros((3, 4, 30), dtype)
    present = rng.integers(0, 2, (11, count)).astype(bool)
    rows, shared = form.rows({"z": pack(present)}), form.shared(np.arange(3))
    want = present[:, np.broadcast_to(ids, x.shape)]
    host = form.masks(rows, shared, "x", x)
    np.testing.assert_array_equal(np.broadcast_to(host, want.shape), want)
    graph = emitted(form, "x", x, rows, shared)
    assert graph.dtype == (dtype if np.dtype(dtype).kind == "f" else np.bool_)
    np.testing.assert_array_equal(graph, host)


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_in_the_graph_are_those_on_the_host(dtype: Any) -> None:
    shapes = {"a": (5, 4, 6), "b": (3,)}
    windows = sliding_windows(shapes, ((2, 4, 3), (2,)), ((2, 1, 2), 1))
    form, total = Windows(shapes, windows.whole), windows.count + 1
    rows = form.rows(windows.sampler(slice(0, total)))
    for name, shape in shapes.items():
        want = np.ones((total, 1, *shape), bool)
        for s, (lo, hi) in enumerate(zip(rows[f"lo.{name}"], rows[f"hi.{name}"], strict=True)):
            want[s, 0][tuple(map(slice, lo, hi))] = False
        assert not want.all()
        x = np.zeros((2, *shape), dtype)
        host = form.masks(rows, {}, name, x)
        np.testing.assert_array_equal(np.broadcast_to(host, want.shape), want)
        np.testing.assert_array_equal(emitted(form, name, x, rows, {}), host)


def test_axes_that_a_window_covers_from_end_to_end_are_not_expanded() -> None:
    windows = sliding_windows({"x": (3, 8, 8)}, (3, 2, 2))
    form = Windows(windows.shapes, windows.whole)
    host = form.masks(windows.sampler(slice(0, 5)), {}, "x", np.zeros((1, 3, 8, 8)))
    assert host.shape == (5, 1, 1, 8, 8)


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_whole_keeps_nothing(dtype: Any) -> None:
    form, x = Whole(), np.ones((2, 3), dtype)
    rows = form.rows({"given.x": np.zeros((4, 2, 3))})
    host = form.masks(rows, {}, "x", x)
    assert host.shape == (4, 1, 1) and not host.any()
    np.testing.assert_array_equal(emitted(form, "x", x, rows, {}), host)


# ------------------------------------------------------------------------ samplers


def test_samples_depend_on_their_numbers_alone() -> None:
    lacking = without_each(130)
    whole = unpack(lacking(slice(0, 131))["z"], 130)
    np.testing.assert_array_equal(whole[0], np.ones(130))
    np.testing.assert_array_equal(~whole[1:], np.eye(130))
    pieces = [lacking(slice(i, min(i + 37, 131)))["z"] for i in range(0, 131, 37)]
    np.testing.assert_array_equal(unpack(np.concatenate(pieces), 130), whole)


@pytest.mark.parametrize("rows", [2, 3, 9])
def test_derangements_never_leave_all_in_place_and_are_uniform(rows: int) -> None:
    found = derangements(3, slice(0, 6000), rows)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.tile(np.arange(rows), (6000, 1)))
    assert not (found == np.arange(rows)).all(axis=1).any()
    np.testing.assert_array_equal(derangements(3, slice(40, 60), rows), found[40:60])
    kinds, times = np.unique(found, axis=0, return_counts=True)
    if rows == 3:
        assert len(kinds) == 5
        assert times.min() > 1100 and times.max() < 1300


# ------------------------------------------------------------------------ the game


class Counted:
    """A function that counts what it is asked."""

    def __init__(self, fn: Callable[..., Any] = lambda x: x.sum(1)) -> None:
        self.fn, self.calls, self.rows = fn, 0, 0

    def __call__(self, *arrays: np.ndarray) -> Any:
        self.calls += 1
        self.rows += len(arrays[0])
        return self.fn(*arrays)


def test_equal_coalitions_are_evaluated_once() -> None:
    counted = Counted()
    ox.Lime(ox.BlackBox(counted), "linear").attribute(X[:1, :3], n_samples=500, seed=0)
    assert counted.rows <= 1 + 8
    counted.rows = 0
    got = ox.ShapleyValueSampling(ox.BlackBox(counted)).attribute(X[:2], n_samples=200, seed=0)
    assert counted.rows <= 2 + 2 * 16
    np.testing.assert_allclose(got, X[:2], atol=1e-6)


def test_forgetting_coalitions_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more distinct ones come than are remembered, they are evaluated again."""
    counted = Counted(lambda x: np.maximum(x[:, 0] * x[:, 1], x[:, 2]))
    ask = ox.KernelShap(ox.BlackBox(counted)).attribute
    wide = np.concatenate([X, X[:, ::-1], X], axis=1)
    want = ask(wide, n_samples=900, seed=2)
    few = counted.rows
    monkeypatch.setattr(game, "_MEMORY_BYTES", 1)
    monkeypatch.setattr(game, "_BLOCK_BYTES", 4096)
    counted.rows = 0
    np.testing.assert_array_equal(ask(wide, n_samples=900, seed=2), want)
    assert counted.rows > few


def test_the_table_never_forgets_what_its_scores_are_kept_of() -> None:
    """A coalition that a full table does not know would get the score of the last one."""
    seen = game._Seen(1)
    assert seen.table.limit > 1 << 40


def test_samples_are_made_ahead_but_not_twice() -> None:
    made: list[slice] = []

    def sampler(piece: slice) -> dict[str, np.ndarray]:
        made.append(piece)
        return {"z": np.zeros((piece.stop - piece.start, 1), np.uint64)}

    ahead = game._Ahead(sampler, 10)
    for start in range(0, 10, 4):
        piece = slice(start, min(start + 4, 10))
        assert len(ahead(piece)["z"]) == piece.stop - piece.start
        ahead(piece)
    assert [(p.start, p.stop) for p in made] == [(0, 4), (4, 8), (8, 10)]


def test_no_perturbed_copy_is_made_on_the_host(
    linear: ox.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[dict[str, tuple[int, ...]]] = []
    original = Session.__call__

    def spy(self: Session, feeds: Any, *args: Any, **more: Any) -> Any:
        fed.append({k: v.shape for k, v in feeds.items()})
        return original(self, feeds, *args, **more)

    monkeypatch.setattr(Session, "__call__", spy)
    got = ox.KernelShap(linear).attribute(X, target=1, n_samples=14, seed=0)
    np.testing.assert_allclose(got, X * W[:, 1], atol=1e-5)
    assert len(fed) == 1  # all samples and examples in one run
    (shapes,) = fed
    present = shapes.pop("perturb.present")  # each coalition once
    assert 8 < present[0] < 14 and present[1] == 4
    assert sorted(shapes.values()) == [(1, 1), (1, 4), (5, 4)]  # target, feature ids, inputs


def test_one_graph_for_any_number_of_features(linear: ox.Model) -> None:
    before = len(linear._programs)
    method = ox.FeatureAblation(linear)
    for mask in ([0, 0, 1, 1], [0, 1, 2, 3], [[0]], np.arange(20).reshape(5, 4)):
        got = method.attribute(X, target=0, feature_mask=mask)
        ids = np.broadcast_to(mask, X.shape)
        for row, own, found in zip(X * W[:, 0], ids, got, strict=True):
            want = [row[own == number].sum() for number in own]
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    assert len(linear._programs) - before <= 1


# ------------------------------------------------------------------------ rounds and tolerance


def test_rounds_depend_on_the_numbers_of_samples_alone() -> None:
    bounds = list(engine.rounds(1000, 3, 0.1))
    assert bounds[0][0] == 0 and bounds[-1][1] == 1000
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    assert all(stop % 3 == 0 for _, stop in bounds[:-1])
    assert list(engine.rounds(10, 1, None)) == [(0, 10)]


NOISY = (
    HEAD
    + """noisy (float[N,6] x) => (float[N] y) {
    h = MatMul(x, w)
    t = Sin(h)
    a = Constant<value_ints=[1]>()
    y = ReduceSum<keepdims=0>(t, a)
}"""
)
HIDDEN = (3 * rng.standard_normal((6, 8))).astype(np.float32)
SIX = rng.standard_normal((4, 6)).astype(np.float32)
SIX[3] *= 0.05  # nearly linear: done early


@pytest.fixture(scope="module")
def noisy() -> ox.Model:
    return model(NOISY, {"w": HIDDEN})


SAMPLED: dict[str, dict[str, Any]] = {
    "ShapleyValueSampling": {},
    "KernelShap": {},
    "Lime": {"interpretable_model": "linear"},
}


def sampled(method: str, m: Any, **options: Any) -> Any:
    return getattr(ox, method)(m, **SAMPLED[method])


@pytest.mark.parametrize("method", SAMPLED)
@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_an_example_gets_the_same_numbers_alone_and_in_any_batch(
    noisy: ox.Model, method: str, tolerance: float | None
) -> None:
    ask = sampled(method, noisy).answer
    options = {"n_samples": 60 if method == "KernelShap" else 400, "seed": 4}
    whole = ask(inputs=SIX, tolerance=tolerance, **options)
    for index in ([0], [3], [2, 1], [3, 0, 3]):
        part = ask(inputs=SIX[index], tolerance=tolerance, **options)
        np.testing.assert_allclose(part.result, whole.result[index], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(part.checks["samples"], whole.checks["samples"][index])


@pytest.mark.parametrize("method", SAMPLED)
def test_tolerance_stops_each_example_when_it_is_met(noisy: ox.Model, method: str) -> None:
    if method == "KernelShap":  # of more features than can be counted out
        m: Any = ox.BlackBox(lambda x: np.sin(x.reshape(len(x), 3, 6) @ HIDDEN).sum((1, 2)))
        x = np.tile(SIX, (1, 3))
    else:
        m, x = noisy, SIX
    ask = sampled(method, m).answer
    most, tolerance = 3000, 0.08
    got = ask(inputs=x, n_samples=most, tolerance=tolerance, seed=1)
    drawn = got.checks["samples"]
    assert len(set(drawn.tolist())) > 1, drawn
    assert "completed" not in got.checks
    early = drawn < most
    assert early.any()
    assert (got.checks["standard_error"][early] <= tolerance * (1 + 1e-6)).all()
    for e, count in enumerate(drawn):  # what is told is what so many samples give
        same = ask(inputs=x[e : e + 1], n_samples=int(count), seed=1)
        np.testing.assert_allclose(same.result[0], got.result[e], rtol=1e-4, atol=1e-5)
    loose = ask(inputs=x, n_samples=most, tolerance=10.0, seed=1).checks["samples"]
    assert (loose <= drawn).all() and loose.max() < 100


# ------------------------------------------------------------------------ standard errors


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ShapleyValueSampling", {"n_samples": 30}),
        ("ShapleyValueSampling", {"n_samples": 60, "sampling": "antithetic"}),
        ("ShapleyValueSampling", {"n_samples": 60, "sampling": "stratified"}),
        ("KernelShap", {"n_samples": 62}),
        ("Lime", {"n_samples": 100}),
    ],
)
def test_standard_errors_are_as_large_as_the_errors(
    method: str, options: dict[str, Any], noisy: ox.Model
) -> None:
    explainer = sampled(method, noisy)
    if method == "Lime":
        truth = explainer.attribute(SIX[:2], n_samples=20000, seed=99)
    else:
        truth = ox.ShapleyValues(noisy).attribute(SIX[:2])
    z = []
    for seed in range(60):
        got, error = explainer.attribute(SIX[:2], seed=seed, return_standard_error=True, **options)
        assert (error > 0).all()
        z.append((got - truth) / error)
    assert 0.7 < np.mean(np.square(z)) < 1.5, np.mean(np.square(z))
    assert abs(np.mean(z)) < 0.25  # unbiased


# ------------------------------------------------------------------------ interrupts and failures

METHODS: dict[str, dict[str, Any]] = {
    "FeatureAblation": {},
    "Occlusion": {"sliding_window_shapes": (1,)},
    "FeaturePermutation": {"seed": 0},
    "ShapleyValues": {},
    "ShapleyValueSampling": {"n_samples": 8, "seed": 0},
    "KernelShap": {"n_samples": 14, "seed": 0},
    "Lime": {"n_samples": 20, "seed": 0, "made": {"interpretable_model": "linear"}},
}


class Failing:
    """A linear function that does something else from its n-th call on."""

    def __init__(self, after: int, then: Callable[[np.ndarray], Any]) -> None:
        self.after, self.then, self.calls = after, then, 0

    def __call__(self, x: np.ndarray) -> Any:
        self.calls += 1
        return x @ W[:, 0] if self.calls <= self.after else self.then(x)


def interrupt(x: np.ndarray) -> Any:
    raise KeyboardInterrupt


def boom(x: np.ndarray) -> Any:
    raise ValueError("boom")


def ask(method: str, m: Any, x: np.ndarray = X, **more: Any) -> Any:
    options = {**METHODS[method], **more}
    return getattr(ox, method)(m, **options.pop("made", {})).answer(inputs=x, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("samples", [2, 4])
def test_an_interrupt_gives_what_was_computed(method: str, samples: int) -> None:
    # One call asks for the shape of the answer; then each is one sample of five examples.
    box = ox.BlackBox(Failing(1 + samples, interrupt))
    with pytest.warns(ox.IncompleteWarning, match="interrupted: 0 of 5"):
        got = ask(method, box, perturbations_per_eval=1)
    known = ~np.isnan(got.result)
    assert got.result.shape == X.shape
    if method in ("FeatureAblation", "Occlusion", "FeaturePermutation"):
        np.testing.assert_array_equal(known, np.tile(np.arange(4) < samples - 1, (5, 1)))
    if method in ("FeatureAblation", "Occlusion"):
        np.testing.assert_allclose(got.result[known], (X * W[:, 0])[known], rtol=1e-5)
    if method == "ShapleyValues":
        assert not known.any()
    done = got.checks["completed"]
    assert done.shape == (5,) and (done == done[0]).all() and 0 < done[0] < 1
    if method in ("FeatureAblation", "Occlusion"):
        assert done[0] == samples / 5
    if method in ("KernelShap", "Lime"):
        assert got.checks["samples"][0] >= samples


def test_an_interrupt_between_examples_gives_those_that_are_complete() -> None:
    box = ox.BlackBox(Failing(1 + 3, interrupt), memory_limit=1)  # one row at a time
    with pytest.warns(ox.IncompleteWarning, match="interrupted: 0 of 5 .* 1 after 60 % of their"):
        got = ask("FeatureAblation", box)
    np.testing.assert_array_equal(~np.isnan(got.result).any(axis=1), [False] * 5)
    np.testing.assert_array_equal(~np.isnan(got.result[0]), [True, True, False, False])
    box = ox.BlackBox(Failing(1 + 5 + 5 + 1, interrupt), memory_limit=1)
    with pytest.warns(ox.IncompleteWarning, match="interrupted: 2 of 5"):
        got = ask("FeatureAblation", box)
    np.testing.assert_allclose(got.result[:2], (X * W[:, 0])[:2], rtol=1e-5)
    assert np.isnan(got.result[2:]).all()
    np.testing.assert_array_equal(got.checks["completed"], [1, 1, 0.2, 0, 0])


def test_an_interrupt_between_groups_of_examples_keeps_the_first() -> None:
    mask = np.array([[0, 0, 0, 0], [0, 1, 2, 3], [5, 5, 5, 5], [0, 1, 1, 1], [2, 2, 2, 2]])
    box = ox.BlackBox(Failing(1 + 1, interrupt))
    with pytest.warns(ox.IncompleteWarning, match="interrupted: 3 of 5"):
        got = ask("FeatureAblation", box, feature_mask=mask)
    whole = (X @ W[:, 0])[:, None]
    np.testing.assert_allclose(got.result[[0, 2, 4]], np.tile(whole, 4)[[0, 2, 4]], rtol=1e-5)
    assert np.isnan(got.result[[1, 3]]).all()
    np.testing.assert_array_equal(got.checks["completed"], [1, 0, 1, 0, 1])


def test_an_interrupt_before_anything_is_known_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        ask("FeatureAblation", ox.BlackBox(Failing(1, interrupt)))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_interrupted_likewise(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m = model(LINEAR, {"w": W})
    want = ask(method, m, target=0).result
    original, calls = Session.__call__, 0

    def stop(self: Session, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return original(self, *args, **more)

    monkeypatch.setattr(Session, "__call__", stop)
    with pytest.warns(ox.IncompleteWarning, match="interrupted"):
        got = ask(method, m, target=0, perturbations_per_eval=1)
    assert (got.checks["completed"] < 1).all()
    known = ~np.isnan(got.result)
    if method in ("FeatureAblation", "Occlusion", "FeaturePermutation"):
        np.testing.assert_array_equal(known.sum(axis=1), [2] * 5)
        np.testing.assert_allclose(got.result[known], want[known], rtol=1e-5)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ox.IncompleteWarning)
        again = ask(method, m, target=0)  # nothing of it is left behind
    np.testing.assert_array_equal(again.result, want)
    assert "completed" not in again.checks


FAILURES: dict[str, Callable[[np.ndarray], Any]] = {
    "raised ValueError": boom,
    "NaN": lambda x: np.full(len(x), np.nan),
    "one number": lambda x: 1.0,
    "values of shape": lambda x: np.zeros((len(x), 2)),
    "first axis must count": lambda x: np.zeros(len(x) - 1),
    "array of numbers": lambda x: np.array(["a"] * len(x)),
}


@pytest.mark.parametrize("says", FAILURES)
@pytest.mark.parametrize("method", METHODS)
def test_a_failure_part_way_carries_what_was_computed(method: str, says: str) -> None:
    box = ox.BlackBox(Failing(1 + 3, FAILURES[says]))
    with pytest.raises(ox.EvaluationError, match=says) as caught:
        ask(method, box, perturbations_per_eval=1)
    partial = caught.value.partial
    assert partial.shape == X.shape
    if method in ("FeatureAblation", "Occlusion"):
        np.testing.assert_allclose(partial[:, :2], (X * W[:, 0])[:, :2], rtol=1e-5)
        assert np.isnan(partial[:, 2:]).all()
    if method in ("KernelShap", "Lime"):
        assert caught.value.samples >= 3


def test_what_was_computed_has_the_users_form() -> None:
    def two(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if len(a) > 5 and not b.all():  # called with perturbed copies where b is off
            raise ValueError("boom")
        return a.sum(1) + b[:, 0]

    with pytest.raises(ox.EvaluationError) as caught:
        ox.FeatureAblation(ox.BlackBox(two)).attribute(
            {"a": X[:, :2], "b": X[:, 2:3]}, perturbations_per_eval=2
        )
    partial = caught.value.partial
    assert set(partial) == {"a", "b"}
    np.testing.assert_allclose(partial["a"][:, :1], X[:, :1], rtol=1e-5)
    assert np.isnan(partial["b"]).all()


def test_a_score_that_is_not_finite_is_named() -> None:
    m = model(HEAD + "g (float[N,4] x) => (float[N,4] y) { y = Log(x) }")
    x = np.ones((3, 4), np.float32)
    with pytest.raises(ox.EvaluationError, match="example\\(s\\) 0, 1, 2 is NaN or infinite"):
        ox.FeatureAblation(m).attribute(x, target=1)
    np.testing.assert_allclose(ox.FeatureAblation(m).attribute(x, 1.0, target=1), 0 * x)


def test_progress_counts_rows(capsys: pytest.CaptureFixture[str]) -> None:
    ox.FeatureAblation(ox.BlackBox(lambda x: x.sum(1))).attribute(X, show_progress=True)
    err = capsys.readouterr().err
    assert "Feature Ablation attribution" in err and "25.0/25.0" in err
    box = ox.BlackBox(lambda x: x.sum(1))
    ox.KernelShap(box).attribute(X, n_samples=14, show_progress=True, seed=0)
    err = capsys.readouterr().err
    assert "Kernel Shap attribution" in err and "70.0/70.0" in err


def test_coalitions_of_many_words_are_told_apart() -> None:
    """Features beyond the first word count too."""
    wide = rng.standard_normal((2, 200)).astype(np.float32)
    box = ox.BlackBox(lambda x: x.sum(1))
    got = ox.KernelShap(box).attribute(wide, n_samples=900, seed=0)
    np.testing.assert_allclose(got, wide, atol=1e-4)
    assert bernoulli(0, 0, 3, 200).shape == (3, 4)
    assert isinstance(features_of({"x": (2, 200)})[0], Features)
