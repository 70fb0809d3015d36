"""Surrogates: a simple model of which features are present, fitted to the scores near an input."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnxplain.errors import EvaluationError, InputError, failing
from onnxplain.methods.base import Answer, Question
from onnxplain.methods.noise import positive
from onnxplain.methods.perturbation import (
    Baselines,
    Found,
    PerturbationAttribution,
    Plan,
    drawn_seed,
)
from onnxplain.model import Model
from onnxplain.perturb.engine import check_tolerance
from onnxplain.perturb.features import Features, features_of
from onnxplain.perturb.forms import Block, Coalitions, Whole
from onnxplain.perturb.game import Given, Off
from onnxplain.perturb.surrogates import Fit, KernelShapFit
from onnxplain.run.feeds import Arrays, in_form

MODELS = ("lasso", "ridge", "linear")
NEEDS_SKLEARN = (
    'needs scikit-learn: pip install "onnxplain[surrogate]", or give your own with fit(X, y, '
    "sample_weight), coef_ and predict"
)

Interpretable = Any
"""A name ("lasso", "ridge", "linear"), or an object with scikit-learn's fit, coef_ and predict."""


def interpretable(model: Interpretable) -> Any:
    """The interpretable model that a name stands for, or the user's own.

    Raises:
        InputError: scikit-learn is missing, or the object has no ``fit``.
    """
    if model is None or isinstance(model, str):
        name = model or "lasso"
        if name not in MODELS:
            raise InputError(
                f"interpretable_model {name!r} is not known; it is one of {', '.join(MODELS)}, or "
                "an object with fit(X, y, sample_weight), coef_ and predict"
            )
        try:
            from sklearn import linear_model
        except ImportError as error:
            raise InputError(f"interpretable_model {name!r} {NEEDS_SKLEARN}") from error
        if name == "lasso":
            return linear_model.Lasso(alpha=0.01)
        return linear_model.Ridge() if name == "ridge" else linear_model.LinearRegression()
    if not callable(getattr(model, "fit", None)):
        raise InputError(
            f"interpretable_model {type(model).__name__} has no fit(X, y, sample_weight): give one "
            f"of {', '.join(MODELS)}, or an object with scikit-learn's fit, coef_ and predict"
        )
    return model


def fitted(
    model: Any, x: np.ndarray, y: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients and predictions of an interpretable model."""
    with failing(f"interpretable_model {type(model).__name__}"):
        model.fit(x, y, sample_weight=weights)
    coefficients = np.asarray(model.coef_, np.float64).ravel()
    if coefficients.shape != (x.shape[1],):
        raise InputError(
            f"interpretable_model {type(model).__name__} has {coefficients.size} coefficients for "
            f"{x.shape[1]} features: its coef_ must have one for each"
        )
    return coefficients, np.asarray(model.predict(x), np.float64).ravel()


@dataclass(frozen=True)
class ExponentialKernel:
    """exp(-d^2 / (2 width^2)) of the distance between an input and its perturbed copy.

    Ribeiro et al. 2016, arXiv:1602.04938, section 3.4. Called with original, perturbed and sample,
    as a similarity function is.
    """

    distance_mode: str = "cosine"
    kernel_width: float = 1.0

    def __post_init__(self) -> None:
        if self.distance_mode not in ("cosine", "euclidean"):
            raise InputError(
                f"distance_mode is 'cosine' or 'euclidean', not {self.distance_mode!r}"
            )
        if not self.kernel_width > 0:
            raise InputError(f"kernel_width must be positive, not {self.kernel_width!r}")

    def __call__(self, original: Any, perturbed: Any, sample: Any, **kwargs: Any) -> float:
        """The similarity of one copy."""
        a, b = _flat(original), _flat(perturbed)
        return float(self.of(a @ a, a @ b, b @ b))

    def of(self, xx: Any, xy: Any, yy: Any) -> Any:
        """The similarity from the products of input and copy with themselves and each other."""
        if self.distance_mode == "cosine":
            norm = np.sqrt(np.maximum(xx, 0)) * np.sqrt(np.maximum(yy, 0))
            distance = 1 - xy / np.maximum(norm, 1e-8)
            square = distance**2
        else:
            square = np.maximum(xx - 2 * xy + yy, 0)
        return np.exp(-square / (2 * self.kernel_width**2))


def get_exp_kernel_similarity_function(
    distance_mode: str = "cosine", kernel_width: float = 1.0
) -> ExponentialKernel:
    """An exponential kernel over a distance, "cosine" or "euclidean", as a similarity function."""
    return ExponentialKernel(distance_mode, kernel_width)


def _flat(arrays: Any) -> np.ndarray:
    if isinstance(arrays, Mapping):
        arrays = tuple(arrays.values())
    parts = arrays if isinstance(arrays, tuple | list) else (arrays,)
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in parts])


class LimeBase(PerturbationAttribution):
    """LIME in its general form: any interpretable space, sampled and mapped by your functions.

    An interpretable model is fitted to the scores of perturbed inputs, weighted by their similarity
    to the input. Source: Ribeiro et al. 2016, arXiv:1602.04938, equation 1. All functions take and
    give numpy arrays, and are called for one sample at a time.

    Args:
        model: an ox.Model or ox.BlackBox.
        interpretable_model: "lasso" (alpha 0.01, the default), "ridge", "linear", or an object with
            scikit-learn's ``fit(X, y, sample_weight)``, ``coef_`` and ``predict``.
        similarity_func: (original_input, perturbed_input, interpretable_sample, **kwargs) -> a
            number of at least 0; None: the exponential kernel of the cosine distance, width 1.
        perturb_func: (original_input, **kwargs) -> a sample, or a generator of samples: of the
            interpretable space [1, features], or of the input space. None: each feature is present
            with probability 1/2.
        perturb_interpretable_space: whether ``perturb_func`` gives interpretable samples.
        from_interp_rep_transform: (interpretable_sample, original_input, **kwargs) -> perturbed
            input; None: elements of absent features are 0.
        to_interp_rep_transform: (perturbed_input, original_input, **kwargs) -> interpretable
            sample; needed where ``perturb_func`` gives inputs.
    """

    name = "lime-base"
    title = "Lime Base"
    paper = "Ribeiro et al. 2016, arXiv:1602.04938"
    needs: ClassVar[tuple[str, ...]] = ("random",)
    multiplies_by_inputs = False
    choices: ClassVar = {"interpretable_model": MODELS}
    check = (
        "fit: R^2 of the surrogate; standard_error: of its coefficients, as a share of their size"
    )

    def __init__(
        self,
        model: Model,
        interpretable_model: Interpretable = None,
        similarity_func: Callable[..., Any] | None = None,
        perturb_func: Callable[..., Any] | None = None,
        perturb_interpretable_space: bool = True,
        from_interp_rep_transform: Callable[..., Any] | None = None,
        to_interp_rep_transform: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model)
        functions = {
            "similarity_func": similarity_func,
            "perturb_func": perturb_func,
            "from_interp_rep_transform": from_interp_rep_transform,
            "to_interp_rep_transform": to_interp_rep_transform,
        }
        for name, function in functions.items():
            if function is not None and not callable(function):
                raise InputError(f"{name} must be a function, not {type(function).__name__}")
        if not perturb_interpretable_space and (
            perturb_func is None or to_interp_rep_transform is None
        ):
            raise InputError(
                "perturb_interpretable_space=False: give perturb_func, which makes inputs, and "
                "to_interp_rep_transform, which makes interpretable samples of them"
            )
        self.interpretable_model = interpretable(interpretable_model)
        self.similarity_func = similarity_func or ExponentialKernel()
        self.perturb_func = perturb_func
        self.perturb_interpretable_space = perturb_interpretable_space
        self.from_interp_rep_transform = from_interp_rep_transform
        self.to_interp_rep_transform = to_interp_rep_transform

    def attribute(
        self,
        inputs: Arrays,
        target: Any = None,
        additional_forward_args: Arrays = None,
        n_samples: int = 50,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        return_standard_error: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Explain one example.

        Args:
            inputs: [1, ...] arrays (one, a tuple in model order, or a dict by name).
            target, additional_forward_args, perturbations_per_eval, show_progress: see
                :meth:`FeatureAblation.attribute`.
            n_samples: perturbed inputs.
            return_standard_error: return (coefficients, standard errors).
            seed: of the default ``perturb_func``.
            kwargs: handed on to your functions.

        Returns:
            The interpretable model's coefficients, [1, interpretable features].

        Raises:
            InputError: several examples, or an argument does not fit; EvaluationError: the model or
                one of your functions failed part-way.
        """
        arguments = {k: v for k, v in locals().items() if k != "kwargs"}
        return self._call({**arguments, "handed_on": kwargs})

    def answer(self, **arguments: Any) -> Answer:
        """Coefficients over the inputs' elements, where there is one for each."""
        arguments.pop("return_standard_error", None)
        bound = inspect.signature(self.attribute).bind(**arguments)
        bound.apply_defaults()
        given = dict(bound.arguments)
        kwargs = given.pop("kwargs")
        question, options, _ = self._parse({**given, "handed_on": kwargs})
        options.pop("return_standard_error", None)
        with self._partial(question):
            found = self._find(question, **options)
        (only, *others) = question.wrt
        shape = question.feeds.arrays[only.name or ""].shape
        if others or found.values[0].size != np.prod(shape):
            raise InputError(
                f"{self.title} explains by your own interpretable space of "
                f"{found.values[0].size} features, not by the input's elements: call its "
                "attribute, or use lime with a feature_mask"
            )
        found.values = [a.reshape(1, 1, *shape[1:]) for a in found.values]
        found.errors = [a.reshape(1, 1, *shape[1:]) for a in found.errors]
        return self._said(question, found)

    def _attribute(self, question: Question, **options: Any) -> Any:
        options["errors"] = options.get("return_standard_error", False)
        return super()._attribute(question, **options)

    def _find(
        self,
        question: Question,
        n_samples: int = 50,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        seed: int | None = None,
        handed_on: Mapping[str, Any] | None = None,
        errors: bool = True,
    ) -> Found:
        positive(n_samples, "n_samples")
        if question.feeds.count != 1 and not question.at_once:
            raise InputError(
                f"{self.title} explains one example at a time, and {question.feeds.count} were "
                "given: pass them one by one, or use lime"
            )
        drawn = _Drawn(self, question, dict(handed_on or {}), drawn_seed(seed))
        samples = drawn.take(n_samples)
        count = samples.shape[1]
        whole = features_of(self._shapes(question), dict.fromkeys(drawn.inputs, 0))[0]
        whole = replace(whole, count=count, given=np.arange(count)[None])

        def sampler(piece: slice) -> Block:
            from onnxplain.kernels.coalitions import pack

            block = {f"given.{k}": v[piece] for k, v in drawn.perturbed.items()}
            return {"z": pack(samples[piece] != 0), **block}

        def plan(features: Features) -> Plan:
            def weights(piece: slice, z: np.ndarray) -> np.ndarray:
                return drawn.similarities[piece][:, None]

            def fit(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> Any:
                return fitted(self.interpretable_model, x, y, w)

            return Plan(
                Whole(),
                sampler,
                len(samples),
                lambda game: Fit(count, weights, fit, samples, errors),
                Given(),
            )

        found = self._evaluated(
            question,
            [whole],
            plan,
            at_most=perturbations_per_eval,
            show_progress=show_progress,
            by_feature=False,
        )
        return found

    def _shaped(self, question: Question, arrays: Any) -> list[np.ndarray]:
        if len(arrays) == len(question.wrt) and arrays[0].ndim > 3:
            return super()._shaped(question, arrays)
        return [np.asarray(a[:, 0]) for a in arrays]


class _Drawn:
    """The samples that a user's functions make of one input."""

    def __init__(
        self, method: LimeBase, question: Question, kwargs: dict[str, Any], seed: int
    ) -> None:
        self._method, self._question, self._kwargs, self._seed = method, question, kwargs, seed
        feeds = question.feeds
        self.inputs = {name: feeds.arrays[name] for name in feeds.explained}
        self.original = in_form(self.inputs, feeds.form)
        self.perturbed: dict[str, np.ndarray] = {}
        self.similarities: np.ndarray = np.zeros(0)

    def take(self, count: int) -> np.ndarray:
        """So many interpretable samples [n, F]; fewer where a generator ends before."""
        method, kwargs = self._method, self._kwargs
        interpretable_samples, similarities = [], []
        perturbed: dict[str, list[np.ndarray]] = {name: [] for name in self.inputs}
        for drawn in itertools.islice(self._draw(), count):
            if method.perturb_interpretable_space:
                sample, copy = np.asarray(drawn), self._from(drawn)
            else:
                assert method.to_interp_rep_transform is not None
                copy = drawn
                with failing("to_interp_rep_transform"):
                    found = method.to_interp_rep_transform(drawn, self.original, **kwargs)
                sample = np.asarray(found)
            interpretable_samples.append(sample.reshape(-1).astype(np.float64))
            for name, array in self._named(copy).items():
                perturbed[name].append(array)
            with failing("similarity_func"):
                weight = method.similarity_func(self.original, copy, sample, **kwargs)
            similarities.append(float(np.asarray(weight).reshape(-1)[0]))
        if not interpretable_samples:
            raise EvaluationError("perturb_func gave no sample: it must make at least one")
        if len({len(s) for s in interpretable_samples}) > 1:
            raise EvaluationError("the interpretable samples have different numbers of features")
        self.perturbed = {k: np.stack(v) for k, v in perturbed.items()}
        self.similarities = checked_weights(np.array(similarities))
        return np.stack(interpretable_samples)

    def _draw(self) -> Iterator[Any]:
        if self._method.perturb_func is None:
            return self._coins()
        return by_user(self._method.perturb_func, self.original, self._kwargs)

    def _coins(self) -> Iterator[np.ndarray]:
        """Each element present with probability 1/2."""
        from onnxplain.kernels.coalitions import bernoulli, unpack

        size = sum(a[0].size for a in self.inputs.values())
        for number in itertools.count():
            yield unpack(bernoulli(self._seed, number, number + 1, size), size).astype(np.int64)

    def _from(self, sample: Any) -> Any:
        """The perturbed input of an interpretable sample."""
        transform = self._method.from_interp_rep_transform
        if transform is not None:
            with failing("from_interp_rep_transform"):
                return transform(sample, self.original, **self._kwargs)
        flat, start, found = np.asarray(sample).reshape(-1) != 0, 0, {}
        for name, array in self.inputs.items():
            part = flat[start : start + array[0].size]
            start += array[0].size
            if part.size != array[0].size:
                raise InputError(
                    f"the samples have {flat.size} features, and the input more elements: give "
                    "from_interp_rep_transform, which makes inputs of samples"
                )
            found[name] = np.where(part.reshape(array.shape[1:]), array, 0).astype(array.dtype)
        return in_form(found, self._question.feeds.form)

    def _named(self, copy: Any) -> dict[str, np.ndarray]:
        """A perturbed input by name, checked."""
        names = list(self.inputs)
        if isinstance(copy, Mapping):
            parts = dict(copy)
        else:
            parts = dict(
                zip(names, copy if isinstance(copy, tuple | list) else (copy,), strict=False)
            )
        for name in names:
            found = np.asarray(parts.get(name))
            wanted = self.inputs[name]
            if found.shape != wanted.shape:
                raise EvaluationError(
                    f"a perturbed input '{name}' has shape {list(found.shape)}, and the input "
                    f"{list(wanted.shape)}: the functions must keep it"
                )
            parts[name] = found.astype(wanted.dtype, copy=False)
        return {name: parts[name] for name in names}


def by_user(perturb: Callable[..., Any], original: Any, kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The samples that a user's function makes; as many as are asked for, unless it ends."""
    with failing("perturb_func"):
        if inspect.isgeneratorfunction(perturb):
            yield from perturb(original, **kwargs)
            return
        while True:
            yield perturb(original, **kwargs)


def checked_weights(weights: np.ndarray) -> np.ndarray:
    """Similarities as weights.

    Raises:
        EvaluationError: one is negative or not finite.
    """
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise EvaluationError(
            "similarity_func gave a weight that is negative, NaN or infinite; where it is a "
            "kernel of a distance, give a baseline nearer to the input"
        )
    return weights


class Lime(LimeBase):
    """LIME over features that are present or absent.

    Each feature is present with probability 1/2; an interpretable model is fitted to the scores,
    weighted by the similarity of the perturbed input to the input. Source: Ribeiro et al. 2016,
    arXiv:1602.04938. Unit: the score's, per feature that is present.

    Args:
        model: an ox.Model or ox.BlackBox.
        interpretable_model, similarity_func, perturb_func: see :class:`LimeBase`; samples are of
            the interpretable space [1, features], where anything but 0 means present.
    """

    name = "lime"
    title = "Lime"

    def __init__(
        self,
        model: Model,
        interpretable_model: Interpretable = None,
        similarity_func: Callable[..., Any] | None = None,
        perturb_func: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, interpretable_model, similarity_func, perturb_func)

    def attribute(  # type: ignore[override]
        self,
        inputs: Arrays,
        baselines: Baselines = None,
        target: Any = None,
        additional_forward_args: Arrays = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        return_input_shape: bool = True,
        show_progress: bool = False,
        *,
        tolerance: float | None = None,
        return_standard_error: bool = False,
        seed: int | None = None,
    ) -> Any:
        """Explain examples, each by a surrogate of its own.

        Args:
            inputs, baselines, target, additional_forward_args, feature_mask,
                perturbations_per_eval, show_progress: see :meth:`FeatureAblation.attribute`.
            n_samples: perturbed inputs for each example, at most; the same coalitions for all.
            return_input_shape: False returns the coefficients [N, features], in the order of the
                features' numbers.
            tolerance: see :meth:`ShapleyValueSampling.attribute`.
            return_standard_error: return (attributions, standard errors), by leaving out a tenth of
                the samples at a time.
            seed: the coalitions depend on it alone; None draws one.

        Returns:
            The coefficient of its feature for each element, of the inputs' shape, in their form.
        """
        return self._call(locals())

    def answer(self, **arguments: Any) -> Answer:
        """Attributions, figures that tell how far to trust them, standard errors."""
        return PerturbationAttribution.answer(self, **arguments)

    def _attribute(
        self, question: Question, *, return_input_shape: bool = True, **options: Any
    ) -> Any:
        if return_input_shape:
            return super()._attribute(question, **options)
        wants = options["errors"] = options.pop("return_standard_error", False)
        with self._partial(question):
            found = self._find(question, return_input_shape=False, **options)
        assert found.columns is not None
        if not wants:
            return found.columns[:, 0]
        errors = None if found.column_errors is None else found.column_errors[:, 0]
        return found.columns[:, 0], self._known(errors, found.columns[:, 0])

    def _shaped(self, question: Question, arrays: Any) -> list[np.ndarray]:
        return PerturbationAttribution._shaped(self, question, arrays)

    def _find(  # type: ignore[override]
        self,
        question: Question,
        baselines: Baselines = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_input_shape: bool = True,
        tolerance: float | None = None,
        seed: int | None = None,
        errors: bool = True,
    ) -> Found:
        positive(n_samples, "n_samples")
        stop, base = check_tolerance(tolerance), drawn_seed(seed)
        errors |= stop is not None
        groups = self._features(question, feature_mask)
        if self.perturb_func is not None and not question.at_once:
            groups = [one for group in groups for one in each_example(group)]
        off = self._baselines(question, baselines, groups, base)

        def plan(features: Features) -> Plan:
            count = features.count
            near = _Near(self.similarity_func, question, features, off)
            sampler, total, samples = self._sampler(question, features, near, n_samples, base)

            def fit(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> Any:
                return fitted(self.interpretable_model, x, y, w)

            return Plan(
                Coalitions(features),
                sampler,
                total,
                lambda game: Fit(count, near.of(game.place), fit, samples, errors),
                off,
                tolerance=stop,
            )

        return self._evaluated(
            question,
            groups,
            plan,
            at_most=perturbations_per_eval,
            show_progress=show_progress,
            columns=not return_input_shape,
        )

    def _sampler(
        self, question: Question, features: Features, near: _Near, n_samples: int, seed: int
    ) -> tuple[Callable[[slice], Block], int, np.ndarray | None]:
        """The sampler, how many samples there are, and what is fitted where not coalitions."""
        from onnxplain.kernels.coalitions import bernoulli, pack

        count = features.count
        if self.perturb_func is None:
            return (lambda s: {"z": bernoulli(seed, s.start, s.stop, count)}), n_samples, None
        original, kwargs = near.original(), near.kwargs()
        drawn = list(itertools.islice(by_user(self.perturb_func, original, kwargs), n_samples))
        shapes = {np.asarray(d).size for d in drawn}
        if shapes != {count}:
            raise EvaluationError(
                f"perturb_func gave samples of {', '.join(map(str, sorted(shapes))) or 'no'} "
                f"values for {count} features: each must be [1, {count}]"
            )
        samples = np.stack([np.asarray(d, np.float64).reshape(-1) for d in drawn])
        packed = pack(samples != 0)
        return (lambda s: {"z": packed[s]}), len(samples), samples


def each_example(group: Features) -> Iterator[Features]:
    """The features of a group, example by example."""
    for i, example in enumerate(group.examples):
        row = slice(i, i + 1)
        ids = {k: v if len(v) == 1 else v[row] for k, v in group.ids.items()}
        given = group.given if len(group.given) == 1 else group.given[row]
        yield Features(group.shapes, ids, group.count, given, np.array([example]))


class _Near:
    """How similar perturbed inputs are to their input, [S, E]."""

    def __init__(
        self, function: Callable[..., Any], question: Question, features: Features, off: Off
    ) -> None:
        self._function, self._question = function, question
        self._features, self._off = features, off
        self._arrays = {k: question.feeds.arrays[k] for k in question.feeds.explained}
        self._sums: tuple[np.ndarray, ...] | None = None

    def of(self, place: np.ndarray) -> Callable[[slice, np.ndarray], np.ndarray]:
        """The similarities of samples to some of the group's examples."""
        if isinstance(self._function, ExponentialKernel):
            return lambda piece, z: self._by_sums(z, place)
        return lambda piece, z: self._by_user(z, place)

    def _by_sums(self, z: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The kernel from sums over features: no perturbed input is made.

        With b the baseline, input times copy is the sum over features of x x where they are present
        and of x b where they are absent; copy times copy likewise.
        """
        assert isinstance(self._function, ExponentialKernel)
        if self._sums is None:
            x = {k: self._some(v) for k, v in self._arrays.items()}
            b = {k: self._some(self._baseline(k)) for k in x}
            # Text has no size: what counts is how much of it is there.
            text = {k for k, v in x.items() if v.dtype.kind not in "fiub"}
            x = {k: np.ones(v.shape) if k in text else v.astype(float) for k, v in x.items()}
            b = {k: np.zeros((1, *x[k].shape[1:])) if k in text else v for k, v in b.items()}
            b = {k: v.astype(float) for k, v in b.items()}
            pairs = ((x, x), (x, b), (b, b))
            wide = {k: np.zeros_like(v) for k, v in x.items()}
            self._sums = tuple(
                self._features.sums({k: wide[k] + p[k] * q[k] for k in x}) for p, q in pairs
            )
            if self._question.at_once:
                self._sums = tuple(s.sum(axis=0, keepdims=True) for s in self._sums)
        place = np.zeros(1, np.int64) if self._question.at_once else place
        xx, xb, bb = (s[place] for s in self._sums)
        z = z.astype(np.float64)
        xy = z @ (xx - xb).T + xb.sum(axis=1)
        yy = z @ (xx - bb).T + bb.sum(axis=1)
        return checked_weights(np.asarray(self._function.of(xx.sum(axis=1), xy, yy)))

    def _baseline(self, name: str) -> np.ndarray:
        """What is put in place of a source, [1 or N, ...]; of a background its mean."""
        array = self._off.arrays[name]
        return array[0] if len(array) == 1 else array.mean(axis=0)

    def _some(self, array: np.ndarray) -> np.ndarray:
        return array if len(array) == 1 else array[self._features.examples]

    def _by_user(self, z: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The user's function, called for each sample and example."""
        rows = [place] if self._question.at_once else [np.array([p]) for p in place]
        found = np.empty((len(z), len(rows)))
        for e, row in enumerate(rows):
            x, kwargs = self.original(row), self.kwargs(row)
            for s, present in enumerate(z):
                sample = present[None].astype(np.int64)
                with failing("similarity_func"):
                    weight = self._function(x, self._copy(present, row), sample, **kwargs)
                found[s, e] = float(np.asarray(weight).reshape(-1)[0])
        return checked_weights(found)

    def _rows(self, array: np.ndarray, row: np.ndarray) -> np.ndarray:
        return array if len(array) == 1 else array[self._features.examples[row]]

    def original(self, row: np.ndarray | None = None) -> Any:
        """The input as a user's function gets it."""
        row = np.arange(len(self._features.examples)) if row is None else row
        found = {k: v[self._features.examples[row]] for k, v in self._arrays.items()}
        return in_form(found, self._question.feeds.form)

    def kwargs(self, row: np.ndarray | None = None) -> dict[str, Any]:
        """What else it gets, by Captum's names."""
        row = np.arange(len(self._features.examples)) if row is None else row
        form = self._question.feeds.form
        baselines = {k: self._rows(self._baseline(k), row) for k in self._off.arrays}
        return {
            "num_interp_features": self._features.count,
            "feature_mask": in_form(self._features.of(row), form),
            "baselines": in_form(baselines, form),
        }

    def _copy(self, present: np.ndarray, row: np.ndarray) -> Any:
        """A perturbed input."""
        found = {}
        for name, ids in self._features.of(row).items():
            x = self._arrays[name][self._features.examples[row]]
            found[name] = np.where(present[ids], x, self._rows(self._baseline(name), row))
        return in_form(found, self._question.feeds.form)


class KernelShap(Lime):
    """Shapley values by a weighted regression over sampled coalitions.

    Coalitions are drawn by the Shapley kernel, each with its complement, and the attributions add
    up to score(x) - score(baseline) exactly. Where ``n_samples`` covers all 2^F coalitions, these
    are all evaluated and the values are exact. Source: Lundberg and Lee 2017, arXiv:1705.07874;
    paired sampling and standard errors: Covert and Lee 2021, arXiv:2012.01536.

    Args:
        model: an ox.Model or ox.BlackBox.
    """

    check = (
        "standard_error: of the values, as a share of their size; r_squared: how close the score "
        "is to a sum over features (Shapley values are well-defined where it is not)"
    )
    name = "kernel-shap"
    title = "Kernel Shap"
    paper = "Lundberg and Lee 2017, arXiv:1705.07874; Covert and Lee 2021, arXiv:2012.01536"
    choices: ClassVar = {}

    def __init__(self, model: Model) -> None:
        PerturbationAttribution.__init__(self, model)

    def attribute(  # type: ignore[override]
        self,
        inputs: Arrays,
        baselines: Baselines = None,
        target: Any = None,
        additional_forward_args: Arrays = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        return_input_shape: bool = True,
        show_progress: bool = False,
        *,
        tolerance: float | None = None,
        return_standard_error: bool = False,
        seed: int | None = None,
    ) -> Any:
        """Explain examples.

        Args:
            inputs, target, additional_forward_args, perturbations_per_eval, show_progress: see
                :meth:`FeatureAblation.attribute`.
            baselines: what an absent feature is: None (zeros), a number, an array, a tuple or dict
                of these, the name of a masker ("blur", "mean", ...), or ``Background(rows)``.
            feature_mask: the feature of each element, integers from 0; elements with the same
                number come and go together. None: each is a feature.
            n_samples: coalitions for each example, at most, the full and the empty one among them;
                3 at least.
            return_input_shape: False returns the values [N, features], in the order of the
                features' numbers.
            tolerance: an example gets no more samples once the standard errors of its attributions
                are, summed, at most this share of their sizes (0.05, say).
            return_standard_error: return (attributions, standard errors): those of the regression,
                in the unit of the score; NaN where samples are too few to tell.
            seed: the coalitions depend on it alone; None draws one.

        Returns:
            The Shapley value of its feature for each element, in the unit of the score, of the
            inputs' shape, in their form.

        Raises:
            InputError: an argument does not fit; EvaluationError: the model failed part-way.
        """
        return self._call(locals())

    def _find(  # type: ignore[override]
        self,
        question: Question,
        baselines: Baselines = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_input_shape: bool = True,
        tolerance: float | None = None,
        seed: int | None = None,
        errors: bool = True,
    ) -> Found:
        positive(n_samples, "n_samples", 3)
        stop, base = check_tolerance(tolerance), drawn_seed(seed)
        errors |= stop is not None

        def plan(features: Features) -> Plan:
            from onnxplain.kernels.coalitions import every, kernel_shap, pack

            count = features.count
            ends = pack(np.stack([np.ones(count, bool), np.zeros(count, bool)]))
            complete = count < 32 and n_samples >= 1 << count
            total = 1 << count if complete else n_samples
            total = 2 if count == 1 else total

            def sampler(piece: slice) -> Block:
                first, last = max(piece.start - 2, 0), max(piece.stop - 2, 0)
                head = ends[piece.start : min(piece.stop, 2)]
                if last == first:
                    return {"z": head}
                inner = (
                    every(first + 1, last + 1, count)
                    if complete
                    else kernel_shap(base, first, last, count)
                )
                return {"z": np.concatenate([head, inner])}

            weights = shapley_kernel(count) if complete and count > 1 else None
            return Plan(
                Coalitions(features, distinct=complete),
                sampler,
                total,
                lambda game: KernelShapFit(count, weights, errors),
                unit=2,
                tolerance=None if complete else stop,
            )

        return self._evaluated(
            question,
            self._features(question, feature_mask),
            plan,
            baselines=baselines,
            at_most=perturbations_per_eval,
            show_progress=show_progress,
            seed=base,
            columns=not return_input_shape,
        )


def shapley_kernel(features: int) -> np.ndarray:
    """The Shapley kernel's weights of coalitions 1 to 2^F - 2, as binary numbers.

    (F - 1) / (C(F, k) k (F - k)) for a coalition of k features: Lundberg and Lee 2017, equation 8.
    """
    numbers = np.arange(1, (1 << features) - 1)
    size = np.zeros(len(numbers), np.int64)
    for bit in range(features):
        size += numbers >> bit & 1
    ways = np.cumprod([1.0, *((features - k + 1) / k for k in range(1, features + 1))])
    return (features - 1) / (ways[size] * size * (features - size))
