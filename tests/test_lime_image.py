"""LIME's local models, and LIME for images: closed forms, layouts, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from skimage import draw
from sklearn import linear_model
from sklearn.datasets import load_digits

import onnxplain as ox
from onnxplain.methods.lime_common import (
    Ridge,
    Surrogate,
    chosen_labels,
    distances_from_first,
    distinct,
    r_squared,
    select,
)
from onnxplain.methods.lime_image import LimeImage
from onnxplain.perturb.segments import (
    SEGMENTATIONS,
    as_picture,
    segment_means,
    segments_of,
)
from tests.helpers import BUNDLED, HEAD, model, shared

RNG = np.random.default_rng(0)


class LeastSquares:
    """Without a penalty, a linear score is found exactly."""

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray) -> None:
        root = np.sqrt(sample_weight)[:, None]
        full = np.column_stack([X, np.ones(len(X))])
        found = np.linalg.lstsq(full * root, y * root[:, 0], rcond=None)[0]
        self.coef_, self.intercept_ = found[:-1], found[-1]

    def predict(self, X: np.ndarray) -> np.ndarray:
        return X @ self.coef_ + self.intercept_


def box(function: Any, **options: Any) -> Any:
    return ox.BlackBox(function, **options)


# ---- the local model ---------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "features"), [(50, 7), (20, 40)])
@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_ridge_is_that_of_scikit_learn(samples: int, features: int, alpha: float) -> None:
    x, y, w = RNG.normal(size=(samples, features)), RNG.normal(size=samples), RNG.random(samples)
    theirs = linear_model.Ridge(alpha=alpha).fit(x, y, sample_weight=w)
    ours = Ridge(alpha).fit(x, y, w)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-9)
    np.testing.assert_allclose(
        r_squared(y, ours.predict(x), w), theirs.score(x, y, sample_weight=w), rtol=1e-9
    )


def test_forward_selection_takes_the_best_each_time() -> None:
    x, w = RNG.integers(0, 2, (60, 9)).astype(float), RNG.random(60)
    x[:, 4] = x[:, 2]  # adds nothing beside the other
    x[:, 7] = 1  # nothing at all
    y = x @ RNG.normal(size=9) + 0.1 * RNG.normal(size=60)
    chosen: list[int] = []
    for _ in range(5):

        def score(feature: int) -> float:
            part = x[:, [*chosen, feature]]
            least = LeastSquares()
            least.fit(part, y, w)
            return r_squared(y, least.predict(part), w)

        rest = [f for f in range(9) if f not in chosen]
        chosen.append(max(rest, key=lambda f: round(score(f), 10)))
    assert select(x, y, w, 5, "forward_selection").tolist() == chosen
    assert sorted(select(x, y, w, 20, "forward_selection")) == list(range(9))


def test_constant_scores_have_no_weights() -> None:
    z = RNG.integers(0, 2, (30, 5)).astype(bool)
    z[0] = True
    local = Surrogate(3, "cosine", 0.25).fit(z, np.full(30, 0.7))
    np.testing.assert_allclose([w for _, w in local.weights], [0, 0, 0], atol=1e-12)
    assert local.score == 1
    assert local.prediction == local.intercept == pytest.approx(0.7)


def test_distances() -> None:
    z = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], float)
    np.testing.assert_allclose(distances_from_first(z, "cosine"), [0, 1 - 0.5**0.5, 1], atol=1e-12)
    np.testing.assert_allclose(distances_from_first(z, "euclidean"), [0, 2**0.5, 2])
    np.testing.assert_allclose(distances_from_first(z, "manhattan"), [0, 2, 4])
    own = distances_from_first(z, lambda a, b: float(np.abs(a - b).max()))
    np.testing.assert_allclose(own, [0, 1, 1])
    with pytest.raises(ox.InputError, match="distance_metric 'nearness'"):
        distances_from_first(z, "nearness")


def test_distinct_samples_come_in_order_of_appearance() -> None:
    z = np.array([[1, 1], [0, 1], [1, 1], [0, 0], [0, 1]], bool)
    rows, numbers = distinct(z)
    assert numbers.tolist() == [0, 1, 0, 2, 1]
    np.testing.assert_array_equal(rows[numbers], z)


def test_standard_errors_are_the_spread_over_seeds() -> None:
    def nonlinear(batch: np.ndarray) -> np.ndarray:
        parts = batch.reshape(len(batch), 4, 2, -1).mean(axis=(2, 3))
        return np.tanh(parts.prod(axis=1) + parts[:, 0])

    x = np.ones((1, 8, 4, 1)) * 1.3
    cut = np.repeat(np.arange(4), 8).reshape(8, 4)
    found = [
        LimeImage(box(nonlinear)).attribute(
            x, segmentation=cut, hide_color=0.0, num_samples=300, seed=seed,
            return_standard_error=True,
        )
        for seed in range(60)
    ]  # fmt: skip
    weights, errors = (np.stack(part)[:, 0, ::2, 0, 0] for part in zip(*found))
    np.testing.assert_allclose(errors.mean(axis=0), weights.std(axis=0), rtol=0.35)


# ---- images ------------------------------------------------------------------------------------


def linear(shape: tuple[int, ...]) -> tuple[ox.Model, np.ndarray]:
    """A model whose two outputs are sums of the input times weights."""
    weights = RNG.normal(size=(2, *shape)).astype(np.float32)
    flat = weights.reshape(2, -1).T.copy()
    size = ", ".join(map(str, shape))
    m = model(
        f"""{HEAD} m (float[n, {size}] x) => (float[n, 2] y) {{
            flat = Flatten(x)
            y = MatMul(flat, w)
        }}""",
        {"w": flat},
    )
    return m, weights


@pytest.mark.parametrize("shape", [(3, 12, 10), (1, 12, 10), (12, 10, 3), (12, 10, 1), (12, 10)])
def test_a_linear_score_is_found_exactly(shape: tuple[int, ...]) -> None:
    m, weights = linear(shape)
    x = RNG.random((2, *shape)).astype(np.float32)
    cut = np.arange(120).reshape(12, 10) // 11  # eleven segments
    asked: dict[str, Any] = {"segmentation": cut, "model_regressor": LeastSquares(), "seed": 0}
    found = LimeImage(m).attribute(x, [0, 1], hide_color=0.25, num_samples=60, **asked)
    assert found.shape == x.shape
    assert found.dtype == np.float32
    axis = {3: None}.get(len(shape) + 1) if len(shape) == 2 else (0 if shape[0] in (1, 3) else 2)
    ids = np.broadcast_to(cut if axis is None else np.expand_dims(cut, axis), shape)
    for example, target in enumerate((0, 1)):
        effect = (weights[target] * (x[example] - 0.25)).ravel()
        sums = np.bincount(ids.ravel(), effect)
        np.testing.assert_allclose(found[example], sums[ids], atol=2e-5)


def test_the_mean_of_a_segment_hides_it() -> None:
    """A score of each segment's mean alone does not change."""
    image = RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    cut = np.arange(64).reshape(8, 8) // 16
    means = segment_means(image, cut)
    for segment in range(4):
        wanted = image[cut == segment].mean(axis=0).astype(np.uint8)  # cut off, as bytes are
        np.testing.assert_array_equal(np.unique(means[cut == segment], axis=0), wanted[None])


def test_samples_depend_on_the_seed_alone() -> None:
    m, _ = linear((1, 8, 8))
    x = RNG.random((3, 1, 8, 8)).astype(np.float32)
    cut = np.arange(64).reshape(8, 8) // 7
    lime = LimeImage(m)
    asked: dict[str, Any] = {"segmentation": cut, "num_samples": 40, "seed": 5}
    together = lime.attribute(x, 0, **asked)
    np.testing.assert_array_equal(together[1:2], lime.attribute(x[1:2], 0, **asked))
    np.testing.assert_allclose(together, lime.attribute(x, 0, batch_size=7, **asked), atol=1e-6)
    assert np.abs(together - lime.attribute(x, 0, **{**asked, "seed": 6})).max() > 1e-4
    again = [LimeImage(m, random_state=1).attribute(x, 0, **{**asked, "seed": None})] * 2
    np.testing.assert_array_equal(*again)


def test_no_more_samples_than_the_tolerance_needs() -> None:
    def function(batch: np.ndarray) -> np.ndarray:
        parts = batch.reshape(len(batch), 4, 2, -1).mean(axis=(2, 3))
        return np.tanh(3 * parts[:, 0] + parts[:, 1] * parts[:, 2]) + parts[:, 3]

    cut = np.repeat(np.arange(4), 16).reshape(8, 8)
    x = np.stack([np.ones((8, 8, 1)), RNG.random((8, 8, 1))])
    lime = LimeImage(box(function))
    asked: dict[str, Any] = {"segmentation": cut, "hide_color": 0.0, "seed": 2}
    answer = lime.answer(inputs=x, num_samples=4000, tolerance=0.05, **asked)
    assert "completed" not in answer.checks
    assert (answer.checks["standard_error"] <= 0.05).all()
    for i, taken in enumerate(answer.checks["samples"].astype(int)):
        assert 32 <= taken < 4000
        alone = lime.attribute(x[i : i + 1], num_samples=taken, **asked)
        np.testing.assert_allclose(answer.result[i], alone[0], rtol=1e-6)
    with pytest.raises(ox.InputError, match="ridge regression only"):
        lime.attribute(x, tolerance=0.1, model_regressor=LeastSquares(), **asked)
    with pytest.raises(ox.InputError, match="tolerance"):
        lime.attribute(x, tolerance=-1.0, **asked)


def test_the_score_is_evaluated_once_for_equal_samples() -> None:
    rows: list[int] = []

    def function(batch: np.ndarray) -> np.ndarray:
        rows.append(len(batch))
        return batch.mean(axis=(1, 2, 3))

    cut = np.arange(36).reshape(6, 6) // 9  # 4 segments: 16 coalitions
    LimeImage(box(function)).attribute(
        RNG.random((1, 6, 6, 3)), segmentation=cut, num_samples=500, seed=0
    )
    assert 16 <= sum(rows) <= 18  # and the question of what the function returns


def by_hand(function: Any, image: np.ndarray, cut: np.ndarray, seed: int) -> Any:
    """The package's way: perturbed images, preprocessed."""
    return LimeImage(box(function), random_state=seed).explain_instance(
        image, segmentation_fn=cut, num_samples=80, top_labels=None, labels=(0, 1)
    )


@pytest.mark.parametrize(
    ("kind", "each"),
    [("scaled", False), ("standardized", True), ("halved", True), ("turned", True)],
)
def test_preprocessing_is_asked_for_each_sample_where_it_looks_around(
    kind: str, each: bool
) -> None:
    size = (3, 4, 4) if kind == "halved" else (3, 8, 8)
    m, _ = linear(size)
    seen = []

    def preprocess(batch: np.ndarray) -> np.ndarray:
        seen.append(len(batch))
        x = np.moveaxis(batch, -1, 1) / np.float32(255)
        if kind == "standardized":
            x = (x - x.mean((1, 2, 3), keepdims=True)) / x.std((1, 2, 3), keepdims=True)
        if kind == "halved":
            x = x.reshape(len(x), 3, 4, 2, 4, 2).mean(axis=(3, 5))
        if kind == "turned":
            x = x[:, :, :, ::-1]
        return np.ascontiguousarray(x, np.float32)

    image = RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    cut = 2 * (np.arange(8)[:, None] // 2) + np.arange(8) // 4
    ours = LimeImage(m, preprocess, random_state=3).explain_instance(
        image, segmentation_fn=cut, num_samples=80, top_labels=None, labels=(0, 1)
    )
    assert (sum(seen) > 40) == each  # else the image, what hides it, and a few on trial
    theirs = by_hand(lambda batch: m(preprocess(batch))["y"], image, cut, 3)
    for label in (0, 1):
        mine, wanted = dict(ours.local_exp[label]), dict(theirs.local_exp[label])
        np.testing.assert_allclose(
            [mine[k] for k in range(8)], [wanted[k] for k in range(8)], atol=1e-5
        )


def test_an_image_as_the_model_takes_it() -> None:
    """Without preprocessing: channels last or first, grey for a model of one channel or three."""
    asked: dict[str, Any] = {"num_samples": 30, "top_labels": None, "labels": [1]}
    cut = np.arange(64).reshape(8, 8) // 8
    m, _ = linear((3, 8, 8))
    image = RNG.random((8, 8, 3)).astype(np.float32)
    found = [
        LimeImage(m, random_state=0).explain_instance(i, segmentation_fn=cut, **asked).local_exp
        for i in (image, np.moveaxis(image, -1, 0))
    ]
    assert found[0] == found[1]
    wanted = LimeImage(m).attribute(
        np.moveaxis(image, -1, 0)[None], 1, segmentation=cut, num_samples=30, seed=0
    )
    np.testing.assert_allclose(wanted[0, 0, :, 0], [w for _, w in sorted(found[0][1])], rtol=1e-5)
    for shape in ((1, 8, 8), (8, 8), (3, 8, 8)):
        m, _ = linear(shape)
        grey = LimeImage(m, random_state=0).explain_instance(
            image[:, :, 0], segmentation_fn=cut, **asked
        )
        x = np.broadcast_to(image[:, :, 0], shape)[None].copy()
        wanted = LimeImage(m).attribute(x, 1, segmentation=cut, num_samples=30, seed=0)
        row = wanted.reshape(-1, 8, 8)[0, :, 0]
        np.testing.assert_allclose(row, [w for _, w in sorted(grey.local_exp[1])], rtol=1e-5)


def test_image_and_mask() -> None:
    m, _ = linear((3, 4, 4))
    image = RNG.random((4, 4, 3)).astype(np.float32)
    cut = np.repeat(np.arange(4), 4).reshape(4, 4)
    found = LimeImage(m, random_state=0).explain_instance(image, segmentation_fn=cut)
    assert found.available_labels() == found.top_labels
    assert set(found.top_labels or ()) == {0, 1}
    found.local_exp[0] = [(2, -0.5), (0, 0.4), (3, -0.2), (1, 0.1)]
    shown, mask = found.get_image_and_mask(0, hide_rest=True)
    np.testing.assert_array_equal(mask[:, 0], [1, 1, 0, 0])
    np.testing.assert_array_equal(shown, np.where(mask[..., None] > 0, image, 0))
    np.testing.assert_array_equal(
        found.get_image_and_mask(0, min_weight=0.3)[1][:, 0], [1, 0, 0, 0]
    )
    _, mask = found.get_image_and_mask(0, positive_only=False, negative_only=True, num_features=1)
    np.testing.assert_array_equal(mask[:, 0], [0, 0, 1, 0])
    shown, mask = found.get_image_and_mask(0, positive_only=False, num_features=3, min_weight=0.3)
    np.testing.assert_array_equal(mask[:, 0], [1, 0, -1, 0])
    assert (shown[0, :, 1] == image.max()).all()
    assert (shown[2, :, 0] == image.max()).all()
    with pytest.raises(ox.InputError, match="can't both be"):
        found.get_image_and_mask(0, True, True)
    with pytest.raises(ox.TargetError, match="label 7 was not explained"):
        found.get_image_and_mask(7)


def test_drawn_shapes_are_pointed_at() -> None:
    m = ox.Model(shared("dianna/geometric_shapes_model.onnx"))
    rng = np.random.default_rng(1)
    x, inside = np.zeros((6, 1, 64, 64), np.float32), np.zeros((6, 64, 64), bool)
    for i in range(6):
        row, column = rng.integers(18, 46, 2)
        if i % 2:
            where = draw.disk((row, column), 11)
        else:
            where = draw.polygon([row - 11, row + 9, row + 9], [column, column - 11, column + 11])
        inside[i][where] = True
    x[:, 0][inside] = 1
    scores = m(x)[m.output.name or ""]
    asked: dict[str, Any] = {"hide_color": 0.0, "num_samples": 300, "seed": 0}
    found = LimeImage(m).attribute(x, scores.argmax(axis=1), **asked)[:, 0]
    for i in range(6):
        top = found[i] == found[i].max()
        assert (inside[i] & top).sum() > 0.5 * top.sum(), i


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_segmentations(name: str) -> None:
    for side in (8, 28, 64):
        rows, columns = np.mgrid[:side, :side] / side
        picture = np.stack([rows, columns, (rows - 0.5) ** 2 + (columns - 0.5) ** 2 < 0.1], axis=2)
        found = segments_of(picture, name)
        assert found.shape == (side, side)
        assert found.dtype == np.int64
        assert set(np.unique(found)) == set(range(found.max() + 1))
        assert found.max() >= 1


def test_segment_numbers_are_made_dense() -> None:
    picture = np.zeros((2, 3, 3))
    found = segments_of(picture, lambda p: np.array([[7, 7, 3], [1, 1, 1]], np.int16))
    np.testing.assert_array_equal(found, [[2, 2, 1], [0, 0, 0]])
    np.testing.assert_array_equal(segments_of(picture, np.eye(2, 3, dtype=bool)), np.eye(2, 3))


def test_pictures_to_divide() -> None:
    x = RNG.random((4, 5, 3))
    np.testing.assert_array_equal(as_picture(x), x)
    for other in (255 * x, x - 0.5):
        wanted = (x - x.min()) / (x.max() - x.min())
        np.testing.assert_allclose(as_picture(other), wanted, atol=1e-12)
    np.testing.assert_array_equal(as_picture(np.full((4, 5, 3), 7.0)), 1)
    assert as_picture(x[:, :, :1]).shape == (4, 5, 3)


def test_explained_through_one_call() -> None:
    m = ox.Model(str(BUNDLED / "digits" / "digits.onnx"))
    x = load_digits().images[:40, None].astype(np.float32)  # each can be divided
    answer = LimeImage(m).answer(
        inputs=x, target=load_digits().target[:40], hide_color=0.0, num_samples=200, seed=0
    )
    assert answer.result.shape == x.shape
    assert answer.checks.keys() == {"fit", "samples", "standard_error"}
    assert ((answer.checks["fit"] > 0) & (answer.checks["fit"] <= 1)).all()
    assert answer.checks["samples"].tolist() == [200] * 40
    assert answer.standard_errors.shape == x.shape


def test_a_model_of_a_fixed_batch() -> None:
    m = ox.Model(shared("attention_mnist/self-attention-mnist-pgd-medium-sim.onnx"))
    x = load_digits().images[:2].repeat(3, 1).repeat(3, 2)[:, :28, :28] / 16
    x = np.pad(x, ((0, 0), (2, 2), (2, 2)))[..., None].astype(np.float32)
    asked: dict[str, Any] = {"hide_color": 0.0, "num_samples": 40, "seed": 0}
    found = LimeImage(m).attribute(x, [0, 1], "slic", **asked)
    for i, target in enumerate((0, 1)):
        np.testing.assert_allclose(
            found[i : i + 1],
            LimeImage(m).attribute(x[i : i + 1], target, "slic", **asked),
            atol=1e-5,
        )
    assert np.abs(found).max() > 0


@pytest.mark.parametrize("kind", ["float16", "double", "uint8"])
def test_other_types(kind: str) -> None:
    """A linear score of other numbers: attributions are float64 for doubles, else float32."""
    names = {"float16": ("float16", 10), "double": ("double", 11), "uint8": ("uint8", 1)}
    typed, number = names[kind]
    m = model(
        f"""{HEAD} m ({typed}[n, 3, 8, 8] x) => ({"float" if kind == "uint8" else typed}[n] y) {{
            flat = Flatten(x)
            f = Cast <to = {number}> (flat)
            axes = Constant <value_ints = [1]> ()
            y = ReduceMean <keepdims = 0> (f, axes)
        }}"""
    )
    x = RNG.integers(0, 200, (1, 3, 8, 8)).astype(np.dtype(kind))
    cut = np.arange(64).reshape(8, 8) // 8
    found = LimeImage(m).attribute(
        x, segmentation=cut, hide_color=3, num_samples=40, model_regressor=LeastSquares(), seed=0
    )
    assert found.dtype == (np.float64 if kind == "double" else np.float32)
    wanted = (x[0].astype(float) - 3).sum(axis=(0, 2)) / x[0].size
    np.testing.assert_allclose(found[0, 0, :, 0], wanted, rtol=3e-2 if kind == "float16" else 1e-5)


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"segmentation": np.zeros((8, 8), int)}, "single segment"),
        ({"segmentation": lambda p: np.zeros((8, 8), int)}, "single segment"),
        ({"segmentation": np.arange(56).reshape(7, 8)}, r"shape \[7, 8\].*8 x 8"),
        ({"segmentation": np.random.default_rng(0).random((8, 8))}, "float64, not segment numbers"),
        ({"segmentation": "felsenzwalb"}, "quickshift, slic, felzenszwalb, watershed"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 2"),
        ({"num_samples": 1}, "num_samples must be an integer of at least 2"),
        ({"num_features": 0}, "num_features"),
        ({"batch_size": 0}, "batch_size"),
        ({"hide_color": (1, 2)}, "hide_color"),
        ({"hide_color": "grey"}, "hide_color"),
        ({"hide_color": np.nan}, "hide_color"),
        ({"distance_metric": "near"}, "distance_metric 'near'"),
        ({"model_regressor": object()}, "fit"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    m, _ = linear((3, 8, 8))
    x = RNG.random((1, 3, 8, 8)).astype(np.float32)
    good: dict[str, Any] = {"segmentation": np.arange(64).reshape(8, 8) // 8, "num_samples": 20}
    with pytest.raises(ox.InputError, match=words):
        LimeImage(m).attribute(x, 0, **{**good, **options})


def test_bad_constructions() -> None:
    m, _ = linear((3, 8, 8))
    for options, words in (
        ({"kernel_width": 0.0}, "kernel_width"),
        ({"feature_selection": "best"}, "feature_selection is one of"),
        ({"random_state": -3}, "random_state"),
        ({"preprocess": 3}, "preprocess is a function"),
    ):
        with pytest.raises(ox.InputError, match=words):
            LimeImage(m, **options)  # type: ignore[arg-type]
    with pytest.raises(ox.InputError, match="the kernel must return"):
        LimeImage(m, kernel=lambda d, width: d * np.nan).attribute(
            np.ones((1, 3, 8, 8), np.float32), 0, np.eye(8, dtype=int), seed=0
        )
    with pytest.raises(ox.InputError, match="no picture"):
        LimeImage(linear((5, 4, 4))[0]).attribute(np.ones((1, 5, 4, 4), np.float32), 0)
    with pytest.raises(ox.InputError, match="no picture"):
        LimeImage(linear((5,))[0]).attribute(np.ones((1, 5), np.float32), 0)


def test_bad_images_and_labels() -> None:
    m, _ = linear((3, 8, 8))
    good = RNG.random((8, 8, 3))
    cut = np.arange(64).reshape(8, 8) // 8
    lime = LimeImage(m)
    for image in (good[None], good[0, 0], np.full((8, 8, 3), "a")):
        with pytest.raises(ox.InputError, match="one image at a time"):
            lime.explain_instance(image)
    asked: dict[str, Any] = {"segmentation_fn": cut, "num_samples": 10, "top_labels": None}
    with pytest.raises(ox.InputError, match=r"4 channels.*RGBA"):
        by_hand(lambda batch: batch.mean(axis=(1, 2)), np.ones((8, 8, 4)), cut, 0)
    with pytest.raises(ox.InputError, match="that uint8 can hold"):
        lime.explain_instance((255 * good).astype(np.uint8), hide_color=256, **asked)
    for labels in ((2,), (-1,)):
        with pytest.raises(ox.TargetError, match="out of range"):
            lime.explain_instance(good, labels, **asked)
    with pytest.raises(ox.TargetError, match="no integer"):
        chosen_labels(np.zeros(3), ["a"], None)  # type: ignore[list-item]
    with pytest.raises(ox.TargetError):
        lime.attribute(np.moveaxis(good, -1, 0)[None].astype(np.float32), 2, segmentation=cut)


@pytest.mark.parametrize("answer", ["nan", "raises"])
def test_what_was_found_before_a_failure_is_kept(answer: str) -> None:
    calls = []

    def function(batch: np.ndarray) -> np.ndarray:
        calls.append(len(batch))
        if len(calls) > 5:
            if answer == "raises":
                raise RuntimeError("gone")
            return np.full(len(batch), np.nan)
        return batch.mean(axis=(1, 2, 3))

    cut = np.arange(64).reshape(8, 8) // 4  # 16 segments
    lime = LimeImage(box(function, batch_size=20))
    with pytest.raises(ox.EvaluationError) as caught:
        lime.attribute(RNG.random((2, 8, 8, 3)), segmentation=cut, num_samples=200, seed=0)
    assert caught.value.samples == 80  # one call asked for the shape of the answer
    assert np.isfinite(caught.value.partial[0]).all()
    assert np.isnan(caught.value.partial[1]).all()


def test_what_was_found_before_an_interrupt_is_returned() -> None:
    calls = []

    def function(batch: np.ndarray) -> np.ndarray:
        calls.append(len(batch))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return batch.mean(axis=(1, 2, 3))

    cut = np.arange(64).reshape(8, 8) // 4
    lime, x = LimeImage(box(function, batch_size=20)), RNG.random((2, 8, 8, 3))
    with pytest.warns(ox.IncompleteWarning, match="interrupted"):
        answer = lime.answer(inputs=x, segmentation=cut, num_samples=200, seed=0)
    assert np.isfinite(answer.result[0]).all()
    assert np.isnan(answer.result[1]).all()
    assert answer.checks["completed"].tolist() == [0.5, 0.0]
    calls.clear()
    with pytest.warns(ox.IncompleteWarning, match="of 200 samples"):
        lime.explain_instance(x[0], segmentation_fn=cut, num_samples=200, labels=[0], top_labels=0)
