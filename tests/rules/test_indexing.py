"""Projection checks of the operators that pick or place elements by index."""

from __future__ import annotations

import numpy as np
import pytest

from tests.projection import Case, check, check_adjoint, evaluate, gradient, load, make_model

rng = np.random.default_rng(0)
normal = rng.standard_normal


def ints(*values: object) -> np.ndarray:
    return np.asarray(values, np.int64)


A = normal((3, 4, 5))
ONE = np.asarray(2)
PICKS = ints([0, -1, 2, 2], [3, 1, -4, 2], [1, 1, 1, 1])
DISTINCT = ints([0, -1, 2, 1], [3, 1, -4, 2], [-1, 0, -3, 2])
CELLS = ints([0, -1], [2, 3], [-1, 0])
SAME = ints([0, 1], [2, 3], [0, 1])

# onnxruntime's scatter kernels take half precision without a reduction alone.
DTYPES = {how: ["float32"] for how in ("add", "mul", "max", "min")} | {
    "none": ["float32", "float16"]
}

ROWS = [
    Case("Gather", [A, ONE], {"axis": 1}, const=[1], name="scalar"),
    Case("Gather", [A, -ONE], {"axis": -1}, const=[1], name="negative-scalar"),
    Case("Gather", [A, ONE], {"axis": 1}, const=[1], symbolic=[0], name="scalar-symbolic"),
    Case("Gather", [A, -ONE], {"axis": 1}, const=[1], symbolic=[0], name="negative-symbolic"),
    Case("Gather", [A, ONE], {"axis": 1}, name="computed-scalar"),
    Case("Gather", [A, ints(1, 2, 3)], {"axis": 1}, const=[1], name="run"),
    Case("Gather", [A, ints(3, -4, 2)], {"axis": 1}, const=[1], name="distinct"),
    Case("Gather", [A, ints(3, 1, 2, 0)], {"axis": 1}, const=[1], name="permutation"),
    Case("Gather", [A, ints(3, 1, -1, 3)], {"axis": 1}, const=[1], name="repeated"),
    Case("Gather", [A, ints([3, 0], [-1, 1])], {"axis": 1}, const=[1], name="matrix"),
    Case("Gather", [A, ints([0, 2], [-1, 0])], {"axis": 0}, name="computed"),
    Case("Gather", [A, ints([3, 0], [-1, 1])], {"axis": -2}, symbolic=[0], name="symbolic"),
    Case("Gather", [A, ints(1, 1)], {"axis": 2}, const=[1], symbolic=[0], name="repeated-symbolic"),
    Case("Gather", [A, np.zeros(0, np.int64)], {"axis": 1}, const=[1], name="empty"),
    Case("Gather", [A, np.zeros(0, np.int64)], {"axis": 1}, name="empty-computed"),
    Case("Gather", [A, np.int32([1, 0])], {"axis": 0}, const=[1], symbolic=[0], name="int32"),
    Case("GatherElements", [normal((3, 4)), PICKS], {"axis": 1}),
    Case("GatherElements", [normal((5, 4)), PICKS], {"axis": -2}, symbolic=[0], name="symbolic"),
    Case("GatherND", [A, CELLS]),
    Case("GatherND", [normal((4, 5)), CELLS], symbolic=[0], name="scalars"),
    Case(
        "GatherND", [A, ints([[1], [1]], [[0], [-1]], [[3], [3]])], {"batch_dims": 1}, name="batch"
    ),
    Case(
        "GatherND",
        [A, ints([[[0]], [[-1]], [[2]], [[2]]], *[[[[1]]] * 4] * 2)],
        {"batch_dims": 2},
        symbolic=[0],
        name="batch2",
    ),
    *(
        Case(
            "ScatterND",
            [A, SAME if how != "none" else CELLS, normal((3, 5))],
            {"reduction": how},
            dtypes=DTYPES[how],
            name=how,
        )
        for how in ("none", "add", "mul", "max", "min")
    ),
    Case(
        "ScatterND",
        [A, SAME, normal((3, 5))],
        {"reduction": "mul"},
        symbolic=[0, 2],
        dtypes=["float32"],
        name="symbolic",
    ),
    *(
        Case(
            "ScatterElements",
            [normal((3, 4)), DISTINCT if how == "none" else PICKS, normal((3, 4))],
            {"reduction": how, "axis": 1},
            dtypes=DTYPES[how],
            name=how,
        )
        for how in ("none", "add", "mul", "max", "min")
    ),
    Case(
        "ScatterElements",
        [normal((5, 4)), normal((3, 4)).argsort(0) - 3, normal((3, 4))],
        {"axis": -2},
        symbolic=[0, 2],
        name="symbolic",
    ),
    Case("Compress", [A, np.asarray([False, True, True])], {"axis": 1}, const=[1]),
    Case("Compress", [A, np.asarray([True, False, True, True])], {"axis": -2}, name="computed"),
    Case("Compress", [A, np.asarray([False, True, False, True])], name="flat"),
    Case(
        "Compress",
        [A, np.asarray([False, True, False, True])],
        const=[1],
        symbolic=[0],
        name="flat-symbolic",
    ),
    Case("OneHot", [ints([0, -1], [2, 5]), np.asarray(3), normal(2)], const=[1]),
    Case(
        "OneHot",
        [ints([0, -1], [2, 5]), np.asarray(3), normal(2)],
        {"axis": 0},
        const=[1],
        name="axis0",
    ),
]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_projection(case: Case) -> None:
    check(case)


def test_indices_narrower_than_data() -> None:
    # The reference evaluator refuses indices that are narrower off the axis.
    check_adjoint(Case("GatherElements", [normal((4, 6)), PICKS], {"axis": 0}, symbolic=[0]))
    check_adjoint(
        Case("ScatterElements", [normal((4, 6)), DISTINCT % 4, normal((3, 4))], {"axis": 1})
    )


def test_kinks_follow_pytorch() -> None:
    """Factors of zero get the product of the others; ties of max and min share evenly."""
    data, updates = np.asarray([0.0, 2.0, 3.0]), np.asarray([5.0, 0.0, 0.0, 3.0])
    cells = ints(0, 1, 1, 2)
    for how, of_data, of_updates in (
        ("mul", [5.0, 0.0, 3.0], [0.0, 0.0, 0.0, 3.0]),
        ("max", [0.0, 1.0, 0.5], [1.0, 0.0, 0.0, 0.5]),
        ("min", [1.0, 0.0, 0.5], [0.0, 0.5, 0.5, 0.5]),
    ):
        case = Case("ScatterElements", [data, cells, updates], {"reduction": how})
        back = gradient(load(make_model(case)), "y0", ["x0", "x2"])
        feeds = {"x0": data, "x1": cells, "x2": updates, "cotangent": np.ones(3)}
        _, g_data, g_updates = evaluate(back, feeds)
        np.testing.assert_array_equal(g_data, of_data)
        np.testing.assert_array_equal(g_updates, of_updates)
