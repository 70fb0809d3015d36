"""Derivative rules as data: tables of small functions, found by operator.

A rule takes ``(op, n, *g)``: an :class:`~onnxplain.graph.emit.Emitter`, the node as a
:class:`~onnxplain.graph.emit.Call`, and the cotangent of each floating-point output of the node.
It returns the cotangents of the inputs in order: values, None where there is none, or functions
without arguments that the walk calls only when that gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

RuleFunction = Callable[..., object]


@dataclass(frozen=True)
class Rule:
    """A derivative rule.

    Attributes:
        function: see the module.
        broadcasts: the operator broadcasts; the walk sums cotangents of the output's shape back.
        quantizes: the operator enters or leaves integers that stand for real numbers. Only its
            first input and output carry the gradient: scales and zero points are constants.
    """

    function: RuleFunction
    broadcasts: bool = False
    quantizes: bool = False


@dataclass
class RuleTable:
    """Rules by operator; ``matches`` narrows a table to some nodes (a layer name, the first)."""

    name: str
    entries: dict[tuple[str, str], Rule] = field(default_factory=dict)
    matches: Callable[[ir.Node], bool] | None = None

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

    def __add__(self, other: Rules) -> Rules:
        return Rules((*self.tables, *other.tables))
