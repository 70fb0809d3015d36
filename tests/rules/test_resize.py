"""Projection checks of Resize: every mode, coordinate transformation and rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.projection import Case, check, check_adjoint

rng = np.random.default_rng(0)
normal = rng.standard_normal
COORDINATES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "asymmetric")
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def scaled(x: np.ndarray, *scales: float, name: str = "", **attrs: Any) -> Case:
    symbolic = [0] if attrs.pop("symbolic", False) else []
    second = attrs.pop("second", True)
    inputs = [x, None, np.asarray(scales, np.float32)]
    return Case(
        "Resize",
        inputs,
        attrs,
        const=[2],
        symbolic=symbolic,
        second=second,
        name=f"{name} {scales}",
    )


def sized(x: np.ndarray, *sizes: int, name: str = "", const: bool = True, **attrs: Any) -> Case:
    symbolic = [0] if attrs.pop("symbolic", False) else []
    inputs = [x, None, None, np.asarray(sizes, np.int64)]
    return Case(
        "Resize",
        inputs,
        attrs,
        const=[3] if const else [],
        symbolic=symbolic,
        name=f"{name} {sizes}",
    )


SMALL = normal((1, 2, 3, 4))
LINE = normal((1, 1, 1, 5))
ROWS = [
    *(
        scaled(
            LINE,
            1,
            1,
            1,
            scale,
            name=f"{c} {r}",
            coordinate_transformation_mode=c,
            nearest_mode=r,
            second=False,
        )
        for c in COORDINATES
        for r in NEAREST
        for scale in (2.0, 1.7, 0.7)
    ),
    *(
        scaled(
            SMALL,
            1,
            1,
            *scales,
            name=f"{mode} {c}",
            mode=mode,
            coordinate_transformation_mode=c,
            second=False,
        )
        for mode in ("linear", "cubic")
        for c in COORDINATES
        for scales in ((2.0, 1.3), (0.7, 0.5))
    ),
    *(
        sized(
            LINE,
            1,
            1,
            1,
            size,
            name=f"align {r}",
            coordinate_transformation_mode="align_corners",
            nearest_mode=r,
        )
        for r in NEAREST
        for size in (8, 4)
    ),
    *(
        sized(
            SMALL,
            1,
            2,
            *sizes,
            name=f"{mode} align",
            mode=mode,
            coordinate_transformation_mode="align_corners",
        )
        for mode in ("linear", "cubic")
        for sizes in ((5, 7), (2, 1))
    ),
    scaled(SMALL, 1, 1, 2, 3, name="blocks", symbolic=True),
    scaled(
        SMALL,
        1,
        1,
        2,
        2,
        name="blocks floor",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    scaled(normal((1, 2, 3)), 1, 1, 3, name="blocks 1d"),
    scaled(normal((1, 1, 2, 2, 3)), 1, 1, 2, 1, 2, name="blocks 3d"),
    scaled(normal((2, 3, 2, 1)), 1, 2, 2, 1, name="blocks nhwc"),
    sized(SMALL, 1, 2, 6, 4, name="blocks"),
    sized(SMALL, 1, 2, 5, 6, name="linear", mode="linear", symbolic=True),
    sized(SMALL, 1, 2, 5, 2, name="computed linear", mode="linear", const=False, symbolic=True),
    sized(SMALL, 6, 5, name="axes", mode="linear", axes=[3, 2]),
    sized(SMALL, 5, name="one axis", mode="cubic", axes=[2], symbolic=True),
    sized(normal((3, 4)), 5, 6, name="linear 2d", mode="linear"),
    sized(normal((1, 1, 2, 3, 2)), 1, 1, 3, 2, 3, name="linear 3d", mode="linear"),
    scaled(SMALL, 1, 1, 1.5, 2, name="cubic a", mode="cubic", cubic_coeff_a=-0.5),
    scaled(SMALL, 1, 1, 1.5, 0.6, name="cubic exclude", mode="cubic", exclude_outside=1),
    sized(
        SMALL,
        7,
        6,
        name="larger",
        mode="linear",
        axes=[2, 3],
        keep_aspect_ratio_policy="not_larger",
    ),
    sized(
        SMALL,
        5,
        10,
        name="smaller",
        mode="linear",
        axes=[2, 3],
        keep_aspect_ratio_policy="not_smaller",
    ),
    scaled(SMALL, 1, 1, 0.6, 0.5, name="antialias linear", mode="linear", antialias=1),
    scaled(SMALL, 1, 1, 0.6, 0.5, name="antialias cubic", mode="cubic", antialias=1),
    Case(
        "Resize",
        [SMALL, np.float32([0.2, 0, 0.9, 1.2]), None, np.asarray([4, 5])],
        {
            "mode": "linear",
            "coordinate_transformation_mode": "tf_crop_and_resize",
            "axes": [2, 3],
            "extrapolation_value": 0.5,
        },
        const=[1, 3],
        name="crop",
    ),
    Case(
        "Resize",
        [SMALL, np.float32([0, 0, 0.2, 0, 1, 1, 0.9, 1.2]), None, np.asarray([1, 2, 4, 5])],
        {"mode": "nearest", "coordinate_transformation_mode": "tf_crop_and_resize"},
        const=[3],
        name="computed crop",
    ),
]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_projection(case: Case) -> None:
    check(case)


# With scales, the reference evaluator aligns the corners of an output of fractional size; and it
# does not take negative axes.
ALIGNED = [
    scaled(
        SMALL, 1, 1, *scales, name=mode, mode=mode, coordinate_transformation_mode="align_corners"
    )
    for mode in ("nearest", "linear", "cubic")
    for scales in ((2.0, 1.3), (0.7, 0.5))
] + [sized(SMALL, 5, 6, name="negative axes", mode="linear", axes=[-2, -1])]


@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_by_onnxruntime(case: Case) -> None:
    check_adjoint(case)
