"""Runs a model as it is, on stock onnxruntime without its optimizer."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

ort.set_default_logger_severity(3)


def evaluate(
    model: ir.Model | onnx.ModelProto, feeds: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Every output by name."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def random_feeds(model: ir.Model, rows: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal numbers (0 and 1 for integers); symbolic dimensions are ``rows``."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        shape = [d if isinstance(d, int) else rows for d in value.shape]
        dtype = value.dtype.numpy()
        floating = np.issubdtype(dtype, np.floating)
        array = rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)
        feeds[value.name] = array.astype(dtype)
    return feeds
