"""Guided backpropagation and deconvolution: what an activation lets back is made non-negative.

An operator is ReLU-like if it is zero below a threshold and the identity above it (up to a limit):
Relu, ThresholdedRelu, Clip with minimum 0, Max with 0, and Where(x > 0, x, 0). Leaky and smooth
activations (LeakyRelu, PRelu, Elu, Gelu, ...) are not: they are changed only where asked for.

Static quantizers drop a ReLU whose result is quantized with the least integer for a zero point: the
QuantizeLinear itself cuts off what is negative. One with such a zero point is ReLU-like, then,
where the operators before it can give something negative. It only rounds where they can't: behind a
ReLU, a sigmoid or another such QuantizeLinear, be it through pooling, concatenation, sums or
products of what comes from there; nor does one of an input of the model stand for a ReLU. (A layer
without ReLU that was positive on all the calibration data gets the same zero point and can't be
told from one with it; the deployed model cuts it off at zero all the same.)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx_ir as ir

from onnxplain.errors import InputError
from onnxplain.graph.emit import Call, Emitter, const_array
from onnxplain.rules import RuleTable
from onnxplain.rules.vjp import VJP

RELU_LIKE = ("Relu", "ThresholdedRelu", "Clip", "Max", "Where", "QuantizeLinear")
ACTIVATIONS = (
    *RELU_LIKE,
    *"LeakyRelu PRelu Elu Selu Celu Gelu Swish HardSwish Mish Softplus Softsign Shrink".split(),
    *"Sigmoid HardSigmoid Tanh".split(),
)
# Operators without a negative result, and those without one if no operand is negative.
_NON_NEGATIVE = frozenset(
    "Relu ThresholdedRelu Sigmoid HardSigmoid Softmax Softplus Exp Sqrt Abs".split()
)
_KEEPS_SIGN = frozenset(
    "MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool ReduceMean ReduceSum "
    "ReduceMax ReduceMin Concat Split Slice Gather Reshape Flatten Squeeze Unsqueeze Transpose "
    "Expand Tile Pad Resize Identity Dropout Cast DepthToSpace SpaceToDepth "
    "Add Mul Max Min Sum Mean QuantizeLinear DequantizeLinear".split()
)
# Of these every operand is data; of the others, the first.
_COMBINING = frozenset("Concat Add Mul Max Min Sum Mean".split())


def guided(op: Emitter, n: Call, g: ir.Value) -> list[ir.Value | None]:
    """The positive part of the gradient (Springenberg et al. 2014, arXiv:1412.6806)."""
    return [None if d is None else op.Relu(d) for d in VJP.gradient(op, n, g)]


def deconvolution(op: Emitter, n: Call, g: ir.Value) -> list[ir.Value | None]:
    """The positive part of the cotangent, whatever the activation let through on the way forward
    (Zeiler and Fergus 2013, arXiv:1311.2901)."""
    if n.node.op_type == "QuantizeLinear":  # in steps of the integer; zero is always in range
        inside = n.on([op.full_like(n.x[0], 0.0), *n.x[1:]], n.y)
        return VJP.gradient(op, inside, op.Relu(g))
    return [
        op.unbroadcast(op.Relu(g), n.y[0], x) if n.needs(i) else None for i, x in enumerate(n.x)
    ]


@cache
def table(rule: Any, activations: str | tuple[str, ...] = "relu") -> RuleTable:
    """One of these rules for some activations, in front of the derivatives.

    Args:
        rule: :func:`guided` or :func:`deconvolution`.
        activations: "relu" for the ReLU-like operators, "all" for every activation function, or
            the types of operators.

    Raises:
        InputError: an unknown type.
    """
    named = {"relu": RELU_LIKE, "all": ACTIVATIONS}
    types = named.get(activations, ()) if isinstance(activations, str) else activations
    if not types or not {*types} <= {*ACTIVATIONS}:
        raise InputError(
            f"activations={activations!r} names no activation functions, or others; give 'relu', "
            f"'all', or a list of {', '.join(ACTIVATIONS)}"
        )
    made = RuleTable(rule.__name__, matches=is_activation)
    made.rule(*{*types} - {"QuantizeLinear"})(rule)
    if "QuantizeLinear" in types:
        made.rule("QuantizeLinear", quantizes=True)(rule)
    return made


def is_activation(node: ir.Node) -> bool:
    """Whether an operator that can be more than an activation is one."""
    x = node.inputs
    if node.op_type == "Clip":
        return _is_zero(x[1] if len(x) > 1 else None)
    if node.op_type == "Max":
        return len(x) == 2 and any(map(_is_zero, x))
    if node.op_type == "Where":
        mask = x[0].producer() if x[0] is not None else None
        return (
            mask is not None
            and mask.op_type in ("Greater", "GreaterOrEqual")
            and mask.inputs[0] is x[1]
            and _is_zero(mask.inputs[1])
            and _is_zero(x[2])
        )
    return node.op_type != "QuantizeLinear" or (_cuts_off(node) and not _is_non_negative(x[0]))


def _cuts_off(node: ir.Node) -> bool:
    """Whether a QuantizeLinear has its zero point at the least integer of its type."""
    stored = node.outputs[0].dtype
    if stored is None or not stored.is_integer():
        return False
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return stored.min == 0
    zero = const_array(node.inputs[2])
    return zero is not None and bool((zero == stored.min).all())


def _clamps(node: ir.Node) -> bool:
    """Whether an operator has no negative result, whatever it is fed."""
    if node.op_type == "QuantizeLinear":
        return _cuts_off(node)
    if node.op_type in ("Clip", "Max", "Where"):
        return is_activation(node)
    return node.op_type in _NON_NEGATIVE


def _is_non_negative(value: ir.Value | None) -> bool:
    """Whether the operators before a value leave nothing negative; inputs of a model count so."""
    seen, left = set(), [value]
    while left:
        value = left.pop()
        if value is None or value in seen or value.is_graph_input():
            continue
        seen.add(value)
        constant, node = const_array(value), value.producer()
        if constant is not None or node is None:
            if constant is None or (constant < 0).any():
                return False
        elif not _clamps(node):
            if node.op_type not in _KEEPS_SIGN:
                return False
            left += node.inputs if node.op_type in _COMBINING else node.inputs[:1]
    return True


def _is_zero(value: ir.Value | None) -> bool:
    constant = const_array(value)
    return constant is not None and not constant.any()
