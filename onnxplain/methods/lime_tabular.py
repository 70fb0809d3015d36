"""LIME for tables: which columns of a row hold the prediction up, by samples of training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnxplain.errors import InputError
from onnxplain.graph.emit import is_float
from onnxplain.methods.base import Question
from onnxplain.methods.baselines import distributions
from onnxplain.methods.lime_common import (
    NEEDS_SKLEARN,
    SELECTIONS,
    LimeAttribution,
    LimeExplanation,
    Metric,
    Pace,
    Sampled,
    chosen_labels,
    flat_target,
)
from onnxplain.methods.noise import positive
from onnxplain.methods.perturbation import Found
from onnxplain.model import Model
from onnxplain.perturb.graph_game import some
from onnxplain.run.feeds import Arrays, Feeds, all_finite

MODES = ("classification", "regression")
SAMPLINGS = ("gaussian", "lhs")

Borders = Callable[[np.ndarray, np.ndarray | None, np.random.RandomState], np.ndarray]
"""Where a column [N] (with the labels of its rows) is cut into bins."""

# Rows that the model is given at once.
_ROWS = 1 << 14
# What keeps the spread of a bin with one value above 0.
_SPREAD = 1e-11


def _percentiles(*levels: int) -> Borders:
    return lambda column, labels, random: np.percentile(column, levels)


def _entropy(
    column: np.ndarray, labels: np.ndarray | None, random: np.random.RandomState
) -> np.ndarray:
    """The thresholds of a decision tree of depth 3 that tells the labels by this column."""
    if labels is None:
        raise InputError("discretizer='entropy' looks at labels: give training_labels")
    try:
        from sklearn.tree import DecisionTreeClassifier
    except ImportError:
        raise InputError(f"discretizer='entropy' {NEEDS_SKLEARN}") from None
    tree = DecisionTreeClassifier(criterion="entropy", max_depth=3, random_state=random)
    found = tree.fit(column[:, None], labels).tree_
    thresholds = found.threshold[found.children_left > -1]
    return np.sort(thresholds) if len(thresholds) else np.array([np.median(column)])


DISCRETIZERS: dict[str, Borders] = {
    "quartile": _percentiles(25, 50, 75),
    "decile": _percentiles(*range(10, 100, 10)),
    "entropy": _entropy,
}


@dataclass(frozen=True)
class Bins:
    """How one column is cut, and what is in each bin: arrays [bins], ``borders`` one fewer.

    A value that equals a border lies below it. Draws are from a normal distribution with the bin's
    mean and standard deviation, cut off at its ends.
    """

    borders: np.ndarray
    means: np.ndarray
    stds: np.ndarray
    lows: np.ndarray
    highs: np.ndarray

    @staticmethod
    def of(column: np.ndarray, borders: np.ndarray) -> Bins:
        """The bins of a column [N]."""
        borders = np.unique(borders)
        number = np.searchsorted(borders, column)
        inside = [column[number == b] for b in range(len(borders) + 1)]
        return Bins(
            borders,
            np.array([part.mean() if len(part) else 0.0 for part in inside]),
            np.array([part.std() if len(part) else 0.0 for part in inside]) + _SPREAD,
            np.append(column.min(), borders),
            np.append(borders, column.max()),
        )

    def number(self, values: Any) -> Any:
        """The bins of values."""
        return np.searchsorted(self.borders, values)

    def draw(self, number: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """A value from each of these bins; the only one there is where a bin has no width."""
        from scipy.stats import truncnorm

        mean, std = self.means[number], self.stds[number]
        low, high = (self.lows[number] - mean) / std, (self.highs[number] - mean) / std
        wide = low != high
        values = self.lows[number].astype(np.float64)
        values[wide] = truncnorm.rvs(
            low[wide], high[wide], loc=mean[wide], scale=std[wide], random_state=random
        )
        return values

    def name(self, number: int, column: str) -> str:
        """A bin in words."""
        if number == 0:
            return f"{column} <= {self.borders[0]:.2f}"
        if number == len(self.borders):
            return f"{column} > {self.borders[-1]:.2f}"
        return f"{self.borders[number - 1]:.2f} < {column} <= {self.borders[number]:.2f}"


@dataclass(frozen=True)
class Training:
    """What samples are drawn from.

    Attributes:
        cut: whether continuous columns are cut into bins.
        bins: those of the columns that are.
        values, shares: of each column that is drawn from a list (cut or categorical), its different
            bin numbers or values, and how often each occurs.
        mean, scale: [F] of the other columns; 0 and 1 elsewhere.
    """

    cut: bool
    bins: Mapping[int, Bins]
    values: Mapping[int, np.ndarray]
    shares: Mapping[int, np.ndarray]
    mean: np.ndarray
    scale: np.ndarray

    @staticmethod
    def of(
        data: Any,
        labels: Any,
        categorical: Sequence[int],
        discretizer: str | Borders | None,
        random: np.random.RandomState,
    ) -> Training:
        """Look at training data.

        Args:
            data: [N, F].
            labels: [N], for discretizers that look at them.
            categorical: the columns that are drawn as they are.
            discretizer: how the others are cut; None: they aren't.
            random: for discretizers that draw.

        Raises:
            InputError: no table of finite numbers.
        """
        table = np.asarray(data)
        if table.ndim != 2 or not table.size or table.dtype.kind not in "fiub":
            raise InputError(
                f"training_data is {table.dtype} of shape {list(table.shape)}: give numbers [rows, "
                "columns], categories as numbers (categorical_features)"
            )
        if not all_finite(table):
            raise InputError("training_data holds NaN or infinity: clean or impute it")
        width = table.shape[1]
        if labels is not None and len(labels) != len(table):
            raise InputError(f"{len(labels)} training_labels for {len(table)} rows: give one each")
        wrong = [c for c in categorical if not 0 <= c < width]
        if wrong:
            raise InputError(
                f"categorical_features: there is no column {wrong[0]}; training_data has {width}, "
                "counted from 0"
            )
        bins, drawn = {}, table.astype(np.float64)
        mean, scale = drawn.mean(axis=0), drawn.std(axis=0)
        # A column whose spread is rounding only is constant.
        scale[scale <= 10 * np.finfo(np.float64).eps * np.abs(mean)] = 1
        for column in range(width):
            if column not in categorical and discretizer is not None:
                cut = DISCRETIZERS[discretizer] if isinstance(discretizer, str) else discretizer
                borders = np.asarray(cut(table[:, column], labels, random), np.float64)
                if borders.ndim != 1 or not borders.size or not all_finite(borders):
                    raise InputError(
                        f"the discretizer cuts column {column} at {borders!r}: return one or more "
                        "finite numbers"
                    )
                bins[column] = Bins.of(table[:, column], borders)
                drawn[:, column] = bins[column].number(table[:, column])
        values, shares = {}, {}
        for column in sorted({*categorical, *bins}):
            values[column], counts = np.unique(drawn[:, column], return_counts=True)
            shares[column] = counts / float(len(table))
            mean[column], scale[column] = 0, 1
        return Training(discretizer is not None, bins, values, shares, mean, scale)

    @property
    def width(self) -> int:
        """How many columns there are."""
        return len(self.mean)

    def around(
        self,
        row: np.ndarray,
        count: int,
        random: np.random.RandomState,
        around_instance: bool,
        sampling: str,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples around a row.

        Args:
            row: [F].
            count: how many; the first is the row.
            random: draws them.
            around_instance: columns that are not cut scatter around the row, not around their mean.
            sampling: "gaussian", or "lhs": a Latin hypercube of these columns.

        Returns:
            [S, F] as the linear model sees them (1 where a column has the row's bin or category,
            else 0; standardized columns), and as the model does.
        """
        width, row = self.width, row.astype(np.float64)
        if self.bins:
            seen = np.zeros((count, width))
        else:
            normal = _hypercube(random, count, width) if sampling == "lhs" else None
            normal = random.normal(0, 1, count * width) if normal is None else normal
            seen = normal.reshape(count, width) * self.scale + (
                row if around_instance else self.mean
            )
        seen[0] = row
        inside = seen.copy()
        for column, values in self.values.items():
            drawn = random.choice(values, size=count, replace=True, p=self.shares[column])
            own = self.bins[column].number(row[column]) if column in self.bins else row[column]
            seen[:, column] = drawn == own
            seen[0, column] = 1
            inside[:, column] = drawn
        for column, bins in self.bins.items():
            inside[1:, column] = bins.draw(inside[1:, column].astype(int), random)
        inside[0] = row
        return (seen - self.mean) / self.scale, inside


def _normal(random: np.random.RandomState, count: int, width: int) -> np.ndarray:
    return random.normal(0, 1, count * width).reshape(count, width)


def _hypercube(random: np.random.RandomState, count: int, width: int) -> np.ndarray:
    """Standard normal numbers [count, width], in each column one in each of ``count`` equal shares.

    McKay, Beckman, Conover, "A comparison of three methods for selecting values of input variables
    in the analysis of output from a computer code", Technometrics 1979.
    """
    from scipy.special import ndtri

    strata = np.stack([random.permutation(count) for _ in range(width)], axis=1)
    return np.asarray(ndtri((strata + random.uniform(size=(count, width))) / count))


class TabularExplanation(LimeExplanation):
    """The local linear models of a row, by label; a feature is a column.

    Attributes:
        names: what each column is called, with the bin or category of the row.
        mode: "classification" or "regression" (there label 1 is the prediction, and label 0 the
            same with the other sign, as in the lime package).
    """

    def __init__(
        self,
        names: Sequence[str],
        mode: str,
        predict_proba: np.ndarray,
        top_labels: list[int] | None,
        class_names: Sequence[str] | None,
    ) -> None:
        super().__init__(predict_proba, top_labels, class_names)
        self.names, self.mode = list(names), mode

    def feature_name(self, feature: int) -> str:
        """What a column is called."""
        return self.names[feature]


class LimeTabular(LimeAttribution):
    """LIME for tables: a linear model of the score, by which columns stay in the row's bin.

    Continuous columns of the training data are cut into bins. Each sample draws a bin of every
    column as often as it occurs there and a value from it; the linear model sees whether it is the
    row's own. Ribeiro, Singh, Guestrin, 2016, arXiv:1602.04938. The same seed gives the samples and
    weights of the lime package, but for one thing: where a bin holds a single value (a constant
    column), that value is drawn, not 0. Unit: that of the output.

    Args:
        model: a model of one input [N, F], or a ``BlackBox``.
        training_data: [rows, F]; None: the ``baselines`` of :meth:`attribute`.
        mode: "classification" or "regression".
        training_labels: [rows], for discretizer="entropy".
        feature_names: of the columns.
        categorical_features: columns that hold categories (as numbers).
        categorical_names: for such a column, the names of its values 0, 1, ...
        kernel_width: width of the exponential kernel; None: 0.75 sqrt(F).
        kernel: weights of samples, by distances [S] and ``kernel_width``.
        class_names: of the labels.
        feature_selection: "auto", "highest_weights", "forward_selection", "lasso_path" (needs
            scikit-learn) or "none".
        discretize_continuous: False: columns are not cut but scatter normally around their mean.
        discretizer: "quartile", "decile", "entropy" (needs scikit-learn), or a function
            ``(column, labels, random_state) -> borders``.
        sample_around_instance: they scatter around the row instead.
        random_state: seed (or numpy's RandomState) of :meth:`explain_instance`.
    """

    name = "lime-tabular"
    title = "LIME for Tables"
    needs = ("random", "baselines")
    choices: ClassVar = {
        "feature_selection": SELECTIONS,
        "mode": MODES,
        "discretizer": tuple(DISCRETIZERS),
        "sampling_method": SAMPLINGS,
    }

    def __init__(
        self,
        model: Model,
        training_data: np.ndarray | None = None,
        mode: str = "classification",
        training_labels: np.ndarray | None = None,
        feature_names: Sequence[str] | None = None,
        categorical_features: Sequence[int] | None = None,
        categorical_names: Mapping[int, Sequence[str]] | None = None,
        kernel_width: float | None = None,
        kernel: Callable[[np.ndarray, float], np.ndarray] | None = None,
        class_names: Sequence[str] | None = None,
        feature_selection: str = "auto",
        discretize_continuous: bool = True,
        discretizer: str | Borders = "quartile",
        sample_around_instance: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"mode is one of {', '.join(MODES)}, not {mode!r}")
        if isinstance(discretizer, str) and discretizer not in DISCRETIZERS:
            raise InputError(
                f"discretizer is one of {', '.join(DISCRETIZERS)}, or a function of a column, not "
                f"{discretizer!r}"
            )
        self.mode = mode
        self.feature_names = None if feature_names is None else list(feature_names)
        self.categorical_features = sorted({int(c) for c in categorical_features or ()})
        self.categorical_names = dict(categorical_names or {})
        self.discretizer = discretizer if discretize_continuous else None
        self.sample_around_instance = sample_around_instance
        super().__init__(model, kernel_width, kernel, feature_selection, random_state, class_names)
        self.training: Training | None = None
        self.training_labels = training_labels
        if training_data is not None:
            self.training = self._trained(training_data)

    def attribute(
        self,
        inputs: Arrays,
        baselines: Any = None,
        target: Any = None,
        num_samples: int = 5000,
        num_features: int | None = None,
        distance_metric: str | Metric = "euclidean",
        model_regressor: Any = None,
        sampling_method: str = "gaussian",
        additional_forward_args: Arrays = None,
        *,
        seed: int | None = None,
        tolerance: float | None = None,
        return_standard_error: bool = False,
        show_progress: bool = False,
    ) -> Any:
        """Explain rows.

        Args:
            inputs: [N, F].
            baselines: training data [rows, F], where the constructor was given none.
            target: the explained value of the output (see ``Saliency``).
            num_samples: how many samples, the row itself among them.
            num_features: the most columns that get a weight; None: all.
            distance_metric: of a sample from the row: "euclidean", "cosine", another of
                ``scipy.spatial.distance.cdist``, or a function of two.
            model_regressor: anything with scikit-learn's ``fit(X, y, sample_weight)``, ``coef_``
                and ``predict``; None: ridge regression.
            sampling_method: "gaussian", or "lhs", a Latin hypercube (of columns that are not cut).
            additional_forward_args: the model's other inputs.
            seed: the samples depend on it alone; None draws one.
            tolerance: an example gets no more samples once the standard errors of its attributions
                are, summed, at most this share of their sizes.
            return_standard_error: also return how far the weights are off, typically.
            show_progress: show a progress bar on standard error.

        Returns:
            [N, F] (in the form of the inputs); with ``return_standard_error`` a pair of these.

        Raises:
            InputError: no training data, or of another width; an option out of range.
            EvaluationError: the model answers NaN.
        """
        return self._call(locals())

    def explain_instance(
        self,
        data_row: np.ndarray,
        labels: Iterable[int] = (1,),
        top_labels: int | None = None,
        num_features: int | None = 10,
        num_samples: int = 5000,
        distance_metric: Metric = "euclidean",
        model_regressor: Any = None,
        sampling_method: str = "gaussian",
    ) -> TabularExplanation:
        """Explain a row as the explainer of tables of the lime package does.

        Args:
            data_row: [F].
            labels: what is explained where ``top_labels`` is None (in classification).
            top_labels: explain so many labels with the highest scores instead.
            num_features, num_samples, distance_metric, model_regressor, sampling_method: see
                :meth:`attribute`.

        Raises:
            InputError, EvaluationError: as :meth:`attribute`.
            TargetError: a label is out of range.
        """
        training = self._checked(self.training, sampling_method)
        row = np.asarray(data_row)
        if row.shape != (training.width,) or row.dtype.kind not in "fiub":
            raise InputError(
                f"data_row is {row.dtype} of shape {list(row.shape)}, but training_data has "
                f"{training.width} columns: give numbers [{training.width}]"
            )
        fit = self._surrogate(num_features, distance_metric, model_regressor)
        count = positive(num_samples, "num_samples", 2)
        around, sampling = self.sample_around_instance, sampling_method
        seen, rows = training.around(row, count, self._random, around, sampling)

        def render(piece: slice) -> Feeds:
            return self.model.feeds(self._typed(rows[piece]))

        pace = Pace(lambda rows: None)
        parts = self._answers(np.arange(count), render, _ROWS, pace)
        taken = pace.take(seen, parts).complete()
        scores = taken.scores
        if self.mode == "regression" and scores.shape[1] != 1:
            raise InputError(
                f"mode='regression' explains one value a row, and the model gives {scores.shape[1]}"
            )
        regression = self.mode == "regression"
        wanted, top = ([0], None) if regression else chosen_labels(scores[0], labels, top_labels)
        names = [self._name(training, column, row) for column in range(training.width)]
        explanation = TabularExplanation(names, self.mode, scores[0], top, self.class_names)
        fit.explain(explanation, taken.samples, scores, wanted)
        if regression:
            for figures in (explanation.intercept, explanation.score, explanation.local_pred):
                figures[1] = figures[0]
            explanation.local_exp[1] = explanation.local_exp[0]
            explanation.local_exp[0] = [(f, -w) for f, w in explanation.local_exp[1]]
        return explanation

    def _find(self, question: Question, **options: Any) -> Found:
        baselines, sampling = options.pop("baselines"), options.pop("sampling_method")
        training = self.training
        if baselines is not None:
            found = distributions(self.model, question.feeds, baselines)
            training = self._trained(next(iter(found.values())))
        training = self._checked(training, sampling)
        shape = question.feeds.arrays[question.wrt[0].name or ""].shape
        if shape[1:] != (training.width,):
            raise InputError(
                f"the input has shape {list(shape)}, but training_data has {training.width} "
                f"columns: give [N, {training.width}]"
            )
        return super()._find(question, training=training, sampling=sampling, **options)

    def _sampled(
        self,
        question: Question,
        example: int,
        random: np.random.RandomState,
        count: int,
        pace: Pace,
        **options: Any,
    ) -> Sampled:
        feeds, name = question.feeds, question.wrt[0].name or ""
        row, around = feeds.arrays[name][example], self.sample_around_instance
        training: Training = options["training"]
        seen, rows = training.around(row, count, random, around, options["sampling"])
        rows, column = self._typed(rows), flat_target(question, example) or 0

        def render(piece: slice) -> Feeds:
            same = some(feeds, np.full(piece.stop - piece.start, example), self.model)
            return replace(same, arrays={**same.arrays, name: rows[piece].astype(row.dtype)})

        parts = self._answers(np.arange(count), render, _ROWS, pace)
        return pace.take(seen, (part[:, column : column + 1] for part in parts))

    def _trained(self, data: Any) -> Training:
        labels, cut = self.training_labels, self.discretizer
        return Training.of(data, labels, self.categorical_features, cut, self._random)

    def _checked(self, training: Training | None, sampling: str) -> Training:
        """The training data, where there are some and samples can be drawn so."""
        if training is None:
            raise InputError(
                "there is no training data to draw samples from: give its rows as training_data, "
                "or in baselines="
            )
        if self.feature_names is not None and len(self.feature_names) != training.width:
            raise InputError(
                f"{len(self.feature_names)} feature_names for {training.width} columns: give one "
                "each"
            )
        if sampling not in SAMPLINGS:
            raise InputError(f"sampling_method is one of {', '.join(SAMPLINGS)}, not {sampling!r}")
        if sampling == "lhs" and training.cut:
            raise InputError(
                "sampling_method='lhs' draws columns that are not cut into bins: use it with "
                "discretize_continuous=False"
            )
        return training

    def _typed(self, rows: np.ndarray) -> np.ndarray:
        """Samples as the model takes them: whole numbers where it takes integers."""
        model: Any = self.model
        if not isinstance(model, Model):
            return rows
        value = model.graph.graph.inputs[0]
        if is_float(value) or value.dtype is None:
            return rows
        whole = rows.astype(value.dtype.numpy())
        if not np.array_equal(whole, rows):
            raise InputError(
                f"input '{value.name}' takes {value.dtype.name.lower()}, and samples of continuous "
                "columns are no whole numbers: name its columns in categorical_features"
            )
        return whole

    def _name(self, training: Training, column: int, row: np.ndarray) -> str:
        """A column and what the row has there."""
        name = str(column) if self.feature_names is None else self.feature_names[column]
        if column in training.bins:
            bins = training.bins[column]
            return bins.name(int(bins.number(row[column])), name)
        if column not in training.values:
            return name
        number = int(row[column])
        known = self.categorical_names.get(column)
        return f"{name}={number if known is None else known[number]}"
