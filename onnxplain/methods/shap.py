"""Gradient SHAP: gradients at random points between the input and baselines drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError
from onnxplain.graph.edit import has_rows, new_input, twin
from onnxplain.graph.emit import Emitter, dims, is_float, rank
from onnxplain.graph.grad import backward, check_path
from onnxplain.methods.base import Question
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
    needs = ("gradient", "random", "baselines")
    check = "standard_error: of the mean over the samples, as a share of its size"

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

    def _attribute(self, question: Question, *args: Any, **options: Any) -> Any:
        return self._sampled(question, **options)[0]

    def _with_delta(self, question: Question, *args: Any, **options: Any) -> tuple[Any, np.ndarray]:
        answer, _, deltas = self._sampled(question, with_delta=True, **options)
        return answer, deltas

    def _with_checks(
        self, question: Question, *args: Any, **options: Any
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
            positions = np.asarray([r.random() for r in streams])
            starts = {
                name: np.stack([array[r.integers(len(array))] for r in streams])
                for name, array in drawn.items()
            }
            ends = {
                name: np.concatenate([noisy(feeds.arrays[name], s, r) for r in streams])
                for name, s in scales.items()
            }
            rows = _repeated(question, len(block), ends)
            starts = {name: array.repeat(feeds.count, 0) for name, array in starts.items()}
            fed = {self._fed(name, "baseline"): array for name, array in starts.items()}
            dtype = _wide(inputs[0]).numpy()
            fed[self._fed("positions")] = positions.repeat(feeds.count).astype(dtype)
            key = ("gradient-shap", self.multiplies_by_inputs)
            arrays = self._pass(rows, key, self._write, fed, more=inputs)
            if with_delta:
                arrays.append(_total(rows, rows.in_form(arrays)) - self._ends(rows, starts))
            return arrays

        # Samples follow one another where nothing but the examples is counted along that axis.
        several = not question.at_once and all(has_rows(v) for v in (*inputs, *question.wrt))
        fed_bytes = 2 * sum(feeds.arrays[name].nbytes for name in feeds.explained)
        moments = [Moments() for _ in question.wrt]
        deltas = []
        for arrays in in_blocks(samples, None if several else 1, fed_bytes, run, model):
            deltas += arrays[len(moments) :]
            for moment, array in zip(moments, arrays, strict=False):
                moment.add(array)
            dtypes = [array.dtype for array in arrays]
        means = [m.mean.astype(d, copy=False) for m, d in zip(moments, dtypes, strict=False)]
        return question.answer(means), moments, np.ravel(deltas, order="F")

    def _write(
        self,
        op: Emitter,
        of: ir.Value,
        seed: ir.Value,
        wrt: Sequence[ir.Value],
        *inputs: ir.Value,
    ) -> list[ir.Value]:
        """A row: a noisy input, ``NAME.baseline`` of each, and its position between the two.

        By a layer, the line lies in the inputs all the same, and what the gradient is multiplied by
        is the difference of the layer's values at the ends.
        """
        check_path(
            op.graph, [of], wrt
        )  # the rewrite below would hide the names that the user knows
        starts = {x: new_input(op.graph, self._fed(x.name, "baseline"), x, dims(x)) for x in inputs}
        kind = ir.TensorType(_wide(inputs[0]))
        positions = ir.Value(
            name=self._fed("positions"), type=kind, shape=ir.Shape(dims(inputs[0])[:1])
        )
        op.graph.inputs.append(positions)
        points = {}
        for x, start in starts.items():
            begin, end = _widen(op, start), _widen(op, x)
            along = op.cast_like(op.Reshape(positions, [-1, *[1] * (rank(x) - 1)]), begin)
            point = op.Add(begin, op.Mul(along, op.Sub(end, begin)))
            points[x] = op.cast_like(point, x)
            points[x].shape = x.shape
        of, *values = twin(op, [of, *wrt], points)
        grads = backward(op, {of: seed}, values, opset=self.model.opset)
        if self.multiplies_by_inputs:
            begins = twin(op, wrt, starts)
            ways = [op.Sub(*ends) for ends in zip(wrt, begins, strict=True)]
            grads = [op.Mul(*factors) for factors in zip(ways, grads, strict=True)]
        for value, grad in zip(wrt, grads, strict=True):
            grad.shape = value.shape
        return grads


@layer_form
class LayerGradientShap(GradientShap):
    """Expected gradients by a layer: its gradient at random points between inputs and baselines.

    The random points lie between the inputs; the gradient of the layer there is multiplied by the
    difference between the layer's values at the noisy input and at the baseline. Source as
    :class:`GradientShap`.
    """


@neuron_form
class NeuronGradientShap(GradientShap):
    """Expected gradients of a neuron of a layer. Source as :class:`GradientShap`."""


def _repeated(question: Question, times: int, inputs: Mapping[str, np.ndarray]) -> Question:
    """The question about all examples several times over, with other explained inputs."""
    feeds, seeds, indices = question.feeds, question.seeds, question.indices
    arrays = {
        name: inputs[name]
        if name in inputs
        else array
        if question.axes[name] is None
        else np.concatenate([array] * times)
        for name, array in feeds.arrays.items()
    }
    if indices is not None:
        assert question.of.dtype is not None
        indices = np.tile(indices, (times, 1))
        seeds = target_seeds(indices, question.shape, question.of.dtype.numpy())
    return replace(
        question,
        feeds=replace(feeds, arrays=arrays, count=times * feeds.count),
        seeds=seeds,
        indices=indices,
    )
