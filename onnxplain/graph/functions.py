"""Operators that ONNX defines as functions, replaced by their bodies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir

from onnxplain.errors import UnsupportedModelError
from onnxplain.graph import recurrent, shapes
from onnxplain.graph.emit import Emitter, const_array

# Folding is for shapes, axes and small tables: larger constants stay computed.
_FOLDED_ELEMENTS = 1 << 16
_RANDOM = ("Random", "Bernoulli", "Multinomial")

# What the standard describes in words: the real operator between dequantizers and a quantizer.
_QUANTIZED = {
    "QLinearMatMul": """
        <opset_import: ["" : 21], domain: "">
        QLinearMatMul (a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero) => (y) {
            a_real = DequantizeLinear <axis = -2> (a, a_scale, a_zero)
            b_real = DequantizeLinear <axis = -1> (b, b_scale, b_zero)
            y_real = MatMul (a_real, b_real)
            y = QuantizeLinear (y_real, y_scale, y_zero)
        }""",
    "QLinearConv": """
        <opset_import: ["" : 21], domain: "">
        QLinearConv <auto_pad, dilations, group, kernel_shape, pads, strides>
        (x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias) => (y) {
            x_real = DequantizeLinear (x, x_scale, x_zero)
            w_real = DequantizeLinear <axis = 0> (w, w_scale, w_zero)
            bias_scale = Mul (x_scale, w_scale)
            bias_real = DequantizeLinear <axis = 0> (bias, bias_scale)
            y_real = Conv <auto_pad: string = @auto_pad, dilations: ints = @dilations,
                group: int = @group, kernel_shape: ints = @kernel_shape, pads: ints = @pads,
                strides: ints = @strides> (x_real, w_real, bias_real)
            y = QuantizeLinear (y_real, y_scale, y_zero)
        }""",
}


def expand(graph: ir.Graph, node: ir.Node) -> bool:
    """Put a node's function body in its place; False when the standard defines none.

    The node's output values stay the same objects (other code may hold them), with the body's
    results copied onto them by Identity. Shape arithmetic of the body is folded as far as the
    shapes are known.
    """
    inner = body(node, graph.opset_imports.get("", 1))
    if inner is None:
        return False
    fold(inner)
    if any(v.type is None for v in _values(inner.graph) if v.name):  # inference gave up
        raise UnsupportedModelError(
            f"operator {node.op_type} (node '{node.name}') has attributes that do not go with its "
            "inputs by the standard, such as axes beyond their rank, so it can't be rewritten as "
            "its function body; export the model with attributes that do"
        )
    op = Emitter(graph, f"{node.op_type}_body")
    for value in list(_values(inner.graph)):
        value.name = op.name(value.name) if value.name else ""
    for part in inner.graph.all_nodes():
        part.name = op.name(part.op_type)
    formals, results = list(inner.graph.inputs), list(inner.graph.outputs)
    inner.graph.outputs.clear()
    inner.graph.inputs.clear()
    actuals = [v for v in node.inputs if v is not None]
    for formal, actual in zip(formals, actuals, strict=True):
        ir.convenience.replace_all_uses_with(formal, actual)
        results = [actual if r is formal else r for r in results]
    for value in list(inner.graph.initializers.values()):
        inner.graph.initializers.pop(value.name or "")
        if value.uses() or value in results:
            graph.register_initializer(value)
    nodes = list(inner.graph)
    inner.graph.remove(nodes)

    outputs = list(node.outputs)
    uses = [list(out.uses()) for out in outputs]
    for reader, index in (use for group in uses for use in group):
        reader.replace_input_with(index, None)
    node.resize_outputs(0)
    for out, result in zip((o for o in outputs if o.name), results, strict=True):
        nodes.append(ir.Node("", "Identity", [result], outputs=[out], name=op.name("result")))
        out.type, out.shape = out.type or result.type, out.shape or result.shape
    graph.insert_before(node, nodes)
    graph.remove(node, safe=True)
    for out, group in zip(outputs, uses, strict=True):
        for reader, index in group:
            reader.replace_input_with(index, out)
    return True


def body(node: ir.Node, opset: int) -> ir.Model | None:
    """The standard's function body for one node as a model at ``opset``, or None.

    Its inputs and outputs are those that the node has, in order; attribute references are resolved.
    """
    if not node.domain and node.op_type in recurrent.OPERATORS:
        return recurrent.body(node, opset)
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return None
    function = _function(schema, node, opset)
    if function is None or not function.node:
        return None
    attributes = {
        name: attr.default_value
        for name, attr in schema.attributes.items()
        if attr.default_value.name
    }
    attributes |= {a.name: a for a in function.attribute_proto}
    attributes |= {a.name: a for a in ir.to_proto(node).attribute}
    absent = set(function.input)
    inputs, initializers = [], []
    for name, value in zip(function.input, node.inputs, strict=False):
        if value is None:
            continue
        absent.discard(name)
        inputs.append(onnx.ValueInfoProto(name=name, type=_type_proto(value)))
        constant = const_array(value)
        if constant is not None and constant.size <= shapes.SMALL:
            initializers.append(onnx.numpy_helper.from_array(constant, name))
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            _resolve(function.node, attributes, absent),
            node.op_type,
            inputs,
            [
                onnx.ValueInfoProto(name=name)
                for name, out in zip(function.output, node.outputs, strict=False)
                if out.name
            ],
            initializers,
        ),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=10,
    )
    if not _fits(model):
        # The body is written in an older version of the operators: raise it.
        del model.opset_import[:]
        model.opset_import.extend(function.opset_import)
        try:
            model = onnx.version_converter.convert_version(model, opset)
        except (RuntimeError, onnx.shape_inference.InferenceError):
            return None
    return ir.from_proto(model)


def fold(model: ir.Model) -> None:
    """Compute what known shapes and constants determine, and enter Ifs whose condition is known.

    Also writes inferred shapes onto all values. In place.
    """
    shapes.infer(model)
    while _fold_once(model):
        shapes.infer(model)


def _function(schema: Any, node: ir.Node, opset: int) -> onnx.FunctionProto | None:
    """The newest function body that ``opset`` may use."""
    if not node.domain and node.op_type in _QUANTIZED:
        described: onnx.FunctionProto = onnx.parser.parse_function(_QUANTIZED[node.op_type])
        return described
    versions = [v for v in schema.all_function_opset_versions if v <= opset]
    if not versions:
        return None
    newest = max(versions)
    if newest in schema.context_dependent_function_opset_versions:
        types = [b"" if v is None else _type_proto(v).SerializeToString() for v in node.inputs]
        try:
            text = schema.get_context_dependent_function_with_opset_version(
                newest, ir.to_proto(node).SerializeToString(), types
            )
        except RuntimeError:  # the builder wants a type or shape that is not known
            return None
    else:
        text = schema.get_function_with_opset_version(newest)
    function: onnx.FunctionProto = onnx.FunctionProto.FromString(text)
    return function


def _resolve(
    nodes: Iterable[onnx.NodeProto],
    attributes: Mapping[str, onnx.AttributeProto],
    absent: set[str],
) -> list[onnx.NodeProto]:
    """Nodes with attribute references replaced and names of absent inputs emptied."""
    resolved = []
    for node in nodes:
        if node.input and node.input[0] in absent:  # computes something absent from it
            absent.update(node.output)
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = ["" if name in absent else name for name in node.input]
        del copy.attribute[:]
        for attr in node.attribute:
            actual = attributes.get(attr.ref_attr_name) if attr.ref_attr_name else attr
            if actual is None:
                continue
            added = copy.attribute.add()
            added.CopyFrom(actual)
            added.name = attr.name
            if added.HasField("g"):
                inner = _resolve(added.g.node, attributes, absent)
                del added.g.node[:]
                added.g.node.extend(inner)
        resolved.append(copy)
    return resolved


def _fits(model: onnx.ModelProto) -> bool:
    """Whether every operator is used as the model's opset defines it."""
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        for node in model.graph.node:
            onnx.checker.check_node(node, _context(model))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def _context(model: onnx.ModelProto) -> onnx.checker.C.CheckerContext:
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {o.domain: o.version for o in model.opset_import}
    return context


def _fold_once(model: ir.Model) -> bool:
    graph, changed = model.graph, False
    for node in list(graph):
        if node.op_type == "If" and (condition := const_array(node.inputs[0])) is not None:
            _take_branch(graph, node, bool(condition.reshape(())))
            changed = True
            continue
        results = _results(node, graph.opset_imports[""])
        if results is None:
            continue
        for out, array in zip(node.outputs, results, strict=True):
            constant = ir.Value(
                name=f"{out.name}.folded",
                shape=ir.Shape(array.shape),
                type=ir.TensorType(out.dtype) if out.dtype else None,
                const_value=ir.tensor(array, name=f"{out.name}.folded"),
            )
            graph.register_initializer(constant)
            ir.convenience.replace_all_uses_with(out, constant, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        changed = True
    return changed


def _results(node: ir.Node, opset: int) -> list[np.ndarray] | None:
    """The outputs of a node that depends on nothing unknown, else None."""
    if node.domain or node.op_type.startswith(_RANDOM):
        return None
    if node.op_type == "Shape" and node.inputs[0] is not None:
        shape = node.inputs[0].shape
        if shape is None:
            return None
        start, end = (node.attributes.get_int(k, d) for k, d in (("start", 0), ("end", len(shape))))
        part = list(shape.dims)[start:end]
        return [np.asarray(part, np.int64)] if all(isinstance(d, int) for d in part) else None
    if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
        return None
    if node.op_type == "CastLike" and node.outputs[0].dtype:
        # Only the dtype of the second input matters.
        array = const_array(node.inputs[0])
        return None if array is None else [array.astype(node.outputs[0].dtype.numpy())]
    given = {v: const_array(v) for v in node.inputs if v is not None}
    feeds = {v.name or "": array for v, array in given.items() if array is not None}
    if len(feeds) < len(given) or not _small(node):
        return None
    proto = ir.to_proto(node)
    inputs = [ir.serde.serialize_value(value) for value in given]
    names = [onnx.ValueInfoProto(name=name) for name in proto.output]
    single = onnx.helper.make_model(
        onnx.helper.make_graph([proto], "single", inputs, names),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
    )
    return [np.asarray(a) for a in onnx.reference.ReferenceEvaluator(single).run(None, feeds)]


def _small(node: ir.Node) -> bool:
    """Whether computing a constant is cheap, and its result worth keeping."""
    if node.op_type == "Range":
        start, limit, delta = (float(np.max(const_array(v))) for v in node.inputs)  # type: ignore[arg-type]
        return abs(limit - start) <= _FOLDED_ELEMENTS * abs(delta)
    known = [out.shape for out in node.outputs if out.name]
    sizes = [math.prod(shape.numpy()) for shape in known if shape is not None and shape.is_static()]
    return len(sizes) == len(known) and max(sizes) <= _FOLDED_ELEMENTS


def _take_branch(graph: ir.Graph, node: ir.Node, condition: bool) -> None:
    """Put the branch that an If takes in its place."""
    branch = node.attributes["then_branch" if condition else "else_branch"].as_graph()
    results = list(branch.outputs)
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        branch.initializers.pop(value.name or "")
        graph.register_initializer(value)
    nodes = list(branch)
    branch.remove(nodes)
    graph.insert_before(node, nodes)
    for out, result in zip(node.outputs, results, strict=True):
        ir.convenience.replace_all_uses_with(out, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    """Every value that a graph and its subgraphs define, inputs apart."""
    yield from graph.initializers.values()
    yield from (v for node in graph.all_nodes() for v in node.outputs)


def _type_proto(value: ir.Value) -> onnx.TypeProto:
    return ir.serde.serialize_value(value).type
