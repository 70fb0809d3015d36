"""DeepLIFT: differences from a reference, passed back by multipliers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError, LayerError, UnsupportedModelError
from onnxplain.graph.edit import BATCH, new_input, reads, twin, upstream
from onnxplain.graph.emit import Emitter, dims, rank
from onnxplain.graph.grad import backward, check_path, expand_functions
from onnxplain.methods.base import DifferenceAttribution, Layers, Question, gap
from onnxplain.methods.baselines import distributions, named_baselines
from onnxplain.methods.forms import layer_form, neuron_form
from onnxplain.methods.target import Seeds
from onnxplain.model import Model
from onnxplain.rules.deeplift import RevealCancel, rescale_rules
from onnxplain.rules.modified import is_activation
from onnxplain.run.feeds import Arrays
from onnxplain.run.program import Rows

Custom = Callable[..., Sequence[np.ndarray]]

_PAIRS_BYTES = 1 << 26
"""Pairs of examples and baselines are explained in groups of about this size."""


class DeepLift(DifferenceAttribution):
    """DeepLIFT: what each input contributes to the difference from a reference.

    Two passes, on the input and on the baseline, and one back, by multipliers (difference over
    difference) in the place of derivatives. What is done with products, softmax, normalizations and
    pooling is said in :mod:`onnxplain.rules.deeplift`.

    Source: Shrikumar, Greenside, Kundaje, "Learning Important Features Through Propagating
    Activation Differences", 2017, arXiv:1704.02685. Unit: output; attributions add up to the
    difference between the outputs at the input and at the baseline.

    Args:
        model: the model.
        multiply_by_inputs: False gives the multipliers, without the factor (input - baseline).
        eps: differences up to this count as none: the gradient is taken instead.
        rule: of nonlinearities: ``rescale`` (section 3.5.2) or ``reveal-cancel`` (3.5.3), which
            tells positive and negative parts of a difference apart.
        softmax: ``exact`` keeps the sum of attributions; ``centered`` is Captum's rule, the
            rescaled gradient less its mean, which doesn't.
    """

    name = "deep-lift"
    title = "DeepLift"
    paper = "Shrikumar et al. 2017, arXiv:1704.02685"
    check = "convergence_delta: sum of attributions minus (output at input - output at baseline)"

    def __init__(
        self,
        model: Model,
        multiply_by_inputs: bool = True,
        eps: float = 1e-10,
        rule: Literal["rescale", "reveal-cancel"] = "rescale",
        softmax: Literal["exact", "centered"] = "exact",
        *,
        of: str | None = None,
        wrt: Layers | None = None,
    ) -> None:
        super().__init__(model, multiply_by_inputs, of=of, wrt=wrt)
        for option, given, known in (
            ("rule", rule, ("rescale", "reveal-cancel")),
            ("softmax", softmax, ("exact", "centered")),
        ):
            if given not in known:
                raise InputError(f"{option} {given!r} is not one of {', '.join(known)}")
        if not eps >= 0:
            raise InputError(f"eps is {eps!r}; it must be a number of at least 0")
        self._eps, self._rule, self._softmax = float(eps), rule, softmax

    def has_convergence_delta(self) -> bool:
        """True: the gap of the sum."""
        return True

    def attribute(
        self,
        inputs: Arrays,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Arrays = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Custom | None = None,
    ) -> Any:
        """Explain examples.

        Args:
            inputs: [N, ...] arrays (one, a tuple in model order, or a dict by name).
            baselines: None (zeros), a number, an array of the input's shape or with first
                dimension 1, or a tuple or dict of these.
            target: int, tuple, one per example, or None; with ``of`` a layer, a neuron selector.
            additional_forward_args: the remaining inputs, fed and not attributed.
            return_convergence_delta: also return [N], the sum of an example's attributions minus
                the difference of the outputs at the input and at the baseline.
            custom_attribution_func: makes the attributions of multipliers, inputs and baselines (or
                of the first one or two of these, if it takes no more): tuples of [N, ...] arrays
                with one entry per source, as it returns.

        Returns:
            Attributions of the inputs' shape, in the inputs' form; with the delta if asked for.

        Raises:
            InputError, TargetError, LayerError, NotDifferentiableError, NoRuleError.
        """
        return self._call(locals())

    def _attribute(
        self,
        question: Question,
        baselines: Any = None,
        custom_attribution_func: Custom | None = None,
        gaps: list[np.ndarray] | None = None,
    ) -> Any:
        """The mean over an example's baselines; ``gaps`` receives the delta of each pair."""
        if custom_attribution_func is not None:
            _taken(custom_attribution_func)
        arrays = []
        for pairs, rows, each in self._pairs(question, baselines):
            *found, difference = self._compare(pairs, rows, custom_attribution_func)
            if gaps is not None:
                gaps.append(_sums(pairs, found) - difference)
            examples = pairs.feeds.count // each
            ends = zip(pairs.wrt, found, strict=True)
            arrays.append([_mean(v, a, examples, each) for v, a in ends])
        parts = zip(question.wrt, *arrays, strict=True)
        return question.answer([np.concatenate(a, _rows_axis(v)) for v, *a in parts])

    def _with_delta(self, question: Question, **options: Any) -> tuple[Any, np.ndarray]:
        gaps: list[np.ndarray] = []
        result = self._attribute(question, **options, gaps=gaps)
        return result, np.concatenate(gaps)

    def _delta(
        self, question: Question, result: Any, baselines: Any = None, **_: Any
    ) -> np.ndarray:
        starts = self._beside(question, named_baselines(self.model, question.feeds, baselines))
        return np.asarray(question.sums(result) - self._differences(question, starts))

    def _with_checks(
        self,
        question: Question,
        baselines: Any = None,
        custom_attribution_func: Custom | None = None,
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """The gap of the sum, where the sum is meant to close: nothing goes around the sources."""
        gaps: list[np.ndarray] = []
        result = self._attribute(question, baselines, custom_attribution_func, gaps)
        if (
            not self.multiplies_by_inputs
            or custom_attribution_func is not None
            or question.at_once
            or not self._complete(question)
        ):
            return result, {}
        total = question.sums(result)
        delta = np.concatenate(gaps).reshape(question.feeds.count, -1).mean(axis=1)
        return result, gap(total, total - delta)

    def _complete(self, question: Question) -> bool:
        """Whether every way from the inputs to what is explained leads through one source."""
        if question.groups is None:
            return True
        if len(question.groups) > 1:
            return False
        graph = self.model.graph.graph
        nodes = upstream(graph, [question.of], stop=question.wrt)
        around = {v for n in nodes if n.op_type not in ("Shape", "Size") for v in reads(n)}
        return not any(v.name in question.feeds.explained for v in around - set(question.wrt))

    # ---- running ------------------------------------------------------------------------------

    def _pairs(
        self, question: Question, baselines: Any
    ) -> Iterator[tuple[Question, dict[str, Any], int]]:
        """Questions with one row for each pair of example and baseline, what these rows are fed,
        and the number of baselines of an example."""
        starts = named_baselines(self.model, question.feeds, baselines)
        yield question, self._beside(question, starts), 1

    def _beside(self, question: Question, starts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        count = question.feeds.count
        return {
            self._fed(name, "baseline"): np.broadcast_to(array, (count, *array.shape[1:]))
            for name, array in starts.items()
        }

    def _compare(
        self, pairs: Question, rows: Mapping[str, Any], custom: Custom | None
    ) -> list[np.ndarray]:
        """The attributions of each pair by each source, and the difference that they explain."""
        multiply = self.multiplies_by_inputs and custom is None

        def write(
            op: Emitter, of: ir.Value, seed: ir.Value, wrt: Sequence[ir.Value], *inputs: ir.Value
        ) -> list[ir.Value]:
            rules = rescale_rules(self._eps, self._softmax)
            _write_relus(op.graph)
            expand_functions(op.graph, [of], wrt, rules)
            check_path(op.graph, [of], wrt, rules)
            reference = self._twin(op, of, inputs)
            still = next((v.name for v in wrt if v not in reference), None)
            if still is not None:
                raise LayerError(
                    f"layer '{still}' does not depend on the explained input(s) "
                    f"({', '.join(pairs.feeds.explained)}), so it does not differ from its "
                    "reference; choose a layer behind them"
                )
            if self._rule == "reveal-cancel":
                rules = RevealCancel(reference, wrt, rules, self._eps, self.model.opset).rules
            found = backward(op, {of: seed}, wrt, rules, self.model.opset, reference)
            starts = [reference[v] for v in wrt]
            if multiply:
                ends = zip(found, wrt, starts, strict=True)
                found = [op.Mul(m, op.Sub(value, start)) for m, value, start in ends]
            for attribution, value in zip(found, wrt, strict=True):
                attribution.shape = value.shape
            explained = _explained(op, of, reference.get(of, of), seed, pairs.at_once)
            return [*found, explained, *((*wrt, *starts) if custom is not None else ())]

        key = ("deep-lift", self._rule, self._softmax, self._eps, multiply, custom is not None)
        found = self._pass(pairs, key, write, rows, exact=False, more=self._explained_inputs(pairs))
        count = len(pairs.wrt)
        if custom is None:
            return found
        sides = found[:count], found[count + 1 : 2 * count + 1], found[2 * count + 1 :]
        return [*_customized(custom, pairs.wrt, *map(tuple, sides)), found[count]]

    def _differences(self, pairs: Question, rows: Mapping[str, Any]) -> np.ndarray:
        """The explained value of each pair at the input minus that at the baseline, float64."""

        def write(
            op: Emitter, of: ir.Value, seed: ir.Value, wrt: Sequence[ir.Value], *inputs: ir.Value
        ) -> list[ir.Value]:
            reference = self._twin(op, of, inputs)
            return [_explained(op, of, reference.get(of, of), seed, pairs.at_once)]

        inputs = self._explained_inputs(pairs)
        return self._pass(pairs, "deep-lift ends", write, rows, more=inputs)[0]

    def _explained_inputs(self, question: Question) -> list[ir.Value]:
        inputs = {v.name: v for v in self.model.graph.graph.inputs}
        return [inputs[name] for name in question.feeds.explained]

    def _twin(
        self, op: Emitter, of: ir.Value, inputs: Sequence[ir.Value]
    ) -> dict[ir.Value, ir.Value]:
        """A second pass on the baselines, which become inputs: the twin of each value."""
        copies: dict[ir.Value, ir.Value] = {}
        baselines = {
            v: new_input(op.graph, self._fed(v.name, "baseline"), v, dims(v)) for v in inputs
        }
        twin(op, [of], baselines, copies)
        return copies


class DeepLiftShap(DeepLift):
    """DeepLIFT from each baseline of a distribution; the mean approximates SHAP values.

    Source: Lundberg and Lee, "A Unified Approach to Interpreting Model Predictions", 2017,
    arXiv:1705.07874, section 4.2 (Deep SHAP). Unit: output; attributions add up to the output at
    the input minus the mean of the outputs at the baselines. Arguments as :class:`DeepLift`.
    """

    name = "deep-lift-shap"
    title = "DeepLiftShap"
    paper = "Lundberg and Lee 2017, arXiv:1705.07874"
    needs = ("gradient", "baselines")
    check = "convergence_delta: sum of attributions minus (output - mean output at the baselines)"

    def attribute(  # type: ignore[override]
        self,
        inputs: Arrays,
        baselines: Any,
        target: Any = None,
        additional_forward_args: Arrays = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Custom | None = None,
    ) -> Any:
        """Explain examples.

        Arguments, result and errors as :meth:`DeepLift.attribute`, but for:

        Args:
            baselines: a distribution: [B, ...] arrays of B >= 2 baselines (one, or a tuple or dict
                of as many for each input).
            return_convergence_delta: also return [N * B], one delta for each example and baseline,
                the baselines of an example together.
            custom_attribution_func: gets one row for each example and baseline, in groups of
                examples; the mean over the baselines is taken of what it returns.
        """
        return self._call(locals())

    def _pairs(
        self, question: Question, baselines: Any
    ) -> Iterator[tuple[Question, dict[str, Any], int]]:
        if question.at_once:
            raise UnsupportedModelError(
                f"output '{question.of.name}' has one number for the whole batch, which can't be "
                "compared example by example with a distribution; use DeepLift"
            )
        feeds = question.feeds
        starts = distributions(self.model, feeds, baselines)
        each = len(next(iter(starts.values())))
        varied = {k: v for k, v in feeds.arrays.items() if self.model.axes[k] is not None}
        size = sum(v[:1].nbytes for v in (*varied.values(), *starts.values()))
        size += sum(4 * math.prod(d for d in dims(v) if isinstance(d, int)) for v in question.wrt)
        at_once = max(1, _PAIRS_BYTES // (size * each))
        for first in range(0, feeds.count, at_once):
            examples = min(at_once, feeds.count - first)
            rows = {k: _picked(v, first * each, each) for k, v in varied.items()}
            for name, array in starts.items():
                rows[self._fed(name, "baseline")] = _picked(array, 0, 1)
            pairs = replace(feeds, count=examples * each)
            seeds = _repeated(question.seeds, first * each, each)
            yield replace(question, feeds=pairs, seeds=seeds), rows, each


@layer_form
class LayerDeepLift(DeepLift):
    """DeepLIFT by a layer: what its values contribute to the difference from a reference.

    The reference of the layer are its values in the pass on the baseline. Source as
    :class:`DeepLift`.
    """


@layer_form
class LayerDeepLiftShap(DeepLiftShap):
    """DeepLIFT by a layer from each baseline of a distribution. Source as :class:`DeepLiftShap`."""


@neuron_form
class NeuronDeepLift(DeepLift):
    """DeepLIFT of one neuron of a layer. Source as :class:`DeepLift`."""


@neuron_form
class NeuronDeepLiftShap(DeepLiftShap):
    """DeepLIFT of one neuron from each baseline of a distribution. Source as
    :class:`DeepLiftShap`."""


def _explained(
    op: Emitter, of: ir.Value, start: ir.Value, seed: ir.Value, at_once: bool
) -> ir.Value:
    """The explained number of each row less that at its baseline, float64 [N]."""
    end, begin, weights = (op.Cast(v, to=ir.DataType.DOUBLE) for v in (of, start, seed))
    change = op.Mul(op.Sub(end, begin), weights)
    axes = list(range(0 if at_once else 1, rank(of)))
    total = op.ReduceSum(change, axes, keepdims=0) if axes else change
    total = op.Reshape(total, [-1])
    total.shape = ir.Shape([1 if at_once else dims(of)[0]])
    return total


def _write_relus(graph: ir.Graph) -> None:
    """Write each ``Where(x > 0, x, 0)`` as the Relu that it is: it has the rule of one."""
    for node in graph:
        x = node.inputs[1] if node.op_type == "Where" else None
        if x is not None and is_activation(node) and dims(x) == dims(node.outputs[0]):
            node.replace_input_with(0, x)
            node.resize_inputs(1)
            node.op_type = "Relu"


def _rows_first(value: ir.Value, array: np.ndarray) -> tuple[np.ndarray, int]:
    """Attributions of a source with the axis that counts the rows first, and that axis."""
    axis = _rows_axis(value)
    return np.moveaxis(array, axis, 0), axis


def _rows_axis(value: ir.Value) -> int:
    return dims(value).index(BATCH) if BATCH in dims(value) else 0


def _sums(pairs: Question, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of each row's attributions over all sources, float64."""
    total = np.zeros(pairs.feeds.count)
    for value, array in zip(pairs.wrt, arrays, strict=True):
        rows, _ = _rows_first(value, array)
        total += rows.reshape(len(total), -1).sum(axis=1, dtype=np.float64)
    return total.sum(keepdims=True) if pairs.at_once else total


def _mean(value: ir.Value, array: np.ndarray, examples: int, each: int) -> np.ndarray:
    """The mean over the baselines of each example, which may have several rows."""
    if each == 1:
        return array
    rows, axis = _rows_first(value, array)
    if len(rows) % (examples * each):
        raise UnsupportedModelError(
            f"'{value.name}' has {len(rows)} rows for {examples * each} pairs of example and "
            "baseline, so its values can't be told apart by pair; choose a layer that has one row "
            "for each example"
        )
    apart = rows.reshape(examples, each, -1, *rows.shape[1:])
    mean = apart.mean(axis=1, dtype=np.float64).astype(array.dtype)
    return np.moveaxis(mean.reshape(-1, *rows.shape[1:]), 0, axis)


def _picked(array: np.ndarray, first: int, each: int) -> Rows:
    """Rows of an array, each of them several times in a row, from its start again at its end."""
    return lambda piece: array[
        (np.arange(first + piece.start, first + piece.stop) // each) % len(array)
    ]


def _repeated(seeds: Seeds, first: int, each: int) -> Seeds:
    """The cotangents of examples, each of them several times in a row."""

    def rows(piece: slice) -> np.ndarray:
        start, stop = first + piece.start, first + piece.stop
        examples = slice(start // each, -(-stop // each))
        skipped = start - examples.start * each
        return seeds(examples).repeat(each, axis=0)[skipped : skipped + stop - start]

    return rows


def _taken(custom: Any) -> int:
    """How many of multipliers, inputs and baselines a function takes."""
    try:
        signature = inspect.signature(custom)
    except (TypeError, ValueError):
        raise InputError(
            f"custom_attribution_func is {custom!r}: give None or a function, such as "
            "lambda multipliers, inputs, baselines: ..."
        ) from None
    for count in (3, 2, 1):
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        return count
    raise InputError(
        f"custom_attribution_func takes {signature}; it gets one to three arguments: multipliers, "
        "inputs, baselines"
    )


def _customized(
    custom: Custom, wrt: Sequence[ir.Value], *sides: tuple[np.ndarray, ...]
) -> list[np.ndarray]:
    """What a function makes of multipliers, inputs and baselines, or of the first of these."""
    found = custom(*sides[: _taken(custom)])
    if not isinstance(found, tuple | list) or len(found) != len(wrt):
        came = type(found).__name__
        raise InputError(
            f"custom_attribution_func must return a tuple of {len(wrt)} array(s), one for each "
            f"source, not {f'{came} of {len(found)}' if isinstance(found, tuple | list) else came}"
        )
    arrays = [np.asarray(a) for a in found]
    for value, array, multipliers in zip(wrt, arrays, sides[0], strict=True):
        rows = multipliers.shape[: _rows_axis(value) + 1]
        if array.dtype.kind not in "fiub" or array.shape[: len(rows)] != rows:
            raise InputError(
                f"custom_attribution_func returned {array.dtype} {list(array.shape)} for "
                f"'{value.name}'; wanted are numbers, one row for each row of the multipliers "
                f"({list(multipliers.shape)})"
            )
    return arrays
