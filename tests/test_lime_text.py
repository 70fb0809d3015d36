"""LIME for texts: what is left out, what is found, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import onnxplain as ox
from onnxplain.methods.lime_text import LimeText, Words
from tests.helpers import BUNDLED, HEAD, model

TEXT = "A good film, a very good film - not bad!"
VALUES = {"good": 2.0, "bad": -3.0, "very": 1.0}


def score(texts: np.ndarray) -> np.ndarray:
    words = [text.replace(",", " ").replace("!", " ").split() for text in texts]
    total = np.array([sum(VALUES.get(w, 0.0) for w in row) for row in words])
    return np.stack([-total, total], axis=1)


def box(function: Any = score) -> Any:
    return ox.BlackBox(function)


@pytest.mark.parametrize(
    ("split", "bag", "words", "left"),
    [
        (r"\W+", True, ["A", "good", "film", "a", "very", "not", "bad"], "  , a    - not bad!"),
        (
            r"\W+",
            False,
            ["A", "good", "film", "a", "very", "good", "film", "not", "bad"],
            "X X X, a X good film - not bad!",
        ),
        (str.split, True, ["A", "good", "film,", "a", "very", "film", "-", "not", "bad!"], None),
        (None, True, sorted(set(TEXT), key=TEXT.index), None),
    ],
)
def test_words_of_a_text(split: Any, bag: bool, words: list[str], left: str | None) -> None:
    found = Words.of(TEXT, split, bag, "X")
    assert found.words == words
    assert "".join(found.pieces) == TEXT
    assert found.without(np.ones(len(words), bool)) == TEXT
    if left is not None:
        present = np.array([w not in ("A", "good", "film", "very") for w in words])
        present[5:7] = True
        assert found.without(present) == left


def test_an_additive_score_is_found() -> None:
    class LeastSquares:
        def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray) -> None:
            full = np.column_stack([X, np.ones(len(X))])
            found = np.linalg.lstsq(full, y, rcond=None)[0]
            self.coef_, self.intercept_ = found[:-1], found[-1]

        def predict(self, X: np.ndarray) -> np.ndarray:
            return X @ self.coef_ + self.intercept_

    asked: dict[str, Any] = {"num_samples": 200, "model_regressor": LeastSquares()}
    found = LimeText(box(), random_state=0).explain_instance(TEXT, **asked)
    weights = dict(found.as_list())
    assert {w: round(v, 9) for w, v in weights.items() if abs(v) > 1e-9} == {
        "good": 4.0,  # it stands there twice
        "bad": -3.0,
        "very": 1.0,
    }
    assert found.score[1] == pytest.approx(1)
    assert found.positions[found.words.index("good")] == [2, 20]
    each = LimeText(box(), bow=False, random_state=0).explain_instance(TEXT, **asked)
    assert sorted(round(v, 9) for _, v in each.as_list() if abs(v) > 1e-9) == [-3, 1, 2, 2]


def test_texts_that_are_equal_are_scored_once() -> None:
    seen: list[str] = []

    def counted(texts: np.ndarray) -> np.ndarray:
        seen.extend(texts)
        return score(texts)

    LimeText(box(counted)).explain_instance("good bad very", num_samples=1000)
    assert len(seen) == len(set(seen)) == 8


def vocabulary() -> list[str]:
    return (BUNDLED / "sentiment" / "vocab.txt").read_text().split("\n")


def tokens(texts: list[str]) -> np.ndarray:
    known = {word: number for number, word in enumerate(vocabulary())}
    rows = [[known.get(w, known["[UNK]"]) for w in text.lower().split()] for text in texts]
    width = max(1, *map(len, rows))
    return np.array([row + [0] * (width - len(row)) for row in rows], np.int64)


def test_a_model_with_a_tokenizer() -> None:
    m = ox.Model(str(BUNDLED / "sentiment" / "sentiment.onnx"))
    text = "the plot was truly wonderful and i loved the music"
    found = LimeText(m, tokens, class_names=["negative", "positive"], random_state=0)
    explanation = found.explain_instance(text, num_samples=500)
    assert {w for w, v in explanation.as_list()[:2]} == {"wonderful", "loved"}
    assert explanation.class_names == ["negative", "positive"]
    assert explanation.predict_proba[1] > 0


def test_token_numbers() -> None:
    m = ox.Model(str(BUNDLED / "sentiment" / "sentiment.onnx"))
    texts = ["the plot was truly wonderful and i loved the music", "the film was bad"]
    x = tokens(texts)
    lime = LimeText(m)
    found = lime.attribute(x, target=1, num_samples=400, seed=0)
    assert found.shape == x.shape and found.dtype == np.float32
    words = texts[0].split()
    assert {words[i] for i in np.argsort(-found[0])[:2]} == {"wonderful", "loved"}
    assert found[1].argmin() == 3
    np.testing.assert_array_equal(found[1, 4:], 0)  # padding
    assert found[0, 0] == found[0, 8]  # the same word
    alone = lime.attribute(x[1:, :4], target=1, num_samples=400, seed=0)
    np.testing.assert_allclose(found[1:, :4], alone, atol=1e-5)
    masked = lime.attribute(x, vocabulary().index("[UNK]"), target=1, num_samples=400, seed=0)
    assert np.abs(masked - found).max() > 1e-3
    each = LimeText(m, bow=False).attribute(x, target=1, num_samples=400, seed=0)
    assert each[0, 0] != each[0, 8]


def test_a_model_of_texts() -> None:
    """onnxruntime's string operators; the score is whether the text holds a word alone."""
    m = model(
        f"""{HEAD} m (string[n] x) => (float[n, 2] y) {{
            word = Constant <value_strings = ["good", "bad"]> ()
            axes = Constant <value_ints = [1]> ()
            wide = Unsqueeze(x, axes)
            same = Equal(wide, word)
            y = Cast <to = 1> (same)
        }}"""
    )
    found = LimeText(m, random_state=0, split_expression=r"\s").explain_instance(
        "good", labels=(0, 1), num_samples=20
    )
    assert found.local_exp[0][0][1] > 1e-3
    assert found.local_exp[1][0][1] == pytest.approx(0)


def test_bad_texts() -> None:
    lime = LimeText(box())
    for text in ("", " ,; "):
        with pytest.raises(ox.InputError, match="no words"):
            lime.explain_instance(text)
    with pytest.raises(ox.InputError, match="not list"):
        lime.explain_instance(["a"])  # type: ignore[arg-type]
    with pytest.raises(ox.InputError, match="num_samples"):
        lime.explain_instance("a b", num_samples=0)
    with pytest.raises(ox.TargetError, match="out of range"):
        lime.explain_instance("a b", labels=(2,))
    with pytest.raises(ox.InputError, match="is no expression"):
        LimeText(box(), split_expression="(").explain_instance("a b")
    with pytest.raises(ox.InputError, match="not in the text behind 'good'"):
        LimeText(box(), split_expression=lambda t: ["good", "evil"]).explain_instance("good bad")
    with pytest.raises(ox.InputError, match="tokenizer is a function"):
        LimeText(box(), "words")  # type: ignore[arg-type]
    m = ox.Model(str(BUNDLED / "sentiment" / "sentiment.onnx"))
    with pytest.raises(ox.InputError, match="give a tokenizer"):
        LimeText(m).explain_instance("a b")
    with pytest.raises(ox.InputError, match="nothing but baselines"):
        LimeText(m).attribute(np.zeros((1, 4), np.int64), target=0)
    with pytest.raises(ox.InputError, match="not a row of token numbers"):
        LimeText(box(lambda x: x.sum(axis=1))).attribute(np.ones((1, 4)))


def test_scores_that_are_none() -> None:
    with pytest.raises(ox.EvaluationError, match="NaN"):
        LimeText(box(lambda texts: np.full(len(texts), np.nan))).explain_instance("a b", labels=[0])
