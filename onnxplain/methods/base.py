"""Of what, with respect to what: the one question every attribution method answers.

A method explains one value of the graph (``of``: the output, or a neuron of a layer) by others
(``wrt``: the inputs, or layers). Layer and neuron variants are choices of these two, not code.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxplain.blackbox import BlackBox
from onnxplain.errors import InputError, LayerError, UnsupportedModelError
from onnxplain.graph.edit import BATCH, has_rows, new_input, prune
from onnxplain.graph.emit import HALVES, Emitter, dims, is_float, rank, static_dims
from onnxplain.methods import target as targets
from onnxplain.model import Model, single
from onnxplain.run.feeds import Arrays, Feeds, all_finite, in_form

Layers = str | Sequence[str]

Write = Callable[..., Sequence[ir.Value]]
"""``write(op, of, seed, wrt, *more)`` emits an explainer; its results are the outputs."""


@dataclass(frozen=True)
class Question:
    """A resolved question: checked inputs, the explained value and its cotangent, the sources."""

    feeds: Feeds
    of: ir.Value
    wrt: tuple[ir.Value, ...]
    shape: tuple[int, ...]
    seeds: targets.Seeds
    indices: np.ndarray | None
    at_once: bool
    form: str
    groups: tuple[int, ...] | None
    axes: Mapping[str, int | None]
    between: tuple[ir.Value, ...] = ()
    """Values between the sources and ``of`` that the answer runs through."""

    @property
    def key(self) -> Hashable:
        """What a compiled program for this question depends on."""
        names = (tuple(v.name for v in values) for values in (self.wrt, self.between))
        return (self.of.name, *names, self.feeds.explained)

    def answer(self, arrays: Sequence[np.ndarray]) -> Any:
        """Attributions in the form in which the sources were named; warns of NaN among them."""
        doubtful = [a.reshape(len(a), -1) for a in arrays if not all_finite(a)]
        if bad := sorted(
            {int(i) for a in doubtful for i in np.flatnonzero(~np.isfinite(a).all(1))}
        ):
            shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            warnings.warn(
                f"attributions of example(s) {shown} are NaN or infinite: the model or its "
                "derivative is not finite on the way there; look for extreme values in the input "
                "or the baseline",
                stacklevel=4,
            )
        return self.in_form(arrays)

    def in_form(self, arrays: Sequence[np.ndarray]) -> Any:
        """One array per source in the form in which the sources were named."""
        if self.groups is None:
            found = {
                v.name or "": np.moveaxis(array, 0, self.axes[v.name or ""] or 0)
                for v, array in zip(self.wrt, arrays, strict=True)
            }
            return in_form(found, self.form)
        out, start = [], 0
        for size in self.groups:
            part = tuple(arrays[start : start + size])
            out.append(part if size > 1 else part[0])
            start += size
        return out if self.form == "list" else out[0]

    def sums(self, answer: Any) -> np.ndarray:
        """The sum of each example's attributions in an answer over all sources, float64 [N]."""
        parts = list(answer.values()) if isinstance(answer, Mapping) else answer
        if not isinstance(parts, tuple | list):
            parts = (parts,)
        flat = [a for part in parts for a in (part if isinstance(part, tuple) else (part,))]
        total = np.zeros(self.feeds.count)
        for value, array in zip(self.wrt, flat, strict=True):
            if self.groups is None:
                axis = self.axes[value.name or ""] or 0
            else:
                axis = dims(value).index(BATCH) if BATCH in dims(value) else 0
            rows = np.moveaxis(array, axis, 0).reshape(self.feeds.count, -1)
            total += rows.sum(axis=1, dtype=np.float64)
        return total


@dataclass(frozen=True)
class Answer:
    """What a method says: attributions in the user's form, and how far to trust them.

    Attributes:
        result: as ``attribute`` returns it.
        checks: figures by name, one per example.
        standard_errors: of each attribution, in the form of ``result``; None where not known.
        features: which values are one feature that the method made itself, in that form; or None.
    """

    result: Any
    checks: dict[str, np.ndarray]
    standard_errors: Any = None
    features: Any = None


class Attribution:
    """Base of the attribution methods.

    Args:
        model: the model.
        of: name of a layer whose neurons are explained; None for the model's output.
        wrt: name (or list of names) of layers to explain by; None for the inputs.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ("gradient",)
    """What it needs: a "gradient", a "layer", a "neuron", an "image", "random" numbers (a seed), a
    distribution of "baselines"."""
    check: ClassVar[str] = "none"
    explains: ClassVar[str] = "inputs"
    """What the result has the shape of: "inputs" or "layer"."""
    choices: ClassVar[Mapping[str, Sequence[str]]] = {}
    """The words that an option takes."""
    multiplies_by_inputs: bool = False

    def __init__(self, model: Model, *, of: str | None = None, wrt: Layers | None = None) -> None:
        self._check_model(model)
        if not model.has_examples:
            raise UnsupportedModelError(
                "the model was loaded with examples_axis=None, so it has no examples to explain; "
                "name the axis, or use model(...) and differentiate"
            )
        self.model = model
        if wrt is not None and not isinstance(wrt, str | list | tuple):
            raise LayerError(f"a layer is a name or a list of names, not {wrt!r}")
        if wrt is None and self.explains == "layer" and "layer" in self.needs:
            raise LayerError("no layer was given: name one; model.layers() lists them")
        if isinstance(wrt, list | tuple) and not wrt:
            raise LayerError("the list of layers is empty: name at least one")
        self._of = of
        self._wrt: str | list[str] | None = list(wrt) if isinstance(wrt, list | tuple) else wrt
        self._resolve(False, False)  # unknown names are refused where they are given

    @staticmethod
    def _check_model(model: Any) -> None:
        """Refuse what the method can't explain."""
        if isinstance(model, BlackBox):
            raise InputError(
                "a BlackBox is a Python function: only its answers are known, and this method "
                "looks inside; use a perturbation method (method='kernel-shap' of ox.explain, "
                "feature-ablation, lime, ...)"
            )
        if not isinstance(model, Model):
            raise InputError(
                f"a method explains an onnxplain.Model, not {type(model).__name__}; wrap it: "
                "ox.Model(path)"
            )

    @property
    def of(self) -> str:
        """Name of the explained value."""
        return self._of or self.model.output.name or ""

    @property
    def wrt(self) -> tuple[str, ...]:
        """Names of what it is explained by."""
        if self._wrt is None:
            return tuple(i.name for i in self.model.inputs)
        return tuple(self._wrt) if isinstance(self._wrt, list) else (self._wrt,)

    def has_convergence_delta(self) -> bool:
        """Whether :meth:`attribute` can return a convergence delta."""
        return False

    def laid_over(self, feeds: Feeds) -> list[str] | None:
        """The inputs in whose coordinates the result is, where it is not in those of its source."""
        return None

    def explain(self, **arguments: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """The result of :meth:`attribute` and figures by name that tell how far to trust it."""
        bound = inspect.signature(self.attribute).bind(**arguments)  # type: ignore[attr-defined]
        bound.apply_defaults()
        question, options, _ = self._parse(bound.arguments)
        return self._with_checks(question, **options)

    def answer(self, **arguments: Any) -> Answer:
        """As :meth:`explain`, with the standard errors of sampled attributions."""
        return Answer(*self.explain(**arguments))

    # ---- what a method is made of -------------------------------------------------------------

    def _attribute(self, question: Question, *args: Any, **options: Any) -> Any:
        """The attributions, in the user's form: what a method computes."""
        raise NotImplementedError

    def _delta(self, question: Question, result: Any, *args: Any, **options: Any) -> np.ndarray:
        """The convergence delta of a result, where the method has one."""
        raise NotImplementedError

    def _with_delta(self, question: Question, *args: Any, **options: Any) -> tuple[Any, np.ndarray]:
        """Attributions and their convergence delta."""
        result = self._attribute(question, **options)
        return result, self._delta(question, result, **options)

    def _checks(
        self, question: Question, result: Any, *args: Any, **options: Any
    ) -> dict[str, np.ndarray]:
        """Figures by name, one per example, that tell how far to trust a result."""
        return {}

    def _with_checks(
        self, question: Question, *args: Any, **options: Any
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """Attributions and their figures."""
        result = self._attribute(question, **options)
        return result, self._checks(question, result, **options)

    def _call(self, arguments: Mapping[str, Any]) -> Any:
        """The body of every ``attribute``: resolve the question, then answer it.

        ``arguments`` are those of ``attribute`` by name; what is not part of the question goes to
        :meth:`_attribute`.
        """
        question, options, wants_delta = self._parse(arguments)
        if wants_delta:
            return self._with_delta(question, **options)
        return self._attribute(question, **options)

    def _parse(self, arguments: Mapping[str, Any]) -> tuple[Question, dict[str, Any], bool]:
        """The question, the options of the method, and whether the delta is wanted."""
        options = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}
        target = options.pop("target", None)
        question = self._ask(
            options.pop("inputs"),
            options.pop("neuron_selector", target),
            options.pop("additional_forward_args", None),
            of_entering=options.pop("attribute_to_neuron_input", False),
            wrt_entering=options.pop("attribute_to_layer_input", False),
        )
        wants_delta = options.pop("return_convergence_delta", False)
        return question, options, wants_delta

    def _pass(
        self,
        question: Question,
        key: Hashable,
        write: Write,
        rows: Mapping[str, Any] | None = None,
        shared: Mapping[str, np.ndarray] | None = None,
        exact: bool = True,
        more: Sequence[ir.Value] = (),
    ) -> list[np.ndarray]:
        """One row of a rewritten graph per example; compiled once per ``key`` and question.

        Args:
            question: the question.
            key: what else the graph depends on.
            write: emits the explainer into a copy of the model: ``write(op, of, seed, wrt, *more)``
                gets the copies of the values and an input that is fed the cotangent; returns the
                outputs. One without a shape is taken to have that of the source at its place.
            rows, shared: feeds of the inputs that ``write`` adds, with a row per example or none.
            exact: the true derivative is taken (see :meth:`Model.rewriting`).
            more: further values of the model that ``write`` needs.

        Returns:
            The outputs in order, examples first.
        """
        cotangent, count = self._fed("cotangent"), len(question.wrt)

        def build() -> ir.Model:
            copy, values = self.model.rewriting(question.of, *question.wrt, *more, exact=exact)
            of, wrt, others = values[0], values[1 : 1 + count], values[1 + count :]
            op = Emitter(copy.graph, "explain")
            seed = new_input(copy.graph, cotangent, of, dims(of))
            written = write(op, of, seed, wrt, *others)
            copy.graph.outputs.clear()
            for i, value in enumerate(written):
                emit_attribution(
                    op, value, self._fed("attribution", i), wrt[i] if i < count else value
                )
            prune(copy)
            return copy

        program = self.model.program((key, question.key), build)
        if question.at_once:
            seed = np.asarray(question.seeds(slice(0, 1))[0])
            fed = {**question.feeds.arrays, **(rows or {}), **(shared or {}), cotangent: seed}
            return list(program.session(fed).values())
        fed = {**(rows or {}), cotangent: question.seeds}
        return list(self.model.run(program, question.feeds, fed, shared).values())

    def _fed(self, name: str | None, suffix: object = None) -> str:
        """The name of an input or output of the explainer, one that the model does not have."""
        return self.model.free_name(f"{name}" if suffix is None else f"{name}.{suffix}")

    # ---- the question -------------------------------------------------------------------------

    def _resolve(
        self, of_entering: bool, wrt_entering: bool
    ) -> tuple[ir.Value, list[tuple[ir.Value, ...]] | None]:
        of = (
            self.model.output
            if self._of is None
            else single(self.model, self._of, entering=of_entering)
        )
        if self._wrt is None:
            return of, None
        return of, [self.model.resolve(name, entering=wrt_entering) for name in self.wrt]

    def _ask(
        self,
        inputs: Arrays,
        selector: Any,
        additional: Arrays,
        *,
        of_entering: bool = False,
        wrt_entering: bool = False,
    ) -> Question:
        """Check and resolve a call of ``attribute``.

        ``selector`` is a target, or a neuron selector where ``of`` names a layer.
        """
        of, groups = self._resolve(of_entering, wrt_entering)
        feeds = self.model.feeds(inputs, additional)
        form = feeds.form
        if groups is None:
            by_name = {v.name: v for v in self.model.graph.graph.inputs}
            wrt = tuple(by_name[name] for name in feeds.explained)
        else:
            wrt = tuple(v for group in groups for v in group)
            twice = next((v.name for v in wrt if wrt.count(v) > 1), None)
            if twice is not None:
                raise LayerError(f"layer '{twice}' is named twice: name each layer once")
            form = "list" if isinstance(self._wrt, list) else "array"
        for value in wrt:
            self._check_source(value)
        if not is_float(of):
            raise InputError(f"'{of.name}' is not floating-point: there is no score to explain")
        self._check_rows(of, feeds, neurons=self._of is not None)
        at_once = not self._per_example(of)
        shape = self._trailing(of, feeds, at_once)
        seeds, indices = self._select(of, selector, shape, feeds.count, at_once)
        sizes = None if groups is None else tuple(len(g) for g in groups)
        axes = self.model.axes
        return Question(feeds, of, wrt, shape, seeds, indices, at_once, form, sizes, axes)

    def _select(
        self, of: ir.Value, selector: Any, shape: tuple[int, ...], count: int, at_once: bool
    ) -> tuple[targets.Seeds, np.ndarray | None]:
        """The cotangents that select a target or neuron, and the index of each example's target."""
        assert of.dtype is not None
        dtype = of.dtype.numpy()
        if self._of is not None:
            return targets.mask_seeds(targets.neuron_mask(selector, shape, dtype)), None
        if at_once:
            if selector is not None or int(np.prod(shape)) != 1:
                raise InputError(
                    f"output '{of.name}' has no examples axis (shape {list(shape)}); only one "
                    "number for the whole batch, with target=None, can be explained"
                )
            return targets.mask_seeds(np.ones((1, *shape), dtype)), None
        indices = targets.target_indices(selector, shape, count)
        return targets.target_seeds(indices, shape, dtype), indices

    def _check_source(self, value: ir.Value) -> None:
        """Refuse an input that can't carry a gradient, naming the layer that can."""
        if is_float(value) or not value.is_graph_input():
            return
        layer = self.model.embedding_layer(value.name or "")
        hint = (
            f"explain by its embedding layer '{layer}' instead (a Layer... method, or "
            "layer= in ox.explain), and sum over the last axis"
            if layer is not None
            else "pass it in additional_forward_args, or use a perturbation method"
        )
        raise InputError(
            f"input '{value.name}' holds {value.dtype.name.lower() if value.dtype else '?'} "
            f"values, which can't carry a gradient: {hint}"
        )

    def _per_example(self, value: ir.Value) -> bool:
        """Whether a value's first axis counts examples."""
        if value.shape is None:
            return True
        d = dims(value)
        if self.model.fixed_batch is not None:
            return bool(d) and d[0] == self.model.fixed_batch
        return bool(d) and not isinstance(d[0], int)

    def _trailing(self, value: ir.Value, feeds: Feeds, at_once: bool) -> tuple[int, ...]:
        """A value's shape without the examples axis; measured on one row when it is dynamic."""
        if value.shape is not None:
            known = static_dims(value) if at_once else _integers(dims(value)[1:])
            if known is not None:
                return known
        if value.is_graph_input():
            return feeds.arrays[value.name or ""].shape[1:]
        return self._one_row(value, feeds).shape[0 if at_once else 1 :]

    def _check_rows(self, value: ir.Value, feeds: Feeds, neurons: bool) -> None:
        """Refuse a value whose first axis does not count the examples.

        ``neurons``: some of its values are selected, so each example must have exactly one row.
        """
        if value.shape is not None and BATCH in dims(value)[1:]:
            raise UnsupportedModelError(
                f"'{value.name}' has its examples on axis {dims(value).index(BATCH)}, not the "
                "first, so its values can't be told apart by example; name one with the examples "
                "first"
            )
        if not neurons or has_rows(value) or self.model.fixed_batch is not None:
            return
        rows = len(self._one_row(value, feeds)) if value.shape is None or rank(value) else 0
        if rows != 1:
            raise UnsupportedModelError(
                f"'{value.name}' has {rows} rows for one example (windows, time, or all examples "
                "together), so a neuron of it can't be told apart by example; name a layer with "
                "one row per example"
            )

    def _one_row(self, value: ir.Value, feeds: Feeds) -> np.ndarray:
        """A value, computed from the first example alone."""
        one = Feeds(
            {k: v[:1] if self.model.axes[k] is not None else v for k, v in feeds.arrays.items()},
            feeds.explained,
            feeds.form,
            1,
        )
        if value.is_graph_input():
            return one.arrays[value.name or ""]
        return self.model.run(self.model.forward([value.name or ""]), one)[value.name or ""]


class DifferenceAttribution(Attribution):
    """Methods whose attributions add up to the difference between the outputs at two points.

    Args:
        model: the model.
        multiply_by_inputs: False leaves out the factor (input - baseline).
        of, wrt: see :class:`Attribution`.
    """

    def __init__(
        self,
        model: Model,
        multiply_by_inputs: bool = True,
        *,
        of: str | None = None,
        wrt: Layers | None = None,
    ) -> None:
        super().__init__(model, of=of, wrt=wrt)
        self.multiplies_by_inputs = flag("multiply_by_inputs", multiply_by_inputs)

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
        return self._delta(question, attributions, start_point)


def gap(total: np.ndarray, explained: np.ndarray) -> dict[str, np.ndarray]:
    """How far attributions miss what they should add up to, absolute and relative, [N] each."""
    delta = total - explained
    size = np.maximum(np.abs(explained), np.finfo(np.float32).tiny)
    return {"convergence_delta": delta, "relative_convergence_delta": np.abs(delta) / size}


def emit_attribution(op: Emitter, value: ir.Value, name: str, source: ir.Value) -> None:
    """Make a value an output, of the shape of ``source`` if its own is not known.

    Half precision leaves as float32.
    """
    out = op.Cast(value, to=ir.DataType.FLOAT) if value.dtype in HALVES else op.Identity(value)
    out.name, out.shape = name, source.shape if value.shape is None else value.shape
    op.graph.outputs.append(out)


def input_values(model: Any, feeds: Feeds) -> dict[str, ir.Value]:
    """The inputs of a model by name; those of a callable as if they were a graph's."""
    if isinstance(model, Model):
        return {v.name or "": v for v in model.graph.graph.inputs}
    return {name: _value(name, array) for name, array in feeds.arrays.items()}


def _value(name: str, array: np.ndarray) -> ir.Value:
    known = array.dtype.kind in "fiub"
    dtype = ir.DataType.from_numpy(array.dtype) if known else ir.DataType.STRING
    shape = ir.Shape([BATCH, *array.shape[1:]])
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)


def flag(name: str, value: Any) -> bool:
    """An argument that is True or False.

    Raises:
        InputError: it is something else (in Captum, another argument may stand at its place).
    """
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} is True or False, not {value!r}")
    return bool(value)


def _integers(d: Sequence[Any]) -> tuple[int, ...] | None:
    return tuple(d) if all(isinstance(k, int) for k in d) else None
