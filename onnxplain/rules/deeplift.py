"""DeepLIFT: what the walk passes back are multipliers, differences of outputs over differences of
inputs between a pass on the input and one on a reference.

The rules keep summation-to-delta: over an operator's inputs, the sum of multiplier times difference
is the multiplier times the difference of its output. Sources: Shrikumar, Greenside, Kundaje,
"Learning Important Features Through Propagating Activation Differences", 2017, arXiv:1704.02685,
sections 3.5.1 to 3.5.3; max pooling as in Captum 0.9. What the paper leaves open:

- products: d(ab) = da (b + b0) / 2 + db (a + a0) / 2, the mean over the two orders of switching the
  operands; other operators of two operands likewise (the Shapley value of two players);
- softmax: :func:`softmax`; normalizations: products, and the rescale rule of 1 / sqrt(variance);
- conditions and indices have no difference: what they choose is the mean of both choices
  (``Where``, but for the ReLU ``Where(x > 0, x, 0)``), or what they choose at the input
  (``Gather``). The gap of the sum shows their share;
- differences that are rounding noise have no ratio: :func:`_ratio`;
- rounding of quantized models passes straight through.

Operators that are neither listed here nor have a function body are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxplain.errors import NoRuleError
from onnxplain.graph.emit import Call, Emitter, dims, is_float, rank
from onnxplain.rules import Rules, RuleTable
from onnxplain.rules.vjp import VJP

_INSTEAD = (
    "Explain with respect to a layer behind it, or use IntegratedGradients, which takes "
    "derivatives and adds up too"
)

# The derivative is the multiplier.
_LINEAR = (
    "Identity Cast CastLike Neg Dropout Add Sub Sum Mean Reshape Flatten Squeeze Unsqueeze "
    "Transpose Concat Split Expand Tile Slice Pad DepthToSpace SpaceToDepth Trilu ReverseSequence "
    "Compress Gather GatherElements GatherND OneHot Resize AveragePool GlobalAveragePool ReduceSum "
    "ReduceMean CumSum QuantizeLinear DequantizeLinear DynamicQuantizeLinear"
).split()
# Linear in each of these operands: their product is.
_FACTORS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        ("Mul", "MatMul", "Gemm", "Conv", "ConvTranspose", "BatchNormalization"), (0, 1)
    ),
    "ReduceSumSquare": (0,),
}
_UNARY = (
    "Abs Exp Log Sqrt Reciprocal Sin Cos Tan Asin Acos Atan Sinh Cosh Tanh Asinh Acosh Atanh Erf "
    "Relu LeakyRelu Elu Selu Celu ThresholdedRelu Shrink Sigmoid HardSigmoid Softplus Softsign "
    "Gelu Swish HardSwish Mish"
).split()
_ELEMENTWISE = "Pow Mod PRelu Clip Max Min".split()
# Differences of these are as exact as those of their inputs.
_EXACT = frozenset("Relu Abs ThresholdedRelu Mod Clip Max Min Softmax LogSoftmax".split())
# Relative spacing of numbers.
_SPACING = {"DOUBLE": 2.0**-52, "FLOAT": 2.0**-23, "FLOAT16": 2.0**-10, "BFLOAT16": 2.0**-7}
_EXTREMA = "MaxPool GlobalMaxPool ReduceMax ReduceMin".split()


def rescale_rules(eps: float = 1e-10, softmax: Literal["exact", "centered"] = "exact") -> Rules:
    """The rescale rule for nonlinearities, and what goes with it.

    Args:
        eps: differences of inputs up to this are none: the gradient is taken instead.
        softmax: ``exact`` keeps the sum; ``centered`` is Captum's, a rescaled gradient less its
            mean, which doesn't.
    """
    table = RuleTable("deeplift", instead=_INSTEAD)
    for op_type in _LINEAR:
        key = ("", op_type)
        table.entries[key] = next(t.entries[key] for t in VJP if key in t.entries)
    table.rule(*_FACTORS, "Einsum")(_product)
    table.rule("Div")(_quotient)
    table.rule("Where")(_where)
    table.rule("ScatterElements", "ScatterND")(_scatter)
    table.rule(*_UNARY)(partial(_rescale, eps=eps))
    table.rule(*_ELEMENTWISE)(partial(_elementwise, eps=eps))
    table.rule(*_EXTREMA)(partial(_extremum, eps=eps))
    if softmax == "exact":
        table.rule("Softmax")(_softmax)
        table.rule("LogSoftmax")(_log_softmax)
    else:
        table.rule("Softmax", "LogSoftmax")(partial(_centered, eps=eps))
    table.rule("LayerNormalization", "RMSNormalization")(_layer_normalization)
    table.rule("InstanceNormalization", "GroupNormalization")(_group_normalization)
    return Rules([table])


# ---- differences ------------------------------------------------------------------------------


def _shaped(value: Any, like: ir.Value) -> Any:
    value.shape = like.shape
    return value


def _mean(op: Emitter, a: ir.Value, b: ir.Value) -> Any:
    return a if a is b else _shaped(op.Mul(op.Add(a, b), 0.5), a)


def _difference(op: Emitter, a: ir.Value, b: ir.Value) -> Any:
    return _shaped(op.Sub(a, b), a)


def _moving(n: Call) -> list[int]:
    """The operands that have a twin in the reference pass, but for integers (axes, shapes)."""
    pairs = enumerate(zip(n.x, n.x0, strict=True))
    return [i for i, (x, x0) in pairs if x is not x0 and is_float(x)]


def _derivative(op: Emitter, n: Call, i: int, g: ir.Value) -> Any:
    return VJP.gradient(op, n, g)[i]


def _over(op: Emitter, change: Any, delta: Any, flat: Any, eps: float) -> Any:
    """``change / delta``, or ``flat`` where ``delta`` vanishes."""
    return op.Where(op.LessOrEqual(op.Abs(delta), eps), flat, op.Div(change, delta))


def _ratio(op: Emitter, n: Call, i: int, g: Any, change: Any, delta: Any, eps: float) -> Any:
    """``change / delta`` of a function of one operand; the mean slope of both ends where ``delta``
    vanishes or where the two may differ by rounding alone.

    A difference of almost equal numbers is noise, and so is a ratio of such differences. Since the
    slope takes its place only where it explains the change as well, the sum stays.
    """
    ends = n, n.on(n.x0, n.y0)
    slope = _mean(op, *(_derivative(op, end, i, g) for end in ends))
    size = op.Add(op.Abs(n.y[0]), op.Abs(n.y0[0]))
    if n.node.op_type == "Sigmoid":  # which runtimes compute as a half and the rest
        size = op.Add(size, 0.5)
    rounding = op.Add(
        op.Mul(op.Abs(g), size),
        op.Mul(op.Abs(slope), op.Add(op.Abs(n.x[i]), op.Abs(n.x0[i]))),
    )
    noise = op.Mul(rounding, 4 * _SPACING[n.y[0].dtype.name])  # type: ignore[union-attr]
    alike = op.LessOrEqual(op.Abs(op.Sub(change, op.Mul(slope, delta))), noise)
    return op.Where(alike, slope, _over(op, change, delta, slope, eps))


def _multipliers(
    op: Emitter, n: Call, g: Any, contributions: Mapping[int, Any], eps: float
) -> list[Any]:
    """Contributions of some operands over their differences; the gradient where these vanish."""
    gradient = VJP.gradient(op, n, g)
    found: list[Any] = [None] * len(n.x)
    for i, contribution in contributions.items():
        if n.needs(i):
            delta = _difference(op, n.x[i], n.x0[i])
            found[i] = _over(op, contribution, delta, gradient[i], eps)
    return found


def _refusal(n: Call, why: str) -> NoRuleError:
    return NoRuleError(
        f"operator {n.node.op_type} (node '{n.node.name}') {why}: DeepLIFT has no rule for that. "
        f"{_INSTEAD}"
    )


# ---- operators --------------------------------------------------------------------------------


def _product(op: Emitter, n: Call, g: Any) -> Any:
    """The derivative midway: exact where the output is linear in each of at most two operands."""
    factors = _FACTORS.get(n.node.op_type, range(len(n.x)))
    if sum(i in factors for i in _moving(n)) > 2:
        raise _refusal(n, "multiplies more than two operands that depend on the input")
    if n.node.op_type == "BatchNormalization" and (n.needs(3) or n.needs(4)):
        raise _refusal(n, "has statistics that depend on the input")
    middle = [_mean(op, n.x[i], n.x0[i]) if i in factors else x for i, x in enumerate(n.x)]
    return VJP.gradient(op, n.on(middle, n.y), g)


def _quotient(op: Emitter, n: Call, g: Any) -> Any:
    """The product of the dividend and the reciprocal, whose multiplier is -1 / (b b0)."""
    (a, b), (a0, b0) = n.x, n.x0
    over = op.Reciprocal(b)
    over0 = over if b is b0 else op.Reciprocal(b0)
    step = op.Mul(over, over0)
    return (
        lambda: op.unbroadcast(op.Mul(g, _mean(op, over, over0)), n.y[0], a),
        lambda: op.unbroadcast(op.Neg(op.Mul(op.Mul(g, _mean(op, a, a0)), step)), n.y[0], b),
    )


def _where(op: Emitter, n: Call, g: Any) -> Any:
    here = VJP.gradient(op, n, g)
    if n.x[0] is n.x0[0]:
        return here
    there = VJP.gradient(op, n.on([n.x0[0], *n.x[1:]], n.y), g)
    pairs = zip(here, there, strict=True)
    return [None if v is None or w is None else _mean(op, v, w) for v, w in pairs]


def _scatter(op: Emitter, n: Call, g: Any) -> Any:
    if (n.attr("reduction") or "none") not in ("none", "add"):
        raise _refusal(n, "reduces by another operation than a sum")
    return VJP.gradient(op, n, g)


def _rescale(op: Emitter, n: Call, g: Any, eps: float) -> Any:
    """The difference of the output over that of the only operand that has one."""
    change = op.Mul(g, op.Sub(n.y[0], n.y0[0]))
    (i,) = _moving(n) or [0]
    if n.node.op_type not in _EXACT and dims(n.x[i]) == dims(n.y[0]):
        delta = _difference(op, n.x[i], n.x0[i])
        near = op.LessOrEqual(op.Abs(delta), eps)
        ratio = _ratio(op, n, i, g, change, delta, eps)
        return [None] * i + [op.Where(near, _derivative(op, n, i, g), ratio)]
    if n.node.op_type in _ELEMENTWISE:
        change = op.unbroadcast(change, n.y[0], n.x[i])
    return _multipliers(op, n, g, {i: change}, eps)


def _elementwise(op: Emitter, n: Call, g: Any, eps: float) -> Any:
    """Of two operands, each contributes the mean of its change first and its change last."""
    moving = _moving(n)
    if len(moving) < 2:
        return _rescale(op, n, g, eps)
    if len(moving) > 2:
        if n.node.op_type in ("Max", "Min"):
            return _extremum(op, n, g, eps)
        raise _refusal(n, f"has {len(moving)} operands that depend on the input")
    contributions = {}
    for i, other in (moving, moving[::-1]):
        operands = list(n.x)
        operands[other] = n.x0[other]
        alone = n.again(op, *operands).y[0]
        operands = list(n.x)
        operands[i] = n.x0[i]
        without = n.again(op, *operands).y[0]
        share = op.Add(op.Sub(alone, n.y0[0]), op.Sub(n.y[0], without))
        change = op.Mul(g, op.Mul(share, 0.5))
        contributions[i] = op.unbroadcast(change, n.y[0], n.x[i])
    return _multipliers(op, n, g, contributions, eps)


def _extremum(op: Emitter, n: Call, g: Any, eps: float) -> Any:
    """What the extremum gained belongs to the extremal element of the input, what it lost to that
    of the reference: Captum's rule for max pooling. Neither element stood still."""
    y, y0 = n.y[0], n.y0[0]
    higher = op.emit("Min" if "Min" in n.node.op_type else "Max", y, y0)
    gained, lost = (_shaped(op.Mul(g, op.Sub(*ends)), y) for ends in ((higher, y0), (y, higher)))
    here = VJP.gradient(op, n, gained)
    there = VJP.gradient(op, n.on(n.x0, n.y0), lost)
    contributions = {i: op.Add(here[i], there[i]) for i in range(len(n.x)) if n.needs(i)}
    return _multipliers(op, n, g, contributions, eps)


def _softmax(op: Emitter, n: Call, g: Any) -> Any:
    """With L = (y - y0) / (z - z0) for z = log y, the logarithmic mean of y and y0, each output
    changes by L dz, and dz is dx less the mean of dx with weights L (since y keeps its sum)."""
    axis = n.attr("axis")
    log_mean = _log_mean(op, n, *(op.LogSoftmax(x, axis=axis) for x in (n.x[0], n.x0[0])))
    total = op.ReduceSum(op.Mul(g, log_mean), [axis], keepdims=1)
    return op.Mul(log_mean, op.Sub(g, op.Div(total, _weight(op, log_mean, axis))))


def _log_softmax(op: Emitter, n: Call, g: Any) -> Any:
    axis = n.attr("axis")
    log_mean = _log_mean(op, n, n.y[0], n.y0[0])
    total = op.ReduceSum(g, [axis], keepdims=1)
    return op.Sub(g, op.Mul(log_mean, op.Div(total, _weight(op, log_mean, axis))))


def _weight(op: Emitter, log_mean: Any, axis: int) -> Any:
    # Zero where no position is possible in both passes.
    return op.Max(op.ReduceSum(log_mean, [axis], keepdims=1), 1e-30)


def _log_mean(op: Emitter, n: Call, z: ir.Value, z0: ir.Value) -> Any:
    """The logarithmic mean of exp(z) and exp(z0), by its series where they are close."""
    y, y0, dz = op.Exp(z), op.Exp(z0), op.Sub(z, z0)
    square = op.Mul(dz, dz)
    series = op.Add(op.Mul(square, op.Add(op.Mul(square, 1 / 1920), 1 / 24)), 1.0)
    near = op.Mul(op.Exp(op.Mul(op.Add(z, z0), 0.5)), series)
    far = op.Div(op.Sub(y, y0), dz)
    mean = op.Where(op.Less(op.Abs(dz), 0.03), near, far)
    # Positions that are masked in both passes: minus infinity less itself is not a number.
    never = op.Equal(op.Max(y, y0), 0.0)
    return _shaped(op.Where(never, op.const(0.0, y.dtype), mean), n.y[0])


def _centered(op: Emitter, n: Call, g: Any, eps: float) -> Any:
    (rescaled,) = _rescale(op, n, g, eps)
    return op.Sub(rescaled, op.ReduceMean(rescaled, [n.attr("axis")], keepdims=1))


def _standardized(
    op: Emitter, x: Any, x0: Any, h: Any, axes: Sequence[int], epsilon: float, centered: bool = True
) -> Any:
    """The multiplier of ``x`` for ``h``, that of ``z = d / sqrt(mean(d d) + epsilon)``.

    ``d`` is ``x``, less its mean if ``centered``. The difference of ``r = 1 / sqrt(v)`` over that
    of ``v`` is ``-(r r0)^2 / (r + r0)``.
    """
    ds, rs = [], []
    if x.dtype != ir.DataType.DOUBLE:  # half precision is too coarse for squares
        x, x0, h = (op.Cast(v, to=ir.DataType.FLOAT) for v in (x, x0, h))
    for v in (x, x0):
        d = op.Sub(v, op.ReduceMean(v, axes, keepdims=1)) if centered else v
        ds.append(d)
        variance = op.ReduceMean(op.Mul(d, d), axes, keepdims=1)
        rs.append(op.Reciprocal(op.Sqrt(op.Add(variance, epsilon))))
    d, r, product = _mean(op, *ds), _mean(op, *rs), op.Mul(*rs)
    along = op.ReduceMean(op.Mul(h, d), axes, keepdims=1)
    slope = op.Div(op.Mul(op.Mul(product, product), along), r)  # twice over the sum of both r
    m = op.Sub(op.Mul(h, r), op.Mul(d, slope))
    return op.Sub(m, op.ReduceMean(m, axes, keepdims=1)) if centered else m


def _layer_normalization(op: Emitter, n: Call, g: Any, *_: Any) -> Any:
    if any(y.uses() for y in n.y[1:]):
        raise _refusal(n, "hands on its statistics")
    x, scale = n.x[:2]
    axes = list(range(n.attr("axis") % rank(x), rank(x)))
    centered = n.node.op_type == "LayerNormalization"
    return _standardized(op, x, n.x0[0], op.Mul(g, scale), axes, n.attr("epsilon"), centered)


def _group_normalization(op: Emitter, n: Call, g: Any) -> Any:
    """Instances are groups of one channel."""
    x, scale = n.x[:2]
    groups = n.attr("num_groups") or -1
    per_channel = op.Unsqueeze(scale, list(range(1, rank(x) - 1))) if rank(x) > 2 else scale

    def grouped(value: Any) -> Any:
        """``[N, G, what a group holds]``."""
        size = None if groups > 0 else op.ReduceProd(op.Shape(x, start=2), keepdims=1)
        return op.Reshape(value, op.vector(op.dim(x, 0), groups, -1 if size is None else size))

    here, there, h = (grouped(v) for v in (x, n.x0[0], op.Mul(g, per_channel)))
    return op.reshape_like(_standardized(op, here, there, h, [2], n.attr("epsilon")), x)


# ---- RevealCancel -----------------------------------------------------------------------------

# Operators that map parts to parts, each output one input (or its negative) times a constant.
_MOVES = frozenset(
    "Identity Cast Neg Reshape Flatten Squeeze Unsqueeze Transpose Concat Split Expand Tile Slice "
    "Gather Pad Mul Div BatchNormalization".split()
)
# Operators that add terms: the sign of each decides to which part of the sum it belongs.
_SUMS = frozenset(
    "Add Sub Sum Mean Conv ConvTranspose Gemm MatMul AveragePool GlobalAveragePool ReduceSum "
    "ReduceMean".split()
)
_WEIGHTS = frozenset("Mul Div BatchNormalization Conv ConvTranspose Gemm MatMul".split())
_OFFSETS = {
    "Conv": (2,),
    "ConvTranspose": (2,),
    "Gemm": (2,),
    "BatchNormalization": (2, 3),
    "Pad": (2,),
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean", "Concat"), range(1 << 16)),
}

# Functions with poles or a bounded domain.
_PARTIAL = frozenset("Log Sqrt Reciprocal Tan Asin Acos Acosh Atanh".split())

Pair = tuple[ir.Value, ir.Value]


class RevealCancel:
    """Positive and negative parts of differences, with a multiplier for each (section 3.5.3).

    A multiplier of the walk is that of the positive part; the excess of the negative part's is kept
    beside it, by value, where the rule of the value's producer asks for it. Where no rule would,
    the two are merged. The parts of a difference that does not come out of one of the operators
    below are its own positive and negative part.

    The rule asks for values at the reference plus one part, which may lie where neither pass comes.
    So it is for functions that are defined everywhere; Log, Sqrt, Reciprocal, Tan, Asin, Acos,
    Acosh and Atanh, powers but for constant exponents 0, 1, 2, ... and constant positive bases, and
    remainders of a divisor that is not constant have the rescale rule.

    Args:
        reference: the twin of each value.
        wrt: the sources, where multipliers are merged.
        base: the rules for everything else.
        eps: as :func:`rescale_rules`.
        opset: the graph's version of the standard operators.
    """

    def __init__(
        self,
        reference: Mapping[ir.Value, ir.Value],
        wrt: Collection[ir.Value],
        base: Rules,
        eps: float = 1e-10,
        opset: int = 21,
    ) -> None:
        self._reference, self._wrt, self._base = reference, set(wrt), base
        self._eps, self._opset = eps, opset
        self._known: dict[ir.Value, Pair] = {}
        self._excess: dict[ir.Value, ir.Value] = {}
        table = RuleTable("reveal-cancel")
        table.rule(*_UNARY, *_ELEMENTWISE)(self._nonlinear)
        table.rule(*_MOVES | _SUMS)(self._linear)
        self.rules = Rules([table]) + base

    # ---- forward: parts ---------------------------------------------------------------------

    def _kind(self, n: Call) -> str:
        """How the parts of a node's output come about."""
        op_type, moving = n.node.op_type, _moving(n)
        if n.node.domain or (len(n.y) != 1 and op_type != "Split") or not moving:
            return "other"
        if op_type in _UNARY or op_type in _ELEMENTWISE:
            one = len(moving) == 1 and dims(n.x[moving[0]]) == dims(n.y[0])
            return "nonlinear" if one and _defined_everywhere(n, moving[0]) else "other"
        if op_type in _WEIGHTS and (len(moving) > 1 or moving[0] > 1):
            return "other"
        if op_type in ("BatchNormalization", "Div") and moving != [0]:
            return "other"
        if op_type in ("Add", "Sub", "Sum") and len(moving) == 1:
            return "move"
        if op_type in _MOVES:
            return "move"
        return "sum" if op_type in _SUMS else "other"

    def _parts(self, op: Emitter, value: ir.Value) -> Pair:
        """What of a value's difference is positive (>= 0) and what negative (<= 0)."""
        if value in self._known:
            return self._known[value]
        delta = _difference(op, value, self._reference.get(value, value))
        n = self._call(value)
        kind = self._kind(n) if n is not None else "other"
        if n is None or kind == "other":
            pair = self._signs(op, delta)
        elif kind == "nonlinear":
            pair = self._changes(op, n)
        else:
            pairs = {
                k: self._parts(op, n.x[k])
                if kind == "move"
                else self._signs(op, _difference(op, n.x[k], n.x0[k]))
                for k in _moving(n)
            }
            # Not one as the rest of the other: what is zero must be zero.
            sides = (self._gathered(op, n, pairs, side) for side in (0, 1))
            self._known.update(zip(n.y, zip(*sides, strict=True), strict=True))
            return self._known[value]
        self._known[value] = pair
        return pair

    def _gathered(
        self, op: Emitter, n: Call, pairs: Mapping[int, Pair], side: int
    ) -> list[ir.Value]:
        """The positive (0) or negative (1) parts of a linear operator's outputs."""
        up, down = self._split(op, n)
        parts = self._run(op, n, up, {k: p[side ^ _flips(n, k)] for k, p in pairs.items()})
        if down is None:
            return parts
        others = self._run(op, n, down, {k: p[1 - side] for k, p in pairs.items()})
        return [_shaped(op.Add(*ends), ends[0]) for ends in zip(parts, others, strict=True)]

    def _call(self, value: ir.Value) -> Call | None:
        node = value.producer()
        if node is None or value not in self._reference:
            return None
        return Call(node, self._opset, [True] * len(node.inputs), self._reference)

    def _signs(self, op: Emitter, delta: ir.Value) -> Pair:
        positive = _shaped(op.Relu(delta), delta)
        return positive, _difference(op, delta, positive)

    def _changes(self, op: Emitter, n: Call) -> Pair:
        """What the parts of the input change, mean over the two orders."""
        (i,) = _moving(n)
        at = []
        for part in self._parts(op, n.x[i]):
            operands = list(n.x)
            operands[i] = _shaped(op.Add(n.x0[i], part), n.x[i])
            at.append(n.again(op, *operands).y[0])
        # One first: f(x0 + p) - f(x0); last: f(x) - f(x0 + q).
        y, y0 = n.y[0], n.y0[0]
        changes = (
            op.Mul(op.Add(op.Sub(first, y0), op.Sub(y, last)), 0.5)
            for first, last in (at, at[::-1])
        )
        positive, negative = (_shaped(c, y) for c in changes)
        return positive, negative

    def _split(self, op: Emitter, n: Call) -> tuple[list[Any], list[Any] | None]:
        """The operands with the weights' positive part, and those with their negative part."""
        up = list(n.x)
        if n.node.op_type not in _WEIGHTS:
            return up, None
        down, (i,) = list(n.x), _moving(n)
        w, known = n.x[1 - i], n.const(1 - i)
        none = np.inf if n.node.op_type == "Div" else 0.0
        for operands, above in ((up, True), (down, False)):
            if known is not None:
                kept = np.where((known > 0) == above, known, known.dtype.type(none))
                operands[1 - i] = op.const(kept)
            else:
                kept = op.Where(op.emit("Greater" if above else "LessOrEqual", w, 0.0), w, none)
                operands[1 - i] = _shaped(kept, w)
        return up, down

    def _run(
        self, op: Emitter, n: Call, operands: Sequence[Any], parts: Mapping[int, ir.Value]
    ) -> list[ir.Value]:
        """The operator on parts of its inputs' differences: offsets have none."""
        given = list(operands)
        for k, x in enumerate(given):
            if k in parts:
                given[k] = parts[k]
            elif x is not None and k in _OFFSETS.get(n.node.op_type, ()):
                known = n.const(k)
                zero = op.full_like(x, 0.0) if known is None else op.const(np.zeros_like(known))
                given[k] = zero
        return n.again(op, *given).y

    # ---- backward: multipliers --------------------------------------------------------------

    def _nonlinear(self, op: Emitter, n: Call, g: Any) -> Any:
        if self._kind(n) != "nonlinear":
            return self._base.gradient(op, n, g)
        (i,) = _moving(n)
        both = g, self._negative(op, n.y[0], g)
        # A vanishing part comes first at the reference, last at the input: the mean slope.
        sides = [
            _ratio(op, n, i, m, op.Mul(m, change), part, self._eps)
            for m, change, part in zip(
                both, self._parts(op, n.y[0]), self._parts(op, n.x[i]), strict=True
            )
        ]
        return [None] * i + [self._hand_on(op, n.x[i], *sides)]

    def _linear(self, op: Emitter, n: Call, *g: Any) -> Any:
        kind = self._kind(n)
        if kind == "other" or self._excess.keys().isdisjoint(n.y):
            return self._base.gradient(op, n, *g)
        both = g, [self._negative(op, y, m) for y, m in zip(n.y, g, strict=True)]
        up: Any
        down: Any
        up, down = (
            operands and [VJP.gradient(op, n.on(operands, n.y), *m) for m in both]
            for operands in self._split(op, n)
        )
        found: list[Any] = [None] * len(n.x)
        for k in _moving(n):
            if n.needs(k):
                sides: list[Any] = [up[side ^ _flips(n, k)][k] for side in (0, 1)]
                if down is not None:
                    sides = [op.Add(m, down[1 - side][k]) for side, m in enumerate(sides)]
                if kind == "move":
                    found[k] = self._hand_on(op, n.x[k], *sides)
                else:
                    found[k] = _by_sign(op, _difference(op, n.x[k], n.x0[k]), *sides)
        return found

    def _negative(self, op: Emitter, value: ir.Value, g: ir.Value) -> ir.Value:
        """The multiplier of a value's negative part, from that of its positive part."""
        excess = self._excess.get(value)
        return g if excess is None else _shaped(op.Add(g, excess), value)

    def _hand_on(self, op: Emitter, value: ir.Value, positive: Any, negative: Any) -> Any:
        """Leave two multipliers to the rule of a value's producer, or merge them."""
        n = self._call(value)
        if value not in self._wrt and n is not None and self._kind(n) != "other":
            excess = _shaped(op.Sub(negative, positive), value)
            known = self._excess.get(value)
            self._excess[value] = excess if known is None else op.Add(known, excess)
            return positive
        delta = _difference(op, value, self._reference.get(value, value))
        up, down = self._parts(op, value)
        total = op.Add(op.Mul(up, positive), op.Mul(down, negative))
        return _over(op, total, delta, _mean(op, positive, negative), self._eps)


def _defined_everywhere(n: Call, operand: int) -> bool:
    """Whether a function of one operand has a value wherever that operand may be."""
    if n.node.op_type == "Mod":
        return operand == 0
    if n.node.op_type != "Pow":
        return n.node.op_type not in _PARTIAL
    other = n.const(1 - operand)
    if other is None:
        return False
    return bool((other > 0).all() if operand else ((other >= 0) & (other % 1 == 0)).all())


def _flips(n: Call, operand: int) -> bool:
    """Whether an operator takes the negative of an operand."""
    return (n.node.op_type, operand) in (("Neg", 0), ("Sub", 1))


def _by_sign(op: Emitter, delta: Any, positive: Any, negative: Any) -> Any:
    """The multiplier of a difference by its sign; the mean of both where there is none."""
    middle = op.Mul(op.Add(positive, negative), 0.5)
    below = op.Where(op.Less(delta, 0.0), negative, middle)
    return op.Where(op.Greater(delta, 0.0), positive, below)
