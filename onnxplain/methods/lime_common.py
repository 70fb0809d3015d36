"""What LIME does for images, tables and texts alike: a local linear model of sampled scores.

Interpretable samples [S, F] (the first is the explained instance), their scores [S, K] and their
distances from the first go in; for each label a ridge regression comes out, weighted by closeness,
on the features that were selected. The numbers are those of the lime package.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxplain.errors import (
    EvaluationError,
    IncompleteWarning,
    InputError,
    TargetError,
    UnsupportedModelError,
)
from onnxplain.methods import target as targets
from onnxplain.methods.base import Question
from onnxplain.methods.noise import positive
from onnxplain.methods.perturbation import Found, PerturbationAttribution
from onnxplain.methods.perturbation import progress_bar as bar_of
from onnxplain.model import Model
from onnxplain.perturb.engine import check_tolerance, games, rounds
from onnxplain.perturb.features import Features
from onnxplain.perturb.forms import Coalitions
from onnxplain.perturb.game import Off, Play, Tick
from onnxplain.perturb.surrogates import r_squared
from onnxplain.run.feeds import Feeds, all_finite

PAPER = (
    'Ribeiro, Singh, Guestrin, "Why Should I Trust You?": Explaining the Predictions of Any '
    "Classifier, 2016, arXiv:1602.04938"
)
SELECTIONS = ("auto", "highest_weights", "forward_selection", "lasso_path", "none")
NEEDS_SKLEARN = 'needs scikit-learn: pip install "onnxplain[surrogate]"'

Kernel = Callable[[np.ndarray, float], np.ndarray]
"""Weights of samples by their distances [S] and the kernel's width."""

Metric = str | Callable[[np.ndarray, np.ndarray], float]

# In place of a target: the scores of all labels.
EVERY = object()
# Up to so many features, "auto" selects them one by one.
_FEW = 6
# A column is a combination of others where this share of its square at most is left.
_COLLINEAR = 1e-10


# ---- weighted least squares --------------------------------------------------------------------


class Ridge:
    """Ridge regression with intercept and sample weights, minimizing |y - Xb|² + alpha |b|².

    Stands where scikit-learn's does: ``fit``, ``coef_``, ``intercept_``, ``predict``.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray) -> Ridge:
        """Fit to samples [S, F] with values [S] and weights [S]."""
        x, z, mean, level = _centered(X, y, sample_weight)
        if x.shape[1] <= len(x):
            gram = x.T @ x + self.alpha * np.eye(x.shape[1])
            self.coef_ = np.linalg.solve(gram, x.T @ z)
        else:  # the same minimum, by a system of the size of the samples
            self.coef_ = x.T @ np.linalg.solve(x @ x.T + self.alpha * np.eye(len(x)), z)
        self.intercept_ = float(level - mean @ self.coef_)
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Values [S] of samples [S, F]."""
        return X @ self.coef_ + self.intercept_

    def standard_errors(
        self,
        X: np.ndarray,
        y: np.ndarray,
        sample_weight: np.ndarray,
    ) -> np.ndarray:
        """Of the coefficients over other samples, [F], whatever the spread of the residuals.

        White, "A heteroskedasticity-consistent covariance matrix estimator and a direct test for
        heteroskedasticity", Econometrica 1980, with the correction for few samples of Hinkley,
        "Jackknifing in unbalanced situations", Technometrics 1977. The shrinkage towards 0 is no
        part of it.
        """
        x, z, _, _ = _centered(X, y, sample_weight)
        samples, features = x.shape
        inverse = np.linalg.inv(x.T @ x + self.alpha * np.eye(features))
        spread = (x @ inverse) * (z - x @ self.coef_)[:, None]
        return np.sqrt((spread**2).sum(axis=0) * samples / max(samples - features - 1, 1))


def _centered(
    samples: np.ndarray, values: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Samples and values less their weighted means, times the roots of the weights; the means."""
    mean = np.average(samples, axis=0, weights=weights)
    level = float(np.average(values, weights=weights))
    root = np.sqrt(weights)
    centered = samples - mean
    centered *= root[:, None]
    return centered, (values - level) * root, mean, level


def select(
    samples: np.ndarray, values: np.ndarray, weights: np.ndarray, count: int, method: str
) -> np.ndarray:
    """The features to explain by, at most ``count``, best first where the method ranks them.

    Args:
        samples: float64 [S, F]; the first is the explained instance.
        values: [S] scores.
        weights: [S].
        count: how many features.
        method: "highest_weights" (the largest products of a ridge coefficient with the instance),
            "forward_selection" (one after the other, each the best beside those before),
            "lasso_path" (the last point of the lasso path with few enough; needs scikit-learn),
            "none" (all), "auto" (forward selection up to 6 features, else highest weights).

    Raises:
        InputError: the method is not known, or scikit-learn is missing.
    """
    if method not in SELECTIONS:
        raise InputError(f"feature_selection is one of {', '.join(SELECTIONS)}, not {method!r}")
    if method == "auto":
        method = "forward_selection" if count <= _FEW else "highest_weights"
    if method == "none":
        return np.arange(samples.shape[1])
    if method == "highest_weights":
        effects = Ridge(0.01).fit(samples, values, weights).coef_ * samples[0]
        return np.argsort(-np.abs(effects), kind="stable")[:count]
    x, y, _, _ = _centered(samples, values, weights)
    return _forward(x, y, count) if method == "forward_selection" else _lasso(x, y, count)


def _forward(x: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    """Greedy least squares: each time the feature that raises R² most, by sweeping its column."""
    gram, effect = x.T @ x, x.T @ y
    enough = _COLLINEAR * gram.diagonal().copy()
    chosen: list[int] = []
    left = np.ones(len(effect), bool)
    for _ in range(min(count, len(effect))):
        square = gram.diagonal()
        free = left & (square > enough)
        gain = np.where(free, effect**2 / np.where(free, square, 1), 0.0)
        best = int(np.argmax(np.where(left, gain, -1.0)))
        chosen.append(best)
        left[best] = False
        if free[best]:
            column = gram[:, best] / gram[best, best]
            effect = effect - column * effect[best]
            gram = gram - np.outer(column, gram[best])
    return np.array(chosen, np.int64)


def _lasso(x: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    try:
        from sklearn.linear_model import lars_path
    except ImportError:
        raise InputError(f"feature_selection='lasso_path' {NEEDS_SKLEARN}") from None
    used = np.arange(x.shape[1])
    for coefficients in lars_path(x, y, method="lasso")[2].T[:0:-1]:
        used = np.flatnonzero(coefficients)
        if len(used) <= count:
            break
    return used


# ---- closeness ---------------------------------------------------------------------------------


def exponential(distances: np.ndarray, width: float) -> np.ndarray:
    """exp(-d² / (2 width²)): the default kernel."""
    return np.exp(-(distances**2) / (2 * width**2))


def distances_from_first(samples: np.ndarray, metric: Metric) -> np.ndarray:
    """The distance of each sample [S, F] from the first, [S].

    ``metric`` is "cosine", "euclidean", another name that ``scipy.spatial.distance.cdist`` knows,
    or a function of two samples.

    Raises:
        InputError: there is no such metric.
    """
    from scipy.spatial.distance import cdist

    if metric == "cosine":  # a sample that is off altogether is as far as an orthogonal one
        lengths = np.linalg.norm(samples, axis=1)
        scale = lengths * lengths[0]
        likeness = np.divide(samples @ samples[0], scale, np.zeros_like(scale), where=scale > 0)
        return np.clip(1 - likeness, 0, 2)
    known = {"l2": "euclidean", "l1": "cityblock", "manhattan": "cityblock"}
    name = known.get(metric, metric) if isinstance(metric, str) else metric
    try:
        return np.asarray(cdist(samples, samples[:1], name)).ravel()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"distance_metric {metric!r}: {error}; take 'cosine', 'euclidean', or a function of "
            "two samples"
        ) from error


# ---- the explanation of an instance ------------------------------------------------------------


@dataclass(frozen=True)
class Local:
    """A linear model of one label.

    Attributes:
        intercept: its constant.
        weights: (feature, weight) by falling size.
        score: weighted R² over the samples.
        prediction: its value at the explained instance.
        row: the weight of every feature, [F]; 0 where it was not selected.
        errors: standard errors of these over other samples, [F]; None for a user's regressor.
    """

    intercept: float
    weights: list[tuple[int, float]]
    score: float
    prediction: float
    row: np.ndarray
    errors: np.ndarray | None


@dataclass(frozen=True)
class Surrogate:
    """How a local model is fitted; checked once.

    Args:
        num_features: how many features it may use; None: all.
        distance_metric: see :func:`distances_from_first`.
        kernel_width: width of the kernel, in units of the distance; None: 0.75 sqrt(F).
        kernel: weights by distances and width; default :func:`exponential`.
        feature_selection: see :func:`select`.
        model_regressor: anything with scikit-learn's ``fit(X, y, sample_weight)``, ``coef_`` and
            ``predict``; default :class:`Ridge`.
        unit: factor on the distances.
    """

    num_features: int | None
    distance_metric: Metric
    kernel_width: float | None
    kernel: Kernel | None = None
    feature_selection: str = "auto"
    model_regressor: Any = None
    unit: float = 1.0

    def __post_init__(self) -> None:
        if self.num_features is not None:
            positive(self.num_features, "num_features")
        width = 1.0 if self.kernel_width is None else self.kernel_width
        if not np.isfinite(width) or width <= 0:
            raise InputError(f"kernel_width must be a positive number, not {self.kernel_width!r}")
        if self.feature_selection not in SELECTIONS:
            raise InputError(
                f"feature_selection is one of {', '.join(SELECTIONS)}, not "
                f"{self.feature_selection!r}"
            )
        if self.model_regressor is not None and not all(
            callable(getattr(self.model_regressor, name, None)) for name in ("fit", "predict")
        ):
            raise InputError(
                "model_regressor needs scikit-learn's fit(X, y, sample_weight) and predict, which "
                f"{type(self.model_regressor).__name__} lacks"
            )

    def weights(self, samples: np.ndarray) -> np.ndarray:
        """How much each sample counts, [S]."""
        samples, width = samples.astype(np.float64), self.kernel_width
        found = (self.kernel or exponential)(
            self.unit * distances_from_first(samples, self.distance_metric),
            0.75 * np.sqrt(samples.shape[1]) if width is None else float(width),
        )
        weights = np.asarray(found, np.float64)
        if weights.shape != (len(samples),) or not all_finite(weights) or weights.min() < 0:
            raise InputError(
                "the kernel must return a finite weight of at least 0 for each of the "
                f"{len(samples)} distances; it returned shape {list(weights.shape)}"
            )
        if not weights.any():
            raise InputError("all samples have weight 0: take a larger kernel_width")
        return weights

    def fit(
        self, samples: np.ndarray, values: np.ndarray, weights: np.ndarray | None = None
    ) -> Local:
        """The local model of one label.

        Args:
            samples: [S, F]; the first is the explained instance.
            values: [S] scores of the label.
            weights: [S]; None: by closeness.
        """
        weights = self.weights(samples) if weights is None else weights
        samples, values = samples.astype(np.float64), values.astype(np.float64)
        features = samples.shape[1]
        count = features if self.num_features is None else self.num_features
        used = select(samples, values, weights, count, self.feature_selection)
        regressor = Ridge() if self.model_regressor is None else self.model_regressor
        x = samples[:, used]
        regressor.fit(x, values, sample_weight=weights)
        fitted = np.asarray(regressor.predict(x), np.float64).ravel()
        coefficients = np.asarray(regressor.coef_, np.float64).ravel()
        if coefficients.shape != used.shape or fitted.shape != values.shape:
            raise InputError(
                f"model_regressor has {coefficients.size} coefficients for {used.size} features, "
                f"and predicts {fitted.size} values of {values.size} samples"
            )
        row, errors = np.zeros(features), None
        row[used] = coefficients
        if isinstance(regressor, Ridge):
            errors = np.zeros(features)
            errors[used] = regressor.standard_errors(x, values, weights)
        return Local(
            float(np.ravel(getattr(regressor, "intercept_", 0.0))[0]),
            sorted(
                zip(used.tolist(), coefficients.tolist(), strict=True), key=lambda w: -abs(w[1])
            ),
            r_squared(values, fitted, weights),
            float(fitted[0]),
            row,
            errors,
        )

    def explain(
        self, into: LimeExplanation, samples: np.ndarray, scores: np.ndarray, labels: Iterable[int]
    ) -> None:
        """Fit a model for each label and enter it.

        Args:
            into: the explanation.
            samples: [S, F]; the first is the explained instance.
            scores: [S, K].
            labels: the labels, in 0..K-1.
        """
        weights = self.weights(samples)
        for label in labels:
            local = self.fit(samples, scores[:, label], weights)
            into.intercept[label] = local.intercept
            into.local_exp[label] = local.weights
            into.score[label] = local.score
            into.local_pred[label] = local.prediction


class LimeExplanation:
    """Local linear models of one prediction, by label.

    Attributes:
        local_exp: (feature, weight) by label, by falling size of the weight.
        intercept, score, local_pred: of each label's model its intercept, its weighted R² over the
            samples, and its value at the explained instance.
        top_labels: the labels by falling score where ``top_labels`` were asked for, else None.
        predict_proba: scores of the instance, [K].
        class_names: of the labels, where they are known.
    """

    def __init__(
        self,
        predict_proba: np.ndarray,
        top_labels: list[int] | None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.predict_proba = predict_proba
        self.top_labels = top_labels
        self.class_names = class_names
        self.local_exp: dict[int, list[tuple[int, float]]] = {}
        self.intercept: dict[int, float] = {}
        self.score: dict[int, float] = {}
        self.local_pred: dict[int, float] = {}

    def available_labels(self) -> list[int]:
        """The explained labels, the highest score first where ``top_labels`` were asked for."""
        return self.top_labels or list(self.local_exp)

    def as_map(self) -> Mapping[int, list[tuple[int, float]]]:
        """(feature, weight) by label."""
        return self.local_exp

    def as_list(self, label: int = 1) -> list[tuple[str, float]]:
        """(what the feature is called, weight) of a label, by falling size.

        Raises:
            TargetError: the label was not explained.
        """
        return [(self.feature_name(feature), weight) for feature, weight in self.of(label)]

    def feature_name(self, feature: int) -> str:
        """What a feature is called."""
        return str(feature)

    def of(self, label: int) -> list[tuple[int, float]]:
        """(feature, weight) of a label; refuses one that was not explained."""
        if label not in self.local_exp:
            raise TargetError(
                f"label {label!r} was not explained; those that were are "
                f"{', '.join(map(str, self.local_exp))}"
            )
        return self.local_exp[label]


def chosen_labels(
    first: np.ndarray, labels: Iterable[int], top_labels: int | None
) -> tuple[list[int], list[int] | None]:
    """The labels to explain, and those by falling score where ``top_labels`` are asked for.

    Args:
        first: scores of the explained instance, [K].
        labels: what is explained where ``top_labels`` is None or 0; positions among these.
        top_labels: explain so many labels with the highest scores instead.

    Raises:
        TargetError: a label is out of range.
    """
    if top_labels:
        ranked = np.argsort(first)[-positive(top_labels, "top_labels") :].tolist()
        return ranked, ranked[::-1]
    wanted = [labels] if isinstance(labels, int | np.integer) else list(labels)
    for label in wanted:
        if isinstance(label, bool) or not isinstance(label, int | np.integer):
            raise TargetError(f"label {label!r} is no integer; labels are positions in the output")
        if not 0 <= label < len(first):
            raise TargetError(
                f"label {label} is out of range: the model gives {len(first)} score(s), counted "
                "from 0"
            )
    return [int(label) for label in wanted], None


def checked_scores(scores: np.ndarray, count: int) -> np.ndarray:
    """Scores as [S, K].

    Raises:
        EvaluationError: no row for each sample, NaN or infinity.
    """
    if not scores.ndim or len(scores) != count:
        raise EvaluationError(
            f"the model answers shape {list(scores.shape)} to {count} samples; LIME needs scores "
            "for each: name another output (ox.Model(..., output=...))"
        )
    if not all_finite(scores):
        bad = np.flatnonzero(~np.isfinite(scores.reshape(count, -1)).all(axis=1))
        raise EvaluationError(
            f"the model answers NaN or infinity to {len(bad)} of {count} samples: it must have a "
            "finite score for perturbed inputs too; hide parts with something else, or look where "
            "the model divides or takes logarithms"
        )
    return scores.reshape(count, -1)


def random_numbers(given: int | np.random.RandomState | None) -> np.random.RandomState:
    """The random numbers that the lime package draws for a seed.

    Raises:
        InputError: it is no seed.
    """
    if isinstance(given, np.random.RandomState):
        return given
    if given is not None:
        positive(given, "random_state", 0)
    try:
        return np.random.RandomState(given)
    except ValueError as error:
        raise InputError(f"random_state {given!r}: {error}") from None


# ---- samples and their scores ------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """What was drawn around an example, and what the model says to it.

    Attributes:
        samples: [S, F]; the first is the example.
        scores: [S, K].
        drawn: how many samples there are; S is fewer where the evaluation ended early.
        ids: which feature each element of the example belongs to, of its shape; -1: none.
        stopped: what stopped it.
    """

    samples: np.ndarray
    scores: np.ndarray
    drawn: int
    ids: np.ndarray
    stopped: BaseException | None = None

    def complete(self) -> Sampled:
        """This, be it of the first samples only where the user interrupted.

        Raises:
            EvaluationError: the model failed.
            KeyboardInterrupt: too early to say anything.
        """
        if self.stopped is not None:
            if isinstance(self.stopped, EvaluationError) or len(self.scores) < 2:
                raise self.stopped
            warn_of_stop(f"the explanation is of {len(self.scores)} of {self.drawn} samples")
        return self


@dataclass(frozen=True)
class Pace:
    """How far, and in what steps, samples are evaluated.

    Attributes:
        tick: told how many have been evaluated.
        enough: tells whether no more are needed; None: all are.
    """

    tick: Tick
    enough: Callable[[Sampled], bool] | None = None

    def steps(self, count: int, at_once: int) -> Iterator[slice]:
        """Pieces of at most ``at_once`` samples, with a look after each where that may end it."""
        for start, stop in rounds(count, 1, None if self.enough is None else 0.0):
            for low in range(start, stop, at_once):
                yield slice(low, min(low + at_once, stop))

    def take(
        self, samples: np.ndarray, parts: Iterable[np.ndarray], ids: np.ndarray | None = None
    ) -> Sampled:
        """Samples and the pieces of their scores put together, as far as these come.

        Args:
            samples: [S, F].
            parts: scores, piece by piece.
            ids: see :class:`Sampled`; None: a feature is an element.
        """
        ids = np.arange(samples.shape[1]) if ids is None else ids
        taken = Sampled(samples[:0], np.empty((0, 1)), len(samples), ids)
        try:
            for part in parts:
                scores = np.concatenate([taken.scores, part]) if len(taken.scores) else part
                taken = replace(taken, samples=samples[: len(scores)], scores=scores)
                if self.enough is not None and self.enough(taken):
                    break
        except (KeyboardInterrupt, EvaluationError) as error:
            return replace(taken, stopped=error)
        return taken


def warn_of_stop(what: str) -> None:
    """Say what there is after an interrupt."""
    warnings.warn(f"interrupted: {what}", IncompleteWarning, stacklevel=4)


class LimeAttribution(PerturbationAttribution):
    """What the LIME methods share: samples of a kind of input, and their local linear models.

    Args:
        model: the model, or a ``BlackBox``.
        kernel_width, kernel, feature_selection: see :class:`Surrogate`.
        random_state: seed (or numpy's RandomState) of ``explain_instance``.
        class_names: of the labels; None: those that the model carries.
    """

    paper = PAPER
    check = (
        "fit: weighted R² of the linear model over the samples; standard_error: of its weights "
        "over other samples, as a share of their size (ridge regression only)"
    )
    choices: ClassVar = {"feature_selection": SELECTIONS}
    unit: ClassVar[float] = 1.0
    """Factor on the distances of samples."""

    def __init__(
        self,
        model: Model,
        kernel_width: float | None,
        kernel: Kernel | None = None,
        feature_selection: str = "auto",
        random_state: int | np.random.RandomState | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model)
        self.kernel_width, self.kernel = kernel_width, kernel
        self.feature_selection = feature_selection
        self.class_names = model.labels if class_names is None else list(class_names)
        self._random = random_numbers(random_state)
        self._surrogate(None, "cosine", None)  # what does not fit is refused where it is given

    def _surrogate(
        self, num_features: int | None, distance_metric: Metric, model_regressor: Any
    ) -> Surrogate:
        return Surrogate(
            num_features,
            distance_metric,
            self.kernel_width,
            self.kernel,
            self.feature_selection,
            model_regressor,
            self.unit,
        )

    def _sampled(
        self,
        question: Question,
        example: int,
        random: np.random.RandomState,
        count: int,
        pace: Pace,
        **options: Any,
    ) -> Sampled:
        """Samples around one example, with the scores of its target [S, 1]."""
        raise NotImplementedError

    def _find(
        self,
        question: Question,
        *,
        num_features: int | None,
        num_samples: int,
        distance_metric: Metric,
        model_regressor: Any,
        seed: int | None,
        tolerance: float | None,
        show_progress: bool,
        **options: Any,
    ) -> Found:
        if len(question.wrt) != 1 or question.at_once:
            what = "one score for the whole batch" if question.at_once else "several inputs"
            raise UnsupportedModelError(
                f"{self.title} explains one input by a score of each example, and there "
                f"{'is' if question.at_once else 'are'} {what}: pass the inputs that are not "
                "explained in additional_forward_args, or use lime with a feature_mask"
            )
        fit = self._surrogate(num_features, distance_metric, model_regressor)
        positive(num_samples, "num_samples", 2)
        seed = int(self._random.randint(1 << 31)) if seed is None else positive(seed, "seed", 0)
        limit = check_tolerance(tolerance)
        if limit is not None and model_regressor is not None:
            raise InputError(
                "tolerance is met by standard errors, which are known of ridge regression only: "
                "leave out model_regressor or tolerance"
            )

        def fitted(taken: Sampled) -> tuple[Local, list[np.ndarray]]:
            """The local model, its weights by element, and their standard errors."""
            local = fit.fit(taken.samples, taken.scores[:, 0])
            rows = [local.row] if local.errors is None else [local.row, local.errors]
            return local, [np.append(row, 0.0)[taken.ids] for row in rows]

        def enough(taken: Sampled) -> bool:
            if len(taken.scores) < 2:
                return False
            weights, errors = fitted(taken)[1]
            return bool(errors.sum() <= limit * np.abs(weights).sum())

        shape = question.feeds.arrays[question.wrt[0].name or ""].shape
        values, errors = (np.full((shape[0], 1, *shape[1:]), np.nan) for _ in range(2))
        figures = {"fit": np.full(shape[0], np.nan), "samples": np.zeros(shape[0])}
        ids = np.full(shape, -1)
        found = Found([values], [errors] if model_regressor is None else [], figures=figures)
        found.features = [ids]
        completed, stopped = np.zeros(shape[0]), None
        rows = shape[0] * num_samples
        with bar_of(f"{self.title} attribution", rows, show_progress) as tick:
            pace = Pace(tick, None if limit is None else enough)
            for example in range(shape[0]):
                random = random_numbers(seed)
                taken = self._sampled(question, example, random, num_samples, pace, **options)
                done, stopped = len(taken.scores), taken.stopped
                if done >= 2:
                    local, spread = fitted(taken)
                    ids[example] = taken.ids
                    for array, part in zip((values, errors), spread, strict=False):
                        array[example, 0] = part
                    figures["fit"][example], figures["samples"][example] = local.score, done
                completed[example] = 1 if stopped is None else done / num_samples
                if stopped is not None:
                    break
        if stopped is not None:
            figures["completed"], done = completed, int(figures["samples"].sum())
            if isinstance(stopped, EvaluationError):
                stopped.partial, stopped.samples = found, done
            if isinstance(stopped, EvaluationError) or not done:
                raise stopped
            full = int((completed == 1).sum())
            warn_of_stop(f"{full} of {shape[0]} example(s) are complete; what is not, is NaN")
        else:
            self._check_met(found, limit)
        return found

    # ---- evaluation --------------------------------------------------------------------------

    def _select(
        self, of: ir.Value, selector: Any, shape: tuple[int, ...], count: int, at_once: bool
    ) -> tuple[targets.Seeds, np.ndarray | None]:
        if selector is EVERY and not at_once:
            return targets.mask_seeds(np.ones((1, *shape))), None
        return super()._select(of, selector, shape, count, at_once)

    def _present(
        self,
        question: Question,
        example: int,
        z: np.ndarray,
        ids: np.ndarray,
        off: np.ndarray,
        pace: Pace,
        at_most: int | None = None,
    ) -> Iterator[np.ndarray]:
        """Scores of one example with some of its features present, [S, K] piece by piece.

        Args:
            question: the question.
            example: which example.
            z: which features are present, boolean [S, F].
            ids: which feature an element is of, broadcastable to the example.
            off: what takes the place of elements of absent features, of its shape.
            pace: in what steps.
            at_most: the most samples of one run.
        """
        from onnxplain.kernels.coalitions import pack

        name = question.wrt[0].name or ""
        x, place = question.feeds.arrays[name], np.array([example])
        count = z.shape[1]
        features = Features(
            {name: x.shape}, {name: ids[None]}, count, np.arange(count)[None], place
        )
        packed = pack(z)
        play = Play(
            self.model,
            question.feeds,
            question.of,
            question.wrt,
            Coalitions(features),
            Off({name: off[None, None].astype(x.dtype)}),
            self._scores(question),
            at_once=False,
            shape=question.shape,
            at_most=None if at_most is None else positive(at_most, "batch_size"),
        )
        ((game, _),) = games(play, len(z), place)
        game.tick = pace.tick
        for step in pace.steps(len(z), len(z)):
            for _, _, found in game.stream(
                lambda piece: {"z": packed[piece]}, step.start, step.stop
            ):
                yield found[:, 0]

    def _answers(
        self,
        numbers: np.ndarray,
        render: Callable[[slice], Feeds],
        at_once: int,
        pace: Pace,
    ) -> Iterator[np.ndarray]:
        """Scores of samples that are made on the host, [S, K] piece by piece.

        Args:
            numbers: which of the rows each sample is, [S], in order of first appearance.
            render: makes the model's inputs for a slice of the rows.
            at_once: how many rows it makes at once.
            pace: in what steps.
        """
        count, known, done = int(numbers.max()) + 1, np.empty((0, 0)), 0
        for step in pace.steps(count, at_once):
            feeds = render(step)
            found = checked_scores(predict(self.model, feeds), feeds.count)
            known = np.concatenate([known, found]) if len(known) else found
            stop = int(np.argmax(np.append(numbers, count) >= len(known)))
            pace.tick(stop - done)
            yield known[numbers[done:stop]]
            done = stop


def predict(model: Any, feeds: Feeds) -> np.ndarray:
    """Values of the explained output, examples first."""
    if not isinstance(model, Model):
        return np.asarray(model.evaluate(feeds.arrays))
    name = model.output.name or ""
    return model.run(model.forward([name]), feeds)[name]


def distinct(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows [U, F] in order of first appearance, and which one each row is [S]."""
    _, first, numbers = np.unique(z, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return z[first[order]], np.argsort(order)[numbers.ravel()]


def flat_target(question: Question, example: int) -> int | None:
    """The place of an example's target among the values of the output; None: there is only one."""
    if question.indices is None:
        return None
    return int(np.ravel_multi_index(tuple(question.indices[example]), question.shape))
