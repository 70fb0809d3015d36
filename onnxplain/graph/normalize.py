"""One form for all models: no functions, no constants in nodes, no copies, nothing dead.

What stays is the computation that depends on the inputs, with unique names everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PreconditionError
from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    RemoveInitializersFromInputsPass,
)

from onnxplain.errors import ModelError, UnsupportedModelError
from onnxplain.graph import shapes
from onnxplain.graph.edit import clone, prune, reads, value_index
from onnxplain.graph.emit import const_array
from onnxplain.graph.names import scopes

Evaluate = Callable[[ir.Model, dict[str, np.ndarray]], dict[str, np.ndarray]]
"""Runs a model: feeds by input name -> every output by name."""

_LARGE = 1 << 20  # bytes; constants beyond it are folded only if that does not grow the model

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial"}
    | {f"Random{kind}{like}" for kind in ("Normal", "Uniform") for like in ("", "Like")}
)
# Folding these would turn quantized weights into float ones.
_QUANTIZATION = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
# What runtimes hand over as plain numpy arrays.
_NUMPY = frozenset(ir.DataType.from_numpy(np.dtype(code)) for code in "?bhiqBHIQefd")


@dataclass(frozen=True)
class Normalized:
    """A model in normal form.

    Attributes:
        model: the model that was given, changed in place.
        aliases: names that are gone (of values, and of the nodes that only passed a value on),
            and the value that stands for each; ``scope#0``, ``scope#1``, ... are the calls of a
            scope that is gone with all its nodes.
    """

    model: ir.Model
    aliases: dict[str, str]


def normalize(model: ir.Model, evaluate: Evaluate) -> Normalized:
    """Bring a model of the working opset into normal form, in place.

    Raises:
        ModelError: cyclic graph or functions.
        UnsupportedModelError: a function that can't be inlined.
    """
    calls = {
        node.name: node.outputs[0].name
        for node in model.graph
        if node.op_identifier() in model.functions
    }
    _inline(model)
    RemoveInitializersFromInputsPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    LiftSubgraphInitializersToMainGraphPass()(model)
    _sort(model)
    _unique_names(model)
    removed, emptied = _drop_copies(model)
    prune(model)
    shapes.infer(model)
    fold_constants(model, evaluate)
    _pad_every_axis(model.graph)
    shapes.infer(model)
    present = value_index(model.graph)
    aliases = {old: value.name for old, value in removed.items()} | calls
    left = {scope for node in model.graph for scope in scopes(node)}
    for scope, values in emptied.items():
        if scope not in left:
            aliases |= {f"{scope}#{i}": value.name for i, value in enumerate(values)}
    return Normalized(
        model,
        {old: new for old, new in aliases.items() if old and old not in present and new in present},
    )


def _sort(model: ir.Model) -> None:
    try:
        model.graph.sort()
    except ValueError as e:
        raise ModelError(f"the graph has a cycle, so it can't be computed: {e}") from e


def _inline(model: ir.Model) -> None:
    for function in model.functions.values():
        # The inliner would give the caller's name to what the function merely hands through.
        for i, value in enumerate(function.outputs):
            if value.producer() is None:
                copy = ir.node("Identity", [value])
                function.append(copy)
                function.outputs[i] = copy.outputs[0]
    try:
        InlinePass()(model)
    except PreconditionError as e:
        raise ModelError(f"the model's functions call each other in a circle: {e}") from e
    except ValueError as e:
        raise UnsupportedModelError(f"a function of the model can't be inlined: {e}") from e
    model.functions.clear()


def _unique_names(model: ir.Model) -> None:
    """Give every value its own name in the whole model, and every node one."""
    graphs = [model.graph, *model.graph.subgraphs()]
    values: list[ir.Value] = [*model.graph.inputs, *model.graph.outputs]
    for graph in graphs:
        values += [*graph.inputs, *graph.initializers.values()]
        # An output named "" is one that the node was asked not to compute.
        values += [v for node in graph for v in node.outputs if v.name != ""]
    taken: set[str] = set()
    for value in dict.fromkeys(values):
        producer = value.producer()
        stem = value.name or (f"{producer.name or producer.op_type}" if producer else "value")
        name = _unused(stem, taken)
        if name != value.name:
            value.name = name
    taken = set()
    for graph in graphs:
        for node in graph:
            node.name = _unused(node.name or node.op_type, taken)


def _unused(stem: str, taken: set[str]) -> str:
    name, i = stem, 1
    while name in taken:
        i += 1
        name = f"{stem}_{i}"
    taken.add(name)
    return name


def _drop_copies(model: ir.Model) -> tuple[dict[str, ir.Value], dict[str, dict[ir.Value, None]]]:
    """Remove Identity and inference Dropout.

    Returns the surviving value of each name that is gone, and those of the removed nodes of each
    scope, in order.
    """
    gone: dict[str, ir.Value] = {}
    emptied: dict[str, dict[ir.Value, None]] = {}
    fixed = set(model.graph.inputs) | set(model.graph.outputs)
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in list(graph):
            if not _is_copy(node):
                continue
            x, y = node.inputs[0], node.outputs[0]
            assert x is not None
            if y in graph.outputs:
                # The output's name must stay: it moves to the value, if that is free to take it.
                if x in fixed or x in graph.outputs or x.producer() is None or x.graph is not graph:
                    continue
                old, x_name, y_name = node.name, x.name, y.name
                ir.convenience.replace_all_uses_with(y, x, replace_graph_outputs=True)
                graph.remove(node, safe=True)
                x.name = y_name
                fixed.add(x)
                names = (old, x_name)
            else:
                ir.convenience.replace_all_uses_with(y, x)
                graph.remove(node, safe=True)
                names = (node.name, y.name)
            gone.update({name: x for name in names if name})
            if graph is model.graph:
                for scope in scopes(node):
                    emptied.setdefault(scope, {})[x] = None
    return gone, emptied


def _is_copy(node: ir.Node) -> bool:
    if node.domain != "" or node.op_type not in ("Identity", "Dropout"):
        return False
    if node.op_type == "Identity":
        return True
    training = node.inputs[2] if len(node.inputs) > 2 else None
    off = training is None or (const_array(training) is not None and not const_array(training))
    mask_used = any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
    return off and not mask_used


def fold_constants(model: ir.Model, evaluate: Evaluate) -> None:
    """Compute once, in one call, all that depends on constants only."""
    constant = set(model.graph.initializers.values())
    nodes = [node for node in model.graph if _foldable(node, constant)]
    inside = set(nodes)
    frontier = [
        v
        for node in nodes
        for v in node.outputs
        if not v.is_graph_output() and any(use.node not in inside for use in v.uses())
    ]
    if not frontier:
        return
    part, outputs = clone(model, frontier)
    part.graph.outputs[:] = outputs
    part.graph.inputs.clear()
    prune(part)
    results = evaluate(part, {})
    for value in frontier:
        name = value.name or ""
        array = results[name]
        if array.nbytes > max(_LARGE, _bytes(value)):
            continue
        value.name = None
        weight = ir.Value(
            name=name,
            type=ir.TensorType(value.dtype or ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
            const_value=ir.tensor(array, name=name),
        )
        model.graph.register_initializer(weight)
        ir.convenience.replace_all_uses_with(value, weight)
    prune(model)


def _pad_every_axis(graph: ir.Graph) -> None:
    """Write Pads of some axes as Pads of all: onnxruntime's optimizer moves a Transpose past the
    former and breaks them."""
    for node in graph:
        if node.op_type != "Pad" or node.domain or len(node.inputs) < 4:
            continue
        pads, axes, x = const_array(node.inputs[1]), const_array(node.inputs[3]), node.inputs[0]
        if pads is None or axes is None or x is None or x.shape is None:
            continue
        every = np.zeros((2, len(x.shape)), np.int64)
        every[:, axes % len(x.shape)] = pads.reshape(2, -1)
        node.replace_input_with(1, _weight(graph, f"{node.name}.pads", every.reshape(-1)))
        node.replace_input_with(3, None)


def _foldable(node: ir.Node, constant: set[ir.Value]) -> bool:
    """Whether a node computes a constant that is worth keeping; its outputs are then marked so."""
    inputs = [v for v in node.inputs if v is not None]
    if (
        node.domain != ""
        or node.op_type in _RANDOM | _QUANTIZATION
        or not all(v in constant for v in inputs)
        or any(a.type in _GRAPHS for a in node.attributes.values())
        or any(v.dtype not in _NUMPY for v in node.outputs if v.name)
    ):
        return False
    if sum(map(_size, node.outputs)) > max(_LARGE, sum(map(_size, inputs))):
        return False
    constant.update(node.outputs)
    return True


def _size(value: ir.Value) -> int:
    """Bytes of a value of known shape, else 0."""
    if value.shape is None or not value.shape.is_static() or value.dtype is None:
        return 0
    return math.prod(value.shape.numpy()) * value.dtype.bitwidth // 8


def _bytes(value: ir.Value) -> int:
    """Bytes of the weights that a constant value is computed from."""
    weights, seen, stack = 0, {value}, [value]
    while stack:
        producer = stack.pop().producer()
        if producer is None:
            continue
        for v in reads(producer):
            if v not in seen:
                seen.add(v)
                stack.append(v)
                weights += _size(v) if v.producer() is None else 0
    return weights


def fold_batchnorm(model: ir.Model, keep: set[str]) -> None:
    """Fold inference BatchNormalization into the convolution or Gemm before it, in place.

    It stays where the value in between has another use, is an output of the graph, or is named in
    ``keep``. Weights are computed in float64.
    """
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "BatchNormalization":
            _fold_batchnorm(model.graph, node, keep)
    prune(model)


_LINEAR = ("Conv", "ConvTranspose", "Gemm")


def _fold_batchnorm(graph: ir.Graph, node: ir.Node, keep: set[str]) -> None:
    x, y = node.inputs[0], node.outputs[0]
    linear = x.producer() if x is not None else None
    if x is None or linear is None or linear.domain or linear.op_type not in _LINEAR:
        return
    if len(x.uses()) != 1 or x.is_graph_output() or x.name in keep or linear.graph is not graph:
        return
    if _attr(node, "training_mode", 0):
        return
    statistics = [const_array(v) for v in node.inputs[1:5]]
    weight = const_array(linear.inputs[1])
    biased = len(linear.inputs) > 2 and linear.inputs[2] is not None
    bias = const_array(linear.inputs[2]) if biased else np.zeros(1)
    if weight is None or bias is None or any(s is None for s in statistics):
        return
    if bias.ndim == 2 and bias.shape[0] != 1:
        return  # Gemm with a bias for every row
    scale, shift, mean, var = (np.asarray(s, np.float64) for s in statistics)
    factor = scale / np.sqrt(var + _attr(node, "epsilon", 1e-5))
    beta = _attr(linear, "beta", 1.0)
    folded = {
        1: _scale_channels(np.asarray(weight, np.float64), factor, linear),
        2: (np.asarray(bias, np.float64).reshape(-1) * beta - mean) * factor + shift,
    }
    linear.resize_inputs(3)
    for index, array in folded.items():
        old = linear.inputs[index]
        stem = f"{old.name if old is not None else f'{linear.name}.bias'}.folded"
        linear.replace_input_with(index, _weight(graph, stem, array.astype(weight.dtype)))
    if linear.op_type == "Gemm":
        linear.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    name = y.name
    x.shape, x.type = y.shape, y.type
    ir.convenience.replace_all_uses_with(y, x, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    x.name = name


def _attr(node: ir.Node, name: str, default: float) -> float:
    attr = node.attributes.get(name)
    return default if attr is None else float(attr.value)


def _scale_channels(weight: np.ndarray, factor: np.ndarray, node: ir.Node) -> np.ndarray:
    """Multiply a weight by one factor for each output channel of its operator."""
    ones = (1,) * (weight.ndim - 2)
    if node.op_type == "Conv" or _attr(node, "transB", 0):
        weight = weight * factor.reshape(-1, 1, *ones)
    elif node.op_type == "Gemm":
        weight = weight * factor
    else:
        # [in, out / groups, ...]: the inputs of one group lead to the group's outputs.
        groups = int(_attr(node, "group", 1))
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        weight = (grouped * factor.reshape(groups, 1, -1, *ones)).reshape(weight.shape)
    return weight


def _weight(graph: ir.Graph, stem: str, array: np.ndarray) -> ir.Value:
    name = _unused(stem, set(graph.initializers))
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value
