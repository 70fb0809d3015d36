"""Derivative rules as data: tables of small functions, found by operator.

A rule takes ``(op, n, *g)``: an :class:`~onnxplain.graph.emit.Emitter`, the node as a
:class:`~onnxplain.graph.emit.Call`, and the cotangent of each floating-point output of the node.
It returns the cotangents of the inputs in order: values, None where there is none, or functions
without arguments that the walk calls only when that gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import onnx_ir as ir

from onnxplain.errors import NoRuleError

if TYPE_CHECKING:
    from onnxplain.graph.emit import Call, Emitter

RuleFunction = Callable[..., object]


@dataclass(frozen=True)
class Rule:
    """A derivative rule.

    Attributes:
        function: see the module.
        broadcasts: the operator broadcasts; the walk sums cotangents of the output's shape back.
        quantizes: the operator enters or leaves integers that stand for real numbers. Only its
            first input and output carry the gradient: scales and zero points are constants.
        expands: there is no formula for this operator; its function body is differentiated.
        operands: indices of the inputs that carry something back, None for all: the others are
            constants, and the walk does not go there.
    """

    function: RuleFunction
    broadcasts: bool = False
    quantizes: bool = False
    expands: bool = False
    operands: tuple[int, ...] | None = None


def apply(
    op: Emitter, rule: Rule, call: Call, gs: Sequence[ir.Value]
) -> Iterator[tuple[int, ir.Value]]:
    """Call a rule; yields the wanted cotangents with the index of their input.

    Raises:
        NoRuleError: a wanted one does not exist.
    """
    result = rule.function(op, call, *gs)
    items = list(result) if isinstance(result, tuple | list) else [result]
    for i in range(len(call.x)):
        if not call.needs(i):
            continue
        item = items[i] if i < len(items) else None
        g = item() if callable(item) else item
        if g is None:
            raise NoRuleError(
                f"operator {call.node.op_type} (node '{call.node.name}') has no derivative with "
                f"respect to its input {i} ('{call.x[i].name}'), which depends on what is "
                "explained by. Use a perturbation method, which needs no gradient"
            )
        value = call.x[i]
        g = cast(ir.Value, g)
        if rule.broadcasts:
            g = op.unbroadcast(g, call.y[0], value)
        if g.dtype is None:
            g.type = value.type
        if g.shape is None:
            g.shape = value.shape
        yield i, op.cast_like(g, value)


def _no_formula(*_: object) -> object:
    raise AssertionError("the walk replaces this operator by its function body")


@dataclass
class RuleTable:
    """Rules by operator; ``matches`` narrows a table to some nodes (a layer name, the first).

    ``instead`` says what to do about an operator that has a derivative and no rule here.
    """

    name: str
    entries: dict[tuple[str, str], Rule] = field(default_factory=dict)
    matches: Callable[[ir.Node], bool] | None = None
    instead: str = ""

    def rule(
        self,
        *op_types: str,
        domain: str = "",
        broadcasts: bool = False,
        quantizes: bool = False,
    ) -> Callable[[RuleFunction], RuleFunction]:
        """Decorator that registers one function for one or more operators."""

        def register(function: RuleFunction) -> RuleFunction:
            for op_type in op_types:
                key = (domain, op_type)
                if key in self.entries:
                    raise ValueError(f"table '{self.name}' has a rule for {op_type} already")
                self.entries[key] = Rule(function, broadcasts, quantizes)
            return function

        return register

    def expand(self, *op_types: str, domain: str = "") -> None:
        """Let operators be differentiated through their function bodies, whatever table follows."""
        for op_type in op_types:
            self.rule(op_type, domain=domain)(_no_formula)
            key = (domain, op_type)
            self.entries[key] = replace(self.entries[key], expands=True)

    def find(self, node: ir.Node) -> Rule | None:
        """The rule for a node, if this table has one."""
        if self.matches is not None and not self.matches(node):
            return None
        return self.entries.get((node.domain, node.op_type))


class Rules:
    """Tables in order of precedence: the first that has a rule for a node wins."""

    def __init__(self, tables: Iterable[RuleTable]) -> None:
        self.tables = tuple(tables)

    def __iter__(self) -> Iterator[RuleTable]:
        return iter(self.tables)

    def find(self, node: ir.Node) -> Rule | None:
        """The first matching rule, or None."""
        return next((r for t in self.tables if (r := t.find(node)) is not None), None)

    def gradient(self, op: Emitter, call: Call, *gs: ir.Value) -> list[ir.Value | None]:
        """One call's cotangents by these rules, one entry per input (None where not wanted).

        Raises:
            NoRuleError: the operator has no rule here, or not for an input that is wanted.
        """
        rule = self.find(call.node)
        if rule is None or rule.expands:
            raise NoRuleError(
                f"operator {call.node.op_type} (node '{call.node.name}') has no derivative rule"
            )
        found: list[ir.Value | None] = [None] * len(call.x)
        for i, g in apply(op, rule, call, gs):
            found[i] = g
        return found

    def __add__(self, other: Rules | RuleTable) -> Rules:
        return Rules((*self.tables, *(other.tables if isinstance(other, Rules) else (other,))))
