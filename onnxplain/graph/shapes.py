"""Types and shapes of every value, by the standard's own inference, without copying weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx
import onnx_ir as ir

# Constants up to this many elements may be shapes, axes or scales: inference reads their values.
SMALL = 64

# Operators that inference knows nothing of: the result has the type and shape of the first input.
_OPAQUE = ("GroupNormalization", "MeanVarianceNormalization")


def without(
    model: ir.Model, left_out: Callable[[ir.TensorProtocol], bool]
) -> tuple[onnx.ModelProto, dict[str, ir.Value]]:
    """The model as a protobuf without some of its initializers, and these by name."""
    graph = model.graph
    large = {
        name: value
        for name, value in graph.initializers.items()
        if value.const_value is not None and left_out(value.const_value)
    }
    for name in large:
        del graph.initializers[name]
    try:
        return ir.to_proto(model), large
    finally:
        graph.initializers.update(large)


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model as a protobuf whose large weights are left out and declared as inputs."""
    proto, large = without(model, lambda tensor: math.prod(tensor.shape.numpy()) > SMALL)
    inputs = {i.name for i in proto.graph.input}
    for name, value in large.items():
        if name not in inputs:
            proto.graph.input.append(_declaration(value))
    for node in proto.graph.node:
        if node.op_type in _OPAQUE and not node.domain:
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    return proto


def _declaration(value: ir.Value) -> onnx.ValueInfoProto:
    tensor = value.const_value
    assert tensor is not None
    return onnx.helper.make_tensor_value_info(
        value.name or "", int(tensor.dtype), list(tensor.shape.numpy())
    )


def infer(model: ir.Model, *, fresh: bool = False) -> None:
    """Write the inferred type and shape onto every value; ``fresh`` forgets what was known."""
    proto = skeleton(model)
    if fresh:
        del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    known = {v.name: v for v in inferred.graph.value_info}
    known |= {v.name: v for v in inferred.graph.output}
    for node in model.graph:
        for value in node.outputs:
            info = known.get(value.name or "")
            if info is None or not info.type.HasField("tensor_type"):
                continue
            found = ir.serde.deserialize_value_info_proto(info, None)
            if value.type is None or value.dtype is None or value.dtype == ir.DataType.UNDEFINED:
                value.type = found.type
            if found.shape is not None:
                value.shape = found.shape if fresh else _merge(value.shape, found.shape)


def _merge(ours: ir.Shape | None, found: ir.Shape) -> ir.Shape:
    """The more telling of two descriptions of a shape, dimension by dimension."""
    if ours is None or len(ours) != len(found):
        return found
    return ir.Shape(
        a if isinstance(a, int) or (not isinstance(b, int) and a.value) else b
        for a, b in zip(ours, found, strict=True)
    )


def concrete(
    model: ir.Model, input_shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, tuple[int, ...] | None]]:
    """Item size in bytes and shape of every value for given input shapes (None: unknown)."""
    proto = skeleton(model)
    del proto.graph.value_info[:]
    for declared in proto.graph.input:
        shape = input_shapes.get(declared.name)
        if shape is not None:
            _set_shape(declared, shape)
    for out in proto.graph.output:
        out.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    found: dict[str, tuple[int, tuple[int, ...] | None]] = {}
    for info in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        tensor = info.type.tensor_type
        if not tensor.elem_type:
            continue
        size = max(1, ir.DataType(tensor.elem_type).bitwidth // 8) if tensor.elem_type != 8 else 8
        shape = None
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shape = tuple(d.dim_value for d in tensor.shape.dim)
        found[info.name] = (size, shape)
    return found


def _set_shape(info: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    tensor = info.type.tensor_type
    tensor.ClearField("shape")
    for d in shape:
        tensor.shape.dim.add().dim_value = int(d)
    if not shape:
        tensor.shape.SetInParent()
