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

_POOLS = ("AveragePool", "LpPool", "MaxPool")
_ROUNDING = ("ceil_mode", "auto_pad", "pads")


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
    """Write the inferred type and shape onto every value; ``fresh`` forgets what was known.

    Pools whose size the standard's inference would get wrong are written without ``ceil_mode``
    where that computes the same, so that the checker and onnxruntime infer the true sizes as well.
    """
    proto = skeleton(model)
    if fresh:
        del proto.graph.value_info[:]
    inferred, pools = _inferred(proto)
    for index, pads in pools.items():
        attributes = model.graph[index].attributes
        for name in _ROUNDING:
            attributes.pop(name, None)
        attributes["pads"] = ir.AttrInt64s("pads", pads)
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
    inferred, _ = _inferred(proto)
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


def _inferred(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[int, list[int]]]:
    """The standard's inference with the true sizes of pools.

    With ``ceil_mode`` it counts a last window that would start behind the input, in the padding;
    PyTorch and onnxruntime drop it. Such a pool is rewritten in ``proto``; pools behind it depend
    on its size. Also returns, by index, the paddings with which some compute the same in floor
    mode.
    """
    pads: dict[int, list[int]] = {}
    while True:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        pools = [
            (i, n)
            for i, n in enumerate(proto.graph.node)
            if n.op_type in _POOLS and not n.domain and n.input
        ]
        known = (*inferred.graph.input, *inferred.graph.value_info) if pools else ()
        sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim[2:]] for v in known}
        for index, node in pools:
            if (found := _without_ceil(node, sizes.get(node.input[0], []))) is not None:
                padding, same = found
                if same:
                    pads[index] = padding
                break
        else:
            return inferred, pads


def _without_ceil(node: onnx.NodeProto, sizes: Sequence[int]) -> tuple[list[int], bool] | None:
    """Rewrite a pool with a window behind its input (0: unknown size) to floor mode.

    Returns its padding, and whether it computes the same: an average that includes the padding
    does not, where that changes, nor does onnxruntime pad by a whole window.
    """
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    mode, kernel = given.get("auto_pad", b"NOTSET"), given.get("kernel_shape", [])
    axes = len(kernel)
    before = (given.get("pads") if mode == b"NOTSET" else None) or [0] * (2 * axes)
    strides, dilations = (given.get(k) or [1] * axes for k in ("strides", "dilations"))
    complete = axes == len(sizes) == len(strides) == len(dilations) == len(before) // 2
    if not given.get("ceil_mode") or mode.startswith(b"SAME") or not complete:
        return None
    if not all((*sizes, *strides)):
        return None
    pads, late = list(before), False
    for a, (n, k, s, d) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        extent, padded = (k - 1) * d + 1, n + pads[a]
        steps = -(-(padded + pads[axes + a] - extent) // s)
        if steps * s >= padded:
            late = True  # floor mode leaves out just this window
        else:
            pads[axes + a] = steps * s + extent - padded
    if not late:
        return None
    for attribute in [a for a in node.attribute if a.name in _ROUNDING]:
        node.attribute.remove(attribute)
    node.attribute.append(onnx.helper.make_attribute("pads", pads))
    same = pads == list(before) or not given.get("count_include_pad")
    return pads, same and all(p < k for p, k in zip(pads[axes:], kernel, strict=True))


def _set_shape(info: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    tensor = info.type.tensor_type
    tensor.ClearField("shape")
    for d in shape:
        tensor.shape.dim.add().dim_value = int(d)
    if not shape:
        tensor.shape.SetInParent()
