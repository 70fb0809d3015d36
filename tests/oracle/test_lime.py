"""The numbers of the lime package: segments, samples and coefficients for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import onnxplain as ox
from onnxplain.methods.lime_common import LimeExplanation
from onnxplain.methods.lime_image import LimeImage
from onnxplain.methods.lime_tabular import LimeTabular
from onnxplain.methods.lime_text import LimeText
from onnxplain.perturb.segments import segmentation
from tests.helpers import HEAD, model, shared

pytest.importorskip("lime")

from lime.lime_image import LimeImageExplainer
from lime.lime_tabular import LimeTabularExplainer
from lime.lime_text import LimeTextExplainer
from lime.wrappers.scikit_image import SegmentationAlgorithm
from skimage import data, transform
from sklearn.datasets import load_iris, load_wine
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline

SELECTIONS = ["highest_weights", "forward_selection", "lasso_path", "none"]


def assert_same(theirs: Any, ours: LimeExplanation, tolerance: float = 1e-8) -> None:
    """The same features, coefficients, intercepts and fit for each label."""
    assert sorted(theirs.local_exp) == sorted(ours.local_exp)
    for label, found in theirs.local_exp.items():
        wanted = {int(feature): weight for feature, weight in found}
        mine = dict(ours.local_exp[label])
        assert mine.keys() == wanted.keys()
        keys = list(wanted)
        np.testing.assert_allclose(
            [mine[k] for k in keys], [wanted[k] for k in keys], rtol=tolerance, atol=tolerance
        )
        np.testing.assert_allclose(ours.intercept[label], theirs.intercept[label], atol=tolerance)
    last = list(theirs.local_exp)[-1]  # of the others the package does not keep them
    np.testing.assert_allclose(ours.score[last], theirs.score, atol=1e-6)
    np.testing.assert_allclose(ours.local_pred[last], theirs.local_pred[0], atol=1e-6)
    if getattr(theirs, "top_labels", None) is not None:
        assert ours.top_labels == [int(k) for k in theirs.top_labels]


# ---- images ------------------------------------------------------------------------------------


def photo(side: int) -> np.ndarray:
    small = transform.resize(data.chelsea(), (side, side), anti_aliasing=True)
    return (small * 255).astype(np.uint8)


def scores(m: ox.Model, x: np.ndarray) -> np.ndarray:
    return m(x)[m.output.name or ""]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("hide_color", [None, 0, (10, 200, 30)])
def test_image(selection: str, hide_color: Any) -> None:
    m = ox.Model(shared("resnet8_cifar10_nhwc/pretrainedResnet.onnx"))
    image = photo(32)
    options = {"kernel_size": 1, "max_dist": 10, "ratio": 0.5}
    asked: dict[str, Any] = {"top_labels": 2, "num_samples": 200, "hide_color": hide_color}
    asked["num_features"] = 4 if selection != "none" else 100000
    theirs = LimeImageExplainer(feature_selection=selection, random_state=7).explain_instance(
        image,
        lambda batch: scores(m, batch.astype(np.float32)),
        segmentation_fn=SegmentationAlgorithm("quickshift", **options),
        **asked,
    )
    ours = LimeImage(
        m, lambda batch: batch.astype(np.float32), feature_selection=selection, random_state=7
    ).explain_instance(image, segmentation_fn=segmentation("quickshift", **options), **asked)
    np.testing.assert_array_equal(ours.segments, theirs.segments)
    assert_same(theirs, ours, 1e-6)  # float32 scores, in other batches
    for choice in ({}, {"negative_only": True, "positive_only": False}, {"hide_rest": True}):
        label = ours.top_labels[0]  # type: ignore[index]
        for a, b in zip(
            theirs.get_image_and_mask(label, **choice), ours.get_image_and_mask(label, **choice)
        ):
            np.testing.assert_array_equal(a, b)


def test_image_masks_with_both_signs() -> None:
    m = ox.Model(shared("resnet8_cifar10_nhwc/pretrainedResnet.onnx"))
    cut: Callable[[np.ndarray], np.ndarray] = segmentation("slic", n_segments=20)
    theirs = LimeImageExplainer(random_state=1).explain_instance(
        photo(32), lambda b: scores(m, b.astype(np.float32)), segmentation_fn=cut, num_samples=100
    )
    ours = LimeImage(m, lambda b: b.astype(np.float32), random_state=1).explain_instance(
        photo(32), segmentation_fn=cut, num_samples=100
    )
    assert_same(theirs, ours, 1e-6)
    weights = sorted(abs(w) for _, w in ours.local_exp[3])
    for least in (0.0, weights[-3]):
        for features in (3, 50):
            asked: dict[str, Any] = {"positive_only": False, "num_features": features}
            a = theirs.get_image_and_mask(3, min_weight=least, **asked)
            b = ours.get_image_and_mask(3, min_weight=least, **asked)
            np.testing.assert_array_equal(a[0], b[0])
            np.testing.assert_array_equal(a[1], b[1])


def test_squeezenet_at_its_defaults() -> None:
    """Quickshift, five labels, all segments; resizing as part of the preprocessing."""
    m = ox.Model(shared("squeezenet/squeezenet1.0-dc.onnx"), output="prob")
    mean = np.array([104, 117, 123], np.float32)

    def preprocess(batch: np.ndarray) -> np.ndarray:
        return np.moveaxis(batch[..., ::-1].astype(np.float32) - mean, -1, 1)

    def scored(batch: np.ndarray) -> np.ndarray:
        return scores(m, preprocess(batch)).reshape(len(batch), -1)

    image = photo(227)
    theirs = LimeImageExplainer(random_state=3).explain_instance(image, scored, num_samples=60)
    ours = LimeImage(m, preprocess, random_state=3).explain_instance(image, num_samples=60)
    np.testing.assert_array_equal(ours.segments, theirs.segments)
    assert_same(theirs, ours, 1e-5)
    assert ours.top_labels[0] == 285  # type: ignore[index]  # Egyptian cat

    # attribute takes what the model takes; it sees the same picture up to its range
    x = preprocess(image[None])
    found = LimeImage(m).attribute(
        x, 285, segmentation=lambda picture: theirs.segments, num_samples=60, seed=3
    )
    weights = dict(theirs.local_exp[285])
    wanted = np.array([weights[k] for k in range(len(weights))])[theirs.segments]
    assert found.shape == x.shape
    np.testing.assert_allclose(found[0, 0], wanted, atol=0.02)  # means of floats, not of bytes


def test_image_that_is_resized() -> None:
    """A preprocessing that looks at neighbours is called for every sample."""
    m = ox.Model(shared("resnet8_cifar10_nhwc/pretrainedResnet.onnx"))

    def preprocess(batch: np.ndarray) -> np.ndarray:
        halved = batch.reshape(len(batch), 32, 2, 32, 2, 3).mean(axis=(2, 4))
        return halved.astype(np.float32)

    image, cut = photo(64), segmentation("slic", n_segments=12)
    asked: dict[str, Any] = {"segmentation_fn": cut, "num_samples": 150, "top_labels": 1}
    theirs = LimeImageExplainer(random_state=5).explain_instance(
        image, lambda batch: scores(m, preprocess(batch)), **asked
    )
    ours = LimeImage(m, preprocess, random_state=5).explain_instance(image, **asked)
    assert_same(theirs, ours, 1e-6)


@pytest.mark.parametrize(
    "regressor", [Lasso(alpha=0.001), LinearRegression()], ids=["lasso", "ols"]
)
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "cityblock"])
def test_image_of_a_function(regressor: Any, metric: str) -> None:
    """A BlackBox gets the images as the package gives them to its function."""

    def function(batch: np.ndarray) -> np.ndarray:
        x = batch.astype(np.float64) / 255
        return np.stack([x[:, :10].mean((1, 2, 3)), x[:, 10:, :, 0].var((1, 2))], axis=1)

    image, cut = photo(24), segmentation("slic", n_segments=9)
    asked: dict[str, Any] = {"segmentation_fn": cut, "num_samples": 120, "top_labels": None}
    asked |= {"labels": (0, 1), "distance_metric": metric, "model_regressor": regressor}
    theirs = LimeImageExplainer(random_state=2, kernel_width=1.5).explain_instance(
        image, function, **asked
    )
    ours = LimeImage(ox.BlackBox(function), random_state=2, kernel_width=1.5)  # type: ignore[arg-type]
    assert_same(theirs, ours.explain_instance(image, **asked), 1e-7)


# ---- tables ------------------------------------------------------------------------------------


WINE, IRIS = load_wine(), load_iris()
FOREST = RandomForestClassifier(20, random_state=0).fit(WINE.data, WINE.target)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"discretizer": "decile"},
        {"discretizer": "entropy", "training_labels": WINE.target},
        {"discretize_continuous": False},
        {"discretize_continuous": False, "sample_around_instance": True},
        {"kernel_width": 2.0, "feature_selection": "lasso_path"},
        {"feature_selection": "forward_selection"},
    ],
    ids=str,
)
def test_table(options: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"top_labels": 2, "num_features": 5, "num_samples": 1000}
    options = {"feature_names": WINE.feature_names, "random_state": 4, **options}
    theirs = LimeTabularExplainer(WINE.data, **options).explain_instance(
        WINE.data[70], FOREST.predict_proba, **asked
    )
    box: Any = ox.BlackBox(FOREST.predict_proba)
    explainer = LimeTabular(box, WINE.data, **options)
    ours = explainer.explain_instance(WINE.data[70], **asked)
    assert_same(theirs, ours)
    for label in theirs.local_exp:
        assert [n for n, _ in ours.as_list(label)] == [n for n, _ in theirs.as_list(label)]


def test_table_with_categories() -> None:
    rng = np.random.default_rng(0)
    table = np.column_stack([rng.normal(size=300), rng.integers(0, 3, 300), rng.normal(size=300)])
    label = (table[:, 0] + (table[:, 1] == 2) > 0.5).astype(int)
    forest = RandomForestClassifier(10, random_state=0).fit(table, label)
    names = {"feature_names": ["a", "b", "c"], "categorical_names": {1: ["x", "y", "z"]}}
    for cut in (True, False):
        options: dict[str, Any] = {"categorical_features": [1], "discretize_continuous": cut}
        options |= {"random_state": 0, **names}
        theirs = LimeTabularExplainer(table, **options).explain_instance(
            table[5], forest.predict_proba, num_samples=500
        )
        box: Any = ox.BlackBox(forest.predict_proba)
        ours = LimeTabular(box, table, **options).explain_instance(table[5], num_samples=500)
        assert_same(theirs, ours)
        assert [n for n, _ in ours.as_list()] == [n for n, _ in theirs.as_list()]


def test_table_of_numbers_to_predict() -> None:
    line = LinearRegression().fit(IRIS.data[:, :3], IRIS.data[:, 3])
    theirs = LimeTabularExplainer(
        IRIS.data[:, :3], mode="regression", random_state=1
    ).explain_instance(IRIS.data[80, :3], line.predict, num_samples=600)
    box: Any = ox.BlackBox(line.predict)
    ours = LimeTabular(box, IRIS.data[:, :3], mode="regression", random_state=1)
    assert_same(theirs, ours.explain_instance(IRIS.data[80, :3], num_samples=600))


def test_xgboost_through_onnx() -> None:
    m = ox.Model(shared("wine_xgboost/xgboost_classifier_tree.onnx"))
    asked: dict[str, Any] = {"top_labels": 3, "num_samples": 800}
    theirs = LimeTabularExplainer(WINE.data, random_state=9).explain_instance(
        WINE.data[20], lambda rows: scores(m, rows.astype(np.float32)), **asked
    )
    explainer = LimeTabular(m, WINE.data, random_state=9)
    assert_same(theirs, explainer.explain_instance(WINE.data[20], **asked), 1e-6)

    found = explainer.attribute(WINE.data[20:22].astype(np.float32), target=0, seed=9)
    theirs = LimeTabularExplainer(WINE.data, random_state=9).explain_instance(
        WINE.data[20].astype(np.float32),
        lambda rows: scores(m, rows.astype(np.float32)),
        labels=(0,),
        num_features=13,
    )
    weights = dict(theirs.local_exp[0])
    np.testing.assert_allclose(found[0], [weights[k] for k in range(13)], atol=1e-6)


# ---- texts -------------------------------------------------------------------------------------


TEXTS = [
    "a good, good film and a lovely story",
    "a bad film; the story is bad and dull",
    "lovely music, and what a story!",
    "dull music. dull story. bad, bad ending",
    "good ending, good cast",
    "the cast is bad, the ending is dull",
]
PIPE = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10)).fit(TEXTS, [1, 0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bow": False},
        {"bow": False, "mask_string": "film"},
        {"char_level": True, "bow": False},
        {"char_level": True},
        {"split_expression": str.split},
        {"split_expression": r"[,;]\s*"},
        {"feature_selection": "lasso_path", "kernel_width": 40},
    ],
    ids=str,
)
def test_text(options: dict[str, Any]) -> None:
    text = "Good story, good cast; a bad, bad ending and a dull film."
    asked: dict[str, Any] = {"labels": (0, 1), "num_features": 4, "num_samples": 300}
    theirs = LimeTextExplainer(random_state=6, **options).explain_instance(
        text, PIPE.predict_proba, **asked
    )
    box: Any = ox.BlackBox(lambda texts: PIPE.predict_proba(list(texts)))
    ours = LimeText(box, random_state=6, **options).explain_instance(text, **asked)
    assert_same(theirs, ours)
    for label in (0, 1):
        assert [n for n, _ in ours.as_list(label)] == [n for n, _ in theirs.as_list(label)]


def test_text_through_a_tokenizer() -> None:
    """A model of token numbers: the mean of the embeddings of a text, padding left out."""
    rng = np.random.default_rng(1)
    vocabulary = ["", *sorted({word for text in TEXTS for word in text.split()})]
    table = rng.normal(size=(len(vocabulary), 2)).astype(np.float32)
    table[0] = 0
    m = model(
        f"""{HEAD} m (int64[n, t] tokens) => (float[n, 2] y) {{
            axes = Constant <value_ints = [1]> ()
            e = Gather(table, tokens)
            s = ReduceSum <keepdims = 0> (e, axes)
            y = Softmax(s)
        }}""",
        {"table": table},
    )

    def tokens(texts: list[str]) -> np.ndarray:
        rows = [[vocabulary.index(w) for w in t.split() if w in vocabulary] for t in texts]
        width = max(1, *map(len, rows))
        return np.array([row + [0] * (width - len(row)) for row in rows], np.int64)

    options: dict[str, Any] = {"random_state": 8, "split_expression": r"\s+"}
    theirs = LimeTextExplainer(**options).explain_instance(
        TEXTS[0], lambda texts: scores(m, tokens(texts)), num_samples=400
    )
    ours = LimeText(m, tokens, **options).explain_instance(TEXTS[0], num_samples=400)
    assert_same(theirs, ours, 1e-5)
    # the same words left out of the tokens
    found = LimeText(m, random_state=0).attribute(
        tokens(TEXTS[:1]), target=1, num_samples=400, seed=8
    )
    weights = dict(ours.as_list())
    np.testing.assert_allclose(found[0], [weights[w] for w in TEXTS[0].split()], atol=1e-5)
