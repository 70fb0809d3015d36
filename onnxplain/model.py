"""The model: loaded, checked, normalized, named, run."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxplain.errors import InputError, LayerError
from onnxplain.graph import batch, edit, grad, load, lower, normalize, opset, outputs, shapes
from onnxplain.graph.emit import Emitter, const_array, dims, is_float
from onnxplain.graph.names import Layer, Names
from onnxplain.rules import Rules
from onnxplain.rules.vjp import VJP
from onnxplain.run.feeds import Arrays, Feeds, InputInfo, check_inputs
from onnxplain.run.program import Program, Settings
from onnxplain.run.session import Provider, Session

log = logging.getLogger("onnxplain")

Source = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model

# Integer operators whose results are values of their first input.
_KEEP_VALUES = frozenset(
    {"Cast", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)

# Compiled graphs kept; each holds its own copy of the weights.
_KEPT_PROGRAMS = 16


class Model:
    """Any ONNX model, ready to be run and explained.

    Args:
        source: path, bytes, ``onnx.ModelProto`` or ``onnx_ir.Model``; it is not changed.
        output: name of the output to explain; default the first floating-point one.
        providers: as onnxruntime takes them, or short names ("cpu", "cuda"); default the best
            there is.
        session_options: an ``onnxruntime.SessionOptions`` for every session.
        memory_limit: bytes that this process may hold while it computes; default a share of what
            is free.
        gradient_engine: "graph", the backward graph in standard operators.
        external_data_dir: folder of the weights when ``source`` is not a path.
        examples_axis: the axis that counts examples: one for all inputs, or a dict by input name
            (None: shared by all examples). ``None`` alone: the model has no examples axis; it is
            run as it is and only ``model(...)`` and ``differentiate`` apply.

    Raises:
        ModelError: the file is missing, malformed or unsafe.
        UnsupportedModelError: it is well-formed but can't be explained.
        InputError: an option does not fit the model.
    """

    def __init__(
        self,
        source: Source,
        *,
        output: str | None = None,
        providers: Sequence[Provider] | None = None,
        session_options: Any = None,
        memory_limit: int | None = None,
        gradient_engine: str = "graph",
        external_data_dir: str | os.PathLike[str] | None = None,
        examples_axis: int | Mapping[str, int | None] | None = 0,
    ) -> None:
        if gradient_engine != "graph":
            raise InputError(
                f"gradient_engine '{gradient_engine}' is not known; the one there is is 'graph'"
            )
        if memory_limit is not None and memory_limit <= 0:
            raise InputError(f"memory_limit must be a positive number of bytes, not {memory_limit}")
        self.gradient_engine = gradient_engine
        self.settings = Settings(providers, session_options, memory_limit)
        self.path = str(source) if isinstance(source, str | os.PathLike) else None
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()

        raw = load.load(source, external_data_dir)
        self.source_opset: int | None = raw.graph.opset_imports.get("")
        self.labels_by_output = outputs.unwrap_zipmaps(raw)
        outputs.drop_unusable(raw)
        raw = opset.raise_opset(raw)
        normalized = normalize.normalize(raw, _evaluate)
        graph_model = normalized.model
        names = [v.name or "" for v in graph_model.graph.inputs]
        self.axes = _axes(examples_axis, names)
        self.has_examples = examples_axis is not None
        self.batch_report: batch.BatchReport | None = None
        if self.has_examples:
            _move_axes(graph_model, self.axes)
            first = {n: None if a is None else 0 for n, a in self.axes.items()}
            self.batch_report = batch.make_dynamic(graph_model, first, _evaluate)
            if self.batch_report.mode == "rows":
                log.warning(
                    "the model runs %s example(s) at a time: its batch size is fixed (%s)",
                    self.batch_report.batch,
                    self.batch_report.reason,
                )
        self.graph: ir.Model = graph_model
        self.opset = graph_model.graph.opset_imports.get("", 1)
        self._output = outputs.choose(graph_model, output)
        self._aliases = normalized.aliases
        self.names = Names(graph_model.graph, self._aliases)
        self._taken = set(edit.value_index(graph_model.graph))

    # ---- what there is ------------------------------------------------------------------------

    @property
    def inputs(self) -> tuple[InputInfo, ...]:
        """The inputs: name, dtype, shape with symbols."""
        found = []
        for value in self.graph.graph.inputs:
            info = InputInfo.of(value)
            axis = self.axes.get(info.name)
            if axis and info.shape is not None:
                rest = list(info.shape[1:])
                rest.insert(axis, info.shape[0])
                info = InputInfo(info.name, info.dtype, tuple(rest))
            found.append(info)
        return tuple(found)

    @property
    def outputs(self) -> tuple[InputInfo, ...]:
        """The tensor outputs: name, dtype, shape with symbols."""
        return tuple(InputInfo.of(v) for v in self.graph.graph.outputs)

    @property
    def output(self) -> ir.Value:
        """The explained output."""
        return self._output

    @property
    def labels(self) -> list[str] | None:
        """Class names that the model carries itself (the keys of a ZipMap)."""
        return self.labels_by_output.get(self._output.name or "")

    @property
    def fixed_batch(self) -> int | None:
        """How many examples a run takes where that can't be changed, else None."""
        report = self.batch_report
        return report.batch if report is not None and report.mode == "rows" else None

    @functools.cached_property
    def quantizes_batches(self) -> bool:
        """Whether rows that run together are quantized together, by the range of all; said once."""
        nodes = self.graph.graph.all_nodes()
        found = any(node.op_type.startswith("DynamicQuantize") for node in nodes)
        if found:
            log.warning(
                "the model quantizes each batch by its own range, so rows that run together change "
                "each other: perturbed rows run one by one"
            )
        return found

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the model file ('' when it was not loaded from a path)."""
        if self.path is None or not Path(self.path).is_file():
            return ""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def layers(self) -> list[Layer]:
        """What can be named as a layer, in the order of computation."""
        return self.names.layers()

    def resolve(self, layer: str, *, entering: bool = False) -> tuple[ir.Value, ...]:
        """The values that a layer name stands for (see :meth:`Names.resolve`)."""
        return self.names.resolve(layer, entering=entering)

    def embeddings(self, name: str) -> tuple[ir.Value, ...]:
        """The floating-point lookups in constant tables by the values of an integer input.

        Lookups by numbers computed from them, such as positions, are not among them.
        """
        ids = {v for v in self.graph.graph.inputs if v.name == name}
        found = []
        for node in self.graph.graph:
            if node.domain:
                continue
            source, *others = node.inputs or [None]
            y = node.outputs[0]
            constant = node.op_type != "Gather" or const_array(others[0]) is not None
            if source in ids and node.op_type in _KEEP_VALUES and constant:
                if y.dtype != ir.DataType.BOOL:
                    ids.add(y)
            elif node.op_type == "Gather" and others[0] in ids and const_array(source) is not None:
                found += [y] if is_float(y) else []
        return tuple(found)

    def embedding(self, name: str) -> ir.Value | None:
        """The only one of :meth:`embeddings`, or None where there is none.

        Raises:
            LayerError: there are several.
        """
        found = self.embeddings(name)
        if len(found) > 1:
            listed = ", ".join(f"'{self.names.unique(v) or v.name}'" for v in found)
            raise LayerError(
                f"input '{name}' feeds {len(found)} embeddings ({listed}): choose one with layer="
            )
        return found[0] if found else None

    def embedding_layer(self, name: str) -> str | None:
        """The layer name of :meth:`embedding`, one that means nothing else."""
        value = self.embedding(name)
        return None if value is None else self.names.unique(value) or value.name

    # ---- running ------------------------------------------------------------------------------

    def feeds(self, inputs: Arrays, additional: Arrays = None) -> Feeds:
        """Check and name what the model is fed (see :func:`check_inputs`)."""
        return check_inputs(self.graph.graph.inputs, self.axes, inputs, additional)

    def program(
        self, key: Hashable, build: Callable[[], ir.Model], batch: int | None = -1
    ) -> Program:
        """The compiled program for a key; built once.

        ``batch``: how many rows a run must have; None: any number; default as the model.
        """
        if key in self._programs:
            self._programs.move_to_end(key)
        else:
            rows = self.fixed_batch if batch == -1 else batch
            self._programs[key] = Program(build(), self.settings, rows)
            if len(self._programs) > _KEPT_PROGRAMS:
                self._programs.popitem(last=False)
        return self._programs[key]

    def forward(self, names: Sequence[str]) -> Program:
        """A program that computes the named values."""

        def build() -> ir.Model:
            copy = self.graph.clone()
            index = edit.value_index(copy.graph)
            copy.graph.outputs[:] = [index[n] for n in names]
            for value in copy.graph.outputs:
                if value.is_graph_input() or value.is_initializer():
                    raise InputError(f"'{value.name}' is an input, not a computed value")
            edit.prune(copy)
            return copy

        return self.program(("forward", tuple(names)), build)

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run the model on any number of examples.

        Args:
            inputs: an array (one input), a tuple in model order, or a dict of all inputs.

        Returns:
            Every tensor output by name; first axis examples.
        """
        feeds = self.feeds(inputs)
        names = [v.name or "" for v in self.graph.graph.outputs]
        return self.run(self.forward(names), feeds)

    def run(
        self,
        program: Program,
        feeds: Feeds,
        rows: Mapping[str, Any] | None = None,
        shared: Mapping[str, np.ndarray] | None = None,
        at_most: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Run a program on checked inputs (and more of its own inputs), in chunks."""
        by_row = (
            {k: v for k, v in feeds.arrays.items() if self.axes[k] is not None}
            if self.has_examples
            else {}
        )
        same = {k: v for k, v in feeds.arrays.items() if k not in by_row} | dict(shared or {})
        if not self.has_examples:
            return program.session({**same, **(rows or {})})
        return program.run({**by_row, **(rows or {})}, same, feeds.count, at_most=at_most)

    # ---- rewriting ----------------------------------------------------------------------------

    def rewriting(self, *values: ir.Value, exact: bool = True) -> tuple[ir.Model, list[ir.Value]]:
        """A copy of the graph to rewrite and the copies of some of its values.

        BatchNormalization is folded into convolutions, and a Relu moved behind a MaxPool, except
        where one of these values lies in between.

        Args:
            values: values of the graph.
            exact: the true derivative will be taken; False keeps every Relu where it is.
        """
        copy, names = self.graph.clone(), {v.name or "" for v in values}
        normalize.fold_batchnorm(copy, names)
        if exact:
            lower.sink_relu(copy, names)
        index = edit.value_index(copy.graph)  # both replace values whose names they keep
        return copy, [index[v.name or ""] for v in values]

    def free_name(self, name: str) -> str:
        """``name``, with underscores behind it until no value of the model has it."""
        while name in self._taken:
            name += "_"
        return name

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the (normalized) model as a standard ``.onnx`` file."""
        ir.save(self.graph, path)


def differentiate(
    model: Model, of: str | None, wrt: Sequence[str] | str, rules: Rules | None = None
) -> Model:
    """The backward graph as a model of its own.

    Args:
        model: the model.
        of: a value, node or scope name; None for the model's explained output.
        wrt: names of inputs or layers.
        rules: derivative rules, first match wins; default the true derivatives.

    Returns:
        A model whose inputs are those of ``model`` and ``cotangent`` (dtype and shape of ``of``),
        and whose outputs are ``of`` and one ``NAME.grad`` for each name in ``wrt``. It has only
        standard operators, can be saved, and can be differentiated again.

    Raises:
        LayerError: a name is unknown, or ``of`` does not depend on it.
        NotDifferentiableError, NoRuleError: no derivative exists between the two.
    """
    target = model.output if of is None else single(model, of)
    sources = [single(model, name) for name in ([wrt] if isinstance(wrt, str) else wrt)]
    if not sources:
        raise InputError("wrt is empty: name at least one input or layer")
    copy, (target, *sources) = model.rewriting(target, *sources, exact=rules is None)
    known = {v.name for v in copy.graph.inputs}
    backward = grad.differentiate(copy, target, sources, VJP if rules is None else rules)
    _move_axes(backward, model.axes, back=True)
    for i, source in enumerate(sources, start=1):
        if source.is_graph_input() and model.axes.get(source.name or ""):
            _turn_output(backward.graph, i, model.axes[source.name or ""] or 0)
    shapes.infer(backward)
    (seed,) = (v.name or "" for v in backward.graph.inputs if v.name not in known)
    where = None if target.shape is None else dims(target)
    axis = where.index(edit.BATCH) if where and edit.BATCH in where else None
    return Model(
        backward,
        output=backward.graph.outputs[1].name,
        providers=model.settings.providers,
        session_options=model.settings.session_options,
        memory_limit=model.settings.memory_limit,
        examples_axis={**model.axes, seed: axis} if model.has_examples else None,
    )


def single(model: Model, name: str, *, entering: bool = False) -> ir.Value:
    """The one value that a name stands for."""
    values = model.resolve(name, entering=entering)
    if len(values) != 1:
        listed = ", ".join(f"'{v.name}'" for v in values)
        raise InputError(f"'{name}' stands for several values ({listed}); name one of them")
    return values[0]


def _evaluate(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph once, on the processor that is always there."""
    return Session(model, ["CPUExecutionProvider"])(feeds)


def _axes(
    given: int | Mapping[str, int | None] | None, names: Sequence[str]
) -> dict[str, int | None]:
    for axis in given.values() if isinstance(given, Mapping) else [given]:
        if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
            raise InputError(
                f"examples_axis is an integer, None or a dict of these by input name, not {axis!r}"
            )
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    unknown = [k for k in given if k not in names]
    if unknown:
        raise InputError(
            f"examples_axis: there is no input {unknown[0]!r}; the names are {', '.join(names)}"
        )
    return {name: given.get(name, 0) for name in names}


def _move_axes(model: ir.Model, axes: Mapping[str, int | None], back: bool = False) -> None:
    """Put the examples axis of every input first; the graph moves it back itself.

    ``back`` undoes this for a derivative: its inputs have the axis where the user has it.
    """
    graph = model.graph
    op = Emitter(graph, "axis")
    moved = {name: axis for name, axis in axes.items() if axis}
    for i, value in enumerate(graph.inputs):
        if value.name not in moved:
            continue
        axis, d = moved[value.name], dims(value)
        if not 0 <= axis < len(d):
            raise InputError(
                f"examples_axis {axis} of input '{value.name}' is outside its {len(d)} dimensions"
            )
        first = [axis, *(k for k in range(len(d)) if k != axis)]
        given = [int(k) for k in np.argsort(first)]
        order = given if back else first
        fresh = ir.Value(name=value.name, type=value.type, shape=ir.Shape([d[k] for k in order]))
        same = op.Transpose(fresh, perm=first if back else given)
        same.shape, same.type = value.shape, value.type
        ir.convenience.replace_all_uses_with(value, same)
        graph.inputs[i] = fresh
    if moved:
        graph.sort()
        shapes.infer(model)


def _turn_output(graph: ir.Graph, index: int, axis: int) -> None:
    """Move the first axis of an output, which counts the examples, to where the user has it."""
    out = graph.outputs[index]
    op = Emitter(graph, "axis")
    order = list(range(1, len(dims(out))))
    order.insert(axis, 0)
    name, out.name = out.name, op.name("first")
    turned = op.Transpose(out, perm=order)
    turned.name, turned.type, turned.shape = name, out.type, ir.Shape([dims(out)[k] for k in order])
    graph.outputs[index] = turned
