"""LIME for tables: what is drawn, what is found, bad input."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import onnxplain as ox
from onnxplain.methods.lime_tabular import Bins, LimeTabular, Training
from tests.helpers import BUNDLED, HEAD, model, shared

RNG = np.random.default_rng(0)
TABLE = np.column_stack([RNG.normal(3, 2, 400), RNG.exponential(1, 400), RNG.integers(0, 3, 400)])


def box(function: Any) -> Any:
    return ox.BlackBox(function)


def trained(discretizer: Any = "quartile", categorical: Any = (2,)) -> Training:
    return Training.of(TABLE, None, categorical, discretizer, np.random.RandomState(0))


def test_bins_of_a_column() -> None:
    bins = Bins.of(np.array([1.0, 2, 3, 4, 5, 6, 7, 8]), np.array([4.0, 2, 4]))
    assert bins.borders.tolist() == [2, 4]
    assert bins.number([1, 2, 2.1, 4, 9]).tolist() == [0, 0, 1, 1, 2]
    np.testing.assert_allclose(bins.means, [1.5, 3.5, 6.5])
    assert [bins.name(i, "a") for i in range(3)] == ["a <= 2.00", "2.00 < a <= 4.00", "a > 4.00"]
    drawn = bins.draw(np.array([0, 1, 2] * 200), np.random.RandomState(0))
    np.testing.assert_array_equal(bins.number(drawn), [0, 1, 2] * 200)
    assert drawn.min() >= 1 and drawn.max() <= 8


def test_a_constant_column_stays_what_it_is() -> None:
    """The lime package draws 0 for it."""
    table = np.column_stack([RNG.normal(size=50), np.full(50, 7.0)])
    random = np.random.RandomState(0)
    training = Training.of(table, None, (), "quartile", random)
    seen, rows = training.around(table[0], 30, random, False, "gaussian")
    assert (rows[:, 1] == 7).all()
    assert (seen[:, 1] == 1).all()
    found = LimeTabular(box(lambda x: x[:, 0] * x[:, 1]), table).attribute(table[:2], seed=0)
    assert (np.abs(found[:, 0]) > 0.1).all()
    np.testing.assert_allclose(found[:, 1], 0, atol=1e-12)
    plain = Training.of(table, None, (), None, random)  # standardized: by 1 where it is constant
    assert plain.scale[1] == 1
    np.testing.assert_array_equal(plain.around(table[0], 9, random, False, "gaussian")[0][:1, 1], 0)


def test_samples_of_bins_and_categories() -> None:
    random = np.random.RandomState(1)
    training, row = trained(), TABLE[0]
    seen, rows = training.around(row, 4000, random, False, "gaussian")
    np.testing.assert_array_equal(rows[0], row)
    np.testing.assert_array_equal(seen[0], 1)
    np.testing.assert_array_equal(seen[:, 2], rows[:, 2] == row[2])
    for column in (0, 1):
        bins = training.bins[column]
        own = bins.number(row[column])
        np.testing.assert_array_equal(seen[:, column], bins.number(rows[:, column]) == own)
        assert abs(seen[:, column].mean() - 0.25) < 0.03


@pytest.mark.parametrize("around", [True, False])
@pytest.mark.parametrize("sampling", ["gaussian", "lhs"])
def test_samples_of_columns_that_are_not_cut(around: bool, sampling: str) -> None:
    random = np.random.RandomState(1)
    seen, rows = trained(None).around(TABLE[0], 3000, random, around, sampling)
    middle = TABLE[0] if around else TABLE.mean(axis=0)
    for column in (0, 1):
        assert abs(rows[:, column].mean() - middle[column]) < 0.15
        assert abs(rows[:, column].std() / TABLE[:, column].std() - 1) < 0.1
        wanted = (rows[:, column] - TABLE[:, column].mean()) / TABLE[:, column].std()
        np.testing.assert_allclose(seen[:, column], wanted)
    assert set(np.unique(seen[:, 2])) == {0, 1}
    if sampling == "lhs":  # one sample in each equal share of the distribution
        scaled = (rows[1:, 0] - middle[0]) / TABLE[:, 0].std()
        from scipy.special import ndtr

        shares = np.floor(ndtr(scaled) * 3000).astype(int)
        assert len(np.unique(shares)) == 2999


def test_a_linear_score_of_standardized_columns() -> None:
    weights = np.array([2.0, -3.0])
    table = TABLE[:, :2]
    lime = LimeTabular(box(lambda x: x @ weights), table, discretize_continuous=False)
    found = lime.attribute(table[:3], num_samples=4000, seed=0)
    np.testing.assert_allclose(
        found, np.broadcast_to(weights * table.std(axis=0), (3, 2)), rtol=0.02
    )
    answer = lime.answer(inputs=table[:3], num_samples=4000, seed=0)
    assert (answer.checks["fit"] > 0.99).all()


def test_a_regression_is_explained_by_label_one() -> None:
    lime = LimeTabular(box(lambda x: x[:, 0] > 3.0), TABLE, mode="regression", random_state=0)
    found = lime.explain_instance(TABLE[0], num_samples=300)
    assert found.local_exp[1] == [(f, -w) for f, w in found.local_exp[0]]
    assert found.as_list()[0][0].count("0") >= 1
    assert abs(found.local_exp[1][0][1]) > 0.2 and found.local_exp[1][0][0] == 0


def test_samples_depend_on_the_seed_alone() -> None:
    m = ox.Model(str(BUNDLED / "breast_cancer" / "breast_cancer.onnx"))
    table = RNG.lognormal(size=(60, 30)).astype(np.float32)
    lime = LimeTabular(m, table)
    asked: dict[str, Any] = {"num_samples": 200, "seed": 3}
    together = lime.attribute(table[:3], target=1, **asked)
    assert together.shape == (3, 30) and together.dtype == np.float32
    np.testing.assert_allclose(together[2:], lime.attribute(table[2:3], target=1, **asked))
    given = LimeTabular(m).attribute(table[:3], table, 1, **asked)
    np.testing.assert_array_equal(together, given)
    few = lime.attribute(table[:3], target=1, num_features=4, **asked)
    assert (np.count_nonzero(few, axis=1) <= 4).all()


def test_another_input_is_fed() -> None:
    m = model(
        f"""{HEAD} m (float[n, 2] x, float[n, 2] shift) => (float[n, 2] y) {{
            s = Mul(x, shift)
            y = Tanh(s)
        }}"""
    )
    x = TABLE[:2, :2].astype(np.float32)
    shift = np.array([[1, 0], [0, 1]], np.float32)
    found = LimeTabular(m, TABLE[:, :2]).attribute(
        x, target=0, num_samples=300, additional_forward_args=shift, seed=0
    )
    assert np.abs(found[0, 0]) > 1e-3
    np.testing.assert_allclose(found[1], 0, atol=1e-7)


def test_integers_are_categories() -> None:
    table = RNG.integers(0, 4, (200, 2))
    m = model(
        f"""{HEAD} m (int64[n, 2] x) => (float[n] y) {{
            axes = Constant <value_ints = [1]> ()
            f = Cast <to = 1> (x)
            y = ReduceSum <keepdims = 0> (f, axes)
        }}"""
    )
    lime = LimeTabular(m, table, categorical_features=[0, 1])
    found = lime.attribute(np.array([[3, 0]]), num_samples=500, seed=0)
    assert found.dtype == np.float32
    assert found[0, 0] > 1 > -1 > found[0, 1]
    with pytest.raises(ox.InputError, match="categorical_features"):
        LimeTabular(m, table).attribute(table[:1], seed=0)


def test_trees_through_onnx() -> None:
    m = ox.Model(shared("wine_xgboost/xgboost_classifier_tree.onnx"))
    from sklearn.datasets import load_wine

    wine = load_wine()
    x = wine.data[[0, 80, 150]].astype(np.float32)
    found = LimeTabular(m, wine.data).attribute(x, target=wine.target[[0, 80, 150]], seed=0)
    assert found.shape == x.shape
    assert (found.sum(axis=1) > 0).all()  # what the rows have speaks for their class


def test_import_brings_neither_scikit_learn_nor_numba() -> None:
    code = (
        "import sys; import onnxplain.methods.lime_tabular, onnxplain.methods.lime_text,"
        "onnxplain.methods.lime_image; "
        "print([m for m in ('sklearn', 'skimage', 'scipy', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_needs_scikit_learn_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    monkeypatch.setitem(sys.modules, "sklearn.tree", None)
    score = box(lambda x: x[:, 0])
    with pytest.raises(ox.InputError, match=r"onnxplain\[surrogate\]"):
        LimeTabular(score, TABLE, feature_selection="lasso_path").attribute(TABLE[:1], seed=0)
    with pytest.raises(ox.InputError, match=r"onnxplain\[surrogate\]"):
        LimeTabular(score, TABLE, discretizer="entropy", training_labels=TABLE[:, 2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"training_data": TABLE[0]}, r"training_data is float64 of shape \[3\]"),
        ({"training_data": np.full((5, 3), "a")}, "give numbers"),
        ({"training_data": TABLE * np.nan}, "NaN"),
        ({"categorical_features": [3]}, "no column 3"),
        ({"discretizer": "tertile"}, "quartile, decile, entropy"),
        ({"discretizer": lambda column, labels, random: np.array([np.nan])}, "cuts column 0"),
        ({"discretizer": "entropy"}, "training_labels"),
        ({"training_labels": np.zeros(7)}, "7 training_labels for 400 rows"),
        ({"mode": "ranking"}, "classification, regression"),
        ({"kernel_width": -1.0}, "kernel_width"),
    ],
)
def test_bad_training(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ox.InputError, match=words):
        LimeTabular(box(lambda x: x[:, 0]), **{"training_data": TABLE, **options})


def test_bad_rows() -> None:
    score = box(lambda x: x[:, 0])
    with pytest.raises(ox.InputError, match="no training data"):
        LimeTabular(score).explain_instance(TABLE[0])
    lime = LimeTabular(score, TABLE)
    with pytest.raises(ox.InputError, match=r"columns: give numbers \[3\]"):
        lime.explain_instance(TABLE[0, :2])
    with pytest.raises(ox.InputError, match=r"has 3 columns: give \[N, 3\]"):
        lime.attribute(TABLE[:2, :2])
    with pytest.raises(ox.InputError, match="discretize_continuous=False"):
        lime.attribute(TABLE[:2], sampling_method="lhs")
    with pytest.raises(ox.InputError, match="gaussian, lhs"):
        lime.attribute(TABLE[:2], sampling_method="sobol")
    with pytest.raises(ox.InputError, match="num_samples"):
        lime.explain_instance(TABLE[0], num_samples=0)
    with pytest.raises(ox.InputError, match="2 feature_names for 3 columns"):
        LimeTabular(score, TABLE, feature_names=["a", "b"]).explain_instance(TABLE[0])
    with pytest.raises(ox.TargetError, match="out of range"):
        lime.explain_instance(TABLE[0])  # label 1 of a single score
    two = box(lambda x: x[:, :2])
    with pytest.raises(ox.InputError, match="one value a row"):
        LimeTabular(two, TABLE, mode="regression").explain_instance(TABLE[0])


def test_scores_that_are_none() -> None:
    calls = []

    def function(x: np.ndarray) -> np.ndarray:
        calls.append(len(x))
        return np.where(np.arange(len(x)) == 5, np.nan, x[:, 0])

    with pytest.raises(ox.EvaluationError, match="NaN"):
        LimeTabular(box(function), TABLE).explain_instance(TABLE[0], [0])
