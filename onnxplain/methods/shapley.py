"""Shapley values: exact over all coalitions, and sampled over permutations."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import numpy as np

from onnxplain.errors import InputError
from onnxplain.methods.base import Question
from onnxplain.methods.noise import positive
from onnxplain.methods.perturbation import (
    Baselines,
    Found,
    PerturbationAttribution,
    Plan,
    drawn_seed,
)
from onnxplain.perturb.aggregate import ExactShapley, Marginals
from onnxplain.perturb.engine import check_tolerance
from onnxplain.perturb.features import Features
from onnxplain.perturb.forms import Block, Coalitions
from onnxplain.run.feeds import Arrays

# Beyond this, all coalitions take days of any but the smallest model.
_MOST_FEATURES = 24
# Above this, it takes long enough to say so before.
_MANY_FEATURES = 16


class ShapleyValues(PerturbationAttribution):
    """Shapley values, exact: what a feature adds, averaged over all orders in which features join.

    phi(f) = sum over coalitions S without f of |S|! (F - |S| - 1)! / F! (v(S + f) - v(S)), where
    v(S) is the score with the features outside S at the baseline. Each of the 2^F coalitions is
    evaluated once. They add up to score(x) - score(baseline). Source: Shapley 1953; Strumbelj and
    Kononenko 2010, JMLR 11, equation 4.

    Args:
        model: an ox.Model or ox.BlackBox.
    """

    name = "shapley-values"
    title = "Shapley Values"
    paper = "Shapley 1953; Strumbelj and Kononenko 2010 (JMLR 11)"
    every_output = True

    def attribute(
        self,
        inputs: Arrays,
        baselines: Baselines = None,
        target: Any = None,
        additional_forward_args: Arrays = None,
        feature_mask: Any = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        """Explain examples; arguments and result as :meth:`FeatureAblation.attribute`.

        Raises:
            InputError: more than 24 features, or an argument does not fit; EvaluationError: the
                model failed part-way (no attribution is known before all coalitions are).
        """
        return self._call(locals())

    def _find(
        self,
        question: Question,
        baselines: Baselines = None,
        feature_mask: Any = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Found:
        def plan(features: Features) -> Plan:
            from onnxplain.kernels.coalitions import every

            count = features.count
            if count > _MOST_FEATURES:
                raise InputError(
                    f"{_coalitions(count)}, which would all be evaluated; sample them "
                    "(shapley-value-sampling, kernel-shap), or give a feature_mask with at most "
                    f"{_MOST_FEATURES} groups"
                )
            if count > _MANY_FEATURES:
                warnings.warn(
                    f"{_coalitions(count)}, and all are evaluated for each example; where that "
                    "takes too long, sample them (shapley-value-sampling, kernel-shap) or give a "
                    "feature_mask",
                    stacklevel=2,
                )

            def sampler(piece: slice) -> Block:
                return {"z": every(piece.start, piece.stop, count)}

            total = 1 << count
            form = Coalitions(features, distinct=True)
            return Plan(form, sampler, total, lambda game: ExactShapley(count))

        return self._evaluated(
            question,
            self._features(question, feature_mask),
            plan,
            baselines=baselines,
            at_most=perturbations_per_eval,
            show_progress=show_progress,
        )


class ShapleyValueSampling(PerturbationAttribution):
    """Shapley values, sampled: what a feature adds when it joins, averaged over random orders.

    Unbiased for any number of orders, and adds up to score(x) - score(baseline) for each. Source:
    Castro, Gomez and Tejada 2009, Computers and Operations Research 36; antithetic orders: Mitchell
    et al. 2022, JMLR 23.

    Args:
        model: an ox.Model or ox.BlackBox.
    """

    name = "shapley-value-sampling"
    title = "Shapley Value Sampling"
    paper = "Castro et al. 2009 (Computers and Operations Research 36)"
    needs: ClassVar[tuple[str, ...]] = ("random",)
    check = "standard_error: of the mean over the orders, as a share of its size"
    every_output = True

    def attribute(
        self,
        inputs: Arrays,
        baselines: Baselines = None,
        target: Any = None,
        additional_forward_args: Arrays = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        sampling: Literal["random", "antithetic", "stratified"] = "random",
        tolerance: float | None = None,
        return_standard_error: bool = False,
        seed: int | None = None,
    ) -> Any:
        """Explain examples.

        Args:
            inputs, baselines, target, additional_forward_args, feature_mask,
                perturbations_per_eval, show_progress: see :meth:`FeatureAblation.attribute`.
            n_samples: orders (permutations) of the features, at most; the same for every example.
            sampling: "random" orders; "antithetic": each with its reverse (n_samples even);
                "stratified": in blocks of F in which each feature takes each place once (n_samples
                a multiple of the number of features).
            tolerance: an example gets no more samples once the standard errors of its attributions
                are, summed, at most this share of their sizes (0.05, say).
            return_standard_error: return (attributions, standard errors).
            seed: the orders depend on it alone; None draws one.

        Returns:
            As :meth:`FeatureAblation.attribute`; with their standard errors if asked for.
        """
        return self._call(locals())

    def _find(
        self,
        question: Question,
        baselines: Baselines = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        sampling: Literal["random", "antithetic", "stratified"] = "random",
        tolerance: float | None = None,
        seed: int | None = None,
    ) -> Found:
        positive(n_samples, "n_samples")
        if sampling not in ("random", "antithetic", "stratified"):
            raise InputError(
                f"sampling is 'random', 'antithetic' or 'stratified', not {sampling!r}"
            )
        stop, base = check_tolerance(tolerance), drawn_seed(seed)

        def plan(features: Features) -> Plan:
            from onnxplain.kernels.coalitions import permutations, prefixes, words

            count = features.count
            inner = count - 1  # of the coalitions of an order, the first and last are always alike
            group = {"random": 1, "antithetic": 2, "stratified": count}[sampling]
            if n_samples % group:
                raise InputError(
                    f"n_samples is {n_samples}, but {sampling} orders come in groups of {group}; "
                    f"give {-(-n_samples // group) * group}"
                )

            def orders(first: int, last: int) -> np.ndarray:
                return permutations(base, first, last, count, sampling)

            def sampler(piece: slice) -> Block:
                """Sample 0 has no feature, sample 1 has all; then the orders, one by one."""
                z = np.zeros((piece.stop - piece.start, words(count)), np.uint64)
                for number in range(piece.start, min(piece.stop, 2)):
                    z[number - piece.start] = ends[number]
                first, last = max(piece.start - 2, 0), piece.stop - 2
                if last > first:
                    start = first // inner
                    order = orders(start, -(-last // inner))
                    found = prefixes(order, first - start * inner, last - start * inner)
                    z[len(z) - len(found) :] = found
                return {"z": z}

            ends = (np.zeros(words(count), np.uint64), _all(count))
            return Plan(
                Coalitions(features),
                sampler,
                2 + n_samples * inner,
                lambda game: Marginals(count, orders, group, n_samples),
                unit=max(inner, 1) * group,
                tolerance=stop,
            )

        return self._evaluated(
            question,
            self._features(question, feature_mask),
            plan,
            baselines=baselines,
            at_most=perturbations_per_eval,
            show_progress=show_progress,
            seed=base,
        )


def _coalitions(features: int) -> str:
    number = f" = {1 << features:,}" if features < 64 else ""
    return f"{features} features have 2^{features}{number} coalitions"


def _all(features: int) -> np.ndarray:
    """The coalition of all features, packed."""
    from onnxplain.kernels.coalitions import pack

    return pack(np.ones((1, features), bool))[0]
