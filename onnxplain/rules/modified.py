"""Guided backpropagation and deconvolution: what an activation lets back is made non-negative.

An operator is ReLU-like if it is zero below a threshold and the identity above it (up to a limit):
Relu, ThresholdedRelu, Clip with minimum 0, Max with 0, and Where(x > 0, x, 0). Leaky and smooth
activations (LeakyRelu, PRelu, Elu, Gelu, ...) are not: they are changed only where asked for.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx_ir as ir

from onnxplain.errors import InputError
from onnxplain.graph.emit import Call, Emitter, const_array
from onnxplain.rules import RuleTable
from onnxplain.rules.vjp import VJP

RELU_LIKE = ("Relu", "ThresholdedRelu", "Clip", "Max", "Where")
ACTIVATIONS = (
    *RELU_LIKE,
    *"LeakyRelu PRelu Elu Selu Celu Gelu Swish HardSwish Mish Softplus Softsign Shrink".split(),
    *"Sigmoid HardSigmoid Tanh".split(),
)


def guided(op: Emitter, n: Call, g: ir.Value) -> list[ir.Value | None]:
    """The positive part of the gradient (Springenberg et al. 2014, arXiv:1412.6806)."""
    return [None if d is None else op.Relu(d) for d in VJP.gradient(op, n, g)]


def deconvolution(op: Emitter, n: Call, g: ir.Value) -> list[ir.Value | None]:
    """The positive part of the cotangent, whatever the activation let through on the way forward
    (Zeiler and Fergus 2013, arXiv:1311.2901)."""
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
    made = RuleTable(rule.__name__, matches=_is_activation)
    made.rule(*types)(rule)
    return made


def _is_activation(node: ir.Node) -> bool:
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
    return True


def _is_zero(value: ir.Value | None) -> bool:
    constant = const_array(value)
    return constant is not None and not constant.any()
