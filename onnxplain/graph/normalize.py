"""One form for all models: no functions, no constants in nodes, no copies, nothing dead.

What stays is the computation that depends on the inputs, with unique names everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import PassError
from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    RemoveInitializersFromInputsPass,
)

from onnxplain.errors import ModelError, UnsupportedModelError
from onnxplain.graph import shapes
from onnxplain.graph.emit import const_array
from onnxplain.graph.grad import clone, prune, reads, value_index

Evaluate = Callable[[ir.Model, dict[str, np.ndarray]], dict[str, np.ndarray]]
"""Runs a model: feeds by input name -> every output by name."""

_LARGE = 1 << 20  # bytes; constants beyond it are folded only if that does not grow the model

_RANDOM = frozenset(
    "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli".split()
)
# Folding these would turn quantized weights into float ones.
_QUANTIZATION = frozenset("QuantizeLinear DequantizeLinear DynamicQuantizeLinear".split())
_NUMPY = frozenset(
    {
        ir.DataType[name]
        for name in "BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 FLOAT16 FLOAT DOUBLE".split()
    }
)


@dataclass(frozen=True)
class Normalized:
    """A model in normal form.

    Attributes:
        model: the model that was given, changed in place.
        aliases: names that are gone (of values, and of the nodes that only passed a value on),
            and the value that stands for each.
    """

    model: ir.Model
    aliases: dict[str, str]


def normalize(model: ir.Model, evaluate: Evaluate) -> Normalized:
    """Bring a model of the working opset into normal form, in place.

    Raises:
        ModelError: cyclic graph or functions, types that contradict each other.
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
    removed = _drop_copies(model)
    prune(model)
    _infer(model)
    fold_constants(model, evaluate)
    _infer(model)
    present = value_index(model.graph)
    aliases = {old: value.name for old, value in removed.items()} | calls
    return Normalized(
        model,
        {
            old: new
            for old, new in aliases.items()
            if old and old not in present and new in present
        },
    )


def _infer(model: ir.Model) -> None:
    try:
        shapes.infer(model)
    except onnx.shape_inference.InferenceError as e:
        raise ModelError(f"the model's types or shapes contradict each other: {e}") from e


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
    except PassError as e:
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


def _drop_copies(model: ir.Model) -> dict[str, ir.Value]:
    """Remove Identity and inference Dropout; names that are gone -> the surviving value."""
    gone: dict[str, ir.Value] = {}
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
    return gone


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
        if array.nbytes > max(_LARGE, _bytes(value, constant)):
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


def _foldable(node: ir.Node, constant: set[ir.Value]) -> bool:
    """Whether a node computes a constant that is worth keeping; its outputs are then marked so."""
    inputs = [v for v in node.inputs if v is not None]
    if (
        node.domain != ""
        or node.op_type in _RANDOM | _QUANTIZATION
        or not all(v in constant for v in inputs)
        or any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
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


def _bytes(value: ir.Value, constant: Iterable[ir.Value]) -> int:
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


# The axis of the weight that counts output channels.
_CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1}


def _fold_batchnorm(graph: ir.Graph, node: ir.Node, keep: set[str]) -> None:
    x, y = node.inputs[0], node.outputs[0]
    before = x.producer() if x is not None else None
    if x is None or before is None or before.domain or before.op_type not in _CHANNEL_AXIS:
        return
    if len(x.uses()) != 1 or x.is_graph_output() or x.name in keep:
        return
    training = node.attributes.get("training_mode")
    if (training and training.as_int()) or before.graph is not graph:
        return
    statistics = [const_array(v) for v in node.inputs[1:5]]
    old_weight = before.inputs[1]
    weight = const_array(old_weight)
    bias_in = before.inputs[2] if len(before.inputs) > 2 else None
    bias = np.zeros(()) if bias_in is None else const_array(bias_in)
    if weight is None or bias is None or any(s is None for s in statistics):
        return
    scale, shift, mean, var = (np.asarray(s, np.float64) for s in statistics)
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    factor = scale / np.sqrt(var + epsilon)
    attrs = before.attributes
    beta = 1.0
    if before.op_type == "Gemm":
        alpha = attrs["alpha"].as_float() if "alpha" in attrs else 1.0
        beta = attrs["beta"].as_float() if "beta" in attrs else 1.0
        transposed = "transB" in attrs and attrs["transB"].as_int()
        by_channel = factor[:, None] if transposed else factor
        if bias.ndim == 2 and bias.shape[0] != 1:
            return  # a bias for every row can't be told from one for every example
        folded = np.asarray(weight, np.float64) * by_channel
        if beta == 0 or alpha == 0:
            return
    else:
        folded = _scale_channels(np.asarray(weight, np.float64), factor, before)
    new_bias = (np.asarray(bias, np.float64).reshape(-1) * beta - mean) * factor + shift
    for index, array in ((1, folded), (2, new_bias / beta)):
        old = before.inputs[index] if len(before.inputs) > index else None
        stem = (old.name if old is not None else None) or f"{before.name}.bias"
        value = _weight(graph, f"{stem}.folded", array.astype(weight.dtype))
        if len(before.inputs) <= index:
            before.resize_inputs(index + 1)
        before.replace_input_with(index, value)
    name, before_output = y.name, before.outputs[0]
    y.name = None
    before_output.shape, before_output.type = y.shape, y.type
    ir.convenience.replace_all_uses_with(y, before_output, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    before_output.name = name


def _scale_channels(weight: np.ndarray, factor: np.ndarray, conv: ir.Node) -> np.ndarray:
    """Multiply a (transposed) convolution's kernel by one factor for each output channel."""
    ones = (1,) * (weight.ndim - 2)
    if conv.op_type == "Conv":
        return weight * factor.reshape(-1, 1, *ones)
    # [in, out / groups, ...]: the inputs of one group lead to the group's outputs.
    groups = conv.attributes["group"].as_int() if "group" in conv.attributes else 1
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * factor.reshape(groups, 1, -1, *ones)).reshape(weight.shape)


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
