"""Operators that are affine in some of their inputs: their derivative does not depend on values.

Sums of gradients commute with them, so a sum over many points of a path passes them once.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

# Affine in all of their inputs together.
_JOINTLY = frozenset("Add Sub Sum Mean Concat".split())
# Affine in any one input while the others are constant.
_SINGLY = frozenset("Mul MatMul".split())
# Affine in the first input.
_FIRST = frozenset(
    "Identity Neg Div Conv ConvTranspose Gemm BatchNormalization AveragePool GlobalAveragePool "
    "ReduceSum ReduceMean Reshape Flatten Squeeze Unsqueeze Transpose Slice Split Expand Tile "
    "Gather DepthToSpace SpaceToDepth".split()
)


def is_affine(node: ir.Node, varying: Sequence[int]) -> bool:
    """Whether a node is affine in the inputs at these positions (the others are constant)."""
    if node.domain or not varying:
        return False
    if node.op_type in _JOINTLY:
        return True
    if node.op_type in _SINGLY:
        return len(varying) == 1
    return node.op_type in _FIRST and list(varying) == [0]
