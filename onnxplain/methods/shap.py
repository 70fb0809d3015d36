"""Gradient SHAP: gradients at random points between the input and baselines drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError
from onnxplain.graph.edit import BATCH, has_rows, new_input, twin
from onnxplain.graph.emit import Emitter, dims, is_float, rank
from onnxplain.graph.grad import backward, check_path
from onnxplain.methods.base import Layers, Question
from onnxplain.methods.baselines import distributions
from onnxplain.methods.forms import layer_form, neuron_form
from onnxplain.methods.noise import (
    Moments,
    deviations,
    in_blocks,
    noisy,
    positive,
    relative_error,
    stream,
)
from onnxplain.methods.path import PathAttribution, _total, _wide, _widen
from onnxplain.methods.target import target_seeds
from onnxplain.model import Model
from onnxplain.run.feeds import Arrays


class GradientShap(PathAttribution):
    """Expected gradients: SHAP values estimated from gradients at random points.

    Each sample adds noise to the input, draws a baseline from a distribution (for each input by
    itself, as Captum does) and a point on the line between the two; the gradient there is
    multiplied by (noisy input - baseline). The attributions are the mean. A sample draws the same
    for every example.

    Source: Lundberg and Lee, "A Unified Approach to Interpreting Model Predictions", 2017,
    arXiv:1705.07874, and the authors' GradientExplainer; Erion et al., 2019, arXiv:1906.10670,
    section 2.2. Unit: output.

    Args:
        model: the model.
        multiply_by_inputs: False gives the mean gradient, without the factor.
    """

    name = "gradient-shap"
    title = "Gradient SHAP"
    paper = "Lundberg and Lee 2017, arXiv:1705.07874; Erion et al. 2019, arXiv:1906.10670"
    needs = ("gradient", "random")
    check = "standard_error: of the mean over the samples, as a share of its size"

    def __init__(
        self,
        model: Model,
        multiply_by_inputs: bool = True,
        *,
        of: str | None = None,
        wrt: Layers | None = None,
    ) -> None:
        super().__init__(model, of=of, wrt=wrt)
        self.multiplies_by_inputs = multiply_by_inputs

    def has_convergence_delta(self) -> bool:
        """True: the completeness gap of each sample."""
        return True

    def attribute(
        self,
        inputs: Arrays,
        baselines: Any,
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] | Mapping[str, float] = 0.0,
        target: Any = None,
        additional_forward_args: Arrays = None,
        return_convergence_delta: bool = False,
        *,
        seed: int | None = None,
    ) -> Any:
        """Explain examples.

        Args:
            inputs: [N, ...] arrays (one, a tuple in model order, or a dict by name).
            baselines: the distribution, [B, ...] with at least two baselines, or a tuple or dict of
                these.
            n_samples: random points for each example.
            stdevs: standard deviation of the Gaussian noise: a number, or a tuple or dict with one
                for each input.
            target: int, tuple, one per example, or None; with ``of`` a layer, a neuron selector.
            additional_forward_args: the remaining inputs, fed and not attributed.
            return_convergence_delta: also return [N * n_samples], for each sample the sum of its
                attributions minus the difference of the outputs at the noisy input and at the
                baseline; those of an example next to each other.
            seed: the samples depend on it alone; None draws one.

        Returns:
            Attributions of the inputs' shape, in the inputs' form; with the deltas if asked for.

        Raises:
            InputError, TargetError, LayerError, NotDifferentiableError, NoRuleError.
        """
        return self._call(locals())

    def _attribute(self, question: Question, *_: Any, **options: Any) -> Any:
        return self._sampled(question, **options)[0]

    def _with_delta(self, question: Question, *_: Any, **options: Any) -> tuple[Any, np.ndarray]:
        answer, _, deltas = self._sampled(question, with_delta=True, **options)
        return answer, deltas

    def _with_checks(
        self, question: Question, *_: Any, **options: Any
    ) -> tuple[Any, dict[str, np.ndarray]]:
        answer, moments, _ = self._sampled(question, **options)
        return answer, relative_error(moments)

    def _sampled(
        self,
        question: Question,
        baselines: Any,
        n_samples: int = 5,
        stdevs: Any = 0.0,
        seed: int | None = None,
        with_delta: bool = False,
    ) -> tuple[Any, list[Moments], np.ndarray]:
        """The attributions, the moments of the samples' arrays, and their deltas."""
        feeds, model = question.feeds, self.model
        inputs = [v for v in model.graph.graph.inputs if v.name in feeds.explained]
        for value in inputs:
            if not is_float(value):
                raise InputError(
                    f"input '{value.name}' holds {feeds.arrays[value.name or ''].dtype} values, "
                    "and there is nothing between them and a baseline's: pass it in "
                    "additional_forward_args, or use a method that goes from layer value to layer "
                    "value (layer-integrated-gradients, layer-deep-lift-shap)"
                )
        drawn = distributions(model, feeds, baselines)
        scales = deviations(model, feeds, stdevs)
        samples, random = positive(n_samples, "n_samples"), stream(seed)

        def run(block: range) -> list[np.ndarray]:
            streams = [random(sample) for sample in block]
            positions = np.repeat([r.random() for r in streams], feeds.count)
            starts = {
                name: np.stack([array[r.integers(len(array))] for r in streams])
                for name, array in drawn.items()
            }
            starts = {name: array.repeat(feeds.count, 0) for name, array in starts.items()}
            ends = {
                name: np.concatenate([noisy(feeds.arrays[name], s, r) for r in streams])
                for name, s in scales.items()
            }
            rows = _repeated(question, len(block), ends)
            fed = {self._fed(name, "baseline"): array for name, array in starts.items()}
            fed[self._fed("positions")] = positions.astype(_working(inputs))
            key = ("gradient-shap", self.multiplies_by_inputs)
            arrays = self._pass(rows, key, self._write, fed, more=inputs)
            if with_delta:
                moved = rows.in_place(arrays)
                arrays.append(self._delta(rows, moved, starts))
            return arrays
