"""How every rewrite writes nodes: ``op.Mul(a, b)`` appends a node to a graph and returns its value.

An :class:`Emitter` writes; a :class:`Call` is one existing node as a derivative rule sees it. Both
know ONNX types and shapes, so that a rule states its formula and nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxplain.errors import UnsupportedModelError

Dim = int | str | None
"""One dimension: its size, the symbol that stands for it, or None where nothing is known."""

Operand = ir.Value | bool | int | float | Sequence[int] | np.ndarray | np.generic | None
"""What an emitted operator takes. Python numbers become scalars of the first value's dtype, lists
of integers become int64 vectors (axes, shapes, indices), numpy arrays keep their own dtype."""

FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
)

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

# Output dtypes of operators whose result does not have the dtype of their first input.
_BOOLEAN = frozenset(
    "Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not IsNaN IsInf".split()
)
_INT64 = frozenset("Shape Size ArgMax ArgMin NonZero".split())


def is_float(value: ir.Value | None) -> bool:
    """Whether a value can carry a gradient."""
    return value is not None and value.dtype in FLOATS


def dims(value: ir.Value) -> tuple[Dim, ...]:
    """The dimensions of a value as far as they are known."""
    if value.shape is None:
        raise UnsupportedModelError(
            f"the rank of value '{value.name}' is unknown, so it can't be rewritten; "
            "export the model with shape information (or fixed input ranks)"
        )
    return tuple(
        d if isinstance(d, int) else (d.value if d.value else None) for d in value.shape.dims
    )


def rank(value: ir.Value) -> int:
    """Number of dimensions of a value."""
    return len(dims(value))


def static_dims(value: ir.Value) -> tuple[int, ...] | None:
    """All dimensions as integers, or None when one of them is symbolic."""
    d = dims(value)
    return d if all(isinstance(k, int) for k in d) else None  # type: ignore[return-value]


def const_array(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a constant value (an initializer or a Constant node), else None."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


class Emitter:
    """Appends nodes to ``graph``: ``op.Conv(x, w, strides=[2, 2])`` returns the output value.

    Several outputs: ``op.Split(x, sizes, axis=1, _outputs=3)`` returns a tuple. Attributes are
    keyword arguments. Nodes go to the end of the graph: sort it after writing in front of others.
    """

    def __init__(self, graph: ir.Graph, prefix: str = "ox") -> None:
        self.graph = graph
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        taken = {v.name for v in graph.inputs} | set(graph.initializers)
        for node in graph.all_nodes():
            taken.update((node.name, *(v.name for v in node.outputs)))
        generation = 0
        while any(n and n.startswith(f"{prefix}{generation}.") for n in taken):
            generation += 1
        self._prefix = f"{prefix}{generation}."
        self._count = 0

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)
        return functools.partial(self.emit, op_type)

    def emit(
        self, op_type: str, *operands: Operand, _outputs: int = 1, _domain: str = "", **attrs: Any
    ) -> Any:
        """Append one node; returns its value, or a tuple of values when ``_outputs`` > 1."""
        typed = operands[1:] if op_type == "Where" else operands  # a condition is boolean
        like = next((o for o in typed if isinstance(o, ir.Value)), None)
        inputs = [self._value(o, like) for o in operands]
        while inputs and inputs[-1] is None:
            inputs.pop()
        attrs = {k: v for k, v in attrs.items() if v is not None}
        name = self.name(op_type)
        node = ir.node(op_type, inputs, attrs, domain=_domain, num_outputs=_outputs, name=name)
        for i, out in enumerate(node.outputs):
            out.name = name if _outputs == 1 else f"{name}.{i}"
            dtype = _output_dtype(op_type, i, node)
            if dtype is not None:
                out.type = ir.TensorType(dtype)
        self.graph.append(node)
        return node.outputs[0] if _outputs == 1 else tuple(node.outputs)

    def name(self, stem: str) -> str:
        """A value name that the graph does not have yet."""
        self._count += 1
        return f"{self._prefix}{self._count}.{stem}"

    def const(self, array: Any, dtype: ir.DataType | None = None) -> ir.Value:
        """A constant (equal ones are written once)."""
        array = np.asarray(array, dtype=None if dtype is None else dtype.numpy())
        key = (array.dtype.str, str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = self.name("const")
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def _value(self, operand: Operand, like: ir.Value | None) -> ir.Value | None:
        if operand is None or isinstance(operand, ir.Value):
            return operand
        if isinstance(operand, np.ndarray | np.generic):
            return self.const(operand)
        if isinstance(operand, bool | int | float):
            if like is None or like.dtype is None:
                raise TypeError(f"a bare number {operand!r} needs a typed value beside it")
            return self.const(operand, like.dtype)
        return self.const(np.asarray(operand, dtype=np.int64))

    # ---- shapes -------------------------------------------------------------------------------

    def shape(self, value: ir.Value) -> ir.Value:
        """The shape as an int64 vector: a constant where it is known."""
        static = static_dims(value) if value.shape is not None else None
        return self.const(np.asarray(static, np.int64)) if static is not None else self.Shape(value)

    def dim(self, value: ir.Value, axis: int) -> ir.Value:
        """One dimension as an int64 vector of length 1."""
        axis %= rank(value)
        known = dims(value)[axis]
        if isinstance(known, int):
            return self.const(np.asarray([known], np.int64))
        return self.Shape(value, start=axis, end=axis + 1)

    def sizes(self, value: ir.Value) -> list[int | ir.Value]:
        """Every dimension: an integer where it is known, else an int64 vector of length 1."""
        return [d if isinstance(d, int) else self.dim(value, i) for i, d in enumerate(dims(value))]

    def vector(self, *parts: int | ir.Value) -> ir.Value:
        """An int64 vector from integers and int64 vectors: a constant where all are known."""
        values = [
            p if isinstance(p, ir.Value) else self.const(np.asarray([p], np.int64)) for p in parts
        ]
        known = [a for v in values if (a := const_array(v)) is not None]
        if len(known) == len(values):
            return self.const(np.concatenate([np.empty(0, np.int64), *known]))
        joined: ir.Value = self.Concat(*values, axis=0)
        return joined

    def reshape_like(self, g: ir.Value, value: ir.Value) -> ir.Value:
        """``g`` (same number of elements) in the shape of ``value``."""
        known = dims(value)
        unknown = [i for i, d in enumerate(known) if not isinstance(d, int)]
        if len(unknown) == 1 and math.prod(d for d in known if isinstance(d, int)) > 0:
            out = self.Reshape(g, [d if isinstance(d, int) else -1 for d in known])
        else:
            out = self.Reshape(g, self.shape(value), allowzero=1)
        out.shape = value.shape
        return out

    def expand_like(self, g: ir.Value, value: ir.Value) -> ir.Value:
        """``g`` broadcast to the shape of ``value``."""
        out = self.Expand(g, self.shape(value))
        out.shape = value.shape
        return out

    def pad(
        self,
        value: ir.Value,
        count: int,
        ends: Mapping[int, tuple[int | ir.Value, int | ir.Value]],
        fill: float | None = None,
    ) -> ir.Value:
        """``value`` (of ``count`` axes) with so many more before and behind along some axes.

        Not by Pad's own list of axes: onnxruntime's optimizer breaks a Transpose next to one.
        """
        amounts = (ends.get(axis, (0, 0))[side] for side in (0, 1) for axis in range(count))
        padded: ir.Value = self.Pad(value, self.vector(*amounts), fill)
        return padded

    def full_like(self, value: ir.Value, fill: float) -> ir.Value:
        """A tensor of ``value``'s shape and dtype with one number everywhere."""
        assert value.dtype is not None
        out = self.Expand(self.const(fill, value.dtype), self.shape(value))
        out.shape = value.shape
        return out

    def cast_like(self, g: ir.Value, value: ir.Value) -> ir.Value:
        """``g`` in the dtype of ``value``."""
        if g.dtype is not None and g.dtype == value.dtype:
            return g
        out: ir.Value = self.Cast(g, to=value.dtype)
        out.shape = g.shape
        return out

    def unbroadcast(self, g: ir.Value, from_: ir.Value, to: ir.Value) -> ir.Value:
        """Sum ``g`` (of the shape of ``from_``) over the axes along which ``to`` was broadcast."""
        big, small = dims(from_), dims(to)
        lead = len(big) - len(small)
        padded: tuple[Dim, ...] = (1,) * lead + small
        sure, unsure = list(range(lead)), []
        for axis in range(lead, len(big)):
            b, s = big[axis], padded[axis]
            if s == 1 and b != 1:
                sure.append(axis)
            elif not isinstance(s, int) and not (s is not None and s == b):
                unsure.append(axis)
        if unsure:
            # Which of these axes were broadcast is only known when the shapes are.
            ones = self.const(np.ones(lead, np.int64))
            target = self.Concat(ones, self.Shape(to), axis=0) if lead else self.Shape(to)
            same = self.Equal(target, self.Shape(from_))
            axes = self.Reshape(self.NonZero(self.Not(same)), [-1])
            g = self.ReduceSum(g, axes, keepdims=1, noop_with_empty_axes=1)
            g.shape = ir.Shape([None] * len(big))  # shape inference gives up on computed axes
            return self.reshape_like(g, to)
        if sure:
            kept = [a for a in sure if a >= lead]
            if kept and lead:
                return self.reshape_like(self.ReduceSum(g, sure, keepdims=0), to)
            g = self.ReduceSum(g, sure, keepdims=int(not lead))
            g.shape = to.shape
        return g


def _output_dtype(op_type: str, index: int, node: ir.Node) -> ir.DataType | None:
    if op_type in _BOOLEAN:
        return ir.DataType.BOOL
    if op_type in _INT64 or (op_type in ("MaxPool", "TopK") and index == 1):
        return ir.DataType.INT64
    if op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if op_type == "ConstantOfShape":
        fill = node.attributes.get("value")
        return fill.as_tensor().dtype if fill else ir.DataType.FLOAT
    source = {"Where": 1, "OneHot": 2}.get(op_type, 0)
    value = node.inputs[source] if len(node.inputs) > source else None
    return value.dtype if value is not None else None


@functools.cache
def _schema(op_type: str, version: int, domain: str) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(op_type, version, domain)


class Call:
    """One node as a derivative rule sees it.

    ``x`` and ``y`` are the node's inputs and outputs (None where an optional one is absent),
    ``attr`` its attributes with the standard's defaults, ``needs(i)`` whether the gradient of
    input ``i`` is wanted, ``const(i)`` the array behind a constant input. ``x0`` and ``y0`` are the
    inputs and outputs in a reference pass (themselves where they have no twin there).
    """

    def __init__(
        self,
        node: ir.Node,
        opset: int,
        wanted: Sequence[bool],
        reference: Mapping[ir.Value, ir.Value] | None = None,
    ) -> None:
        self.node = node
        self.opset = opset
        self.x: list[ir.Value] = list(node.inputs)  # type: ignore[arg-type]
        self.y: list[ir.Value] = list(node.outputs)
        twins = reference or {}
        self.x0 = [twins.get(v, v) for v in self.x]
        self.y0 = [twins.get(v, v) for v in self.y]
        self._wanted = wanted

    def replace(self, value: ir.Value, seen: ir.Value, reference: ir.Value) -> None:
        """Let rules see something else in the place of an operand and of its twin."""
        for now, twin, original in (
            (self.x, self.x0, self.node.inputs),
            (self.y, self.y0, self.node.outputs),
        ):
            for i, v in enumerate(original):
                if v is value:
                    now[i], twin[i] = seen, reference

    def on(
        self,
        x: Sequence[ir.Value | None],
        y: Sequence[ir.Value],
        wanted: Sequence[bool] | None = None,
    ) -> Call:
        """The same operator at other operands: what a rule reads there instead of this node's."""
        other = Call(self.node, self.opset, self._wanted if wanted is None else wanted)
        other.x = other.x0 = list(x)  # type: ignore[arg-type]
        other.y = other.y0 = list(y)
        return other

    def again(self, op: Emitter, *x: ir.Value | None) -> Call:
        """Run the operator again on other inputs; None keeps one, as those left out are kept."""
        given = [*x, *[None] * (len(self.x) - len(x))]
        inputs = [v if v is not None else old for v, old in zip(given, self.x, strict=True)]
        attributes = list(self.node.attributes.values())
        node = ir.Node(
            self.node.domain,
            self.node.op_type,
            inputs,
            attributes,
            num_outputs=len(self.y),
            name=op.name(self.node.op_type),
        )
        for old, new in zip(self.y, node.outputs, strict=True):
            new.name = op.name(self.node.op_type) if old.name else ""
            new.type, new.shape = old.type, old.shape
        op.graph.append(node)
        return self.on(inputs, node.outputs)

    def has(self, index: int) -> bool:
        """Whether an optional input is there."""
        return index < len(self.x) and self.x[index] is not None

    def needs(self, index: int) -> bool:
        """Whether the gradient with respect to an input is wanted."""
        return index < len(self._wanted) and self._wanted[index]

    def const(self, index: int) -> np.ndarray | None:
        """The constant behind an input, or None when it is absent or computed."""
        return const_array(self.x[index]) if self.has(index) else None

    def attr(self, name: str) -> Any:
        """An attribute's value; the standard's default where the node leaves it out, else None."""
        given = self.node.attributes.get(name)
        if given is not None:
            return given.as_string() if given.type == ir.AttributeType.STRING else given.value
        known = _schema(self.node.op_type, self.opset, self.node.domain).attributes.get(name)
        if known is None or not known.default_value.name:
            return None
        default = onnx.helper.get_attribute_value(known.default_value)
        return default.decode() if isinstance(default, bytes) else default

    def attrs(self, *names: str) -> dict[str, Any]:
        """Several attributes, those without a value left out."""
        found = {name: self.attr(name) for name in names}
        return {k: v for k, v in found.items() if v is not None}
