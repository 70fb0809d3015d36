"""Layer-wise relevance propagation (LRP): what the walk carries back is relevance.

A rule modifies the operands of a linear operator, runs it again, and hands the relevance of each
output on in proportion to what each input contributed to it (Bach et al. 2015, PLoS ONE 10(7),
e0130140; Montavon et al. 2019, "Layer-Wise Relevance Propagation: An Overview"). The rules have the
meaning and the defaults of zennit (Anders et al. 2021, arXiv:2106.13200); those of Captum are among
them, see :class:`Epsilon`, :class:`Gamma`, :class:`ZPlus` and :class:`Pass`.

What happens where no rule was chosen is in ``DEFAULTS``, by operator:

* linear layers, sums, means, average pooling, interpolation, running sums, normalizations: in
  proportion to the contributions, with a stabilizer of 1e-9 (Captum's default). What a bias or
  another constant contributes is absorbed. Layer, RMS and instance normalization are linear, as
  their scale is taken for a constant (Ali et al. 2022, arXiv:2202.07304, section 4);
* functions of one variable (activations, softmax, products and quotients with constants, rounding
  of quantized models): unchanged, :class:`Pass`; a softmax at the end hands the relevance of a
  probability to its logit;
* what moves values (reshapes, slices, gathers) and what selects them (maximum pooling, Where): to
  where the value came from, :class:`Move`;
* products of two explained values: :class:`Signal`, attention weights and gates are constants (Ali
  et al. 2022; Arras et al. 2017, arXiv:1706.07206); the divisor of a quotient is one too.

Any other operator is refused, unless its function body consists of these or a rule is chosen for
it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError
from onnxplain.graph.emit import Call, Emitter, const_array, dims, rank
from onnxplain.rules import Rule, RuleTable
from onnxplain.rules.vjp import VJP, indexing, shape

__all__ = [
    "AlphaBeta",
    "Epsilon",
    "Flat",
    "Gamma",
    "Norm",
    "Pass",
    "PropagationRule",
    "Signal",
    "Uniform",
    "WSquare",
    "ZBox",
    "ZPlus",
    "preset",
]


def __dir__() -> list[str]:
    """What completion of ``ox.lrp.`` offers: the public names."""
    return __all__


CONVOLUTIONS = ("Conv", "ConvTranspose")
DENSE = ("Gemm", "MatMul", "Einsum")
LINEAR = (*CONVOLUTIONS, *DENSE)
"""Operators that are linear layers where one of their factors is explained."""

# Linear in what is explained, without weights.
_AVERAGES = tuple(
    "AveragePool GlobalAveragePool ReduceSum ReduceMean CumSum Resize Mean Sum Add Sub".split()
)
_SCALED = ("LayerNormalization", "RMSNormalization", "InstanceNormalization")
_BIAS = 2  # of Conv, ConvTranspose and Gemm
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


# ---- the mechanism ------------------------------------------------------------------------------

Modifier = Callable[[Emitter, ir.Value], ir.Value]
"""Another operand in the place of one."""


def keep(op: Emitter, v: ir.Value) -> ir.Value:
    return v


def positive(op: Emitter, v: ir.Value) -> Any:
    return op.Relu(v)


def negative(op: Emitter, v: ir.Value) -> Any:
    return op.Min(v, 0.0)


def square(op: Emitter, v: ir.Value) -> Any:
    return op.Mul(v, v)


def ones(op: Emitter, v: ir.Value) -> Any:
    return op.full_like(v, 1.0)


def raised(by: float, part: Modifier) -> Modifier:
    """An operand plus a multiple of its positive or negative part."""
    return lambda op, v: op.Add(v, op.Mul(part(op, v), by))


@dataclass(frozen=True)
class Term:
    """One run of an operator on modified operands; ``bias`` None: without bias."""

    x: Modifier = keep
    weight: Modifier = keep
    bias: Modifier | None = keep
    sign: int = 1


@dataclass(frozen=True)
class Share:
    """Terms whose signed sum is the denominator of what they hand on.

    ``factor`` multiplies it; ``where`` ("Greater", "Less") limits it to outputs above or below 0.
    """

    terms: tuple[Term, ...]
    factor: float = 1.0
    where: str | None = None


@dataclass(frozen=True)
class Added:
    """The bias of a matrix product that an Add behind it adds, and the sum."""

    bias: ir.Value
    y: ir.Value


@dataclass(frozen=True)
class Place:
    """Where a rule is applied.

    ``varying``: the inputs that depend on what is explained, whether relevance is wanted there or
    not; ``carried``: those of them that the rule does not hold constant; ``added``: the bias that
    is added behind the node.
    """

    varying: tuple[int, ...]
    carried: tuple[int, ...]
    added: Added | None = None


def redistribute(
    op: Emitter,
    n: Call,
    r: ir.Value,
    shares: Sequence[Share],
    stabilizer: float,
    added: Added | None = None,
) -> list[ir.Value | None]:
    """Hand the relevance of an operator's output to its inputs: the one formula of all rules.

    ``sum over shares of factor * sum over terms of sign * x_k * vjp_k(r / z)`` with
    ``z = sum over terms of sign * y_k``, where ``y_k`` is the operator run on the operands of term
    k and ``vjp_k`` its vector-Jacobian product with the weights of term k.

    Args:
        op: writes nodes.
        n: the operator's call; one relevance is returned for each input that it needs.
        r: relevance of the output.
        shares: the rule.
        stabilizer: added to ``z`` with its sign. 0: an output that is zero hands on nothing.
        added: the bias that is added behind the operator.

    Returns:
        One value for each input, None where none is needed.
    """
    explained = [i for i in range(len(n.x)) if n.needs(i)]
    y = n.y[0] if added is None else added.y
    unsigned = all(nonnegative(n.x[i]) for i in explained)
    total: list[Any] = [None] * len(n.x)
    for share in shares:
        terms = [t for t in share.terms if not (unsigned and t.x is negative)]
        runs = [_Run(op, n, t, y, explained, added) for t in terms]
        z: Any = None
        for t, run in zip(terms, runs, strict=True):
            z = run.z() if z is None else (op.Add if t.sign > 0 else op.Sub)(z, run.z())
        s = op.Div(r, _stabilized(op, z, stabilizer))
        if share.where is not None:
            s = op.Mul(s, op.cast_like(op.emit(share.where, y, 0.0), s))
        if share.factor != 1.0:
            s = op.Mul(s, share.factor)
        for t, run in zip(terms, runs, strict=True):
            for i, g in enumerate(VJP.gradient(op, run.linear, s)):
                if g is None:
                    continue
                part = g if t.x is ones else op.Mul(run.x[i], g)
                part.shape = n.x[i].shape
                if total[i] is not None:
                    part = (op.Add if t.sign > 0 else op.Sub)(total[i], part)
                    part.shape = n.x[i].shape
                total[i] = part
    return total


class _Run:
    """One term of a call: its modified operands, its output, the call that is differentiated."""

    def __init__(
        self,
        op: Emitter,
        n: Call,
        term: Term,
        y: ir.Value,
        explained: Sequence[int],
        added: Added | None,
    ) -> None:
        self.op, self.n, self.term, self.y, self.added = op, n, term, y, added
        self.x = {i: _modified(op, n, i, term.x) for i in explained}
        self.weights: dict[int, ir.Value] = {}
        if term.weight is not keep:
            scale = n.attr("alpha") if n.node.op_type == "Gemm" else 1.0
            for i in weights(n.node, explained):
                self.weights[i] = _scaled(op, n.x[i], scale, term.weight)
        # What enters the operator does not matter for its derivative, if it is linear.
        self.linear = n.on([self.weights.get(i, v) for i, v in enumerate(n.x)], n.y)

    def z(self) -> Any:
        """The output: that of the model where nothing is modified."""
        op, n, term = self.op, self.n, self.term
        own = n.node.op_type in (*CONVOLUTIONS, "Gemm") and n.has(_BIAS) and not n.needs(_BIAS)
        biased = own or self.added is not None
        if term.x is keep and not self.weights and (term.bias is keep or not biased):
            return self.y
        inputs: dict[int, ir.Value] = {**self.weights, **self.x}
        if own and term.bias is not keep:
            bias = n.x[_BIAS]
            if term.bias is None:
                inputs[_BIAS] = op.full_like(bias, 0.0)
            else:
                scale = n.attr("beta") if n.node.op_type == "Gemm" else 1.0
                inputs[_BIAS] = _scaled(op, bias, scale, term.bias)
        z = n.again(op, *(inputs.get(i) for i in range(len(n.x)))).y[0]
        if any(_is_one_row(v) and not _is_one_row(n.x[i]) for i, v in self.x.items()):
            z.shape = ir.Shape([1, *dims(z)[1:]])
        if self.added is not None and term.bias is not None:
            z = op.Add(z, term.bias(op, self.added.bias))
        return z


def _is_one_row(value: ir.Value) -> bool:
    return dims(value)[:1] == (1,)


def _modified(op: Emitter, n: Call, i: int, modify: Modifier) -> ir.Value:
    """An explained operand under a rule. What is the same for all examples is written for one."""
    x = n.x[i]
    if modify is keep:
        return x
    constant = modify is ones or isinstance(modify, _Box)
    layer = n.node.op_type in CONVOLUTIONS or (i == 0 and not n.attr("transA") and rank(x) > 1)
    if constant and layer and n.node.op_type != "Einsum" and not isinstance(dims(x)[0], int):
        one = ir.Shape([1, *dims(x)[1:]])
        static = one.is_static()  # then what is written does not depend on x at all
        x = ir.Value(type=x.type) if static else op.Slice(x, [0], [1], [0])
        x.shape = one
    out = modify(op, x)
    out.shape = x.shape
    return out


def _scaled(op: Emitter, v: ir.Value, scale: float, modify: Modifier) -> Any:
    """A weight that a Gemm multiplies by a number, modified as the product is."""
    if scale in (0.0, 1.0):
        out = modify(op, v)
    else:
        out = op.Mul(modify(op, op.Mul(v, scale)), 1.0 / scale)
    out.shape = v.shape
    return out


def _stabilized(op: Emitter, z: ir.Value, stabilizer: float) -> Any:
    """A denominator moved away from zero."""
    if stabilizer == 0.0:
        return op.Where(op.Equal(z, 0.0), op.const(np.inf, z.dtype), z)
    small = (op.const(sign * stabilizer, z.dtype) for sign in (1, -1))
    return op.Add(z, op.Where(op.GreaterOrEqual(z, 0.0), *small))


_UNSIGNED = frozenset(
    "Relu Sigmoid HardSigmoid Softmax Softplus Exp Abs Sqrt ReduceL1 ReduceL2 LpPool".split()
)
_KEEPS_SIGN = frozenset(
    "MaxPool AveragePool GlobalAveragePool GlobalMaxPool ReduceMean ReduceSum ReduceMax ReduceMin "
    "Identity Cast Dropout Reshape Flatten Squeeze Unsqueeze Transpose Concat Split Slice Expand "
    "Add Sum Mul Mean Max Min".split()
)


def nonnegative(value: ir.Value) -> bool:
    """Whether a value is known to be nowhere below zero."""
    constant = const_array(value)
    if constant is not None:
        return bool((constant >= 0).all())
    node = value.producer()
    if node is None or node.domain:
        return False
    if node.op_type in _KEEPS_SIGN:
        layout = node.op_type not in ("Add", "Sum", "Mul", "Mean", "Max", "Min", "Concat")
        return all(nonnegative(v) for v in node.inputs[: 1 if layout else None] if v is not None)
    if node.op_type == "Clip":
        low = const_array(node.inputs[1]) if len(node.inputs) > 1 else None
        return low is not None and bool(low >= 0)
    return node.op_type in _UNSIGNED


# ---- which operands are which -------------------------------------------------------------------


def weights(node: ir.Node, explained: Sequence[int]) -> tuple[int, ...]:
    """The inputs of a linear layer that hold its weights; none if the node isn't a linear layer."""
    if node.domain or node.op_type not in LINEAR or len(explained) != 1:
        return ()
    if node.op_type == "Einsum" and len(node.inputs) != 2:
        return ()
    (i,) = explained
    if i > 1 or (i == 1 and node.op_type in CONVOLUTIONS):
        return ()
    return (1 - i,)


def _factors(node: ir.Node, explained: Sequence[int]) -> tuple[int, ...]:
    """The explained inputs that are multiplied (or divided) by each other."""
    if node.op_type in _PRODUCTS:
        return tuple(i for i in explained if i != _BIAS or node.op_type == "Einsum")
    return ()


# How much of a gate a function is: a bounded or positive factor that scales the other one.
_GATES = dict.fromkeys("Softmax Sigmoid HardSigmoid Erf Exp Reciprocal".split(), 3)
_GATES |= {"Tanh": 2, "Clip": 1}
_ARITHMETIC = frozenset("Add Sub Mul Div Neg Cast Identity Dropout Where".split())


def _gating(value: ir.Value, other: ir.Value, explained: Collection[ir.Value]) -> int:
    """How sure it is that one factor is the gate of another: 4 if it is a function of it."""
    found: int | None = None
    while value is not other:
        node = value.producer()
        default = None if node is None or node.domain else DEFAULTS.get(node.op_type)
        if node is None or not (isinstance(default, Pass | Move) or node.op_type in _ARITHMETIC):
            break
        if found is None and node.op_type in _GATES:
            found = _GATES[node.op_type]
        elif found is None and isinstance(default, Pass) and node.op_type not in _ARITHMETIC:
            exponent = const_array(node.inputs[1]) if node.op_type == "Pow" else None
            found = 3 if exponent is not None and bool((exponent < 0).all()) else 0
        sources = list(dict.fromkeys(v for v in node.inputs if v is not None and v in explained))
        if len(sources) > 1 and node.op_type == "Div":
            sources = [node.inputs[0]]  # type: ignore[list-item]
        if len(sources) != 1:
            break
        value = sources[0]
    else:
        return 4
    return found or 0


# ---- the rules ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PropagationRule:
    """How the relevance of a layer's output becomes that of its input."""

    _for: ClassVar[str] = "any operator"

    def _fits(self, node: ir.Node, explained: Sequence[int]) -> bool:
        """Whether the rule has a meaning for a node of which these inputs are explained."""
        raise NotImplementedError

    def _carries(
        self, node: ir.Node, explained: Sequence[int], values: Collection[ir.Value]
    ) -> Sequence[int]:
        """Of the explained inputs, those that get relevance; the others are constants."""
        return explained

    def _propagate(
        self, op: Emitter, n: Call, r: Sequence[ir.Value], at: Place
    ) -> list[ir.Value | None]:
        """The relevance of each input from that of each output."""
        raise NotImplementedError

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for rules that do the same."""
        values = (getattr(self, f.name) for f in fields(self))
        return (
            type(self).__name__,
            *((v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for v in values),
        )


class _Redistribution(PropagationRule):
    """A rule of the one formula."""

    stabilizer: float
    _for: ClassVar[str] = f"linear layers of which one factor is explained ({', '.join(LINEAR)})"

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("gamma", "alpha", "beta", "stabilizer", "epsilon") and not (
                isinstance(value, int | float) and np.isfinite(value) and value >= 0
            ):
                raise InputError(
                    f"{type(self).__name__}: {f.name}={value!r} is not a finite number >= 0"
                )

    def _shares(self) -> tuple[Share, ...]:
        raise NotImplementedError

    def _fits(self, node: ir.Node, explained: Sequence[int]) -> bool:
        return bool(weights(node, explained))

    def _propagate(
        self, op: Emitter, n: Call, r: Sequence[ir.Value], at: Place
    ) -> list[ir.Value | None]:
        if n.node.op_type in _SCALED:
            return [_normalization(op, n, r[0], self.stabilizer)]
        return redistribute(op, n, r[0], self._shares(), self.stabilizer, at.added)


@dataclass(frozen=True)
class Norm(_Redistribution):
    """In proportion to the contributions: sums, average pooling, anything linear.

    Args:
        stabilizer: added to the denominator with its sign.
    """

    stabilizer: float = 1e-6
    _for: ClassVar[str] = "whatever has a derivative, but for products of explained values"

    def _fits(self, node: ir.Node, explained: Sequence[int]) -> bool:
        return VJP.find(node) is not None and len(_factors(node, explained)) < 2

    def _shares(self) -> tuple[Share, ...]:
        return (Share((Term(),)),)


@dataclass(frozen=True)
class Epsilon(_Redistribution):
    """In proportion to the contributions ``x * w`` to ``z + epsilon * sign(z)`` (Bach et al. 2015).

    Captum's ``EpsilonRule(epsilon)`` is this rule, with 1e-9 by default. ``epsilon=0`` is LRP-0.

    Args:
        epsilon: absorbs relevance of small outputs.
        set_bias_to_zero: the bias takes no share (zennit's ``zero_params="bias"``).
    """

    epsilon: float = 1e-6
    set_bias_to_zero: bool = False
    _for: ClassVar[str] = Norm._for

    @property
    def stabilizer(self) -> float:  # type: ignore[override]
        """``epsilon``, as the other rules call it."""
        return self.epsilon

    def _fits(self, node: ir.Node, explained: Sequence[int]) -> bool:
        return Norm()._fits(node, explained)

    def _shares(self) -> tuple[Share, ...]:
        return (Share((Term(bias=None if self.set_bias_to_zero else keep),)),)


@dataclass(frozen=True)
class Gamma(_Redistribution):
    """Positive contributions count more (Montavon et al. 2019; for inputs of both signs, Andeol et
    al. 2021, arXiv:2106.03484).

    Args:
        gamma: how much more.
        stabilizer: added to the denominator with its sign.
        set_bias_to_zero: the bias takes no share.
        signed: inputs and outputs of either sign are told apart, and the bias is modified as the
            weights are, as in zennit. False: ``w + gamma * max(w, 0)`` for all inputs and the bias
            as it is; with ``stabilizer=1e-9`` this is Captum's ``GammaRule``.
    """

    gamma: float = 0.25
    stabilizer: float = 1e-6
    set_bias_to_zero: bool = False
    signed: bool = True

    def _shares(self) -> tuple[Share, ...]:
        up, down = raised(self.gamma, positive), raised(self.gamma, negative)
        if not self.signed:
            return (Share((Term(keep, up, None if self.set_bias_to_zero else keep),)),)
        found = []
        for grows, shrinks, where in ((up, down, "Greater"), (down, up, "Less")):
            bias = None if self.set_bias_to_zero else grows
            terms = Term(positive, grows, bias), Term(negative, shrinks, None)
            found.append(Share(terms, where=where))
        return tuple(found)


@dataclass(frozen=True)
class AlphaBeta(_Redistribution):
    """Positive contributions with weight alpha, negative ones with -beta (Bach et al. 2015).

    Args:
        alpha, beta: not negative, alpha - beta = 1.
        stabilizer: added to the denominators with their sign.
        set_bias_to_zero: the bias takes no share.
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = 1e-6
    set_bias_to_zero: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not np.isclose(self.alpha - self.beta, 1.0, rtol=0, atol=1e-9):
            raise InputError(
                f"AlphaBeta: alpha={self.alpha} and beta={self.beta}, but relevance is conserved "
                "only where alpha - beta = 1"
            )

    def _shares(self) -> tuple[Share, ...]:
        found = []
        for factor, helps, hinders in (
            (self.alpha, positive, negative),
            (-self.beta, negative, positive),
        ):
            bias = None if self.set_bias_to_zero else helps
            terms = Term(positive, helps, bias), Term(negative, hinders, None)
            found += [Share(terms, factor)] if factor else []
        return tuple(found)


@dataclass(frozen=True)
class ZPlus(_Redistribution):
    """In proportion to the positive contributions (Montavon et al. 2017, arXiv:1512.02479):
    ``AlphaBeta(1, 0)``.

    Args:
        stabilizer: added to the denominator with its sign.
        set_bias_to_zero: the bias takes no share.
        signed: negative inputs contribute by negative weights, and only a positive bias counts, as
            in zennit. False: positive weights for all inputs and the bias as it is; with
            ``stabilizer=1e-9`` this is Captum's ``Alpha1_Beta0_Rule``.
    """

    stabilizer: float = 1e-6
    set_bias_to_zero: bool = False
    signed: bool = True

    def _shares(self) -> tuple[Share, ...]:
        if self.signed:
            return AlphaBeta(1.0, 0.0, self.stabilizer, self.set_bias_to_zero)._shares()
        return (Share((Term(keep, positive, None if self.set_bias_to_zero else keep),)),)


@dataclass(frozen=True)
class _Box:
    """A bound of the input, the same for all examples."""

    bound: np.ndarray

    def __call__(self, op: Emitter, x: ir.Value) -> Any:
        return op.expand_like(op.const(self.bound, x.dtype), x)


@dataclass(frozen=True, eq=False)
class ZBox(_Redistribution):
    """For a first layer whose input lies in a box (Montavon et al. 2017, arXiv:1512.02479).

    Args:
        low, high: the bounds of what enters the layer, numbers or arrays that broadcast against it
            (a convolution: [1, C, 1, 1] for bounds by channel, in models of any layout).
        stabilizer: added to the denominator with its sign.
        set_bias_to_zero: the bias takes no share.
    """

    low: Any
    high: Any
    stabilizer: float = 1e-6
    set_bias_to_zero: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("low", "high"):
            try:
                object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
            except (TypeError, ValueError) as error:
                raise InputError(f"ZBox: {name} is not a number or an array: {error}") from None
        try:
            ordered = bool((self.low <= self.high).all())
        except ValueError:
            raise InputError(
                f"ZBox: low has shape {self.low.shape} and high {self.high.shape}; they must "
                "broadcast against each other"
            ) from None
        if not ordered:
            raise InputError("ZBox: low must not be above high (nor NaN)")

    def _shares(self) -> tuple[Share, ...]:
        bias: list[Modifier | None] = [keep, positive, negative]
        if self.set_bias_to_zero:
            bias = [None] * 3
        return (
            Share(
                (
                    Term(keep, keep, bias[0]),
                    Term(_Box(self.low), positive, bias[1], -1),
                    Term(_Box(self.high), negative, bias[2], -1),
                )
            ),
        )

    def _propagate(
        self, op: Emitter, n: Call, r: Sequence[ir.Value], at: Place
    ) -> list[ir.Value | None]:
        x = next(v for i, v in enumerate(n.x) if n.needs(i))
        shown = dims(x)
        for name, bound in (("low", self.low), ("high", self.high)):
            sizes = zip(reversed(bound.shape), reversed(shown), strict=False)
            if bound.ndim > len(shown) or any(
                b != 1 and b != d and isinstance(d, int) for b, d in sizes
            ):
                raise InputError(
                    f"ZBox: {name} has shape {bound.shape}, which does not broadcast against what "
                    f"enters {n.node.op_type} '{n.node.name}': {shown}"
                )
        return super()._propagate(op, n, r, at)


@dataclass(frozen=True)
class WSquare(_Redistribution):
    """In proportion to the squared weights, for a first layer with unbounded inputs (Montavon et
    al. 2017, arXiv:1512.02479).

    Args:
        stabilizer: added to the denominator.
        set_bias_to_zero: the bias takes no share.
    """

    stabilizer: float = 1e-6
    set_bias_to_zero: bool = False

    def _shares(self) -> tuple[Share, ...]:
        return (Share((Term(ones, square, None if self.set_bias_to_zero else square),)),)


@dataclass(frozen=True)
class Flat(_Redistribution):
    """Evenly to all inputs of an output (Lapuschkin et al. 2019, arXiv:1902.10178).

    Args:
        stabilizer: added to the denominator.
    """

    stabilizer: float = 1e-6
    _for: ClassVar[str] = f"{_Redistribution._for}, sums and averages"

    def _fits(self, node: ir.Node, explained: Sequence[int]) -> bool:
        return super()._fits(node, explained) or node.op_type in _AVERAGES

    def _shares(self) -> tuple[Share, ...]:
        return (Share((Term(ones, ones, None),)),)


@dataclass(frozen=True)
class Pass(PropagationRule):
    """Unchanged, for layers with one explained input of the output's shape (activations, batch
    normalization); Captum's ``IdentityRule``."""

    _for: ClassVar[str] = "operators of which one input is explained, of the output's shape"

    def _fits(self, node: ir.Node, explained: Sequence[int]) -> bool:
        return len(explained) == 1

    def _propagate(
        self, op: Emitter, n: Call, r: Sequence[ir.Value], at: Place
    ) -> list[ir.Value | None]:
        found: list[ir.Value | None] = [None] * len(n.x)
        for i, x in enumerate(n.x):
            if n.needs(i):
                small, large = dims(x), dims(n.y[0])
                ends = zip(reversed(small), reversed(large), strict=False)
                if len(small) > len(large) or any(
                    isinstance(a, int) and isinstance(b, int) and a not in (1, b) for a, b in ends
                ):
                    raise InputError(
                        f"Pass needs an output of the input's shape, but {n.node.op_type} "
                        f"'{n.node.name}' turns {small} into {large}; use Epsilon there"
                    )
                found[i] = op.unbroadcast(r[0], n.y[0], x)
        return found


@dataclass(frozen=True)
class Move(PropagationRule):
    """To where a value came from: for operators that move or select values."""

    def _fits(self, node: ir.Node, explained: Sequence[int]) -> bool:
        return True

    def _propagate(
        self, op: Emitter, n: Call, r: Sequence[ir.Value], at: Place
    ) -> list[ir.Value | None]:
        return VJP.gradient(op, n, *r)


@dataclass(frozen=True)
class Signal(PropagationRule):
    """Of the factors of a product, the signal takes all and the gates are constants.

    A gate is a function of the other factor (``x * sigmoid(x)``), or else the factor that is the
    more bounded: a softmax, sigmoid, exponential or reciprocal before tanh, before a clipped value,
    before any other. Where none stands out, as :class:`Uniform`. Attention weights, gates of
    recurrent and gated units and scales of normalizations are thereby constants (Arras et al. 2017,
    arXiv:1706.07206; Ali et al. 2022, arXiv:2202.07304).

    Args:
        stabilizer: added to the denominator with its sign.
    """

    stabilizer: float = 1e-9
    _for: ClassVar[str] = f"products of explained values (Mul, Div, Pow, {', '.join(LINEAR)})"

    def _fits(self, node: ir.Node, explained: Sequence[int]) -> bool:
        return len(_factors(node, explained)) > 1

    def _carries(
        self, node: ir.Node, explained: Sequence[int], values: Collection[ir.Value]
    ) -> Sequence[int]:
        factors = _factors(node, explained)
        if len(factors) < 2 or node.inputs[factors[0]] is node.inputs[factors[1]]:
            return explained
        if node.op_type in ("Div", "Pow"):
            return (0,)
        if len(factors) > 2:
            return explained
        a, b = factors
        ranks = {
            i: _gating(node.inputs[i], node.inputs[j], values)  # type: ignore[arg-type]
            for i, j in ((a, b), (b, a))
        }
        if ranks[a] == ranks[b]:
            return explained
        gate = max(factors, key=lambda i: ranks[i])
        return [i for i in explained if i != gate]

    def _propagate(
        self, op: Emitter, n: Call, r: Sequence[ir.Value], at: Place
    ) -> list[ir.Value | None]:
        if len(_factors(n.node, at.carried)) > 1:
            return Uniform(self.stabilizer)._propagate(op, n, r, at)
        rule = Pass() if n.node.op_type in ("Mul", "Div", "Pow") else Norm(self.stabilizer)
        return rule._propagate(op, n, r, at)


@dataclass(frozen=True)
class Uniform(PropagationRule):
    """The factors of a product share alike (AttnLRP: Achtibat et al. 2024, arXiv:2402.05602,
    section 3.3.2).

    Args:
        stabilizer: added to the denominator with its sign.
    """

    stabilizer: float = 1e-9
    _for: ClassVar[str] = f"products of explained values (Mul, {', '.join(LINEAR)})"

    def _fits(self, node: ir.Node, explained: Sequence[int]) -> bool:
        return len(_factors(node, explained)) > 1 and node.op_type not in ("Div", "Pow")

    def _propagate(
        self, op: Emitter, n: Call, r: Sequence[ir.Value], at: Place
    ) -> list[ir.Value | None]:
        shares = [Share((Term(),), 1.0 / max(len(_factors(n.node, at.varying)), 1))]
        return redistribute(op, n, r[0], shares, self.stabilizer, at.added)


def _normalization(op: Emitter, n: Call, r: ir.Value, stabilizer: float) -> Any:
    """A normalization whose scale is a constant: linear in its input, and centered but for RMS."""
    x, gain = n.x[:2]
    if n.node.op_type == "InstanceNormalization":
        axes = list(range(2, rank(x)))
        gain = op.Unsqueeze(gain, list(range(1, rank(x) - 1)))
    else:
        axes = list(range(n.attr("axis") % rank(x), rank(x)))
    centered = n.node.op_type != "RMSNormalization"
    d = op.Sub(x, op.ReduceMean(x, axes, keepdims=1)) if centered else x
    variance = op.ReduceMean(op.Mul(d, d), axes, keepdims=1)
    scale = op.Div(gain, op.Sqrt(op.Add(variance, n.attr("epsilon"))))
    s = op.Mul(op.Div(r, _stabilized(op, n.y[0], stabilizer)), scale)
    if centered:
        s = op.Sub(s, op.ReduceMean(s, axes, keepdims=1))
    return op.Mul(x, s)


# ---- what happens where no rule was chosen ------------------------------------------------------

_PRODUCTS = frozenset((*LINEAR, "Mul", "Div", "Pow"))
_FUNCTIONS = (
    "Relu LeakyRelu PRelu Elu Selu Celu Gelu Sigmoid HardSigmoid Tanh Softplus Softsign Mish "
    "HardSwish Swish ThresholdedRelu Shrink Clip Softmax LogSoftmax Identity Cast Dropout "
    "Neg Abs Exp Log Sqrt Reciprocal Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Erf "
    "LRN LpNormalization"
).split()
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_SELECTIONS = "MaxPool GlobalMaxPool ReduceMax ReduceMin Max Min Where CastLike".split()
_MOVED = [t for table in (shape.TABLE, indexing.TABLE) for _, t in table.entries if t != "OneHot"]
_HOMOGENEOUS = "ReduceL1 ReduceL2 LpPool GlobalLpPool BatchNormalization".split()

DEFAULTS: Mapping[str, PropagationRule] = {
    **dict.fromkeys((*_FUNCTIONS, *QUANTIZERS), Pass()),
    **dict.fromkeys((*_SELECTIONS, *_MOVED), Move()),
    **dict.fromkeys((*_AVERAGES, *_SCALED, *_HOMOGENEOUS), Norm(1e-9)),
    **dict.fromkeys(_PRODUCTS, Signal()),
}
"""The rule of each operator for which none was chosen."""


def _default(node: ir.Node, explained: Sequence[int]) -> PropagationRule | None:
    if node.domain:
        return None
    if node.op_type in _PRODUCTS and len(_factors(node, explained)) < 2:
        return Epsilon(1e-9) if node.op_type in LINEAR else Pass()
    if node.op_type in ("Max", "Min") and len(explained) == 1:
        return Pass()  # an activation: Max(x, 0)
    if node.op_type in ("ScatterND", "ScatterElements"):
        attr = node.attributes.get("reduction")
        kind = "none" if attr is None else attr.as_string()
        return {"none": Move(), "add": Norm(1e-9)}.get(kind)
    return DEFAULTS.get(node.op_type)


# ---- presets ------------------------------------------------------------------------------------

Selector = str | Callable[[ir.Node], bool] | Sequence[str]
"""A layer name or scope, an operator type, "first", a predicate on the node, or a list of names."""

PRESETS = (
    "epsilon",
    "epsilon-plus",
    "epsilon-plus-flat",
    "epsilon-alpha2-beta1",
    "epsilon-alpha2-beta1-flat",
    "epsilon-gamma-box",
    "excitation-backprop",
)


class Preset(tuple[Selector, PropagationRule]):
    """An entry of a preset: there may be nothing that it fits."""


def preset(
    name: str,
    *,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    stabilizer: float = 1e-6,
    set_bias_to_zero: bool = False,
    low: Any = None,
    high: Any = None,
) -> list[tuple[Selector, PropagationRule]]:
    """The rules of a preset as a list, to put others in front of; the composites of zennit.

    Where a composite has no rule, zennit takes the gradient and we the operator's default (see the
    module): functions of one variable pass. Only "excitation-backprop" leaves activations to it, so
    its numbers are zennit's for ReLU and differ for Tanh, Sigmoid, LeakyReLU and the like.

    Args:
        name: "epsilon" (Epsilon everywhere); "epsilon-plus" (ZPlus for convolutions, Epsilon for
            dense layers), "epsilon-alpha2-beta1" (AlphaBeta(2, 1) for convolutions), each with
            "-flat" (Flat for the first layers); "epsilon-gamma-box" (ZBox for the first layers,
            Gamma for convolutions, Epsilon for dense layers); "excitation-backprop" (ZPlus
            everywhere).
            Sums and averages get Norm, batch normalization that follows no linear layer gets Pass.
            Unlike an entry of your own, one of these may fit nothing in the model.
        epsilon, gamma: of Epsilon and Gamma.
        stabilizer: of the other rules.
        set_bias_to_zero: of all rules that have it.
        low, high: the box of "epsilon-gamma-box".

    Raises:
        InputError: an unknown name, or no box for "epsilon-gamma-box".
    """
    rest = {"stabilizer": stabilizer, "set_bias_to_zero": set_bias_to_zero}
    dense: PropagationRule = Epsilon(epsilon, set_bias_to_zero)
    convolutions: dict[str, PropagationRule] = {
        "epsilon": dense,
        "epsilon-plus": ZPlus(**rest),  # type: ignore[arg-type]
        "epsilon-alpha2-beta1": AlphaBeta(**rest),  # type: ignore[arg-type]
        "epsilon-gamma-box": Gamma(gamma, **rest),  # type: ignore[arg-type]
        "excitation-backprop": ZPlus(**rest),  # type: ignore[arg-type]
    }
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}: there are {', '.join(PRESETS)}")
    first: list[tuple[Selector, PropagationRule]] = []
    if name.endswith("-flat"):
        first = [("first", Flat(stabilizer))]
    elif name == "epsilon-gamma-box":
        if low is None or high is None:
            raise InputError(
                "'epsilon-gamma-box' needs the lowest and highest values of the input: give "
                "rules=ox.lrp.preset('epsilon-gamma-box', low=..., high=...)"
            )
        first = [("first", ZBox(low, high, **rest))]  # type: ignore[arg-type]
    convolution = convolutions[name.removesuffix("-flat")]
    rules: list[tuple[Selector, PropagationRule]] = [
        *first,
        (_AVERAGES, Norm(stabilizer)),
        ("BatchNormalization", Pass()),
        (CONVOLUTIONS, convolution),
        (DENSE, convolution if name == "excitation-backprop" else dense),
    ]
    return [Preset(pair) for pair in rules]


# ---- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A chosen rule: for the nodes that ``selects`` picks, or for the first linear layers.

    ``selector`` is how the user put it, where the rule must fit some of the nodes; ``named``: as
    the name of a layer.
    """

    rule: PropagationRule
    selects: Callable[[ir.Node], bool] | None = None
    selector: str | None = None
    named: bool = False


class Known(RuleTable):
    """Tells which operators will have a rule, before it is known what is explained."""

    def __init__(self, entries: Sequence[Entry], instead: str = "") -> None:
        super().__init__("lrp", instead=instead)
        self.chosen = entries

    def find(self, node: ir.Node) -> Rule | None:
        selected = any(e.selects is not None and e.selects(node) for e in self.chosen)
        if not selected and _default(node, ()) is None:
            return None
        return Rule(_unused, quantizes=node.op_type in QUANTIZERS)


def _unused(*_: object) -> object:
    raise AssertionError("this table only tells what has a rule")


@dataclass
class Propagation(RuleTable):
    """The rules for one question, of each node the first that fits.

    Attributes:
        chosen: rules by selector.
        nodes: the nodes between the sources and the explained value, in order.
        values: those that depend on what is explained. Where that is a layer, they include what
            depends on the same inputs as the layer does, so that relevance does not depend on the
            layer that is asked for.
        fixed: values that must get their own relevance: sources and the explained value.
        log: told of each rule and node.
    """

    chosen: Sequence[Entry] = ()
    nodes: Sequence[ir.Node] = ()
    values: Collection[ir.Value] = ()
    fixed: Collection[ir.Value] = ()
    log: Callable[[PropagationRule, ir.Node], None] | None = None
    _added: dict[ir.Node, Added] = field(default_factory=dict)
    _first: set[ir.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        behind: set[ir.Value] = set()
        for node in self.nodes:
            linear = bool(weights(node, self._varying(node)))
            if linear and behind.isdisjoint(v for v in node.inputs if v is not None):
                self._first.add(node)
            if linear or not behind.isdisjoint(v for v in node.inputs if v is not None):
                behind.update(node.outputs)
            if linear and (added := self._bias_behind(node)) is not None:
                self._added[node] = added
        self._biases = {a.y.producer() for a in self._added.values()}
        for entry in self.chosen:
            self._check(entry)

    def find(self, node: ir.Node) -> Rule | None:
        varying = self._varying(node)
        rule: PropagationRule | None = next(
            (e.rule for e in self.chosen if self._picks(e, node) and e.rule._fits(node, varying)),
            _default(node, varying),
        )
        if node in self._biases:
            rule = Pass()
        if rule is None:
            return None
        chosen = rule
        carried = tuple(rule._carries(node, varying, self.values))
        at = Place(varying, carried, self._added.get(node))

        def function(op: Emitter, n: Call, *r: ir.Value) -> list[ir.Value | None]:
            if self.log is not None:
                self.log(chosen, node)
            if r[0].dtype in _HALF:
                n = n.on([_single(op, v) for v in n.x], [_single(op, v) for v in n.y])
                r = tuple(_single(op, v) for v in r)
            return chosen._propagate(op, n, r, at)

        return Rule(function, quantizes=node.op_type in QUANTIZERS, operands=carried)

    def _picks(self, entry: Entry, node: ir.Node) -> bool:
        if entry.selects is None:
            return node in self._first
        added = self._added.get(node) if entry.named else None
        behind = added.y.producer() if added is not None else None
        # The layer is the two together, and its output has the name of the Add.
        return entry.selects(node) or (behind is not None and entry.selects(behind))

    def _varying(self, node: ir.Node) -> tuple[int, ...]:
        return tuple(i for i, v in enumerate(node.inputs) if v in self.values)

    def _bias_behind(self, node: ir.Node) -> Added | None:
        """The Add of a constant by channel that is all that uses a layer without bias."""
        y = node.outputs[0]
        if len(y.uses()) != 1 or y in self.fixed or y.is_graph_output():
            return None
        (use,) = y.uses()
        add = use.node
        if add.op_type != "Add" or add.domain or add.graph is not node.graph:
            return None
        bias = add.inputs[1 - use.idx]
        sizes = const_array(bias).shape if const_array(bias) is not None else None  # type: ignore[union-attr]
        if bias is None or sizes is None or len(sizes) > rank(y):
            return None
        channel = 1 - rank(y) if node.op_type in CONVOLUTIONS else -1
        wide = [a - len(sizes) for a, d in enumerate(sizes) if d != 1]
        # What broadcasts a single channel is no bias.
        by_channel = all(a == channel and dims(y)[a] != 1 for a in wide)
        return Added(bias, add.outputs[0]) if by_channel else None

    def _check(self, entry: Entry) -> None:
        """Refuse a rule that fits none of the nodes it was chosen for."""
        picked = [n for n in self.nodes if self._picks(entry, n) and n not in self._biases]
        if entry.selector is None or not picked:
            return
        if not any(entry.rule._fits(n, self._varying(n)) for n in picked):
            kinds = ", ".join(sorted({n.op_type for n in picked}))
            raise InputError(
                f"{entry.rule} was chosen for {entry.selector}, but fits none of the operators "
                f"there ({kinds}): it is for {entry.rule._for}. Without an entry they have the "
                "default rule of their operator; Pass is for activations, Epsilon and Norm for "
                "what is linear, Uniform for products of explained values"
            )


def _single(op: Emitter, v: ir.Value) -> Any:
    """Half precision as single, in which a small stabilizer still counts."""
    if v is None or v.dtype not in _HALF:
        return v
    wide = op.Cast(v, to=ir.DataType.FLOAT)
    wide.shape = v.shape
    return wide
