from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from onnxplain.graph import shapes
from tests.projection import Case, check, load, project
from tests.rules.test_elementwise import apart, between, normal, vjp

NAMES = ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
OPS = [f"Reduce{name}" for name in NAMES]
SIGNED = apart(2, 3, 2)
POSITIVE = between(0.5, 2, 2, 3, 2)


def data(op: str) -> np.ndarray:
    return POSITIVE if op == "ReduceLogSum" else SIGNED


ROWS = [
    *(
        Case(op, [data(op), *axes], {"keepdims": keep}, const=const, name=f"{name}-keep{keep}")
        for op in OPS
        for keep in (0, 1)
        for name, axes, const in (
            ("absent", [], ()),
            ("const", [np.array([-2])], (1,)),
            ("two", [np.array([2, 0])], (1,)),
        )
    ),
    *(
        Case(
            op,
            [data(op), *axes],
            {"noop_with_empty_axes": noop, "keepdims": keep},
            const=[1],
            name=f"noop{noop}-{'empty' if axes else 'absent'}-keep{keep}",
        )
        for op in OPS
        for noop, axes, keep in itertools.product((0, 1), ([np.zeros(0, np.int64)], []), (0, 1))
        if noop or axes
    ),
    *(
        Case(
            op,
            [data(op), np.array([1])],
            {"keepdims": 0},
            const=[1],
            symbolic=(0,),
            name="symbolic",
        )
        for op in OPS
    ),
    # the reference evaluator's ReduceLogSumExp takes no scalars
    *(Case(op, [np.float64(1.5)], name="scalar") for op in OPS if op != "ReduceLogSumExp"),
    *(
        Case(op, [np.zeros((0, 3)), np.array([1])], {"keepdims": 0}, const=[1], name="empty")
        for op in OPS
    ),
    Case("ReduceSum", [np.zeros((3, 0)), np.array([1])], const=[1], name="over-empty"),
    Case(
        "ReduceMean",
        [normal(2, 3), np.array([0, 1])],
        {"keepdims": 0},
        symbolic=(0,),
        const=[1],
        name="symbolic-all",
    ),
    # one, two and three zeros among the factors
    Case(
        "ReduceProd",
        [np.array([[0, 2, 3], [0, 0, 3], [0, 0, 0], [1, 2, 3.0]]), np.array([1])],
        const=[1],
        name="zeros",
    ),
    Case(
        "ReduceLogSumExp",
        [normal(2, 3) + np.array([[1000.0], [-1000.0]]), np.array([1])],
        const=[1],
        dtypes=("float32",),
        name="far-out",
    ),
    *(
        Case(
            "CumSum",
            [normal(2, 3), np.array(axis)],
            {"exclusive": e, "reverse": r},
            const=const,
            name=f"{axis}-{e}{r}-{'const' if const else 'computed'}",
        )
        for e, r, (axis, const) in itertools.product((0, 1), (0, 1), ((1, (1,)), (-2, ())))
    ),
]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_projection(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [[1], [-1, 0]])
@pytest.mark.parametrize("op", OPS)
def test_computed_axes(op: str, axes: list[int], keep: int) -> None:
    shape = "A, B, C" if keep else ", ".join("AB"[: 3 - len(axes)])
    model = load(
        onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["": 21]>
            case (double[2, M, N] x, int64[K] axes) => (double[{shape}] y) {{
                y = {op}<keepdims = {keep}>(x, axes)
            }}"""
        )
    )
    feeds = {"x": data(op), "axes": np.array(axes, np.int64)}
    rng = np.random.default_rng(0)
    back, feeds, _ = project(model, "y", ["x"], feeds, rng, 1e-6)
    if op not in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1"):
        shapes.infer(back)
        project(back, "x.grad", ["x"], feeds, rng, 1e-4)


@pytest.mark.parametrize(("op", "sign"), [("ReduceMax", 1), ("ReduceMin", -1)])
def test_ties_share_evenly(op: str, sign: float) -> None:
    x = sign * np.array([[2.0, 2.0, 1.0], [3.0, 3.0, 3.0]])
    (got,) = vjp(Case(op, [x, np.array([1])], const=[1]))
    np.testing.assert_allclose(got, [[0.5, 0.5, 0], [1 / 3] * 3])


@pytest.mark.parametrize("op", ["ReduceL1", "ReduceL2"])
def test_norms_at_zero(op: str) -> None:
    np.testing.assert_array_equal(vjp(Case(op, [np.zeros(3)])), [[0, 0, 0]])


def test_product_of_zeros() -> None:
    x = np.array([[0.0, 2, 3], [0, 0, 3]])
    (got,) = vjp(Case("ReduceProd", [x, np.array([1])], const=[1]))
    np.testing.assert_array_equal(got, [[6, 0, 0], [0, 0, 0]])
