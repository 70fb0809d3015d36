"""Projection checks of the operators that rearrange elements."""

from __future__ import annotations

import numpy as np
import pytest

from tests.projection import Case, check, check_adjoint

rng = np.random.default_rng(0)
normal = rng.standard_normal


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


A = normal((2, 3, 4))
IMAGE = normal((2, 3, 5, 4))
BIG = np.iinfo(np.int64).max

ROWS = [
    Case("Reshape", [A, ints(4, 6)], const=[1]),
    Case("Reshape", [A, ints(0, -1)], const=[1], name="zero-and-minus-one"),
    Case("Reshape", [A, ints(0, -1)], const=[1], symbolic=[0], name="symbolic"),
    Case("Reshape", [A, ints(0, -1)], symbolic=[0], name="computed-target"),
    Case("Reshape", [normal((0, 3)), ints(3, 0)], {"allowzero": 1}, const=[1], name="allowzero"),
    Case("Reshape", [normal((0, 3)), ints(3, 0)], {"allowzero": 1}, symbolic=[0], name="empty"),
    Case("Reshape", [np.asarray(2.0), ints(1, 1)], const=[1], name="scalar"),
    Case("Flatten", [IMAGE], name="default"),
    Case("Flatten", [IMAGE], {"axis": 0}, name="axis0"),
    Case("Flatten", [IMAGE], {"axis": -1}, symbolic=[0], name="symbolic"),
    Case("Squeeze", [normal((1, 3, 1)), ints(-1)], const=[1]),
    Case("Squeeze", [normal((1, 3, 1))], name="all"),
    Case("Unsqueeze", [A, ints(0, -1)], const=[1]),
    Case("Unsqueeze", [np.asarray(1.5), ints(0)], const=[1], name="scalar"),
    Case("Transpose", [A], name="reversed"),
    Case("Transpose", [IMAGE], {"perm": [2, 0, 3, 1]}, symbolic=[0], name="perm"),
    Case("Transpose", [normal((2, 0, 3))], {"perm": [1, 2, 0]}, name="empty"),
    Case("Concat", [A, normal((2, 1, 4)), normal((2, 2, 4))], {"axis": 1}),
    Case("Concat", [A, normal((2, 3, 0)), A], {"axis": -1}, name="empty-part"),
    Case("Concat", [A, normal((2, 2, 4))], {"axis": -2}, symbolic=[0, 1], name="symbolic"),
    Case("Concat", [A, normal((2, 2, 4))], {"axis": 1}, wrt=[1], name="second-only"),
    Case("Concat", [A], {"axis": 0}, name="single"),
    Case("Split", [A, ints(1, 2)], {"axis": 1}, const=[1], outputs=2, of=1, name="sizes"),
    Case("Split", [normal((2, 5))], {"axis": -1, "num_outputs": 3}, outputs=3, of=0, name="uneven"),
    Case("Split", [A], {"axis": 0, "num_outputs": 2}, outputs=2, symbolic=[0], name="symbolic"),
    Case("Slice", [A, ints(1), ints(BIG), ints(1)], const=[1, 2, 3], name="to-the-end"),
    Case("Slice", [A, ints(-2, 1), ints(-1, 100), ints(-1, 1)], const=[1, 2, 3], name="negative"),
    Case("Slice", [A, ints(0, 1), ints(2, 3)], const=[1, 2], name="no-axes"),
    Case(
        "Slice",
        [A, ints(-1, 100), ints(-BIG, 0), ints(2, 1), ints(-1, -2)],
        const=[1, 2, 3, 4],
        name="backwards",
    ),
    Case(
        "Slice",
        [IMAGE, ints(1, 0), ints(BIG, 4), ints(-2, 3), ints(2, 3)],
        const=[1, 2, 3, 4],
        symbolic=[0],
        name="strided",
    ),
    Case("Slice", [A, ints(2), ints(1), ints(0)], const=[1, 2, 3], name="empty"),
    Case("Slice", [A, ints(3), ints(3), ints(2), ints(-1)], const=[1, 2, 3, 4], name="empty-back"),
    Case("Slice", [A, ints(1, -3), ints(3, -1), ints(2, 1)], const=[3], name="computed-bounds"),
    Case(
        "Slice",
        [A, ints(1, 3), ints(3, -9), ints(1, 2), ints(1, -2)],
        const=[3],
        name="computed-steps",
    ),
    Case("Slice", [A, ints(1), ints(BIG), ints(2)], const=[1, 2, 3], symbolic=[0], name="symbolic"),
    Case(
        "Slice",
        [A, np.int32([0]), np.int32([2]), np.int32([2]), np.int32([2])],
        const=[1, 2, 3, 4],
        symbolic=[0],
        name="int32",
    ),
    Case("Expand", [normal((3, 1)), ints(2, 3, 4)], const=[1]),
    Case("Expand", [normal((3, 1)), ints(2, 1, 4)], const=[1], name="two-way"),
    Case("Expand", [np.asarray(1.5), ints(2, 3)], const=[1], name="scalar"),
    Case("Expand", [normal((3, 1)), ints(2, 3, 4)], symbolic=[0], name="computed"),
    Case("Expand", [normal((1, 3)), ints(0, 3)], const=[1], name="empty"),
    Case("Tile", [A, ints(1, 2, 3)], const=[1]),
    Case("Tile", [A, ints(1, 1, 1)], const=[1], name="once"),
    Case("Tile", [A, ints(2, 1, 3)], symbolic=[0], name="computed"),
    Case("Tile", [A, ints(2, 1, 3)], const=[1], symbolic=[0], name="symbolic"),
    Case("Tile", [A, ints(1, 0, 2)], const=[1], name="none"),
    Case("Pad", [A, ints(0, 1, 2, 1, 0, 1)], const=[1], name="constant"),
    Case(
        "Pad", [A, ints(1, 0), np.asarray(0.7), ints(1)], const=[3], symbolic=[0], name="computed"
    ),
    Case("Pad", [A, ints(0, 1, 2, 0, 2, 3)], {"mode": "reflect"}, const=[1], name="reflect"),
    Case(
        "Pad", [A, ints(1, 2, 0, 3), None, ints(-1, 1)], {"mode": "edge"}, const=[1, 3], name="edge"
    ),
    Case("Pad", [A, ints(0, 1, 2, 1, 2, 3)], {"mode": "wrap"}, const=[1], name="wrap"),
    Case(
        "Pad",
        [A, ints(0, 0, 1, 0, 0, 2)],
        {"mode": "reflect"},
        const=[1],
        symbolic=[0],
        name="symbolic",
    ),
    Case("Pad", [A, ints(0, 1, 1, 0, 0, 2)], {"mode": "edge"}, symbolic=[0], name="computed-edge"),
    Case("DepthToSpace", [normal((2, 8, 2, 3))], {"blocksize": 2}, name="DCR"),
    Case("DepthToSpace", [normal((2, 8, 2, 3))], {"blocksize": 2, "mode": "CRD"}, name="CRD"),
    Case(
        "DepthToSpace",
        [normal((2, 8, 2, 3))],
        {"blocksize": 2, "mode": "CRD"},
        symbolic=[0],
        name="CRD-symbolic",
    ),
    Case("SpaceToDepth", [normal((2, 2, 4, 6))], {"blocksize": 2}, symbolic=[0]),
    Case("Trilu", [normal((2, 4, 3))]),
    Case("Trilu", [normal((2, 4, 3)), np.asarray(-1)], {"upper": 0}, name="lower"),
    Case("ReverseSequence", [normal((4, 3, 2)), ints(1, 4, 2)]),
    Case(
        "ReverseSequence",
        [normal((3, 4, 2)), ints(1, 4, 2)],
        {"batch_axis": 0, "time_axis": 1},
        name="batch-first",
    ),
]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_projection(case: Case) -> None:
    check(case)


# The reference evaluator has no negative pads.
CROPS = [
    Case("Pad", [A, ints(0, 1, -1, 1, -2, 1)], const=[1], name="crop"),
    Case(
        "Pad", [A, ints(1, -1, 2, 1), np.asarray(0.7), ints(-1, 0)], const=[1, 3], name="value-axes"
    ),
    Case("Pad", [A, ints(0, -1, 2, 0, 1, -1)], {"mode": "edge"}, const=[1], name="edge-crop"),
    Case("Pad", [A, ints(0, -1, 2, 0, 1, -1)], name="computed"),
    Case("Pad", [A, ints(0, -1, 2, 0, 1, -1)], {"mode": "reflect"}, symbolic=[0], name="reflect"),
    Case(
        "Pad", [A, ints(-1, 1), None, ints(-1)], {"mode": "wrap"}, const=[3], name="computed-wrap"
    ),
]


@pytest.mark.parametrize("case", CROPS, ids=str)
def test_negative_pads(case: Case) -> None:
    check_adjoint(case)
