"""Excitation backpropagation: the probability with which a winner-take-all walk visits a neuron.

What comes back is a probability of each neuron. A linear layer hands it on to the neurons before it
in proportion to what excites it: their values times positive weights, without bias (Zhang et al.
2016, arXiv:1608.00507, section 3.2). That is a rule of layer-wise relevance propagation, and so is
the rest:

- a sum is a linear layer of weight 1, averages are linear; what is subtracted inhibits and gets
  nothing, and neither does a constant;
- activation functions and normalizations hand it on as it is (a batch normalization behind a linear
  layer is part of the layer's weights);
- poolings, reshapes, gathers, products of activations (attention, gates) as in :mod:`.lrp`: where a
  value came from; to the factor that is no gate.

The probabilities of a layer that the whole walk passes add up to those it started with, but for
neurons that nothing excites.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from onnxplain.graph.emit import Emitter
from onnxplain.rules.lrp import (
    LINEAR,
    Entry,
    Modifier,
    Norm,
    Pass,
    PropagationRule,
    Share,
    Term,
    keep,
    positive,
)

NORMALIZATIONS = frozenset(
    "BatchNormalization LayerNormalization RMSNormalization InstanceNormalization "
    "GroupNormalization MeanVarianceNormalization LpNormalization LRN".split()
)
_SUMS = frozenset(
    "Add Sum Mean AveragePool GlobalAveragePool ReduceSum ReduceMean CumSum Resize".split()
)


def flipped(op: Emitter, weight: ir.Value) -> Any:
    """The positive part of a weight with the other sign: what speaks against a class."""
    return op.Relu(op.Neg(weight))


@dataclass(frozen=True)
class Winners(Norm):
    """In proportion to values times positive weights, for anything linear.

    Args:
        stabilizer: added to the denominator with its sign.
        weight: what excites of a weight.
        value: what excites of a value.
    """

    stabilizer: float = 0.0
    weight: Modifier = positive
    value: Modifier = keep

    def _shares(self) -> tuple[Share, ...]:
        return (Share((Term(self.value, self.weight, None),)),)


@dataclass(frozen=True)
class Minuend(Pass):
    """Of a difference, what is subtracted gets nothing."""

    def _carries(
        self, node: ir.Node, explained: Sequence[int], values: Collection[ir.Value]
    ) -> Sequence[int]:
        return [i for i in explained if i == 0]

    def _fits(self, node: ir.Node, explained: Sequence[int]) -> bool:
        return True


def excitation(ignore_negative: bool = False, against: ir.Node | None = None) -> tuple[Entry, ...]:
    """The rule of each operator; the first that fits counts, and the defaults of LRP come last.

    Args:
        ignore_negative: negative values excite nothing.
        against: a linear layer whose weights are flipped.
    """
    value = positive if ignore_negative else keep
    return (
        Entry(Winners(weight=flipped, value=value), lambda node: node is against),
        Entry(Pass(), lambda node: node.op_type in ("Add", "Sum") and _adds_constant(node)),
        _entry(Winners(value=value), (*LINEAR, *_SUMS)),
        _entry(Minuend(), ("Sub",)),
        _entry(Pass(), NORMALIZATIONS),
    )


def _entry(rule: PropagationRule, op_types: Collection[str]) -> Entry:
    return Entry(rule, lambda node: node.op_type in op_types and not node.domain)


def _adds_constant(node: ir.Node) -> bool:
    """Whether all terms of a sum but one are constants."""
    return sum(varies(v) for v in node.inputs if v is not None) == 1


def varies(value: ir.Value) -> bool:
    """Whether a value depends on an input of the model."""
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        v = stack.pop()
        if v.is_graph_input():
            return True
        node = v.producer()
        if node is not None and v not in seen:
            stack.extend(x for x in node.inputs if x is not None)
        seen.add(v)
    return False
