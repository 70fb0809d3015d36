"""Small models for tests, written as ONNX text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxplain as ox

SHARED = Path(__file__).parent.parent.parent / "shared" / "models"
BUNDLED = Path(__file__).parent.parent / "models"


def shared(name: str) -> str:
    """Path of a real model; skips the test where the folder is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the real model {name} is not on this machine")
    return str(path)


def proto(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX text; `weights` are initializers."""
    model = onnx.parser.parse_model(text)
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def model(text: str, weights: dict[str, np.ndarray] | None = None, **options: object) -> ox.Model:
    return ox.Model(proto(text, **(weights or {})), **options)  # type: ignore[arg-type]


HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
