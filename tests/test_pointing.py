"""The pointing game: what matters most to a classifier of shapes lies on the drawn shape.

A hit as Zhang et al. count it ("Top-down neural attention by excitation backprop", 2016, section
4.1): the largest attribution is on the object, or within a margin of it, 15 pixels of 224 there and
so 4 of 64 here. Layers that have a value for each 2 x 2 or 4 x 4 pixels can't point any better.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import pytest
from scipy.ndimage import distance_transform_edt

import onnxplain as ox
from tests.helpers import shared

FILE = "dianna/geometric_shapes_model.onnx"
SIZE, FINE = 64, 7
MARGIN = 4
CIRCLE, TRIANGLE = 0, 1

# Segments: squares of 8 x 8 pixels.
SQUARES = np.add.outer(np.arange(SIZE) // 8 * 8, np.arange(SIZE) // 8)[None]

# By method: what it explains ("output": log-probabilities; "24": the logits before), and options.
# The model was trained on shapes in the middle: most masks leave it as sure of a triangle as of one
# that it sees whole, so RISE weighs by scores around their mean, and most explain the logits.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "rise": ("output", {"num_masks": 500, "centered": True}),
    "score-cam": ("output", {"layer": "13"}),
    "ablation-cam": ("24", {"layer": "13"}),
    "occlusion": ("24", {"sliding_window_shapes": (1, 8, 8), "strides": (1, 4, 4)}),
    "feature-ablation": ("24", {"feature_mask": SQUARES}),
    "kernel-shap": ("24", {"feature_mask": SQUARES, "n_samples": 200}),
    "lime": ("24", {"feature_mask": SQUARES, "n_samples": 400}),
    "lime-image": ("24", {"segmentation": SQUARES[0], "hide_color": 0, "num_samples": 200}),
    "shapley-value-sampling": ("24", {"feature_mask": SQUARES, "n_samples": 3}),
}


@functools.cache
def model(output: str) -> ox.Model:
    proto = onnx.load(shared(FILE))
    if output not in {o.name for o in proto.graph.output}:
        scores = onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ["N", 2])
        proto.graph.output.append(scores)
    return ox.Model(proto, output=output)


@functools.cache
def drawings(count: int = 100) -> np.ndarray:
    """White circles and triangles, in turn, of any size and angle, near the middle of black images.

    [count, 1, 64, 64], pixels half covered are half white.
    """
    rng = np.random.default_rng(0)
    fine = (np.mgrid[: SIZE * FINE, : SIZE * FINE] + 0.5) / FINE
    found = []
    for i in range(count):
        radius, turn = rng.uniform(13, 29), rng.uniform(0, 2 * np.pi)
        y, x = fine - SIZE / 2 - rng.uniform(-2, 2, 2)[:, None, None]
        if i % 2 == CIRCLE:
            inside = np.hypot(y, x) <= radius
        else:
            sides = turn + 2 * np.pi / 3 * np.arange(3)[:, None, None]
            inside = (y * np.sin(sides) + x * np.cos(sides) <= radius / 2).all(axis=0)
        found.append(inside.reshape(SIZE, FINE, SIZE, FINE).mean((1, 3)))
    return np.array(found, np.float32)[:, None]


def distances(attributions: np.ndarray) -> np.ndarray:
    """How far from the shape each example's largest attribution is, in pixels, [N].

    Where several pixels have it, which are those of a segment, the nearest counts.
    """
    found = []
    for image, values in zip(drawings()[:, 0], attributions.sum(axis=1), strict=True):
        found.append(distance_transform_edt(image < 0.5)[values == values.max()].min())
    return np.array(found)


def kinds() -> np.ndarray:
    return np.arange(len(drawings())) % 2


def test_the_model_knows_the_shapes() -> None:
    scores = model("output")(drawings())["output"]
    assert (scores.argmax(1) == kinds()).all() and np.exp(scores.max(1)).min() > 0.99


@pytest.mark.parametrize("method", ROWS)
def test_the_explanation_lies_on_the_shape(method: str) -> None:
    output, options = ROWS[method]
    seed = {"seed": 0} if "random" in ox.methods()[method].needs else {}
    found = ox.explain(model(output), drawings(), method=method, target=kinds(), **seed, **options)
    missed = np.flatnonzero(distances(found.attributions) > MARGIN)
    assert not missed.size, f"{missed.size} of {len(drawings())} drawings missed: {missed}"
