"""Path methods: gradients summed along a straight line from a baseline to the input.

They differ in where the line lies (in the inputs, or in a layer), by what is differentiated along
it, and in what the gradient of a step is multiplied with; the rest is :class:`PathAttribution`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError, LayerError, OutOfMemoryError
from onnxplain.graph.edit import (
    Rows,
    affine_frontier,
    downstream,
    has_rows,
    new_input,
    prune,
    stack_rows,
    twin,
    unstack_rows,
    upstream,
)
from onnxplain.graph.emit import HALVES, Emitter, dims, is_float, rank
from onnxplain.graph.grad import backward, check_path
from onnxplain.methods import target as targets
from onnxplain.methods.base import (
    DifferenceAttribution,
    Layers,
    Question,
    emit_attribution,
    gap,
)
from onnxplain.methods.baselines import named_baselines
from onnxplain.methods.forms import layer_form, neuron_form
from onnxplain.model import Model, single
from onnxplain.run.feeds import Arrays
from onnxplain.run.program import Program, take

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


@dataclass(frozen=True)
class _Line:
    """A copy of the model that runs every example at ``positions`` of its line."""

    copy: ir.Model
    op: Emitter
    times: ir.Value
    deltas: list[ir.Value]
    """The way from the baseline to the input, of each value that the line lies in."""
    leaves: list[ir.Value]
    """These values at the input, depending on nothing that the line changes."""
    frontier: dict[ir.Value, ir.Value]
    """Where the affine part behind the leaves ends, and the rows of these values at all steps."""
    of: ir.Value
    """Rows of the explained value at all steps."""
    layers: list[ir.Value]
    """Rows of the question's sources (if the line is not in them) and of what is between."""
    sources: list[ir.Value]
    """The question's sources themselves."""


class PathAttribution(DifferenceAttribution):
    """What path methods share: the line, the steps in chunks, the sum over them.

    The interpolation, the pass and the weighted sum over the steps are in the graph. A subclass
    says with :meth:`_emit` what a chunk of steps contributes.
    """

    choices: ClassVar = {"method": QUADRATURES}
    line_in = "inputs"
    """Where the line lies: in the "inputs", or in the "sources" (layers) themselves."""

    def _steps(self, method: str, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions on the line and the weights of their cotangents."""
        return quadrature(method, n_steps)

    def _emit(self, line: _Line, seeds: ir.Value, weights: ir.Value | None) -> list[ir.Value]:
        """What a chunk of steps contributes to each source (of its shape); after that, what the
        next chunk wants to know of this one.

        ``seeds`` are the weighted cotangents of all steps. ``weights`` [S] are given where that was
        not possible: multiply them to the gradient of a step.
        """
        raise NotImplementedError

    @property
    def _graph_key(self) -> tuple[object, ...]:
        """What the explainer depends on besides the question."""
        return self.line_in, self._emit.__qualname__, self.multiplies_by_inputs

    # ---- running ------------------------------------------------------------------------------

    def _attribute(
        self,
        question: Question,
        baselines: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        **shared: np.ndarray,
    ) -> Any:
        if internal_batch_size is not None and (
            not isinstance(internal_batch_size, int | np.integer) or internal_batch_size < 1
        ):
            raise InputError(
                f"internal_batch_size must be an integer of at least 1, not {internal_batch_size!r}"
            )
        starts = named_baselines(self.model, question.feeds, baselines)
        positions, weights = self._steps(method, n_steps)
        arrays = self._sum(question, starts, positions, weights, internal_batch_size, shared)
        return question.answer(arrays)

    def _sum(
        self,
        question: Question,
        starts: Mapping[str, np.ndarray],
        positions: np.ndarray,
        weights: np.ndarray,
        at_most: int | None,
        more: Mapping[str, np.ndarray],
    ) -> list[np.ndarray]:
        """The sum of what the steps contribute, in chunks of rows and of steps."""
        program = self.model.program((self._graph_key, question.key), lambda: self._build(question))
        feeds = question.feeds
        rows, same = self._split_feeds(question, starts)
        same |= {self._fed(name): array for name, array in more.items()}
        cotangent = self._fed("cotangent")
        rows[cotangent] = question.seeds
        steps, count = len(positions), len(question.wrt)
        kind = _working(self._anchors(question)[0])
        # What a layer counts other than examples belongs to no chunk of them.
        whole = self.model.fixed_batch is None and not all(map(has_rows, question.wrt))
        carried = {
            v.name or "": np.zeros([1] * rank(v), _dtype(v))
            for v in program.model.graph.inputs
            if (v.name or "").startswith(self._fed("carried"))
        }
        first = {self._fed("positions"): positions[:1], self._fed("weights"): weights[:1]}
        size = self._steps_at_once(program, question, rows, same | carried | first, steps, at_most)
        totals: list[np.ndarray] | None = None
        start = 0
        while start < steps:
            piece = slice(start, min(start + size, steps))
            shared = same | {
                self._fed("positions"): positions[piece].astype(kind),
                self._fed("weights"): weights[piece].astype(_working(question.of)),
            }
            # Before the first step there is nothing yet, which broadcasts; then a row per example.
            by_row = {k: v for k, v in carried.items() if start and len(v) == feeds.count}
            shared |= {k: v for k, v in carried.items() if k not in by_row}
            try:
                if question.at_once or whole:
                    every = slice(0, 1 if question.at_once else feeds.count)
                    seeds = question.seeds(every)
                    fed = {**feeds.arrays, **rows, **by_row, **shared}
                    fed[cotangent] = np.asarray(seeds[0] if question.at_once else seeds)
                    found = program.session(_read(program, fed))
                else:
                    limit = None if at_most is None else max(1, at_most // size)
                    found = self.model.run(
                        program, feeds, rows | by_row, _read(program, shared), at_most=limit
                    )
            except OutOfMemoryError:
                if size == 1:
                    raise
                size = max(1, size // 2)
                continue
            parts = list(found.values())[:count]
            carried = dict(zip(carried, list(found.values())[count:], strict=True))
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
        program: Program,
        question: Question,
        rows: Mapping[str, Any],
        same: Mapping[str, np.ndarray],
        steps: int,
        at_most: int | None,
    ) -> int:
        """How many steps of one example fit the memory."""
        if question.at_once or self.model.fixed_batch is not None:
            return 1
        if not all(has_rows(v) for v in self._on_steps(question)):
            # What the first axis counts (windows, time) can't be told apart by step afterwards:
            # one step is run at a time.
            return 1
        arrays = {k: v for k, v in question.feeds.arrays.items() if self.model.axes[k] is not None}
        row = {k: take(v, slice(0, 1)).shape for k, v in {**arrays, **rows}.items()}
        shared = {k: v.shape for k, v in question.feeds.arrays.items() if k not in row}
        shared |= {k: v.shape for k, v in _read(program, same).items()}
        # A step costs what a row of one step costs.
        size = program.fitting(row, shared, steps)
        return size if at_most is None else min(size, at_most)

    def _on_steps(self, question: Question) -> list[ir.Value]:
        """The values of which every step has rows of its own."""
        return [*question.wrt, *self._anchors(question), *self._between(question)]

    # ---- the graph ----------------------------------------------------------------------------

    def _anchors(self, question: Question) -> list[ir.Value]:
        """The values between whose baseline and input the line lies.

        An input of integers (token numbers) has its line in its embedding.
        """
        if self.line_in == "sources":
            return list(question.wrt)
        found: list[ir.Value] = []
        for value in self.model.graph.graph.inputs:
            if value.name in question.feeds.explained:
                embedded = () if is_float(value) else self.model.embeddings(value.name or "")
                if not embedded:
                    self._check_source(value)
                found += embedded or [value]
        return found

    def _between(self, question: Question) -> list[ir.Value]:
        """Further values on the way, whose rows at all steps are wanted."""
        return []

    def _build(self, question: Question) -> ir.Model:
        """The explainer.

        Inputs: those of the model, ``NAME.baseline`` for each explained one (first dimension 1 or
        N), ``positions`` and ``weights`` of the steps [S], ``cotangent``, and what :meth:`_emit`
        adds. Outputs: ``attribution.I``, summed over the steps given, and what is carried on.
        """
        line = self._line(question)
        graph, op, of = line.copy.graph, line.op, line.of
        weights = ir.Value(
            name=self._fed("weights"), type=ir.TensorType(_wide(of)), shape=ir.Shape(["steps"])
        )
        seed = new_input(graph, self._fed("cotangent"), of, dims(of))
        graph.inputs.append(weights)
        seeds = seed
        later: ir.Value | None = weights
        if not question.at_once:
            # Linear in the cotangent: weighting it weights the gradients, and costs nothing.
            scaled = op.Mul(
                op.Unsqueeze(_widen(op, seed), [0]), _along_steps(op, weights, rank(of))
            )
            seeds, later = stack_rows(op, op.cast_like(scaled, of), of), None
        emitted = self._emit(line, seeds, later)
        graph.outputs.clear()
        for i, value in enumerate(emitted):
            if i < len(question.wrt):
                emit_attribution(op, value, self._fed("attribution", i), line.sources[i])
            else:
                emit_attribution(op, value, self._fed("hands_on", i), value)
        prune(line.copy)
        return line.copy

    def _build_ends(self, question: Question) -> ir.Model:
        """The explained value at positions of the line; the inputs as in the explainer."""
        line = self._line(question)
        line.copy.graph.outputs[:] = [line.of]
        prune(line.copy)
        return line.copy

    def _line(self, question: Question) -> _Line:
        explained = [v for v in self.model.graph.graph.inputs if v.name in question.feeds.explained]
        groups = [question.wrt, self._between(question), self._anchors(question), explained]
        copy, (of, *values) = self.model.rewriting(question.of, *(v for g in groups for v in g))
        rest = iter(values)
        wrt, between, anchors, inputs = ([next(rest) for _ in group] for group in groups)
        graph = copy.graph
        # The rewrite below would hide the names that the user knows.
        check_path(graph, [of], wrt)
        reached = {v for n in downstream(graph, anchors) for v in n.outputs} | set(anchors)
        for value in (*wrt, *between):
            if value not in reached:
                raise LayerError(
                    f"layer '{value.name}' does not depend on the explained input(s) "
                    f"({', '.join(question.feeds.explained)}), so nothing changes there along the "
                    "path; choose a layer behind them"
                )
        op = Emitter(graph, "explain")
        baselines = {
            v: new_input(graph, self._fed(v.name, "baseline"), v, ["baselines", *dims(v)[1:]])
            for v in inputs
        }
        positions = ir.Value(
            name=self._fed("positions"),
            type=ir.TensorType(_wide(anchors[0])),
            shape=ir.Shape(["steps"]),
        )
        graph.inputs.append(positions)
        begins = twin(op, anchors, baselines)
        deltas = [
            op.Sub(_widen(op, v), _widen(op, b)) for v, b in zip(anchors, begins, strict=True)
        ]
        # Anchors that depend on each other are independent here: each is on its own line.
        leaves = [v if v.is_graph_input() else _leaf(op, v) for v in anchors]
        cut = {v: leaf for v, leaf in zip(anchors, leaves, strict=True) if v is not leaf}
        inside = between if self.line_in == "sources" else [*wrt, *between]
        ends = twin(op, [of, *inside], cut)
        for value, leaf in cut.items():
            reached = {leaf} | {v for n in downstream(graph, [leaf]) for v in n.outputs}
            if ends[0] not in reached:
                raise LayerError(
                    f"layer '{value.name}' reaches '{self.of}' through other layers of the list "
                    "only, and each layer has a path of its own: explain by it separately"
                )
        # What is affine behind the anchors maps lines to lines: the line is drawn where that ends,
        # and the widest layers run twice an example instead of once a step.
        frontier = affine_frontier(graph, leaves, ends)
        starts = twin(op, frontier, dict(zip(leaves, begins, strict=True)))
        times = op.Shape(positions)
        fed = {
            v: stack_rows(op, self._interpolated(op, b, v, positions), v)
            for v, b in zip(frontier, starts, strict=True)
        }
        of, *rows = Rows(op, ends, fed, times).of
        return _Line(copy, op, times, deltas, leaves, fed, of, rows, wrt)

    def _interpolated(
        self, op: Emitter, begin: ir.Value, end: ir.Value, positions: ir.Value
    ) -> ir.Value:
        """[S, N, ...] of ``begin`` and ``end`` [N, ...]."""
        first = op.Unsqueeze(_widen(op, begin), [0])
        way = op.Sub(op.Unsqueeze(_widen(op, end), [0]), first)
        line = op.Add(first, op.Mul(way, _along_steps(op, positions, rank(end))))
        return op.cast_like(line, end)

    def _summed(
        self, line: _Line, of: ir.Value, seeds: ir.Value, weights: ir.Value | None
    ) -> list[ir.Value]:
        """Gradients by the leaves, summed over the steps.

        Sums over the steps commute with what is affine, so the last part of the way back, often a
        whole convolution, is gone once an example instead of once a step.
        """
        op = line.op
        behind = {v for node in upstream(op.graph, [of]) for v in node.inputs} | {of}
        frontier = {v: rows for v, rows in line.frontier.items() if rows in behind}
        grads = backward(op, {of: seeds}, list(frontier.values()), opset=self.model.opset)
        totals = {
            value: op.cast_like(self._over_steps(line, grad, value, weights), value)
            for value, grad in zip(frontier, grads, strict=True)
        }
        return backward(op, totals, line.leaves, opset=self.model.opset)

    def _products(
        self, line: _Line, of: ir.Value, seeds: ir.Value, weights: ir.Value | None
    ) -> list[ir.Value]:
        """The summed gradients by the leaves, times the way from the baseline if wanted."""
        op = line.op
        found = []
        for leaf, delta, grad in zip(
            line.leaves, line.deltas, self._summed(line, of, seeds, weights), strict=True
        ):
            total = _widen(op, grad)
            found.append(op.Mul(total, delta) if self.multiplies_by_inputs else total)
            found[-1].shape = leaf.shape
        return found

    def _over_steps(
        self, line: _Line, stacked: ir.Value, like: ir.Value, weights: ir.Value | None
    ) -> ir.Value:
        """The sum over the steps of rows of all steps, weighted where they are not yet."""
        op = line.op
        steps = _widen(op, unstack_rows(op, stacked, line.times, like))
        if weights is not None:
            steps = op.Mul(steps, _along_steps(op, op.cast_like(weights, steps), rank(like)))
        total = op.ReduceSum(steps, [0], keepdims=0)
        total.shape = like.shape
        return total

    # ---- baselines, and the ends of the line --------------------------------------------------

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

    def _explained(self, question: Question, values: np.ndarray) -> np.ndarray:
        """The explained number of each example from the values of ``of``, float64 [N]."""
        values = values.astype(np.float64)
        if question.at_once:
            return values.reshape(1)
        if self._of is not None:
            values = values * question.seeds(slice(0, 1))
            return values.reshape(len(values), -1).sum(axis=1)
        return targets.select(values, question.indices).reshape(len(values))

    def _delta(
        self, question: Question, result: Any, baselines: Any = None, **_: Any
    ) -> np.ndarray:
        starts = named_baselines(self.model, question.feeds, baselines)
        return _total(question, result) - self._ends(question, starts)


class IntegratedGradients(PathAttribution):
    """Integrated gradients: the gradient, integrated from a baseline to the input.

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
    line_in = "sources"

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
        return self._call(locals())

    def _emit(self, line: _Line, seeds: ir.Value, weights: ir.Value | None) -> list[ir.Value]:
        return self._products(line, line.of, seeds, weights)

    def _checks(
        self, question: Question, result: Any, baselines: Any = None, **_: Any
    ) -> dict[str, np.ndarray]:
        """The completeness gap along the path that was integrated.

        Between the ends of the path only the sources differ: what reaches the output around a layer
        keeps the values of the input. (``return_convergence_delta`` compares with the output at the
        baseline, as Captum does, where what goes around the layer differs too.)
        """
        if not self.multiplies_by_inputs or question.at_once:
            return {}
        starts = named_baselines(self.model, question.feeds, baselines)
        explained = self._difference(question, starts)
        return gap(question.sums(result), explained)

    def _difference(self, question: Question, starts: Mapping[str, np.ndarray]) -> np.ndarray:
        """The explained value at the end of the path minus that at its start, float64 [N]."""
        if question.groups is None:
            return self._ends(question, starts)
        program = self.model.program(
            ("path ends", question.key), lambda: self._build_ends(question)
        )
        dtype = _working(self._anchors(question)[0])
        ends = []
        for position in (1.0, 0.0):
            rows, same = self._split_feeds(question, starts)
            same[self._fed("positions")] = np.asarray([position], dtype)
            found = self.model.run(program, question.feeds, rows, same)
            ends.append(self._explained(question, next(iter(found.values()))))
        return ends[0] - ends[1]


@layer_form
class LayerIntegratedGradients(IntegratedGradients):
    """Integrated gradients along the straight line between a layer's values.

    The layer's values at the baseline and at the input are the ends of the path. Source as
    :class:`IntegratedGradients`.

    Args:
        model: the model.
        layer: a layer's name, or a list of names.
        multiply_by_inputs: False gives the integral without the factor (value - baseline value).
    """


@neuron_form
class NeuronIntegratedGradients(IntegratedGradients):
    """Integrated gradients of one neuron of a layer.

    Args:
        model: the model.
        layer: name of the neuron's layer.
        multiply_by_inputs: as :class:`IntegratedGradients`.
    """


class InternalInfluence(PathAttribution):
    """The gradient by a layer, averaged along the straight line from a baseline to the input.

    Source: Leino et al., "Influence-Directed Explanations for Deep Convolutional Networks", 2018,
    arXiv:1802.03788, definition 1. Unit: output per unit of the layer.

    Args:
        model: the model.
        layer: a layer's name, or a list of names.
    """

    name = "internal-influence"
    title = "Internal Influence"
    paper = "Leino et al. 2018, arXiv:1802.03788"
    needs = ("gradient", "layer")
    explains = "layer"

    def __init__(self, model: Model, layer: Layers) -> None:
        super().__init__(model, multiply_by_inputs=False, wrt=layer)

    def attribute(
        self,
        inputs: Arrays,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Arrays = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Explain examples by a layer.

        Arguments and errors as :meth:`IntegratedGradients.attribute`, the path lying in the inputs
        (for token numbers, in their embedding); ``attribute_to_layer_input``: by what enters the
        layer.

        Returns:
            An array of the layer's shape; a tuple where several values leave the scope; a list for
            a list of layers.
        """
        return self._call(locals())

    def _emit(self, line: _Line, seeds: ir.Value, weights: ir.Value | None) -> list[ir.Value]:
        grads = backward(line.op, {line.of: seeds}, line.layers, opset=self.model.opset)
        return [
            self._over_steps(line, grad, value, weights)
            for grad, value in zip(grads, line.sources, strict=True)
        ]


class LayerConductance(PathAttribution):
    """The part of integrated gradients of the inputs that flows through each neuron of a layer.

    The integral of (d output / d neuron) d neuron along the straight line from a baseline to the
    input, taken from the neuron's values at the steps, which saves the derivative of what comes
    before the layer.

    Source: Dhamdhere et al., "How Important Is a Neuron?", 2018, arXiv:1805.12233, equation 2;
    Shrikumar et al., 2018, arXiv:1807.09946, section 2.2, for the differences. Unit: output;
    conductances of a layer through which every path runs add up to the difference between the
    outputs at the input and at the baseline.

    Args:
        model: the model.
        layer: a layer's name, or a list of names.
    """

    name = "layer-conductance"
    title = "Layer Conductance"
    paper = "Dhamdhere et al. 2018, arXiv:1805.12233"
    needs = ("gradient", "layer")
    explains = "layer"
    check = IntegratedGradients.check

    def __init__(self, model: Model, layer: Layers) -> None:
        super().__init__(model, wrt=layer)

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
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Explain examples by a layer.

        Arguments and errors as :meth:`InternalInfluence.attribute`. The layer is evaluated at
        n_steps + 1 points.

        Returns:
            An array of the layer's shape; a tuple where several values leave the scope; a list for
            a list of layers; with the delta if asked for.
        """
        return self._call(locals())

    def _steps(self, method: str, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
        quadrature(method, n_steps)  # refuses what it refuses elsewhere
        positions, _ = quadrature(method, n_steps + 1)
        return positions, np.ones_like(positions)

    def _emit(self, line: _Line, seeds: ir.Value, weights: ir.Value | None) -> list[ir.Value]:
        op = line.op
        grads = backward(op, {line.of: seeds}, line.layers, opset=self.model.opset)
        totals, carried = [], []
        for i, (rows, grad, value) in enumerate(zip(line.layers, grads, line.sources, strict=True)):
            now, slope = (_widen(op, unstack_rows(op, v, line.times, value)) for v in (rows, grad))
            before, slope_before = (
                ir.Value(
                    name=self._fed("carried", 2 * i + k),
                    type=ir.TensorType(_wide(value)),
                    shape=ir.Shape([None] * rank(value)),
                )
                for k in (0, 1)
            )
            op.graph.inputs.extend((before, slope_before))
            first, last = (op.Gather(now, op.const(np.int64(at))) for at in (0, -1))
            rise = op.Sub(op.Slice(now, [1], [_END], [0]), op.Slice(now, [0], [-1], [0]))
            inside = op.ReduceSum(op.Mul(op.Slice(slope, [0], [-1], [0]), rise), [0], keepdims=0)
            total = op.Add(inside, op.Mul(slope_before, op.Sub(first, before)))
            total.shape = value.shape
            totals.append(total)
            carried += [last, op.Gather(slope, op.const(np.int64(-1)))]
        for value, rows in zip(carried, [v for v in line.sources for _ in (0, 1)], strict=True):
            value.shape = rows.shape
        return totals + carried

    def _checks(
        self, question: Question, result: Any, baselines: Any = None, **_: Any
    ) -> dict[str, np.ndarray]:
        """The completeness gap, where nothing goes around the layer and is missing in the sum."""
        around = upstream(self.model.graph.graph, [question.of], stop=question.wrt)
        anchors = self._anchors(question)
        if question.at_once or any(v in anchors for node in around for v in node.inputs):
            return {}
        starts = named_baselines(self.model, question.feeds, baselines)
        return gap(question.sums(result), self._ends(question, starts))


class NeuronConductance(PathAttribution):
    """The conductance of one neuron of a layer, by input.

    The integral of (d output / d neuron)(d neuron / d input) along the straight line from a
    baseline to the input, times (input - baseline).

    Source: Dhamdhere et al., 2018, arXiv:1805.12233, equation 1. Unit: output.

    Args:
        model: the model.
        layer: name of the neuron's layer.
        multiply_by_inputs: False gives the integral without the factor (input - baseline).
        wrt: explain by these layers (the embedding of token numbers) instead of the inputs.
    """

    name = "neuron-conductance"
    title = "Neuron Conductance"
    paper = LayerConductance.paper
    needs = ("gradient", "layer", "neuron")

    line_in = "sources"

    def __init__(
        self,
        model: Model,
        layer: str,
        multiply_by_inputs: bool = True,
        *,
        wrt: Layers | None = None,
    ) -> None:
        super().__init__(model, multiply_by_inputs, wrt=wrt)
        self.layer = layer
        single(model, layer)  # unknown names are refused where they are given

    def attribute(
        self,
        inputs: Arrays,
        neuron_selector: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Arrays = None,
        n_steps: int = 50,
        method: str = "riemann_trapezoid",
        internal_batch_size: int | None = None,
        attribute_to_neuron_input: bool = False,
    ) -> Any:
        """Explain what a neuron passes on to the target.

        ``neuron_selector``: int, or tuple of ints and slices, without the examples axis; of several
        neurons the conductances are summed (Captum multiplies the sums of both factors instead).
        ``attribute_to_neuron_input``: of what enters the layer. Other arguments and errors as
        :meth:`IntegratedGradients.attribute`.

        Returns:
            Attributions of the inputs' shape, in the inputs' form.
        """
        return self._call(locals())

    def _parse(self, arguments: Mapping[str, Any]) -> tuple[Question, dict[str, Any], bool]:
        arguments = dict(arguments)
        selector = arguments.pop("neuron_selector")
        entering = arguments.pop("attribute_to_neuron_input", False)
        question, options, delta = super()._parse(arguments)
        layer = single(self.model, self.layer, entering=entering)
        self._check_rows(layer, question.feeds, neurons=True)
        shape = self._trailing(layer, question.feeds, False)
        mask = targets.neuron_mask(selector, shape, _dtype(layer))
        return replace(question, between=(layer,)), {**options, "neuron": mask}, delta

    def _between(self, question: Question) -> list[ir.Value]:
        return list(question.between)

    def _emit(self, line: _Line, seeds: ir.Value, weights: ir.Value | None) -> list[ir.Value]:
        neuron = line.layers[-1]
        op = line.op
        mask = new_input(op.graph, self._fed("neuron"), neuron, [1, *dims(neuron)[1:]])
        (slope,) = backward(op, {line.of: seeds}, [neuron], opset=self.model.opset)
        through = op.Mul(slope, mask)
        through.shape = neuron.shape
        return self._products(line, neuron, through, weights)


def _total(question: Question, result: Any) -> np.ndarray:
    """The sum of attributions of each example, or of all where they are explained at once."""
    total = question.sums(result)
    return total.sum(keepdims=True) if question.at_once else total


def _read(program: Program, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """The feeds that the graph has inputs for (weights of steps may have none)."""
    names = {v.name for v in program.model.graph.inputs}
    return {k: v for k, v in feeds.items() if k in names}


_END = np.iinfo(np.int64).max


def _leaf(op: Emitter, value: ir.Value) -> ir.Value:
    """The same value, cut off from what it was computed from."""
    leaf: ir.Value = op.Identity(value)
    leaf.shape = value.shape
    return leaf


def _wide(value: ir.Value) -> ir.DataType:
    """Half precision is too coarse for positions on a path: they are float32 then."""
    assert value.dtype is not None
    return ir.DataType.FLOAT if value.dtype in HALVES else value.dtype


def _working(value: ir.Value) -> np.dtype[Any]:
    return _wide(value).numpy()


def _dtype(value: ir.Value) -> np.dtype[Any]:
    assert value.dtype is not None
    return value.dtype.numpy()


def _widen(op: Emitter, value: ir.Value) -> ir.Value:
    return op.Cast(value, to=ir.DataType.FLOAT) if value.dtype in HALVES else value


def _along_steps(op: Emitter, vector: ir.Value, value_rank: int) -> ir.Value:
    """[S] as [S, 1, ...], to broadcast against [S, N, ...]."""
    return op.Reshape(vector, [-1, *[1] * value_rank])
