"""Vector-Jacobian products of the standard operators, by family."""

from __future__ import annotations

from onnxplain.rules import Rules
from onnxplain.rules.vjp import (
    activation,
    elementwise,
    indexing,
    linear,
    normalization,
    pooling,
    quantization,
    reduction,
    resize,
    shape,
)
from onnxplain.rules.vjp.none import NO_DERIVATIVE

__all__ = ["NO_DERIVATIVE", "VJP"]

VJP = Rules(
    module.TABLE
    for module in (
        elementwise,
        activation,
        linear,
        pooling,
        normalization,
        reduction,
        shape,
        indexing,
        resize,
        quantization,
    )
)
