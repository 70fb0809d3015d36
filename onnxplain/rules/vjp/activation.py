"""Activation functions. Masks and slopes come from the output where it tells as much as the input:
then the input need not be kept, and onnxruntime can fuse the activation into the layer before."""

from __future__ import annotations

import math
from typing import Any

from onnxplain.graph.emit import Call, Emitter
from onnxplain.rules import RuleTable
from onnxplain.rules.vjp.elementwise import register_unary

TABLE = RuleTable("activation")
rule = TABLE.rule


def _masked(op: Emitter, g: Any, mask: Any) -> Any:
    # Faster than Where, than Sign of the output, and than a mask in the blocked layout.
    return op.Mul(g, op.Cast(mask, to=g.dtype))


def _select(op: Emitter, g: Any, condition: Any, yes: Any, no: Any) -> Any:
    """``g`` times one of two slopes, numbers or values."""
    yes, no = (op.const(v, g.dtype) if isinstance(v, float) else v for v in (yes, no))
    return op.Mul(g, op.Where(condition, yes, no))


def _softsign(op: Emitter, g: Any, x: Any, y: Any) -> Any:
    scale = op.Add(op.Abs(x), 1.0)
    return op.Div(g, op.Mul(scale, scale))


def _mish(op: Emitter, g: Any, x: Any, y: Any) -> Any:
    t = op.Tanh(op.Softplus(x))
    rise = op.Mul(op.Mul(x, op.Sigmoid(x)), op.Sub(1.0, op.Mul(t, t)))
    return op.Mul(g, op.Add(t, rise))


def _hard_swish(op: Emitter, g: Any, x: Any, y: Any) -> Any:
    # HardSigmoid(x), and x / 6 strictly inside (-3, 3).
    rise = op.Mul(_masked(op, x, op.Less(op.Abs(x), 3.0)), 1.0 / 6.0)
    gate = op.HardSigmoid(x, alpha=1.0 / 6.0, beta=0.5)
    return op.Mul(g, op.Add(gate, rise))


register_unary(
    TABLE,
    {
        "Relu": lambda op, g, x, y: _masked(op, g, op.Greater(y, 0.0)),
        "Sigmoid": lambda op, g, x, y: op.Mul(g, op.Mul(y, op.Sub(1.0, y))),
        "Softplus": lambda op, g, x, y: op.Mul(g, op.Sigmoid(x)),
        "Softsign": _softsign,
        "Mish": _mish,
        "HardSwish": _hard_swish,
    },
)


@rule("LeakyRelu")
def leaky_relu(op: Emitter, n: Call, g: Any) -> Any:
    alpha = n.attr("alpha")
    positive = op.Greater(n.y[0] if alpha >= 0 else n.x[0], 0.0)
    return _select(op, g, positive, 1.0, alpha)


@rule("PRelu", broadcasts=True)
def prelu(op: Emitter, n: Call, g: Any) -> Any:
    x, slope = n.x
    positive, zero = op.Greater(x, 0.0), op.const(0.0, g.dtype)
    return (
        lambda: op.Where(positive, g, op.Mul(g, slope)),
        lambda: op.Where(positive, zero, op.Mul(g, x)),
    )


@rule("Elu", "Selu", "Celu")
def exponential_unit(op: Emitter, n: Call, g: Any) -> Any:
    """Where x <= 0 the slope is linear in the output, so that no large exponential is taken."""
    alpha = n.attr("alpha")
    gamma = n.attr("gamma") if n.node.op_type == "Selu" else 1.0
    y = n.y[0]
    if n.node.op_type == "Celu":
        below = op.Add(op.Mul(y, 1.0 / alpha), 1.0)
        signed = y
    else:
        below = op.Add(y, gamma * alpha)
        signed = y if alpha >= 0 and gamma > 0 else n.x[0]
    return _select(op, g, op.Greater(signed, 0.0), gamma, below)


@rule("ThresholdedRelu")
def thresholded_relu(op: Emitter, n: Call, g: Any) -> Any:
    return _masked(op, g, op.Greater(n.x[0], n.attr("alpha")))


@rule("Shrink")
def shrink(op: Emitter, n: Call, g: Any) -> Any:
    return _masked(op, g, op.Greater(op.Abs(n.x[0]), n.attr("lambd")))


@rule("HardSigmoid")
def hard_sigmoid(op: Emitter, n: Call, g: Any) -> Any:
    inside = op.And(op.Greater(n.y[0], 0.0), op.Less(n.y[0], 1.0))
    return _select(op, g, inside, n.attr("alpha"), 0.0)


@rule("Gelu")
def gelu(op: Emitter, n: Call, g: Any) -> Any:
    x = n.x[0]
    if n.attr("approximate") == "tanh":
        # x * Sigmoid(x * (a + b x^2)); the slope is constant beyond 10, where x^2 may overflow.
        a = 2.0 * math.sqrt(2.0 / math.pi)
        b = 0.044715 * a
        x = op.Clip(x, -10.0, 10.0)
        square = op.Mul(x, x)
        gate = op.Sigmoid(op.Mul(x, op.Add(op.Mul(square, b), a)))
        rise = op.Mul(x, op.Add(op.Mul(square, 3.0 * b), a))
        return op.Mul(g, op.Mul(gate, op.Add(op.Mul(op.Sub(1.0, gate), rise), 1.0)))
    # The normal distribution Phi(x) plus x times its density; u = x / sqrt(2).
    u = op.Mul(x, math.sqrt(0.5))
    distribution = op.Add(op.Mul(op.Erf(u), 0.5), 0.5)
    density = op.Exp(op.Sub(-0.5 * math.log(math.pi), op.Mul(u, u)))
    return op.Mul(g, op.Add(distribution, op.Mul(u, density)))


@rule("Swish")
def swish(op: Emitter, n: Call, g: Any) -> Any:
    x, y, alpha = n.x[0], n.y[0], n.attr("alpha")
    scaled, grown = (x, y) if alpha == 1.0 else (op.Mul(x, alpha), op.Mul(y, alpha))
    gate = op.Sigmoid(scaled)
    return op.Mul(g, op.Add(gate, op.Mul(grown, op.Sub(1.0, gate))))


@rule("Softmax")
def softmax(op: Emitter, n: Call, g: Any) -> Any:
    y = n.y[0]
    mean = op.ReduceSum(op.Mul(g, y), [n.attr("axis")], keepdims=1)
    return op.Mul(y, op.Sub(g, mean))


@rule("LogSoftmax")
def log_softmax(op: Emitter, n: Call, g: Any) -> Any:
    total = op.ReduceSum(g, [n.attr("axis")], keepdims=1)
    return op.Sub(g, op.Mul(op.Exp(n.y[0]), total))
