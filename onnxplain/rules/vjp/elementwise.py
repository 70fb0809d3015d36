"""Elementwise arithmetic and functions, with broadcasting; the walk sums broadcast axes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxplain.errors import UnsupportedModelError
from onnxplain.graph.emit import Call, Emitter
from onnxplain.rules import RuleTable

TABLE = RuleTable("elementwise")
rule = TABLE.rule

Formula = Callable[[Emitter, Any, Any, Any], Any]
"""``(op, g, x, y)``: the cotangent of the input of a function of one variable."""


def register_unary(table: RuleTable, formulas: Mapping[str, Formula]) -> None:
    """Register functions of one variable by the formula of their derivative."""
    for op_type, formula in formulas.items():
        table.rule(op_type)(lambda op, n, g, f=formula: f(op, g, n.x[0], n.y[0]))


def _one_plus_square(op: Emitter, v: Any) -> Any:
    return op.Add(op.Mul(v, v), 1.0)


def _one_minus_square(op: Emitter, v: Any) -> Any:
    return op.Sub(1.0, op.Mul(v, v))


register_unary(
    TABLE,
    {
        "Identity": lambda op, g, x, y: g,
        "Cast": lambda op, g, x, y: op.cast_like(g, x),
        "Neg": lambda op, g, x, y: op.Neg(g),
        "Abs": lambda op, g, x, y: op.Mul(g, op.Sign(x)),
        "Exp": lambda op, g, x, y: op.Mul(g, y),
        "Log": lambda op, g, x, y: op.Div(g, x),
        "Sqrt": lambda op, g, x, y: op.Div(g, op.Add(y, y)),
        "Reciprocal": lambda op, g, x, y: op.Neg(op.Mul(g, op.Mul(y, y))),
        "Sin": lambda op, g, x, y: op.Mul(g, op.Cos(x)),
        "Cos": lambda op, g, x, y: op.Neg(op.Mul(g, op.Sin(x))),
        "Tan": lambda op, g, x, y: op.Mul(g, _one_plus_square(op, y)),
        "Asin": lambda op, g, x, y: op.Div(g, op.Sqrt(_one_minus_square(op, x))),
        "Acos": lambda op, g, x, y: op.Neg(op.Div(g, op.Sqrt(_one_minus_square(op, x)))),
        "Atan": lambda op, g, x, y: op.Div(g, _one_plus_square(op, x)),
        "Sinh": lambda op, g, x, y: op.Mul(g, op.Cosh(x)),
        "Cosh": lambda op, g, x, y: op.Mul(g, op.Sinh(x)),
        "Tanh": lambda op, g, x, y: op.Mul(g, _one_minus_square(op, y)),
        "Asinh": lambda op, g, x, y: op.Div(g, op.Sqrt(_one_plus_square(op, x))),
        "Acosh": lambda op, g, x, y: op.Div(g, op.Sqrt(op.Sub(op.Mul(x, x), 1.0))),
        "Atanh": lambda op, g, x, y: op.Div(g, _one_minus_square(op, x)),
        "Erf": lambda op, g, x, y: op.Mul(
            g, op.Mul(op.Exp(op.Neg(op.Mul(x, x))), 2.0 / math.sqrt(math.pi))
        ),
    },
)


@rule("CastLike")
def cast_like(op: Emitter, n: Call, g: Any) -> Any:
    x, like = n.x
    return op.cast_like(g, x), lambda: op.full_like(like, 0.0)


@rule("Dropout")
def dropout(op: Emitter, n: Call, g: Any) -> Any:
    if n.has(2) and (n.const(2) is None or n.const(2)):
        raise UnsupportedModelError(
            f"node '{n.node.name}' is a Dropout in training mode (or its mode is computed): its "
            "output is random. Export the model in evaluation mode"
        )
    return g, lambda: op.full_like(n.x[1], 0.0)


@rule("Add", broadcasts=True)
def add(op: Emitter, n: Call, g: Any) -> Any:
    return g, g


@rule("Sub", broadcasts=True)
def sub(op: Emitter, n: Call, g: Any) -> Any:
    return g, lambda: op.Neg(g)


@rule("Mul", broadcasts=True)
def mul(op: Emitter, n: Call, g: Any) -> Any:
    a, b = n.x
    return lambda: op.Mul(g, b), lambda: op.Mul(g, a)


@rule("Div", broadcasts=True)
def div(op: Emitter, n: Call, g: Any) -> Any:
    quotient = op.Div(g, n.x[1])
    return quotient, lambda: op.Neg(op.Mul(quotient, n.y[0]))


@rule("Mod", broadcasts=True)
def mod(op: Emitter, n: Call, g: Any) -> Any:
    a, b = n.x
    # y = a - kb with an integer k: truncated for fmod, floored else.
    return g, lambda: op.Mul(g, op.Round(op.Div(op.Sub(n.y[0], a), b)))


@rule("Pow", broadcasts=True)
def pow_(op: Emitter, n: Call, g: Any) -> Any:
    x, exponent = n.x
    known = n.const(1)

    def base() -> Any:
        # Exponent 0 needs x ** 0, not 0 * x ** -1, which is not a number at x = 0.
        if known is not None:
            e = op.const(known, x.dtype)
            less = np.where(known == 0, 0, known.astype(np.float64) - 1)
            power = x if np.all(less == 1) else op.Pow(x, op.const(less, x.dtype))
        else:
            e = op.cast_like(exponent, x)
            singular = op.And(op.Equal(x, 0.0), op.Equal(e, 0.0))
            power = op.Pow(x, op.Sub(op.Where(singular, op.const(1.0, x.dtype), e), 1.0))
        return op.Mul(g, op.Mul(power, e))

    def power() -> Any:
        # d(x ** e)/de = x ** e * log(x), which tends to 0 with x where e >= 0.
        flat = op.And(op.Equal(x, 0.0), op.GreaterOrEqual(exponent, 0.0))
        log = op.Log(op.Where(flat, op.const(1.0, x.dtype), x))
        return op.cast_like(op.Mul(g, op.Mul(n.y[0], log)), exponent)

    return base, power


@rule("Sum", broadcasts=True)
def sum_(op: Emitter, n: Call, g: Any) -> Any:
    return (g,) * len(n.x)


@rule("Mean", broadcasts=True)
def mean(op: Emitter, n: Call, g: Any) -> Any:
    return (op.Mul(g, 1.0 / len(n.x)),) * len(n.x)


@rule("Max", "Min", broadcasts=True)
def extremum(op: Emitter, n: Call, g: Any) -> Any:
    """Inputs that tie share the cotangent evenly."""
    if len(n.x) == 1:
        return g
    chosen = [op.Cast(op.Equal(x, n.y[0]), to=g.dtype) for x in n.x]
    share = op.Div(g, op.Sum(*chosen))
    return [lambda c=c: op.Mul(share, c) for c in chosen]


@rule("Where", broadcasts=True)
def where(op: Emitter, n: Call, g: Any) -> Any:
    zero = op.const(0.0, g.dtype)
    return None, lambda: op.Where(n.x[0], g, zero), lambda: op.Where(n.x[0], zero, g)


@rule("Clip", broadcasts=True)
def clip(op: Emitter, n: Call, g: Any) -> Any:
    """At a limit the cotangent goes to the input; where min > max, to max."""
    x, low, high = (*n.x, None, None)[:3]

    def to_low() -> Any:
        below = op.Less(x, low)
        return keep(op.And(below, op.Less(low, high)) if high is not None else below)

    def to_high() -> Any:
        above = op.Greater(x, high)
        return keep(op.Or(above, op.Less(high, low)) if low is not None else above)

    def keep(mask: Any) -> Any:
        return op.Mul(g, op.Cast(mask, to=g.dtype))

    return lambda: keep(op.Equal(x, n.y[0])), to_low, to_high
