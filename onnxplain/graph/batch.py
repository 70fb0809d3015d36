"""Models exported for a fixed number of examples, rewritten to take any number.

The examples axis is followed through the graph. Where a constant holds the fixed number (a Reshape
target, an Expand shape, a constant that meets rows of examples), the constant is replaced. That
is a guess at what the exporter meant, so it counts only if several rows together give what the
original model gives row by row.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from onnxplain.errors import InputError, RuntimeMissingError
from onnxplain.graph import shapes
from onnxplain.graph.edit import BATCH, clone, prune, reads
from onnxplain.graph.emit import Dim, Emitter, const_array, is_float
from onnxplain.graph.normalize import Evaluate, fold_constants

log = logging.getLogger("onnxplain")

_GROUPS = 3  # fixed-size batches that are run together in the proof
_FREE = 6  # size tried for symbolic dimensions other than the examples
_MOST = 64  # largest number of examples looked for in a model that declares none
_TRIALS = 8  # how many such numbers are tried
_NOT_ALONE = "of several rows together is not that of the rows alone"


@dataclass(frozen=True)
class BatchReport:
    """How a model takes several examples.

    Attributes:
        mode: "dynamic", any number; "rewritten", any number since the rewrite, which was proved;
            "rows", only ``batch`` at a time; "coupled", any number, but what the model gives for an
            example depends on the others.
        batch: the fixed number of examples of the model as it was, None if it had none.
        reason: why the model could not be rewritten, or is held to be coupled ("" otherwise).
    """

    mode: Literal["dynamic", "rewritten", "rows", "coupled"]
    batch: int | None
    reason: str = ""


def make_dynamic(
    model: ir.Model, examples_axis: Mapping[str, int | None], evaluate: Evaluate
) -> BatchReport:
    """Let ``model`` (in normal form) take any number of examples, in place, if that can be proved.

    Args:
        model: every input with an examples axis gets the symbol ``BATCH`` there, unless the mode
            is "rows": then the model is as it was.
        examples_axis: the axis that counts examples, by input name; None or absent: the input is
            shared by all examples.
        evaluate: runs a model.

    Raises:
        InputError: an axis that the input doesn't have.
    """
    axes = _axes(model.graph, examples_axis)
    if not axes:
        return BatchReport("dynamic", None)
    declared = (_dims(v)[axis] for v, axis in axes.items())
    fixed = {d for d in declared if isinstance(d, int) and d > 0}  # some exporters write -1 or 0
    if len(fixed) > 1:
        sizes = ", ".join(f"'{v.name}' {_dims(v)[axis]}" for v, axis in axes.items())
        return BatchReport("rows", max(fixed), f"inputs have different numbers of rows: {sizes}")
    if fixed:
        return _rewrite(model, axes, fixed.pop(), evaluate)
    return _check_symbolic(model, axes, evaluate)


def _axes(graph: ir.Graph, examples_axis: Mapping[str, int | None]) -> dict[ir.Value, int]:
    axes = {}
    for value in graph.inputs:
        axis = examples_axis.get(value.name or "")
        if axis is None:
            continue
        rank = None if value.shape is None else len(value.shape)
        if rank is None or not -rank <= axis < rank:
            raise InputError(
                f"input '{value.name}' has {'unknown' if rank is None else rank} dimensions, so "
                f"axis {axis} can't count its examples; set examples_axis for this input"
            )
        axes[value] = axis % rank
    return axes


def _dims(value: ir.Value) -> list[Dim]:
    assert value.shape is not None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def _set_dims(value: ir.Value, dims: Sequence[Dim]) -> None:
    value.shape = ir.Shape(dims)


def _check_symbolic(model: ir.Model, axes: dict[ir.Value, int], evaluate: Evaluate) -> BatchReport:
    """A declared symbol is believed if it reaches the outputs, else it is put to the proof."""
    original, _ = clone(model)
    symbols = {_dims(v)[axis] for v, axis in axes.items()} - {None}
    for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
        if value.shape is not None:
            known = [BATCH if d in symbols else d for d in _dims(value)]
            if value.is_graph_output():  # exporters invent names for what they can't tell
                known = [d if isinstance(d, int) or d == BATCH else None for d in known]
            _set_dims(value, known)
    for value, axis in axes.items():
        _set_dims(value, [BATCH if i == axis else d for i, d in enumerate(_dims(value))])
    shapes.infer(model)
    _refine(model, axes)
    if all(v.shape is not None and BATCH in _dims(v) for v in model.graph.outputs):
        why = _disproof(original, model, axes, 1, evaluate) if _mixes(model.graph) else None
        if why is None or not why.endswith(_NOT_ALONE):
            return BatchReport("dynamic", None)
        log.warning("results depend on which examples are explained together: %s", why)
        return BatchReport("coupled", None, why)
    if _disproof(original, model, axes, 1, evaluate) is None:
        return BatchReport("dynamic", None)
    declared = model.graph
    model.graph = original.graph
    by_name = {v.name or "": axis for v, axis in axes.items()}
    found = _axes(model.graph, by_name)
    any_number = all(_run(original, found, n, evaluate) is not None for n in (1, _GROUPS))
    sizes = [1] if any_number else [1, *_hints(original)]
    runs = ((n, _run(original, found, n, evaluate)) for n in sizes)
    fixed = next((n for n, given in runs if given and all(n in shape for shape in given)), 1)
    report = _rewrite(model, found, fixed, evaluate)
    if report.mode == "rows" and any_number:
        model.graph = declared  # outputs of the whole batch: several rows are one evaluation
        return BatchReport("dynamic", None, report.reason)
    if report.mode == "rows" and fixed > 1:
        _fix(model, found, fixed)
    return report


def _hints(model: ir.Model) -> list[int]:
    """Numbers of examples that a traced model's constants may hold, the most frequent first."""
    sizes: Counter[int] = Counter()  # of shapes that are constants
    leading: Counter[int] = Counter()
    for value in model.graph.initializers.values():
        if value.shape is not None and len(value.shape) > 1:
            leading[int(value.shape.numpy()[0])] += 1
        elif value.dtype == ir.DataType.INT64 and (array := const_array(value)) is not None:
            sizes.update(array.flat[:1].tolist())
    ordered = [n for counter in (sizes, leading) for n, _ in counter.most_common()]
    return [n for n in dict.fromkeys(ordered) if 1 < n <= _MOST][:_TRIALS]


def _fix(model: ir.Model, axes: Mapping[ir.Value, int], fixed: int) -> None:
    """Declare the number of examples that a model runs with, in place of its symbol."""
    for value, axis in axes.items():
        _set_dims(value, [fixed if i == axis else d for i, d in enumerate(_dims(value))])
    for value in (v for node in model.graph for v in node.outputs):
        value.shape = None
    shapes.infer(model, fresh=True)


# The axes that operators compute along: an attribute and its default, or an input.
_ALONG_ATTRIBUTE = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "LayerNormalization", "TopK"), -1),
    **dict.fromkeys(("ArgMax", "ArgMin", "Concat", "Gather", "Split"), 0),
}
_ALONG_INPUT = {
    **dict.fromkeys((f"Reduce{kind}" for kind in ("Max", "Mean", "Min", "Prod", "Sum")), 1),
    **dict.fromkeys((f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp")), 1),
    **{"ReduceSumSquare": 1, "CumSum": 1, "Slice": 3},
}


def _mixes(graph: ir.Graph) -> bool:
    """Whether an operator computes along the examples axis, as far as that is known."""
    return any(_mixes_examples(node) for node in graph if node.domain == "")


def _mixes_examples(node: ir.Node) -> bool:
    first, second = ([*map(_examples_axis, node.inputs), None, None])[:2]
    if node.op_type == "MatMul":
        return first == -1 or second in (-2, -1)
    if node.op_type == "Gemm":
        return first == (-2 if _int(node, "transA", 0) else -1) or second is not None
    if first is None:
        return False
    if node.op_type in _ALONG_ATTRIBUTE:
        along = [_int(node, "axis", _ALONG_ATTRIBUTE[node.op_type])]
    elif node.op_type in _ALONG_INPUT:
        index = _ALONG_INPUT[node.op_type]
        array = const_array(node.inputs[index]) if len(node.inputs) > index else None
        if array is None or not array.size:
            return not _int(node, "noop_with_empty_axes", 0)
        along = array.flatten().tolist()
    else:
        return False
    rank = len(_dims(node.inputs[0]))  # type: ignore[arg-type]
    return any(axis in (first, first + rank) for axis in along)


def _examples_axis(value: ir.Value | None) -> int | None:
    """The axis of a value that counts examples, from the end."""
    if value is None or value.shape is None or BATCH not in _dims(value):
        return None
    return _dims(value).index(BATCH) - len(_dims(value))


def _is_tensor(value: ir.Value) -> bool:
    return value.type is None or isinstance(value.type, ir.TensorType)


def _refine(model: ir.Model, axes: Mapping[ir.Value, int]) -> None:
    """Name the dimensions that grow with the examples: those that equal two trial numbers of them.

    Numeric inference sees through shape arithmetic that symbolic inference gives up on.
    """
    trials = (1009, 1013)  # primes, larger than most dimensions and not their multiples
    free = any(
        not isinstance(d, int) and axes.get(v) != i
        for v in model.graph.inputs
        for i, d in enumerate(_dims(v) if v.shape is not None else [None])
    )
    found = []
    for rows in trials:
        sizes = {
            v.name or "": _trial_shape(v, axes.get(v), rows)
            for v in model.graph.inputs
            if v.shape is not None
        }
        found.append(shapes.concrete(model, sizes))
    for value in (v for node in model.graph for v in node.outputs):
        pair = [trial.get(value.name or "", (0, None))[1] for trial in found]
        if pair[0] is None or pair[1] is None or len(pair[0]) != len(pair[1]):
            continue
        known = _dims(value) if value.shape is not None else []
        dims: list[Dim] = known if len(known) == len(pair[0]) else [None] * len(pair[0])
        for i, (a, b) in enumerate(zip(*pair, strict=True)):
            if (a, b) == trials:
                dims[i] = BATCH
            elif a == b and not free:
                dims[i] = a
        _set_dims(value, dims)


def _trial_shape(value: ir.Value, axis: int | None, rows: int) -> list[int]:
    dims = _dims(value)
    return [rows if i == axis else d if isinstance(d, int) else _FREE for i, d in enumerate(dims)]


def _rewrite(
    model: ir.Model, axes: dict[ir.Value, int], fixed: int, evaluate: Evaluate
) -> BatchReport:
    candidate, inputs = clone(model, list(axes))
    new_axes = dict(zip(inputs, axes.values(), strict=True))
    try:
        _Unbake(candidate, new_axes, fixed, evaluate).run()
        why = _disproof(model, candidate, axes, fixed, evaluate)
    except _Stuck as e:
        why = str(e)
    if why is not None:
        return BatchReport("rows", fixed, why)
    model.graph = candidate.graph
    return BatchReport("rewritten", fixed)


# ---- the rewrite ----


class _Stuck(Exception):
    """The examples axis can't be followed further."""


@dataclass(frozen=True)
class _Rows:
    """Where a value carries the examples: dimension ``axis`` has size ``outer * N * inner``."""

    axis: int
    outer: int = 1
    inner: int = 1

    @property
    def plain(self) -> bool:
        return self.outer == self.inner == 1

    @property
    def symbol(self) -> str:
        return BATCH if self.plain else f"{self.outer}*{BATCH}*{self.inner}"

    @staticmethod
    def of(dims: Sequence[Dim]) -> _Rows | None:
        for axis, d in enumerate(dims):
            if d == BATCH:
                return _Rows(axis)
            if isinstance(d, str) and f"*{BATCH}*" in d:
                outer, inner = d.split(f"*{BATCH}*")
                return _Rows(axis, int(outer), int(inner))
        return None


_BROADCAST = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Sum", "Mean", "Where", "PRelu"}
    | {"And", "Or", "Xor", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "MatMul"}
    | {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
)
_SHAPE_READERS = frozenset({"Shape", "Size"})


class _Unbake:
    """Follows the examples axis in topological order and replaces the constants in its way."""

    def __init__(
        self, model: ir.Model, axes: dict[ir.Value, int], fixed: int, evaluate: Evaluate
    ) -> None:
        self.model, self.graph = model, model.graph
        self.axes, self.fixed, self.evaluate = axes, fixed, evaluate
        self.opset = self.graph.opset_imports[""]
        self.dims: dict[ir.Value, list[Dim]] = {}  # with symbols for the examples
        self.lost: ir.Node | None = None
        self._count: ir.Value | None = None

    def run(self) -> None:
        self._bake()
        self.op = Emitter(self.graph, "batch")
        # What is known when the number of examples is the fixed one.
        self.old = {v: _dims(v) for v in self._values() if v.shape is not None}
        for value in self.graph.inputs:
            self.dims[value] = list(self.old[value]) if value in self.old else []
        for value, axis in self.axes.items():
            self.dims[value][axis] = BATCH
        for node in list(self.graph):
            if any(self.rows(v) for v in reads(node)):
                fix = _FIXES.get(node.op_type) if node.domain == "" else None
                found = fix(self, node) if fix is not None else None
                self._infer(node, found)
        for out in filter(_is_tensor, self.graph.outputs):
            rows = self.rows(out)
            if rows is None or not rows.plain:
                where = f" after node '{self.lost.name}' ({self.lost.op_type})" if self.lost else ""
                raise _Stuck(f"output '{out.name}' does not have one row an example{where}")
        self._declare()

    def rows(self, value: ir.Value | None) -> _Rows | None:
        """Where a value carries the examples."""
        return _Rows.of(self.dims.get(value, ())) if value is not None else None

    def known(self, value: ir.Value, node: ir.Node) -> list[Dim]:
        """Dimensions at the fixed number of examples."""
        if value not in self.old:
            raise _Stuck(f"the shape of '{value.name}' at node '{node.name}' is unknown")
        return self.old[value]

    def repeat(self, value: ir.Value, rows: _Rows, node: ir.Node) -> ir.Value:
        """A value that is equal for all examples, once for each of them."""
        axis, inner = rows.axis, rows.inner
        if rows.outer != 1:
            raise _Stuck(f"constant '{value.name}' would have to be repeated within an axis")
        if self._count is None:
            source, position = next(iter(self.axes.items()))
            self._count = self.op.Shape(source, start=position, end=position + 1)
        sizes, out = list(self.known(value, node)), self.first(value, rows)
        if inner > 1:
            out = self.op.Unsqueeze(out, [axis])
        ones = [np.ones(n, np.int64) for n in (axis, len(sizes) - axis - (inner == 1))]
        before, after = ([self.op.const(part)] if part.size else [] for part in ones)
        out = self.op.Expand(out, self.op.Concat(*before, self._count, *after, axis=0))
        if inner > 1:
            if not all(isinstance(d, int) for d in sizes):
                raise _Stuck(f"the shape of '{value.name}' at node '{node.name}' is not fixed")
            out = self.op.Reshape(out, [*sizes[:axis], -1, *sizes[axis + 1 :]])
        sizes[axis] = rows.symbol
        self.dims[out], self.old[out] = sizes, self.old[value]
        return out

    def first(self, value: ir.Value, rows: _Rows) -> ir.Value:
        """The part of a constant that belongs to the first example."""
        if self.fixed == 1:
            return value
        out: ir.Value = self.op.Slice(value, [0], [rows.inner], [rows.axis])
        dims = list(self.old[value])
        dims[rows.axis] = rows.inner
        self.old[out] = dims
        return out

    # ---- shapes ----

    def _values(self) -> Iterator[ir.Value]:
        yield from self.graph.inputs
        yield from self.graph.initializers.values()
        for node in self.graph:
            yield from node.outputs

    def _forget(self) -> None:
        for node in self.graph:
            for value in node.outputs:
                value.shape = None

    def _bake(self) -> None:
        """Shapes at the fixed number of examples, and all that follows from them as constants."""
        for value, axis in self.axes.items():
            _set_dims(value, [self.fixed if i == axis else d for i, d in enumerate(_dims(value))])
        self._forget()
        shapes.infer(self.model, fresh=True)
        self._measure()
        op, baked = Emitter(self.graph, "baked"), False
        for node in list(self.graph):
            x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
            if node.domain or node.op_type not in _SHAPE_READERS or x is None or x.shape is None:
                continue
            if x.shape.is_static() and not y.is_graph_output():
                shape = np.asarray(x.shape.numpy(), np.int64)
                part = slice(*(_int(node, k) for k in ("start", "end")))
                const = op.const(shape[part] if node.op_type == "Shape" else shape.prod())
                ir.convenience.replace_all_uses_with(y, const)
                baked = True
        if baked:
            prune(self.model)
            fold_constants(self.model, self.evaluate)

    def _measure(self) -> None:
        """Run the model once for the shapes that inference can't tell, if the input's are known."""
        unknown = [
            v
            for node in self.graph
            for v in node.outputs
            if v.name and _is_tensor(v) and (v.shape is None or not v.shape.is_static())
        ]
        known = all(v.shape is not None and v.shape.is_static() for v in self.graph.inputs)
        if not unknown or not known:
            return
        probe, outputs = clone(self.model, unknown)
        probe.graph.outputs[:] = outputs
        prune(probe)
        axes = {v.name or "": axis for v, axis in self.axes.items()}
        try:
            values = self.evaluate(probe, _random_feeds(self.graph, axes, self.fixed, 0, 1.0))
        except RuntimeMissingError:
            raise
        except Exception as e:  # whatever the runtime raises
            raise _Stuck(f"the model can't be run: {str(e).splitlines()[0]}") from e
        for value in unknown:
            array = values[value.name or ""]
            _set_dims(value, np.shape(array))
            if value.type is None:
                value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))

    def _infer(self, node: ir.Node, found: list[Dim] | None) -> None:
        """Dimensions of a node's outputs: ``found`` by its fix, else by standard inference."""
        types = {} if found is not None else self._standard(node)
        for i, value in enumerate(node.outputs):
            if not value.name:
                continue
            dims = found if found is not None and i == 0 else types.get(value.name)
            old = self.old.get(value)
            if old is None or (dims is not None and len(dims) != len(old)):
                if dims is not None:
                    self.dims[value] = dims
                continue
            self.dims[value] = self._fill(dims or [None] * len(old), old)
        carries = any(self.rows(v) for v in node.outputs)
        if self.lost is None and not carries and node.op_type not in _SHAPE_READERS:
            self.lost = node

    def _fill(self, dims: list[Dim], old: list[Dim]) -> list[Dim]:
        """What inference left open: one dimension must have grown with the examples."""
        grown = [
            i
            for i, (d, o) in enumerate(zip(dims, old, strict=True))
            if d is None and isinstance(o, int) and o % self.fixed == 0
        ]
        filled = [o if d is None else d for d, o in zip(dims, old, strict=True)]
        if grown and _Rows.of(dims) is None:
            axis = grown[0]
            size = old[axis]
            assert isinstance(size, int)
            filled[axis] = _Rows(axis, 1, size // self.fixed).symbol
        return filled

    def _standard(self, node: ir.Node) -> dict[str, list[Dim]]:
        """The standard's inference for one node, with the examples as a symbol."""
        types, data = {}, {}
        for value in node.inputs:
            if value is None or value.dtype is None:
                continue
            dims = self.dims.get(value, self.old.get(value))
            types[value.name or ""] = onnx.helper.make_tensor_type_proto(int(value.dtype), dims)
            array = (
                const_array(value)
                if dims is not None and math.prod(d for d in dims if isinstance(d, int)) <= 64
                else None
            )
            if array is not None and value.dtype != ir.DataType.STRING:
                data[value.name or ""] = ir.to_proto(ir.tensor(array, dtype=value.dtype))
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
            found = onnx.shape_inference.infer_node_outputs(
                schema,
                ir.to_proto(node),
                types,
                data,
                opset_imports=[onnx.helper.make_opsetid("", self.opset)],
            )
        except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, RuntimeError):
            return {}  # another domain, or a guess that went wrong: the proof decides
        return {
            name: [
                d.dim_value if d.HasField("dim_value") else d.dim_param or None
                for d in t.tensor_type.shape.dim
            ]
            for name, t in found.items()
            if t.tensor_type.HasField("shape")
        }

    def _declare(self) -> None:
        """Write the new shapes onto inputs, values and outputs."""
        self.graph.sort()
        prune(self.model)
        for value in self.axes:
            _set_dims(value, self.dims[value])
        self._forget()
        shapes.infer(self.model, fresh=True)
        _refine(self.model, self.axes)
        for value, dims in self.dims.items():  # other domains' operators have no inference
            found = _dims(value) if value.shape is not None else [None] * len(dims)
            told = [d if isinstance(d, int) or d == BATCH else None for d in dims]
            if len(found) == len(told):
                merged = zip(found, told, strict=True)
                _set_dims(value, [a if isinstance(a, int) or b is None else b for a, b in merged])


def _int(node: ir.Node, name: str, default: int | None = None) -> int | None:
    attr = node.attributes.get(name)
    return default if attr is None else attr.as_int()


def _reshape(u: _Unbake, node: ir.Node) -> list[Dim] | None:
    x, target = node.inputs[0], node.inputs[1]
    rows = u.rows(x)
    if x is None or target is None or rows is None:
        return None
    old, new = u.known(x, node), u.known(node.outputs[0], node)
    found = _after_reshape(old, new, rows, u.fixed)
    if found is None:
        raise _Stuck(f"node '{node.name}' (Reshape {old} to {new}) mixes examples with other axes")
    array, at = const_array(target), found.axis
    if array is None:
        parts = [u.op.Slice(target, [0], [at], [0]), u.op.const(np.asarray([-1]))]
        parts.append(u.op.Slice(target, [at + 1], [len(new)], [0]))
        node.replace_input_with(1, u.op.Concat(*parts, axis=0))
    else:
        sizes = [d if isinstance(d, int) else int(array[i]) for i, d in enumerate(new)]
        sizes[at] = -1
        if sizes.count(-1) > 1:
            if not (found.plain and rows.plain and at == rows.axis) or _int(node, "allowzero", 0):
                raise _Stuck(f"node '{node.name}' (Reshape to {new}) has two open dimensions")
            sizes[at] = 0  # as in the input
        node.replace_input_with(1, u.op.const(np.asarray(sizes, np.int64)))
    dims = list(new)
    dims[at] = found.symbol
    return dims


def _after_reshape(old: Sequence[Dim], new: Sequence[Dim], rows: _Rows, fixed: int) -> _Rows | None:
    """Where the examples are after a row-major reshape, or None if they are torn apart.

    When the fixed number is 1, several places fit. Preferred is an axis of their own, where it
    was; then being the outermost part of an axis; the last axis (features) only for want of others.
    """
    outside = _product([*old[: rows.axis], rows.outer])
    choices = []
    for axis, size in enumerate(new):
        outer = _quotient(outside, _product(new[:axis]))
        if outer is None or not isinstance(size, int) or size % (outer * fixed):
            continue
        found = _Rows(axis, outer, size // (outer * fixed))
        last = axis == len(new) - 1 and len(new) > 1
        key = (not found.plain, last and not found.plain, outer != 1, axis != rows.axis, axis)
        choices.append((key, found))
    return min(choices, key=lambda c: c[0])[1] if choices else None


def _product(dims: Sequence[Dim]) -> tuple[int, list[Dim]]:
    """A product of sizes and symbols."""
    return math.prod(d for d in dims if isinstance(d, int)), [
        d for d in dims if not isinstance(d, int)
    ]


def _quotient(a: tuple[int, list[Dim]], b: tuple[int, list[Dim]]) -> int | None:
    """``a / b`` if it is an integer."""
    if sorted(map(str, a[1])) != sorted(map(str, b[1])) or not b[0] or a[0] % b[0]:
        return None
    return a[0] // b[0]


def _expand(u: _Unbake, node: ir.Node) -> list[Dim] | None:
    x, target = node.inputs[0], node.inputs[1]
    rows = u.rows(x)
    if rows is None or x is None:
        return None
    array = const_array(target)
    old, new = u.known(x, node), u.known(node.outputs[0], node)
    axis = rows.axis + len(new) - len(old)
    if array is not None:
        at = axis - len(new) + len(array)
        if at >= 0:
            if array[at] not in (1, old[rows.axis]):
                raise _Stuck(f"node '{node.name}' (Expand) copies one example to {array[at]} rows")
            sizes = array.copy()
            sizes[at] = 1
            node.replace_input_with(1, u.op.const(sizes))
    dims: list[Dim] = list(new)
    dims[axis] = rows.symbol
    return dims


def _concat(u: _Unbake, node: ir.Node) -> None:
    rows = next(r for r in map(u.rows, node.inputs) if r is not None)
    rank = len(u.known(node.outputs[0], node))
    if (_int(node, "axis") or 0) % rank == rows.axis:
        raise _Stuck(f"node '{node.name}' (Concat) joins rows of examples with other rows")
    for i, value in enumerate(node.inputs):
        if value is not None and u.rows(value) is None:
            node.replace_input_with(i, u.repeat(value, rows, node))


def _broadcast(u: _Unbake, node: ir.Node) -> None:
    rank = len(u.known(node.outputs[0], node))
    carriers = [(v, r) for v in node.inputs if v is not None and (r := u.rows(v)) is not None]
    carrier, rows = carriers[0]
    from_end = len(u.known(carrier, node)) - rows.axis
    if node.op_type == "MatMul" and from_end <= 2:
        return
    for i, value in enumerate(node.inputs):
        if value is None or u.rows(value) is not None:
            continue
        old = u.known(value, node)
        axis = len(old) - from_end
        if axis < 0 or old[axis] == 1 or rank < from_end:
            continue
        place = _Rows(axis, rows.outer, rows.inner)
        node.replace_input_with(
            i, u.first(value, place) if rows.plain else u.repeat(value, place, node)
        )


def _recurrent(u: _Unbake, node: ir.Node) -> None:
    state_axis = 0 if _int(node, "layout", 0) else 1
    for i, axis in ((4, 0), (5, state_axis), (6, state_axis)):
        value = node.inputs[i] if len(node.inputs) > i else None
        if value is not None and u.rows(value) is None:
            node.replace_input_with(i, u.repeat(value, _Rows(axis), node))


_FIXES: dict[str, Callable[[_Unbake, ir.Node], list[Dim] | None]] = {
    "Reshape": _reshape,
    "Expand": _expand,
    "Concat": _concat,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    **dict.fromkeys(_BROADCAST, _broadcast),
}


# ---- the proof ----


def _disproof(
    original: ir.Model,
    candidate: ir.Model,
    axes: dict[ir.Value, int],
    fixed: int,
    evaluate: Evaluate,
) -> str | None:
    """Why ``candidate`` is not ``original`` for any number of rows; None where it is."""
    by_name = {v.name or "": axis for v, axis in axes.items()}
    why = "the outputs do not depend on the random rows tried"
    for seed, scale in enumerate((1.0, 100.0)):
        feeds = _random_feeds(original.graph, by_name, _GROUPS * fixed, seed, scale)
        parts, what = [], "a row of random numbers"
        try:
            for i in range(_GROUPS):
                rows = np.arange(i * fixed, (i + 1) * fixed)
                some = {
                    k: np.take(a, rows, by_name[k]) if k in by_name else a for k, a in feeds.items()
                }
                parts.append(evaluate(original, some))
            what = "its rows together"
            together = evaluate(candidate, feeds)
        except RuntimeMissingError:
            raise
        except Exception as e:  # whatever the runtime raises
            return f"{what} can't be run: {str(e).splitlines()[0]}"
        differ = False
        for out in candidate.graph.outputs:
            if not (_is_tensor(out) and is_float(out)):
                continue
            name, axis = out.name or "", _rows_axis(out)
            apart = [np.asarray(p[name], np.float64) for p in parts]
            both = np.asarray(together[name], np.float64)
            if not all(a.ndim and np.isfinite(a).all() for a in apart):
                why = f"output '{name}' is not finite, or is one number, for random rows"
                break
            expected = np.concatenate(apart, axis)
            coarse = 1e-4 if out.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE) else 1e-2
            bound = coarse * np.abs(expected) + 0.1 * coarse * np.abs(expected).max(initial=0)
            if expected.shape != both.shape or not (np.abs(both - expected) <= bound).all():
                return f"output '{name}' {_NOT_ALONE}"
            differ |= any(not np.allclose(a, apart[0], rtol=10 * coarse, atol=0) for a in apart[1:])
        else:
            if differ:
                _name_rows(candidate.graph, together)
                return None
    return why


def _rows_axis(out: ir.Value) -> int:
    dims = _dims(out) if out.shape is not None else []
    return dims.index(BATCH) if BATCH in dims else 0


def _name_rows(graph: ir.Graph, results: Mapping[str, np.ndarray]) -> None:
    """Declare the examples axis of outputs where inference could not (other domains)."""
    for out in filter(_is_tensor, graph.outputs):
        rank = np.ndim(results[out.name or ""])
        if out.shape is None:
            _set_dims(out, [None] * rank)
        dims = _dims(out)
        if rank and BATCH not in dims and not isinstance(dims[0], int):
            _set_dims(out, [BATCH, *dims[1:]])


def _run(
    model: ir.Model, axes: dict[ir.Value, int], rows: int, evaluate: Evaluate
) -> list[tuple[int, ...]] | None:
    """The shapes of the outputs for so many rows; None if the model does not run with them."""
    feeds = _random_feeds(model.graph, {v.name or "": a for v, a in axes.items()}, rows, 0, 1.0)
    try:
        return [np.shape(array) for array in evaluate(model, feeds).values()]
    except RuntimeMissingError:
        raise
    except Exception:  # any error of the runtime is the answer no
        return None


def _random_feeds(
    graph: ir.Graph, axes: Mapping[str, int], rows: int, seed: int, scale: float
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in graph.inputs:
        name = value.name or ""
        shape = [] if value.shape is None else _trial_shape(value, axes.get(name), rows)
        # 0 and 1 are valid as ids, masks and flags alike.
        array = scale * rng.random(shape) if is_float(value) else 1.0 * rng.integers(0, 2, shape)
        if value.dtype == ir.DataType.STRING:
            feeds[name] = array.astype(np.int64).astype(str).astype(object)
        else:
            feeds[name] = array.astype((value.dtype or ir.DataType.FLOAT).numpy())
    return feeds
