"""LIME for texts: which words hold the prediction up, by leaving some of them out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError
from onnxplain.methods.base import Question
from onnxplain.methods.baselines import named_baselines
from onnxplain.methods.lime_common import (
    LimeAttribution,
    LimeExplanation,
    Metric,
    Pace,
    Sampled,
    chosen_labels,
    distinct,
)
from onnxplain.methods.noise import positive
from onnxplain.methods.perturbation import progress_bar as bar_of
from onnxplain.model import Model
from onnxplain.run.feeds import Arrays, Feeds

Splitter = str | Callable[[str], Sequence[str]]
"""A regular expression of what separates words, or a function that returns the words in order."""

# Texts that are tokenized at once.
_TEXTS = 1024


@dataclass(frozen=True)
class Words:
    """A text in pieces, and which of them are the words that can be left out.

    Attributes:
        pieces: they make the text when joined.
        words: what each feature is called.
        places: the pieces of each feature.
        mask: what takes the place of a piece that is left out.
    """

    pieces: list[str]
    words: list[str]
    places: list[list[int]]
    mask: str

    @staticmethod
    def of(text: str, split: Splitter | None, bag: bool, mask: str) -> Words:
        """Divide a text.

        Args:
            text: the text.
            split: what separates words; None: each character is a word.
            bag: equal words are one feature, and leave nothing behind.
            mask: what takes the place of a word otherwise.

        Raises:
            InputError: there is no word; the expression is none; words that are not in the text.
        """
        if split is None:
            pieces, is_word = list(text), [True] * len(text)
        elif callable(split):
            pieces, is_word = _around(text, list(split(text)))
        else:
            try:
                gaps = [match.span() for match in re.finditer(split, text)]
            except re.error as error:
                raise InputError(f"split_expression {split!r} is no expression: {error}") from None
            ends = [0, *(end for gap in gaps for end in gap), len(text)]
            spans = [(a, b, i % 2 == 0) for i, (a, b) in enumerate(pairwise(ends)) if b > a]
            pieces = [text[a:b] for a, b, _ in spans]
            is_word = [word for _, _, word in spans]
        words: list[str] = []
        places: list[list[int]] = []
        known: dict[str, int] = {}
        for place in np.flatnonzero(is_word).tolist():
            word = pieces[place]
            if not bag or word not in known:
                known[word] = len(words)
                words.append(word)
                places.append([])
            places[known[word]].append(place)
        if not words:
            raise InputError(f"the text {text[:40]!r} has no words to leave out")
        return Words(pieces, words, places, "" if bag else mask)

    def without(self, present: np.ndarray) -> str:
        """The text with some of its features only (boolean [F])."""
        pieces = list(self.pieces)
        for feature in np.flatnonzero(~present):
            for place in self.places[feature]:
                pieces[place] = self.mask
        return "".join(pieces)


def _around(text: str, words: list[str]) -> tuple[list[str], list[bool]]:
    """A text in words and what lies between them, and which are words."""
    pieces, end = [], 0
    for word in words:
        start = text.find(word, end)
        if start < 0 or not word:
            raise InputError(
                f"split_expression returned {word!r}, which is not in the text behind "
                f"{text[:end][-20:]!r}: return words of it, in order"
            )
        pieces += [text[end:start], word]
        end = start + len(word)
    pieces = [piece for piece in (*pieces, text[end:]) if piece]
    known = set(words)
    return pieces, [piece in known for piece in pieces]


class TextExplanation(LimeExplanation):
    """The local linear models of a text, by label; a feature is a word.

    Attributes:
        text: the text.
        words: the word of each feature.
        positions: where it stands in the text, in characters.
    """

    def __init__(
        self,
        text: str,
        words: Words,
        predict_proba: np.ndarray,
        top_labels: list[int] | None,
        class_names: Sequence[str] | None,
    ) -> None:
        super().__init__(predict_proba, top_labels, class_names)
        starts = np.cumsum([0, *map(len, words.pieces)])
        self.text, self.words = text, words.words
        self.positions = [starts[places].tolist() for places in words.places]

    def feature_name(self, feature: int) -> str:
        """A word."""
        return self.words[feature]


class LimeText(LimeAttribution):
    """LIME for texts: a linear model of the score, by which words of the text are there.

    Each sample leaves out a random number of random words. Ribeiro, Singh, Guestrin, 2016,
    arXiv:1602.04938. The same seed gives the samples and weights of the lime package. Unit: that of
    the output, per word.

    Args:
        model: a model of texts or of token numbers, or a ``BlackBox`` of an array of texts.
        tokenizer: makes the model's inputs of a list of texts, some of them without any word; None
            where the model takes texts.
        kernel_width: width of the exponential kernel, in units of the distance times 100.
        kernel: weights of samples, by distances [S] and ``kernel_width``.
        class_names: of the labels; None: those that the model carries.
        feature_selection: "auto", "highest_weights", "forward_selection", "lasso_path" (needs
            scikit-learn) or "none".
        split_expression: regular expression of what separates words, or a function that returns
            the words of a text in order.
        bow: the same word is one feature wherever it stands, and leaves nothing behind; False: each
            place is one, and gets ``mask_string``.
        mask_string: None: "UNKWORDZ", for characters chr(0).
        random_state: seed (or numpy's RandomState) of :meth:`explain_instance`.
        char_level: characters are left out, not words.
    """

    name = "lime-text"
    title = "LIME for Texts"
    needs = ("random",)
    unit = 100.0

    def __init__(
        self,
        model: Model,
        tokenizer: Callable[[list[str]], Arrays] | None = None,
        kernel_width: float = 25,
        kernel: Callable[[np.ndarray, float], np.ndarray] | None = None,
        class_names: Sequence[str] | None = None,
        feature_selection: str = "auto",
        split_expression: str | Callable[[str], Sequence[str]] = r"\W+",
        bow: bool = True,
        mask_string: str | None = None,
        random_state: int | np.random.RandomState | None = None,
        char_level: bool = False,
    ) -> None:
        super().__init__(model, kernel_width, kernel, feature_selection, random_state, class_names)
        if tokenizer is not None and not callable(tokenizer):
            raise InputError(f"tokenizer is a function of a list of texts, not {tokenizer!r}")
        self.tokenizer, self.bow = tokenizer, bow
        self.split: Splitter | None = None if char_level else split_expression
        usual = chr(0) if char_level else "UNKWORDZ"
        self.mask_string = usual if mask_string is None else mask_string

    def attribute(
        self,
        inputs: Arrays,
        baselines: Any = None,
        target: Any = None,
        num_samples: int = 5000,
        num_features: int | None = None,
        distance_metric: str | Metric = "cosine",
        model_regressor: Any = None,
        additional_forward_args: Arrays = None,
        *,
        seed: int | None = None,
        tolerance: float | None = None,
        return_standard_error: bool = False,
        show_progress: bool = False,
    ) -> Any:
        """Explain token numbers; those that are left out are replaced.

        Args:
            inputs: integers [N, T]. Elements equal to their baseline (padding) get 0.
            baselines: the number that takes the place of a token (that of padding or of a mask), or
                an array of them; None: 0.
            target: the explained value of the output (see ``Saliency``).
            num_samples: how many samples, the text itself among them.
            num_features: the most features that get a weight; None: all. With ``bow`` a feature is
                a token number, whose places all get its weight; else a place.
            distance_metric: of a sample from the text: "cosine", "euclidean", another of
                ``scipy.spatial.distance.cdist``, or a function of two.
            model_regressor: anything with scikit-learn's ``fit(X, y, sample_weight)``, ``coef_``
                and ``predict``; None: ridge regression.
            additional_forward_args: the model's other inputs, such as the attention mask.
            seed: the samples depend on it alone; None draws one.
            tolerance: an example gets no more samples once the standard errors of its attributions
                are, summed, at most this share of their sizes.
            return_standard_error: also return how far the weights are off, typically.
            show_progress: show a progress bar on standard error.

        Returns:
            float32 [N, T] (in the form of the inputs); with ``return_standard_error`` a pair of
            these.

        Raises:
            InputError: no integers [N, T], or nothing but baselines; an option out of range.
            EvaluationError: the model answers NaN.
        """
        return self._call(locals())

    def explain_instance(
        self,
        text_instance: str,
        labels: Iterable[int] = (1,),
        top_labels: int | None = None,
        num_features: int | None = 10,
        num_samples: int = 5000,
        distance_metric: Metric = "cosine",
        model_regressor: Any = None,
        progress_bar: bool = False,
    ) -> TextExplanation:
        """Explain a text as the explainer of texts of the lime package does.

        Args:
            text_instance: the text.
            labels: what is explained where ``top_labels`` is None.
            top_labels: explain so many labels with the highest scores instead.
            num_features, num_samples, distance_metric, model_regressor: see :meth:`attribute`.
            progress_bar: show one on standard error.

        Raises:
            InputError: the text has no words; as :meth:`attribute`.
            TargetError: a label is out of range.
        """
        if not isinstance(text_instance, str):
            raise InputError(f"text_instance is a text, not {type(text_instance).__name__}")
        fit = self._surrogate(num_features, distance_metric, model_regressor)
        words = Words.of(text_instance, self.split, self.bow, self.mask_string)
        z = _leaving_out(self._random, num_samples, len(words.words))
        rows, numbers = distinct(z)

        def render(piece: slice) -> Feeds:
            return self._texts([words.without(row) for row in rows[piece]])

        with bar_of(f"{self.title} attribution", len(z), progress_bar) as tick:
            pace = Pace(tick)
            parts = self._answers(numbers, render, _TEXTS, pace)
            taken = pace.take(z, parts).complete()
        scores = taken.scores
        wanted, top = chosen_labels(scores[0], labels, top_labels)
        explanation = TextExplanation(text_instance, words, scores[0], top, self.class_names)
        fit.explain(explanation, taken.samples, scores, wanted)
        return explanation

    def _texts(self, texts: list[str]) -> Feeds:
        """Texts as the model takes them."""
        if self.tokenizer is not None:
            return self.model.feeds(self.tokenizer(texts))
        array = np.array(texts, object)
        if isinstance(self.model, Model):
            value = self.model.graph.graph.inputs[0]
            if value.dtype != ir.DataType.STRING:
                raise InputError(
                    f"'{value.name}' takes no text but {value.dtype}: give a tokenizer, a function "
                    "that makes the model's inputs of a list of texts"
                )
            if value.shape is not None and len(value.shape) == 2:
                array = array[:, None]
        return self.model.feeds(array)

    def _sampled(
        self,
        question: Question,
        example: int,
        random: np.random.RandomState,
        count: int,
        pace: Pace,
        **options: Any,
    ) -> Sampled:
        name = question.wrt[0].name or ""
        tokens = question.feeds.arrays[name][example]
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise InputError(
                f"'{name}' holds {tokens.dtype} {list(tokens.shape)} for one example, not a row of "
                "token numbers: explain images with lime-image, tables with lime-tabular, and "
                "strings with LimeText.explain_instance"
            )
        given = named_baselines(self.model, question.feeds, options["baselines"])[name]
        off = given[example if len(given) > 1 else 0]
        real = tokens != off
        if not real.any():
            raise InputError(f"example {example} of '{name}' has nothing but baselines: no words")
        ids = np.full(len(tokens), -1)
        ids[real] = distinct(tokens[real, None])[1] if self.bow else np.arange(real.sum())
        z = _leaving_out(random, count, int(ids.max()) + 1)
        parts = self._present(question, example, z, ids.clip(0), off, pace)
        return pace.take(z, parts, ids)


def _leaving_out(random: np.random.RandomState, count: int, features: int) -> np.ndarray:
    """Which words are kept in each sample, boolean [count, F]; all of them in the first."""
    positive(count, "num_samples", 2)
    z = np.ones((count, features), bool)
    for row, size in enumerate(random.randint(1, features + 1, count - 1), start=1):
        z[row, random.choice(features, size, replace=False)] = False
    return z
