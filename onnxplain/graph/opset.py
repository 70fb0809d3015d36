"""One working opset: older models are raised to it, node by node, in place.

Between opsets 7 and 26 the standard changed the form or meaning of a few operators only; each
change is one small function in ``_CHANGES``. Everything else about a node (name, metadata, values,
weights, other domains) stays as it is, which a conversion through a protobuf would not give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxplain.errors import UnsupportedModelError
from onnxplain.graph import shapes
from onnxplain.graph.emit import const_array

OLDEST = 7
"""The oldest opset whose operators still mean what onnxruntime computes for them."""

NEWEST = 26
"""The newest opset that onnxruntime loads (1.31 refuses 27 as under development)."""

NEWEST_IR = 13
"""The newest version of the file format that onnxruntime loads (1.31)."""


def raise_opset(model: ir.Model, working: int = 21) -> ir.Model:
    """Raise the standard operators of ``model`` to opset ``working``; a later one is kept.

    Raises:
        UnsupportedModelError: the opset is older than 7 or later than onnxruntime takes, or an
            operator has no counterpart in the working opset.
    """
    roots = [model.graph, *(f.graph for f in model.functions.values())]
    for root in roots:
        if "ai.onnx" in root.opset_imports:
            root.opset_imports[""] = root.opset_imports.pop("ai.onnx")
    given = [root.opset_imports[""] for root in roots if "" in root.opset_imports]
    _check_range(given)
    target = max(working, *given) if given else working
    old = [
        (node, root.opset_imports.get("", target))
        for root in roots
        for node in root.all_nodes()
        if node.domain == "" and root.opset_imports.get("", target) < target
    ]
    names = {v.name for root in roots for v in _values(root)}
    for last in (False, True):
        # Changes that look at shapes come last: inference tells more for later opsets.
        nodes = [(node, version) for node, version in old if (node.op_type in _SHAPED) == last]
        if nodes:
            shapes.infer(model)
        for node, version in nodes:
            _raise_node(node, version, target, names)
        for root in roots:
            root.opset_imports[""] = target
    least = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", target)])
    model.ir_version = min(max(model.ir_version, least), NEWEST_IR)
    return model


def _check_range(given: Sequence[int]) -> None:
    if given and max(given) > NEWEST:
        raise UnsupportedModelError(
            f"the model uses opset {max(given)} of the standard operators, but onnxruntime takes "
            f"{NEWEST} at most; export it with opset {NEWEST} or lower"
        )
    if given and min(given) < OLDEST:
        raise UnsupportedModelError(
            f"the model uses opset {min(given)} of the standard operators, older than {OLDEST}, "
            "the oldest that onnxruntime supports; export it again with a later opset"
        )


def _values(root: ir.Graph) -> Iterator[ir.Value]:
    for graph in (root, *root.subgraphs()):
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _raise_node(node: ir.Node, version: int, target: int, names: set[str | None]) -> None:
    site = _Site(node, names)
    op_type = node.op_type
    for v in range(version + 1, target + 1):
        change = _CHANGES.get((node.op_type, v))
        if change is not None:
            change(site)
        if site.replaced:
            return
    if version < target and not _is_standard(node.op_type, target):
        raise UnsupportedModelError(
            f"operator {op_type} (node '{node.name}') of opset {version} does not exist in opset "
            f"{target}, the working opset; export the model with a later opset"
        )


def _is_standard(op_type: str, version: int) -> bool:
    try:
        return not onnx.defs.get_schema(op_type, version, "").deprecated
    except onnx.defs.SchemaError:
        return False


class _Site:
    """One node under change: reads its attributes, writes nodes around it."""

    def __init__(self, node: ir.Node, names: set[str | None]) -> None:
        self.node = node
        self.replaced = False
        self._names = names

    def pop(self, name: str, default: Any = None) -> Any:
        """Take an attribute off the node."""
        attr = self.node.attributes.pop(name, None)
        if attr is None:
            return default
        if attr.is_ref():
            raise self.refusal(f"its attribute '{name}' is a parameter of a function")
        return attr.as_string() if attr.type == ir.AttributeType.STRING else attr.value

    def set(self, name: str, value: Any) -> None:
        """Put an attribute on the node."""
        self.node.attributes[name] = ir.convenience.convert_attribute(name, value)

    def rank(self) -> int | None:
        """Rank of the first input, where known."""
        x = self.node.inputs[0]
        return None if x is None or x.shape is None else len(x.shape)

    def const(self, array: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant in front of the node."""
        return self.emit("Constant", value=ir.tensor(np.asarray(array, dtype)))

    def like(self, number: float) -> ir.Value:
        """A scalar of the first input's dtype."""
        x = self.node.inputs[0]
        if x is not None and x.dtype is not None:
            return self.const(number, x.dtype.numpy())
        return self.emit("CastLike", self.const(number, np.float32), x)

    def emit(self, op_type: str, *inputs: ir.Value | None, **attrs: Any) -> ir.Value:
        """A node in front of this one, of the same scope."""
        node = ir.node(op_type, inputs, attrs, name=self._name(f"{self.node.name}.{op_type}"))
        node.metadata_props.update(self.node.metadata_props)
        self._name_output(node.outputs[0], op_type)
        self.node.prepend(node)
        return node.outputs[0]

    def replace_output(self, value: ir.Value) -> None:
        """Let ``value`` (just emitted) take the place and name of the node's first output."""
        old, producer = self.node.outputs[0], value.producer()
        assert producer is not None
        value.type, value.shape = old.type, old.shape
        name = old.name
        old.name = None
        value.name, producer.name = name, self.node.name
        value.metadata_props.update(old.metadata_props)
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        assert self.node.graph is not None
        self.node.graph.remove(self.node, safe=True)
        self.replaced = True

    def put(self, index: int, value: ir.Value | None) -> None:
        """Set an input, adding absent ones before it."""
        if len(self.node.inputs) <= index:
            self.node.resize_inputs(index + 1)
        self.node.replace_input_with(index, value)

    def refusal(self, why: str) -> UnsupportedModelError:
        """The error for what can't be raised."""
        return UnsupportedModelError(
            f"operator {self.node.op_type} (node '{self.node.name}') can't be raised to the "
            f"working opset: {why}. Export the model with a later opset"
        )

    def _name_output(self, value: ir.Value, op_type: str) -> None:
        value.name = self._name(f"{self.node.outputs[0].name}.{op_type}")

    def _name(self, stem: str) -> str:
        name, i = stem, 0
        while name in self._names:
            i += 1
            name = f"{stem}.{i}"
        self._names.add(name)
        return name


def _to_input(attribute: str, index: int, default: Any = None) -> Callable[[_Site], None]:
    """A list (or number) given as attribute becomes an input."""

    def change(s: _Site) -> None:
        value = s.pop(attribute, default)
        if value is not None:
            s.put(index, s.const(value))

    return change


def _batch_norm_9(s: _Site) -> None:
    if s.pop("spatial", 1):
        return
    # Statistics for every position instead of every channel: the formula, broadcast over axis 0.
    x, scale, bias, mean, var = s.node.inputs[:5]
    deviation = s.emit("Sqrt", s.emit("Add", var, s.like(s.pop("epsilon", 1e-5))))
    normal = s.emit("Div", s.emit("Sub", x, mean), deviation)
    s.replace_output(s.emit("Add", s.emit("Mul", normal, scale), bias))


def _batch_norm_14(s: _Site) -> None:
    if any(v.uses() or v.is_graph_output() for v in s.node.outputs[1:]):
        raise s.refusal("its statistics outputs are used, which is training")
    s.node.resize_outputs(1)


def _upsample_9(s: _Site) -> None:
    s.put(1, s.const(s.pop("scales"), np.float32))


def _upsample_10(s: _Site) -> None:
    s.node.op_type = "Resize"


def _resize_11(s: _Site) -> None:
    scales = s.node.inputs[1]
    known = const_array(scales)
    down = known is not None and bool((known < 1).any())
    if known is not None and down and (known > 1).any():
        raise s.refusal("it enlarges one axis and shrinks another")
    s.put(2, scales)
    s.put(1, None)
    s.set("coordinate_transformation_mode", "asymmetric")
    # What onnxruntime computes for these opsets, whose standard left the rounding open.
    s.set("nearest_mode", "ceil" if down else "floor")


def _resize_13(s: _Site) -> None:
    for i in (1, 2):
        empty = const_array(s.node.inputs[i]) if len(s.node.inputs) > i else None
        if empty is not None and empty.size == 0:
            s.put(i, None)
    attrs = s.node.attributes
    if "coordinate_transformation_mode" not in attrs:
        return
    if attrs["coordinate_transformation_mode"].as_string() == "tf_half_pixel_for_nn":
        if "nearest_mode" not in attrs or attrs["nearest_mode"].as_string() != "floor":
            raise s.refusal("coordinate_transformation_mode=tf_half_pixel_for_nn was dropped")
        # floor((x + 1/2) / s) = round((x + 1/2) / s - 1/2), halves up
        s.set("coordinate_transformation_mode", "half_pixel")
        s.set("nearest_mode", "round_prefer_ceil")


def _slice_10(s: _Site) -> None:
    for i, name in enumerate(("starts", "ends", "axes"), 1):
        _to_input(name, i)(s)


def _topk_10(s: _Site) -> None:
    s.put(1, s.const([s.pop("k")]))


def _clip_11(s: _Site) -> None:
    for i, name in enumerate(("min", "max"), 1):
        limit = s.pop(name)
        if limit is not None:
            s.put(i, s.like(limit))


def _pad_11(s: _Site) -> None:
    value = s.pop("value", 0.0)
    _to_input("pads", 1)(s)
    if value:
        s.put(2, s.like(value))


def _scatter_11(s: _Site) -> None:
    s.node.op_type = "ScatterElements"


def _dropout_12(s: _Site) -> None:
    s.pop("ratio")  # means something in training only


def _softmax_13(s: _Site) -> None:
    # Until opset 12 the input was taken as a matrix whose rows are all axes from ``axis`` on.
    axis, rank = s.pop("axis", 1), s.rank()
    last = axis == -1 or (rank is not None and axis % max(rank, 1) == rank - 1)
    s.set("axis", -1)
    if not last:
        x = s.node.inputs[0]
        rows = s.emit(s.node.op_type, s.emit("Flatten", x, axis=axis), axis=-1)
        s.replace_output(s.emit("Reshape", rows, s.emit("Shape", x)))


def _roi_align_16(s: _Site) -> None:
    if "coordinate_transformation_mode" not in s.node.attributes:
        s.set("coordinate_transformation_mode", "output_half_pixel")


def _split_18(s: _Site) -> None:
    if len(s.node.inputs) < 2 or s.node.inputs[1] is None:
        s.set("num_outputs", len(s.node.outputs))


def _grid_sample_20(s: _Site) -> None:
    mode = s.pop("mode", "bilinear")
    s.set("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


def _group_norm_21(s: _Site) -> None:
    # Scale and bias were one per group and are one per channel since.
    x, groups = s.node.inputs[0], s.pop("num_groups")
    s.set("num_groups", groups)
    channels = s.emit("Shape", x, start=1, end=2)
    if x is not None and x.shape is not None and isinstance(x.shape[1], int):
        channels = s.const([x.shape[1]])
    repeats = s.emit("Concat", s.const([1]), s.emit("Div", channels, s.const([groups])), axis=0)
    for i in (1, 2):
        column = s.emit("Reshape", s.node.inputs[i], s.const([-1, 1]))
        s.put(i, s.emit("Reshape", s.emit("Expand", column, repeats), s.const([-1])))
    if x is not None and x.dtype is not None:
        s.set("stash_type", int(x.dtype))


def _refuse(why: str) -> Callable[[_Site], None]:
    def change(s: _Site) -> None:
        raise s.refusal(why)

    return change


_SOFTMAXES = ("Softmax", "LogSoftmax", "Hardmax")
_SHAPED = frozenset({*_SOFTMAXES, "GroupNormalization"})
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

# What to do on the way to an opset, by operator and that opset.
_CHANGES: dict[tuple[str, int], Callable[[_Site], None]] = {
    ("BatchNormalization", 9): _batch_norm_9,
    ("BatchNormalization", 14): _batch_norm_14,
    ("Upsample", 9): _upsample_9,
    ("Upsample", 10): _upsample_10,
    ("Resize", 11): _resize_11,
    ("Resize", 13): _resize_13,
    ("Scan", 9): _refuse("until opset 8 it ran over a batch axis of its own"),
    ("Slice", 10): _slice_10,
    ("TopK", 10): _topk_10,
    ("Clip", 11): _clip_11,
    ("Pad", 11): _pad_11,
    ("Scatter", 11): _scatter_11,
    ("Dropout", 12): _dropout_12,
    **{(op, 13): _softmax_13 for op in _SOFTMAXES},
    **{(op, 13): _to_input("axes", 1) for op in ("Squeeze", "Unsqueeze", "ReduceSum")},
    ("Split", 13): _to_input("split", 1),
    ("Split", 18): _split_18,
    ("RoiAlign", 16): _roi_align_16,
    **{(f"Reduce{op}", 18): _to_input("axes", 1) for op in _REDUCTIONS},
    ("DFT", 20): _to_input("axis", 2, default=1),
    ("GridSample", 20): _grid_sample_20,
    ("GroupNormalization", 21): _group_norm_21,
}
