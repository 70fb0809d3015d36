"""Path methods: gradients summed along a straight line from a baseline to the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError, OutOfMemoryError
from onnxplain.graph.edit import (
    Rows,
    affine_frontier,
    has_rows,
    new_input,
    prune,
    stack_rows,
    twin,
    unstack_rows,
)
from onnxplain.graph.emit import Emitter, dims, rank
from onnxplain.graph.grad import backward, check_path
from onnxplain.methods import target as targets
from onnxplain.methods.base import Attribution, Layers, Question
from onnxplain.methods.gradient import HALVES, emit_attribution
from onnxplain.model import Model
from onnxplain.run.feeds import Arrays, Feeds, by_name, check_array
from onnxplain.run.program import take

QUADRATURES = (
    "gausslegendre",
    "riemann_left",
    "riemann_right",
    "riemann_middle",
    "riemann_trapezoid",
)


@lru_cache(maxsize=64)
def quadrature(method: str, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in [0, 1] and weights of a rule of numerical integration, float64 [n_steps].

    The trapezoid has the weights 1/n inside and 1/(2n) at its ends, as Captum's, whose sum is
    1 - 1/n.
    """
    if method not in QUADRATURES:
        raise InputError(f"method '{method}' is not one of {', '.join(QUADRATURES)}")
    if isinstance(n_steps, bool) or not isinstance(n_steps, int | np.integer):
        raise InputError(f"n_steps must be an integer, not {n_steps!r}")
    least = 1 if method == "gausslegendre" else 2
    if n_steps < least:
        raise InputError(f"n_steps is {n_steps}, but '{method}' needs at least {least}")
    n = int(n_steps)
    if method == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(n)
        return (1 + nodes) / 2, weights / 2
    weights = np.full(n, 1 / n)
    if method == "riemann_trapezoid":
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, n), weights
    first = {"riemann_left": 0.0, "riemann_right": 1 / n, "riemann_middle": 1 / (2 * n)}[method]
    return np.linspace(first, first + 1 - 1 / n, n), weights


def named_baselines(model: Model, feeds: Feeds, baselines: Any) -> dict[str, np.ndarray]:
    """Baselines of the explained inputs, each with first dimension 1 or N.

    Args:
        baselines: None (zeros), a number, an array, or a tuple or dict of these.

    Raises:
        InputError: a baseline doesn't fit its input.
    """
    names = list(feeds.explained)
    given: Mapping[str, Any] = {}
    if isinstance(baselines, Mapping | tuple):
        given, _ = by_name(baselines, names, "baselines")
    elif baselines is not None:
        if np.ndim(baselines) == 0:
            given = dict.fromkeys(names, baselines)
        elif len(names) == 1:
            given = {names[0]: baselines}
        else:
            raise InputError(
                f"one array can't be the baseline of {len(names)} inputs ({', '.join(names)}); "
                "give a number, or a tuple or dict with one for each"
            )
    values = {v.name: v for v in model.graph.graph.inputs}
    found = {}
    for name in names:
        if model.axes[name] is None:
            raise InputError(
                f"input '{name}' is shared by all examples (examples_axis), so a path of each "
                "example's own can't lead to it; pass it in additional_forward_args"
            )
        x, baseline = feeds.arrays[name], given.get(name)
        if baseline is None or np.ndim(baseline) == 0:
            array = np.full((1, *x.shape[1:]), 0 if baseline is None else baseline)
        else:
            array = np.asarray(baseline)
            if array.shape == x.shape[1:]:
                array = array[None]
            elif array.ndim == x.ndim:
                array = np.moveaxis(array, model.axes[name] or 0, 0)
        if array.shape[1:] != x.shape[1:] or array.shape[0] not in (1, len(x)):
            raise InputError(
                f"baseline of '{name}': shape {list(array.shape)} was given for an input of shape "
                f"{list(x.shape)}; give that shape, the same with first dimension 1, or a number"
            )
        found[name] = check_array(values[name], array, 0, "baseline of")
    return found


@dataclass(frozen=True)
class _Point:
    """A source on its path: its value, the way from the baseline, and its rows at all steps."""

    value: ir.Value
    delta: ir.Value
    rows: ir.Value
    times: ir.Value


class IntegratedGradients(Attribution):
    """Integrated gradients: the gradient, integrated from a baseline to the input.

    The interpolation, the pass and the weighted sum over the steps are in the graph.

    Source: Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", 2017,
    arXiv:1703.01365, equations 1 and 3. Unit: output; attributions add up to the difference between
    the outputs at the input and at the baseline (completeness).

    Args:
        model: the model.
        multiply_by_inputs: False gives the integral without the factor (input - baseline).
    """

    name = "integrated-gradients"
    title = "Integrated Gradients"
    paper = "Sundararajan et al. 2017, arXiv:1703.01365"
    check = "convergence_delta: sum of attributions minus (output at input - output at baseline)"

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
        """True: the completeness gap."""
        return True

    def attribute(
        self,
        inputs: Arrays,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Arrays = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Explain examples.

        Args:
            inputs: [N, ...] arrays (one, a tuple in model order, or a dict by name).
            baselines: None (zeros), a number, an array of the input's shape or with first
                dimension 1, or a tuple or dict of these.
            target: int, tuple, one per example, or None; with ``of`` a layer, a neuron selector.
            additional_forward_args: the remaining inputs, fed and not attributed.
            n_steps: steps of the integral's approximation.
            method: gausslegendre, riemann_left, riemann_right, riemann_middle or
                riemann_trapezoid.
            internal_batch_size: the most rows evaluated at once; None: as many as fit the memory.
            return_convergence_delta: also return [N], the sum of an example's attributions minus
                the difference of the outputs at the input and at the baseline.

        Returns:
            Attributions of the inputs' shape, in the inputs' form; with the delta if asked for.

        Raises:
            InputError, TargetError, LayerError, NotDifferentiableError, NoRuleError.
        """
        question = self._ask(inputs, target, additional_forward_args)
        return self._integrate(
            question, baselines, n_steps, method, internal_batch_size, return_convergence_delta
        )

    def explain(self, **arguments: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """As :meth:`attribute`, with the completeness gap along the path that was integrated.

        Between the ends of the path only the sources differ: what reaches the output around a layer
        keeps the values of the input. (``return_convergence_delta`` compares with the output at the
        baseline, as Captum does, where what goes around the layer differs too.)
        """
        result = self.attribute(**arguments)
        question = self._ask(
            arguments["inputs"],
            arguments.get("target", arguments.get("neuron_selector")),
            arguments.get("additional_forward_args"),
            of_entering=arguments.get("attribute_to_neuron_input", False),
            wrt_entering=arguments.get("attribute_to_layer_input", False),
        )
        if not self.multiplies_by_inputs or question.at_once:
            return result, {}
        starts = named_baselines(self.model, question.feeds, arguments.get("baselines"))
        explained = self._difference(question, starts)
        delta = question.sums(result) - explained
        size = np.maximum(np.abs(explained), np.finfo(np.float32).tiny)
        return result, {
            "convergence_delta": delta,
            "relative_convergence_delta": np.abs(delta) / size,
        }

    def _difference(self, question: Question, starts: Mapping[str, np.ndarray]) -> np.ndarray:
        """The explained value at the end of the path minus that at its start, float64 [N]."""
        if question.groups is None:
            return self._ends(question, starts)
        program = self.model.program(("ends", question.key), lambda: self._build_ends(question))
        dtype = _working(question.wrt[0])
        ends = []
        for position in (1.0, 0.0):
            rows, same = self._split_feeds(question, starts)
            same[self._fed("positions")] = np.asarray([position], dtype)
            found = self.model.run(program, question.feeds, rows, same)
            ends.append(self._explained(question, next(iter(found.values()))))
        return ends[0] - ends[1]

    def _ends(self, question: Question, starts: Mapping[str, np.ndarray]) -> np.ndarray:
        """The explained value at the inputs minus that at the baselines, float64 [N]."""
        feeds = question.feeds
        name = question.of.name or ""
        program = self.model.forward([name])
        begins = {k: np.broadcast_to(v, feeds.arrays[k].shape) for k, v in starts.items()}
        end, begin = (
            self._explained(question, self.model.run(program, replace(feeds, arrays=fed))[name])
            for fed in (feeds.arrays, feeds.arrays | begins)
        )
        return np.asarray(end - begin)

    def _fed(self, name: str | None, suffix: object = None) -> str:
        """The name of an input or output of the explainer, one that the model does not have."""
        return self.model.free_name(f"{name}" if suffix is None else f"{name}.{suffix}")

    def _split_feeds(
        self, question: Question, starts: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The baselines as feeds: those with a row per example, and those shared by all.

        In front of a layer they meet other values with a row per example, so each has one too.
        """
        count = question.feeds.count
        if question.groups is not None:
            starts = {k: np.broadcast_to(v, (count, *v.shape[1:])) for k, v in starts.items()}
        fed = {self._fed(k, "baseline"): v for k, v in starts.items()}
        rows: dict[str, Any] = {k: v for k, v in fed.items() if len(v) == count}
        return rows, {k: v for k, v in fed.items() if k not in rows}

    def _explained(self, question: Question, values: np.ndarray) -> np.ndarray:
        """The explained number of each example from the values of ``of``, float64 [N]."""
        values = values.astype(np.float64)
        if question.at_once:
            return values.reshape(1)
        if self._of is not None:
            values = values * question.seeds(slice(0, 1))
            return values.reshape(len(values), -1).sum(axis=1)
        return targets.select(values, question.indices).reshape(len(values))

    def compute_convergence_delta(
        self,
        attributions: Any,
        start_point: Any,
        end_point: Arrays,
        target: Any = None,
        additional_forward_args: Arrays = None,
    ) -> np.ndarray:
        """Sum of attributions minus (output at ``end_point`` - output at ``start_point``), [N]."""
        question = self._ask(end_point, target, additional_forward_args)
        starts = named_baselines(self.model, question.feeds, start_point)
        return self._delta(question, attributions, starts)

    def _integrate(
        self,
        question: Question,
        baselines: Any,
        n_steps: int,
        method: str,
        internal_batch_size: int | None,
        return_convergence_delta: bool,
    ) -> Any:
        if internal_batch_size is not None and (
            not isinstance(internal_batch_size, int | np.integer) or internal_batch_size < 1
        ):
            raise InputError(
                f"internal_batch_size must be an integer of at least 1, not {internal_batch_size!r}"
            )
        positions, weights = quadrature(method, n_steps)
        starts = named_baselines(self.model, question.feeds, baselines)
        arrays = self._sum(question, starts, positions, weights, internal_batch_size)
        answer = question.answer(arrays)
        if not return_convergence_delta:
            return answer
        return answer, self._delta(question, answer, starts)

    def _sum(
        self,
        question: Question,
        starts: Mapping[str, np.ndarray],
        positions: np.ndarray,
        weights: np.ndarray,
        at_most: int | None,
    ) -> list[np.ndarray]:
        """The weighted sum of gradients over the steps, in chunks of rows and of steps."""
        program = self.model.program(
            ("path", self.multiplies_by_inputs, question.key), lambda: self._build(question)
        )
        feeds = question.feeds
        rows, same = self._split_feeds(question, starts)
        cotangent = self._fed("cotangent")
        rows[cotangent] = question.seeds
        steps = len(positions)
        size = self._steps_at_once(program, question, rows, same, steps, at_most)
        totals: list[np.ndarray] | None = None
        start = 0
        while start < steps:
            piece = slice(start, min(start + size, steps))
            shared = same | {
                self._fed("positions"): positions[piece].astype(_working(question.wrt[0])),
                self._fed("weights"): weights[piece].astype(_working(question.of)),
            }
            try:
                if question.at_once:
                    seed = np.asarray(question.seeds(slice(0, 1))[0])
                    fed = {**feeds.arrays, **rows, **shared, cotangent: seed}
                    found = program.session(fed)
                else:
                    limit = None if at_most is None else max(1, at_most // size)
                    found = self.model.run(program, feeds, rows, shared, at_most=limit)
            except OutOfMemoryError:
                if size == 1 or question.at_once:
                    raise
                size = max(1, size // 2)
                continue
            parts = list(found.values())
            if totals is None:
                totals = parts if piece.stop == steps else [p.astype(np.float64) for p in parts]
            else:
                for total, part in zip(totals, parts, strict=True):
                    total += part
            dtypes = [p.dtype for p in parts]
            start = piece.stop
        assert totals is not None
        return [t.astype(d, copy=False) for t, d in zip(totals, dtypes, strict=True)]

    def _steps_at_once(
        self,
        program: Any,
        question: Question,
        rows: Mapping[str, Any],
        same: Mapping[str, np.ndarray],
        steps: int,
        at_most: int | None,
    ) -> int:
        """How many steps of one example fit the memory."""
        aligned = all(has_rows(v) for v in question.wrt)
        if question.at_once or not aligned:
            # Only whole batches follow one another along the first axis: where that counts
            # something else too (windows, time), and where one number stands for the whole batch,
            # one step is run at a time.
            return 1
        arrays = {k: v for k, v in question.feeds.arrays.items() if self.model.axes[k] is not None}
        row = {k: take(v, slice(0, 1)).shape for k, v in {**arrays, **rows}.items()}
        shared = {k: v.shape for k, v in question.feeds.arrays.items() if k not in row}
        shared |= {k: v.shape for k, v in same.items()}
        # A step costs what a row of one step costs.
        size = program.fitting(
            row, shared | {self._fed("positions"): (1,), self._fed("weights"): (1,)}, steps
        )
        return size if at_most is None else min(size, at_most)

    def _build(self, question: Question) -> ir.Model:
        """The explainer.

        Inputs: those of the model, ``NAME.baseline`` for each explained one (first dimension 1 or
        N), ``positions`` and ``weights`` of the steps [S], ``cotangent``. Outputs:
        ``attribution.I``, summed over the steps given.
        """
        copy, op, of, path = self._along_path(question)
        graph = copy.graph
        weights = ir.Value(
            name=self._fed("weights"), type=ir.TensorType(_wide(of)), shape=ir.Shape(["steps"])
        )
        seed = new_input(graph, self._fed("cotangent"), of, dims(of))
        graph.inputs.append(weights)
        seeds = seed
        if not question.at_once:
            # Linear in the cotangent: weighting it weights the gradients, and costs nothing.
            scaled = op.Mul(
                op.Unsqueeze(_widen(op, seed), [0]), _along_steps(op, weights, rank(of))
            )
            seeds = stack_rows(op, op.cast_like(scaled, of), of)
        # Sums over the steps commute with what is affine, so the last part of the way back, often
        # a whole convolution, is gone once an example instead of once a step.
        rows = {point.rows: point.value for point in path}
        frontier = affine_frontier(graph, list(rows), of)
        totals = []
        for value, grad in zip(
            frontier, backward(op, {of: seeds}, frontier, opset=self.model.opset), strict=True
        ):
            steps = _widen(op, unstack_rows(op, grad, path[0].times, value))
            if question.at_once:
                steps = op.Mul(steps, _along_steps(op, op.cast_like(weights, steps), rank(value)))
            totals.append(op.cast_like(op.ReduceSum(steps, [0], keepdims=0), value))
        # Sources that depend on each other are independent here: each is on its own path.
        sources = {new: op.Identity(value) for new, value in rows.items()}
        for leaf, value in zip(sources.values(), rows.values(), strict=True):
            leaf.shape = value.shape
        ends = twin(op, frontier, sources)
        grads = backward(
            op, dict(zip(ends, totals, strict=True)), list(sources.values()), opset=self.model.opset
        )
        graph.outputs.clear()
        for i, (point, grad) in enumerate(zip(path, grads, strict=True)):
            total = _widen(op, grad)
            result = op.Mul(total, point.delta) if self.multiplies_by_inputs else total
            emit_attribution(op, result, self._fed("attribution", i), point.value)
        prune(copy)
        return copy

    def _build_ends(self, question: Question) -> ir.Model:
        """The explained value at positions of the path; the inputs as in the explainer."""
        copy, _, of, _ = self._along_path(question)
        copy.graph.outputs[:] = [of]
        prune(copy)
        return copy

    def _along_path(self, question: Question) -> tuple[ir.Model, Emitter, ir.Value, list[_Point]]:
        """A copy of the model that runs every example at ``positions`` of its path."""
        explained = [v for v in self.model.graph.graph.inputs if v.name in question.feeds.explained]
        copy, values = self.model.rewriting(question.of, *question.wrt, *explained)
        count = len(question.wrt)
        of, wrt, inputs = values[0], values[1 : 1 + count], values[1 + count :]
        graph = copy.graph
        check_path(graph, [of], wrt)  # the rewrite below would hide the names that the user knows
        op = Emitter(graph, "explain")
        baselines = {
            v: new_input(graph, self._fed(v.name, "baseline"), v, ["baselines", *dims(v)[1:]])
            for v in inputs
        }
        positions = ir.Value(
            name=self._fed("positions"),
            type=ir.TensorType(_wide(wrt[0])),
            shape=ir.Shape(["steps"]),
        )
        graph.inputs.append(positions)
        times = op.Shape(positions)
        path = []
        for value, start in zip(wrt, twin(op, wrt, baselines), strict=True):
            begin, end = _widen(op, start), _widen(op, value)
            delta = op.Sub(end, begin)
            line = op.Add(
                op.Unsqueeze(begin, [0]),
                op.Mul(op.Unsqueeze(delta, [0]), _along_steps(op, positions, rank(value))),
            )
            rows = stack_rows(op, op.cast_like(line, value), value)
            path.append(_Point(value, delta, rows, times))
        (of,) = Rows(op, [of], {p.value: p.rows for p in path}, times).of
        return copy, op, of, path

    def _delta(
        self, question: Question, result: Any, starts: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """The sum of attributions minus the difference of the outputs, float64 [N]."""
        total = question.sums(result)
        if question.at_once:
            total = total.sum(keepdims=True)
        return total - self._ends(question, starts)


class LayerIntegratedGradients(IntegratedGradients):
    """Integrated gradients along the straight line between a layer's values.

    The layer's values at the baseline and at the input are the ends of the path. Source as
    :class:`IntegratedGradients`.

    Args:
        model: the model.
        layer: a layer's name, or a list of names.
        multiply_by_inputs: False gives the integral without the factor (value - baseline value).
    """

    name = "layer-integrated-gradients"
    title = "Layer Integrated Gradients"
    needs = ("gradient", "layer")

    def __init__(self, model: Model, layer: Layers, multiply_by_inputs: bool = True) -> None:
        super().__init__(model, multiply_by_inputs, wrt=layer)

    def attribute(
        self,
        inputs: Arrays,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Arrays = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Explain examples by a layer.

        Arguments as :meth:`IntegratedGradients.attribute`; integer inputs (token ids) are allowed,
        their default baseline is 0. ``attribute_to_layer_input``: by what enters the layer.

        Returns:
            An array of the layer's shape; a tuple where several values leave the scope; a list for
            a list of layers; with the delta if asked for.
        """
        question = self._ask(
            inputs, target, additional_forward_args, wrt_entering=attribute_to_layer_input
        )
        return self._integrate(
            question, baselines, n_steps, method, internal_batch_size, return_convergence_delta
        )


class NeuronIntegratedGradients(IntegratedGradients):
    """Integrated gradients of one neuron of a layer.

    Args:
        model: the model.
        layer: name of the neuron's layer.
        multiply_by_inputs: as :class:`IntegratedGradients`.
    """

    name = "neuron-integrated-gradients"
    title = "Neuron Integrated Gradients"
    needs = ("gradient", "layer", "neuron")

    def __init__(self, model: Model, layer: str, multiply_by_inputs: bool = True) -> None:
        super().__init__(model, multiply_by_inputs, of=layer)

    def attribute(  # type: ignore[override]
        self,
        inputs: Arrays,
        neuron_selector: Any,
        baselines: Any = None,
        additional_forward_args: Arrays = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        attribute_to_neuron_input: bool = False,
    ) -> Any:
        """Explain a neuron.

        ``neuron_selector``: int, or tuple of ints and slices (summed), without the examples axis;
        ``attribute_to_neuron_input``: of what enters the layer; the others, the result and the
        errors as :meth:`IntegratedGradients.attribute`.
        """
        question = self._ask(
            inputs,
            neuron_selector,
            additional_forward_args,
            of_entering=attribute_to_neuron_input,
        )
        return self._integrate(question, baselines, n_steps, method, internal_batch_size, False)


def _wide(value: ir.Value) -> ir.DataType:
    """Half precision is too coarse for positions on a path: they are float32 then."""
    assert value.dtype is not None
    return ir.DataType.FLOAT if value.dtype in HALVES else value.dtype


def _working(value: ir.Value) -> np.dtype[Any]:
    return _wide(value).numpy()


def _widen(op: Emitter, value: ir.Value) -> ir.Value:
    return op.Cast(value, to=ir.DataType.FLOAT) if value.dtype in HALVES else value


def _along_steps(op: Emitter, vector: ir.Value, value_rank: int) -> ir.Value:
    """[S] as [S, 1, ...], to broadcast against [S, N, ...]."""
    return op.Reshape(vector, [-1, *[1] * value_rank])
